"""Block sizes and tiles of the attention kernels per device: tuned/<device>.json, and a heuristic behind."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from kernels_pallas.attention.spec import LANES, Form, Tiles

# Device kinds as `jax.Device.device_kind` says them, to names of files.
DEVICES = {
    "TPU v4": "tpu_v4",
    "TPU v5 lite": "tpu_v5e",
    "TPU v5e": "tpu_v5e",
    "TPU v5": "tpu_v5p",
    "TPU v5p": "tpu_v5p",
    "TPU v6 lite": "tpu_v6e",
    "TPU v6e": "tpu_v6e",
    "TPU7x": "tpu_7x",
    "TPU v7x": "tpu_7x",
}
# The MXU is 128 wide up to v5 and 256 from v6 on: the tiles of one generation suit it throughout.
_RELATED = {"tpu_v4": "tpu_v5e", "tpu_v5p": "tpu_v5e", "tpu_7x": "tpu_v6e"}


class Tuning(NamedTuple):
    """Sizes of one call; tiles come in pairs, for blocks without and with a mask.

    Attributes:
        block: queries and keys per block where the caller does not say.
        forward: tiles of the forward kernel.
        online: tiles of the forward kernel where the softmax needs a running maximum.
        dq: tiles of the dq kernel.
        dkv: tiles of the dk, dv kernel.
    """

    block: int
    forward: tuple[Tiles, Tiles]
    online: tuple[Tiles, Tiles]
    dq: tuple[Tiles, Tiles]
    dkv: tuple[Tiles, Tiles]


_overrides: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("overrides", default=None)
_WHOLE = [[512, 512, 0, False]] * 2


@functools.cache
def _load(device: str) -> dict[str, Any] | None:
    file = tuned_file(device)
    return json.loads(file.read_text()) if file.is_file() else None


def tuned_file(device: str) -> Any:
    """Path of a device's table."""
    return importlib.resources.files("kernels_pallas.attention").joinpath("tuned", f"{device}.json")


@contextlib.contextmanager
def using(**fields: Any) -> Iterator[None]:
    """Replaces fields of the `Tuning` of every kernel traced inside (to measure a candidate)."""
    token = _overrides.set(fields)
    try:
        yield
    finally:
        _overrides.reset(token)


def lookup(device_kind: str | None, form: Form) -> Tuning:
    """Returns the sizes for a device kind (None or unknown: those of the latest generation)."""
    device = DEVICES.get(device_kind or "", "tpu_v6e")
    table = _load(device) or _load(_RELATED.get(device, "")) or {}
    entry = table.get(form, {})
    pairs = (tuple(Tiles(*tiles) for tiles in entry.get(name, _WHOLE)) for name in Tuning._fields[1:])
    tuned = Tuning(entry.get("block", 512), *pairs)
    return tuned._replace(**(_overrides.get() or {}))


def block_size(length: int, largest: int) -> int:
    """Cuts a length into equal blocks of at most `largest`, a multiple of the lanes, with as little padding as can be."""
    count = -(-length // largest)
    each = -(-length // count)
    return -(-each // LANES) * LANES

"""Which implementation of an op runs, and why.

Every op has a table of implementations in order of preference. An implementation may refuse a call with a reason. With
`implementation=None` the first one that accepts runs and the reasons of the others are recorded; a named implementation
never falls back: it raises NotImplementedError with its reason while the call is traced.

    dispatch.register("sigmoid_attention", "pallas", "my_kernels.sigmoid:IMPLEMENTATION", platforms=("tpu",))

The platform is that of `dispatch.target(...)` if set, else of the mesh in force (`jax.set_mesh`), else JAX's default.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from attnlab.errors import ConfigError, nearest

PLATFORMS = ("cpu", "gpu", "tpu")


class Implementation(NamedTuple):
    """One way to compute an op; all three functions take the op's (canonical) arguments.

    Attributes:
        run: computes the result.
        refuse: returns why the call cannot be computed, or None.
        defer: returns why another implementation would serve better, or None; counts only when none was named.
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda *args, **kwargs: None
    defer: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What `explain` returns: the implementation that runs and why the others before it do not."""

    op: str
    platform: str
    device_kind: str | None
    chosen: str
    reasons: dict[str, str]
    named: bool = False

    def __str__(self) -> str:
        where = self.platform if self.device_kind is None else f"{self.platform} ({self.device_kind})"
        why = "named by the caller" if self.named else "first that accepts the call"
        lines = [f"{self.op} on {where}: {self.chosen} ({why})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


class _Entry(NamedTuple):
    target: Implementation | str
    platforms: tuple[str, ...]


_tables: dict[str, dict[str, _Entry]] = {}
_target: contextvars.ContextVar[tuple[str, str | None] | None] = contextvars.ContextVar("target", default=None)
_portable: contextvars.ContextVar[bool] = contextvars.ContextVar("portable", default=False)
_interpret: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)
_record: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar("record", default=None)


def register(
    op: str,
    name: str,
    target: Implementation | str,
    *,
    platforms: tuple[str, ...] = PLATFORMS,
    before: str | None = None,
) -> None:
    """Adds an implementation to the table of an op, or replaces the one of that name.

    Args:
        op: name of the op, for example "sigmoid_attention".
        name: what users write as `implementation=`.
        target: the implementation, or "module:symbol" of it, imported when a call on its platform considers it.
        platforms: where it runs, of "cpu", "gpu", "tpu".
        before: name of the entry that it goes in front of; the default is the end of the table.
    """
    table = dict(_tables.get(op, {}))
    entry = _Entry(target, tuple(platforms))
    if name in table or before is None:
        table[name] = entry
    else:
        items = list(table.items())
        at = [known for known, _ in items].index(before)
        table = dict([*items[:at], (name, entry), *items[at:]])
    _tables[op] = table


def implementations(op: str) -> dict[str, tuple[str, ...]]:
    """Returns the names of an op's implementations in order of preference, each with its platforms."""
    return {name: entry.platforms for name, entry in _table(op).items()}


@contextlib.contextmanager
def target(platform: str, device_kind: str | None = None) -> Iterator[None]:
    """Traces for another platform than the present one, as when compiling ahead of time.

    Args:
        platform: "cpu", "gpu" or "tpu".
        device_kind: as `jax.Device.device_kind` says it, for example "TPU v5 lite".
    """
    if platform not in PLATFORMS:
        raise ConfigError(f"unknown platform {platform!r}: {nearest(platform, PLATFORMS)}")
    token = _target.set((platform, device_kind))
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Ops choose among the implementations that run on every platform, unless one is named: no kernels, nothing opaque.

    For what reads the traced program, such as counting its FLOPs.
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def is_portable() -> bool:
    """Tells whether the present trace is in `portable`."""
    return _portable.get()


def target_platform() -> str:
    """Returns the platform that the present trace is for: "cpu", "gpu" or "tpu"."""
    return _where()[0]


def target_device_kind() -> str | None:
    """Returns the device kind that the present trace is for, None where it is not known."""
    return _where()[1]


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Lets a named Pallas kernel run in Pallas' interpreter on a platform that is not its own (for tests)."""
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpreting() -> bool:
    """True inside `interpreted()`: kernels pass it on as `interpret=`."""
    return _interpret.get()


@contextlib.contextmanager
def record() -> Iterator[list[Decision]]:
    """Collects the decisions of every call traced inside, in order."""
    decisions: list[Decision] = []
    token = _record.set(decisions)
    try:
        yield decisions
    finally:
        _record.reset(token)


def call(op: str, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """Runs an op through its table.

    Raises:
        NotImplementedError: the named implementation refuses the call, or every one does; the message has the reasons.
        ConfigError: there is no implementation of that name.
    """
    decision, chosen = _choose(op, implementation, args, kwargs)
    collector = _record.get()
    if collector is not None:
        collector.append(decision)
    return chosen.run(*args, **kwargs)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Decision:
    """Says which implementation a call would run on the target platform, and why the others do not; computes nothing.

    Args:
        op: an op of `attnlab.ops`, or its name.
        *args: its array arguments, arrays or `jax.ShapeDtypeStruct`.
        **kwargs: its keyword arguments, the same.

    Returns:
        The `Decision`; `print` it.
    """
    if isinstance(op, str):
        from attnlab import ops

        if not hasattr(ops, op):
            raise ConfigError(f"unknown op {op!r}: {nearest(op, _tables)}")
        op = getattr(ops, op)
    arrays = {name: value for name, value in kwargs.items() if hasattr(value, "shape") and hasattr(value, "dtype")}
    static = {name: value for name, value in kwargs.items() if name not in arrays}
    with record() as decisions:
        jax.eval_shape(lambda *a, **k: op(*a, **k, **static), *args, **arrays)
    return decisions[0]


def _where() -> tuple[str, str | None]:
    forced = _target.get()
    if forced is not None:
        return forced
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is not None:
        return device.platform, device.device_kind
    platform = jax.default_backend()
    return platform, jax.local_devices()[0].device_kind


def _table(op: str) -> dict[str, _Entry]:
    if op not in _tables:
        raise ConfigError(f"unknown op {op!r}: {nearest(op, _tables)}")
    return _tables[op]


def _choose(op: str, implementation: str | None, args: tuple, kwargs: dict) -> tuple[Decision, Implementation]:
    table = _table(op)
    platform, device_kind = _where()
    if implementation is not None and implementation not in table:
        raise ConfigError(f"unknown implementation {implementation!r} of {op}: {nearest(implementation, table)}")
    reasons: dict[str, str] = {}
    for name, entry in table.items() if implementation is None else [(implementation, table[implementation])]:
        named = implementation is not None
        candidate, reason = _resolve(entry, platform, named)
        if candidate is not None:
            reason = candidate.refuse(*args, **kwargs)
            if reason is None and not named:
                reason = candidate.defer(*args, **kwargs)
            if reason is None:
                return Decision(op, platform, device_kind, name, reasons, named), candidate
        reasons[name] = reason
    if implementation is not None:
        raise NotImplementedError(f"{op} with implementation={implementation!r}: {reasons[implementation]}")
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no implementation of {op} on {platform} accepts this call: {listed}")


def _resolve(entry: _Entry, platform: str, named: bool) -> tuple[Implementation | None, str]:
    """Returns the implementation behind an entry, or None and the reason why it is out of question here."""
    if platform not in entry.platforms and not (named and interpreting()):
        return None, f"runs on {' and '.join(entry.platforms)}, and this is {platform}"
    if _portable.get() and not named and set(entry.platforms) != set(PLATFORMS):
        return None, f"runs on {' and '.join(entry.platforms)} only, and what runs everywhere is asked for"
    if not isinstance(entry.target, str):
        return entry.target, ""
    module, _, symbol = entry.target.partition(":")
    try:
        return getattr(importlib.import_module(module), symbol), ""
    except ImportError as error:
        return None, f"cannot be imported: {error}"

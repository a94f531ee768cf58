"""Tile sizes of the Triton kernels: a rule by pass, type and head width, chosen so that registers do not spill on Hopper."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

Pass = Literal["forward", "dq", "dkv"]
SMALLEST = 16  # of a tensor core's operand


class Tile(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        block_m: queries per tile.
        block_n: keys per tile.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# by pass: (largest padded head width, tile), for 16-bit inputs
_NARROW: dict[Pass, list[tuple[int, Tile]]] = {
    "forward": [(64, Tile(128, 128, 8, 3)), (128, Tile(128, 128, 8, 2)), (256, Tile(128, 32, 8, 2))],
    "dq": [(64, Tile(128, 64, 8, 3)), (128, Tile(128, 64, 8, 2)), (256, Tile(64, 32, 8, 2))],
    "dkv": [(64, Tile(64, 128, 8, 3)), (128, Tile(64, 128, 8, 2)), (256, Tile(32, 32, 8, 1))],
}
# the same for GPUs with 99 KiB of shared memory per program
_NARROW_SMALL: dict[Pass, list[tuple[int, Tile]]] = {
    "forward": [(64, Tile(128, 64, 8, 2)), (128, Tile(64, 64, 4, 2)), (256, Tile(64, 32, 8, 1))],
    "dq": [(64, Tile(64, 64, 4, 2)), (128, Tile(64, 32, 4, 2)), (256, Tile(32, 32, 8, 1))],
    "dkv": [(64, Tile(64, 64, 4, 2)), (128, Tile(32, 64, 4, 2)), (256, Tile(32, 32, 8, 1))],
}
# float32 multiplies outside of the tensor cores, with its operands in registers
_WIDE: dict[Pass, list[tuple[int, Tile]]] = {
    "forward": [(64, Tile(64, 32, 8, 2)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 32, 8, 1))],
    "dq": [(64, Tile(32, 32, 8, 2)), (128, Tile(16, 16, 8, 1)), (256, Tile(16, 16, 8, 1))],
    "dkv": [(64, Tile(32, 32, 8, 2)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 8, 1))],
}
# Marketing names of GPUs whose programs get 99 KiB (compute capability 8.6, 8.9, 12.0); A100, H100 and B200 have more.
_SMALL = ("A10", "A40", "A16", "A2", "L4", "L40", "RTX")


def lookup(
    kind: Pass,
    dtype: Any,
    padded: int,
    device_kind: str | None,
    *,
    length: int,
    keys: int,
    block_q: int | None,
    block_kv: int | None,
) -> Tile:
    """Returns the sizes of a kernel.

    Args:
        kind: which kernel.
        dtype: of q, k and v.
        padded: head width as the kernel holds it.
        device_kind: as `jax.Device.device_kind` says it, None = a data centre GPU.
        length: T; short ones get small tiles.
        keys: S, alike.
        block_q: queries per block of a list: tiles divide it.
        block_kv: keys per block, alike.
    """
    small = any(word in _SMALL for word in (device_kind or "").split())
    table = (_WIDE if dtype == jnp.float32 else _NARROW_SMALL if small else _NARROW)[kind]
    tile = next(tile for width, tile in table if padded <= width)
    block_m = _fit(tile.block_m, length, block_q)
    block_n = _fit(tile.block_n, keys, block_kv)
    return tile._replace(block_m=block_m, block_n=block_n)


def padded_width(width: int) -> int:
    """Head width as the kernels hold it: a power of two, at least 16."""
    return max(1 << (width - 1).bit_length(), SMALLEST)


def _fit(largest: int, length: int, block: int | None) -> int:
    """A power of two up to `largest` that is not much longer than the length and divides the block."""
    size = min(largest, max(1 << (length - 1).bit_length(), SMALLEST))
    return size if block is None else min(size, block & -block)

"""Block sizes of the Triton scan kernels: a rule by kernel, type and state, chosen so that registers do not spill on Hopper."""

from __future__ import annotations

from typing import NamedTuple

SMALLEST = 16  # of a tensor core's operand


class Tile(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        block_k: key channels per step.
        block_v: value channels per step, or per program.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


def padded_rows(rows: int) -> int:
    """Key channels as the kernels hold them: a power of two, at least 16."""
    return max(1 << (rows - 1).bit_length(), SMALLEST)


def padded_width(width: int) -> int:
    """Value channels as the kernels hold them: a power of two up to 64, then a multiple of 64."""
    return padded_rows(width) if width <= 64 else -(-width // 64) * 64


def lookup(kernel: str, *, rows: int, width: int, channel: bool, exact: bool) -> Tile:
    """Returns the sizes of a kernel.

    Args:
        kernel: its name without `_kernel`.
        rows: padded Hk.
        width: padded Hv.
        channel: decays are per key channel.
        exact: products in float32.
    """
    block_k, block_v, warps, stages = 64, 64, 4, 2
    if exact:
        block_k, block_v, warps, stages = 32, 32, 4, 1
    if kernel in ("states", "state_gradients"):  # these hold Hk x block_v of the state
        block_v = 64 if rows <= 128 else 32
        if exact:
            block_v, warps = 32 if rows <= 64 else 16, 4
    if kernel in ("prepare", "token_gradients"):  # and these several [C, C] or [C, block_k]
        warps = 8
    if kernel == "prepare":  # a loop of one step is none: the compiler then keeps what is loaded for the second pass over keys
        block_k = min(block_k, max(rows // 2, SMALLEST))
    if kernel == "token_gradients" and channel:
        block_k = 32
    return Tile(min(block_k, rows), min(block_v, width), warps, stages)

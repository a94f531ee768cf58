"""Lists of key blocks per query block: the form in which sparse families say which keys a query sees.

`block_index` is int32 [B, G, T/bq, J]: for batch row, head group (G = 1: all heads, K: one list per key/value head, N: one per
query head) and query block the numbers of up to J key blocks, -1 = none, each at most once and in any order. Causal
order and the other masks still apply inside the listed blocks. The last block of a ragged length is shorter.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import ConfigError
from attnlab.types import Array, Bool, Int


class BlockIndex(NamedTuple):
    """A block list with the sizes of its blocks.

    Attributes:
        index: [B, G, T/bq, J] int32.
        block_q: queries per block.
        block_kv: keys per block.
    """

    index: Array
    block_q: int
    block_kv: int


def check(blocks: BlockIndex, *, batch: int, length: int, keys: int, heads: int, kv_heads: int) -> None:
    """Checks a block list against the call that it is for; the numbers themselves where they are known while tracing.

    Raises:
        ConfigError: wrong type, shape or range, or a block listed twice for one query block.
    """
    index, block_q, block_kv = blocks
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if not isinstance(block, int) or block < 1:
            raise ConfigError(f"{name} = {block!r}: not a block size. Give a positive int.")
    if not jnp.issubdtype(index.dtype, jnp.signedinteger):
        raise ConfigError(f"block_index has type {index.dtype}: it needs signed integers. Cast it to int32.")
    rows, columns = -(-length // block_q), -(-keys // block_kv)
    groups = sorted({1, kv_heads, heads})
    fits = index.ndim == 4 and index.shape[0] == batch and index.shape[1] in groups and index.shape[2] == rows
    if not fits or index.shape[3] < 1:
        wanted = f"[{batch}, {' or '.join(map(str, groups))}, {rows}, J]"
        raise ConfigError(
            f"block_index has shape {tuple(index.shape)}: T = {length} in blocks of {block_q} needs {wanted}. "
            "Build it with attnlab.ops.select."
        )
    if isinstance(index, jax.core.Tracer):
        return
    known = np.asarray(index)
    if known.size and (known.min() < -1 or known.max() >= columns):
        wrong = known.min() if known.min() < -1 else known.max()
        raise ConfigError(
            f"block_index holds {wrong}: S = {keys} in blocks of {block_kv} has blocks 0 to {columns - 1}. "
            "Use -1 for an unused entry."
        )
    ordered = np.sort(known, axis=-1)
    if np.any((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)):
        raise ConfigError("block_index lists a key block twice for one query block. List every block once.")


def transpose(index: Int[Array, "B G R J"], kv_blocks: int, width: int | None = None) -> Int[Array, "B G C W"]:
    """Turns lists of key blocks per query block into lists of query blocks per key block, on the device.

    Args:
        index: block lists, -1 = none.
        kv_blocks: number of key blocks C.
        width: entries W per key block; the default R is always enough (a query block lists a key block once). Entries
            beyond it are dropped.

    Returns:
        int32, query blocks in increasing order, then -1.
    """
    batch, groups, rows, _ = index.shape
    width = rows if width is None else width
    listed = membership(index, kv_blocks)  # [B, G, R, C]
    place = jnp.cumsum(listed, axis=2) - 1
    place = jnp.where(listed & (place < width), place, width)  # `width` = dropped
    out = jnp.full((batch, groups, kv_blocks, width + 1), -1, jnp.int32)
    b, g, r, c = jnp.ogrid[:batch, :groups, :rows, :kv_blocks]
    return out.at[b, g, c, place].set(jnp.broadcast_to(r, listed.shape).astype(jnp.int32))[..., :width]


def membership(index: Int[Array, "B G R J"], kv_blocks: int) -> Bool[Array, "B G R C"]:
    """Tells for every query block and key block whether the key block is listed."""
    there = index[..., None] == jnp.arange(kv_blocks, dtype=index.dtype)
    return there.any(axis=-2)


def to_mask(blocks: BlockIndex, length: int, keys: int, heads: int) -> Bool[Array, "B N T S"]:
    """The dense mask that a block list stands for (True = listed), for references and pictures."""
    listed = membership(blocks.index, -(-keys // blocks.block_kv))
    dense = jnp.repeat(jnp.repeat(listed, blocks.block_q, axis=2), blocks.block_kv, axis=3)[:, :, :length, :keys]
    return jnp.repeat(dense, heads // dense.shape[1], axis=1)

"""Lists of tiles for the Triton kernels, made on the device by XLA: what a tile visits, and which of it without a mask.

Block lists, segment ids and explicit positions all end up here: the kernel only walks. Tiles that cannot hold a visible
pair are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import schedule
from kernels_pallas.attention_triton.tuning import Tile


class Lists(NamedTuple):
    """Lists of one kernel; b = 1 or B, G = 1, K or N lists per batch row.

    Attributes:
        entries: [b, G, E] int32, numbers of tiles.
        ends: [b, G, tiles, 3] int32: the wholly visible ones of a tile are entries [0] to [1], the partly visible [1] to [2].
    """

    entries: jax.Array
    ends: jax.Array


def build(
    tile: Tile,
    length: int,
    keys: int,
    window: tuple[int | None, int | None],
    *,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    block_index: jax.Array | None,
    block_q: int | None,
    block_kv: int | None,
    transposed: bool,
) -> Lists:
    """Builds the lists of the forward and dq kernels, or (transposed) those of the dk, dv kernel.

    Args:
        tile: sizes of the kernel.
        length: T.
        keys: S.
        window: canonical (left, right), right = 0 when causal.
        q_positions: [b, T] int32, or None.
        kv_positions: [b, S] int32, negative = empty.
        q_segments: [B, T] int32, or None.
        kv_segments: [B, S] int32, `schedule.NO_SEGMENT` = padding.
        block_index: [B, G, ceil(T / block_q), J] int32, -1 = none; None = all pairs.
        block_q: queries per block of the list, a multiple of the tile's.
        block_kv: keys per block, alike.
        transposed: lists of query tiles per key tile.
    """
    rows, columns = -(-length // tile.block_m), -(-keys // tile.block_n)
    q, kv = _ranges(tile, length, keys, q_positions, kv_positions, q_segments, kv_segments)
    if block_index is None:
        index = jnp.asarray(np.arange(columns, dtype=np.int32))[None, None, None]
        index = jnp.broadcast_to(index, (1, 1, rows, columns))
    else:
        parts_q, parts_kv = block_q // tile.block_m, block_kv // tile.block_n
        index = block_index[..., None] * parts_kv + jnp.arange(parts_kv, dtype=jnp.int32)
        index = jnp.where(block_index[..., None] < 0, -1, index).reshape(*block_index.shape[:-1], -1)
        index = jnp.repeat(index, parts_q, axis=2)[:, :, :rows]
    batch, groups, _, width = index.shape
    flat = index.reshape(batch, groups, rows * width).astype(jnp.int32)
    there = (flat >= 0) & (flat < columns)
    kv_index = jnp.where(there, flat, 0)
    q_index = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), width)
    many = max(batch, q.low.shape[0], kv.low.shape[0], 1 if q.segment_low is None else q.segment_low.shape[0])
    kv_index = jnp.broadcast_to(kv_index, (many, *kv_index.shape[1:]))
    kind = schedule.classify(q, kv, q_index, kv_index, window)
    kind = jnp.where(there, kind, schedule.SKIP)
    kind = jnp.broadcast_to(kind, (many, groups, rows * width))
    partial = (kind == schedule.PARTIAL).astype(jnp.int32)
    if transposed:
        q_index = jnp.broadcast_to(q_index, kind.shape)
        return _sorted(kv_index * 2 + partial, kind, q_index, columns)
    kv_index = jnp.broadcast_to(kv_index, kind.shape)
    return _sorted(q_index * 2 + partial, kind, kv_index, rows)


def _sorted(key: jax.Array, kind: jax.Array, entries: jax.Array, tiles: int) -> Lists:
    """Sorts entries by 2 x tile + partial; skipped ones go to the end, where no tile looks."""
    key = jnp.where(kind == schedule.SKIP, 2 * tiles, key)
    key, entries = jax.lax.sort((key, entries), dimension=-1, is_stable=True, num_keys=1)
    edges = jnp.arange(2 * tiles + 1, dtype=jnp.int32)
    found = jax.vmap(jax.vmap(lambda row: jnp.searchsorted(row, edges).astype(jnp.int32)))(key)
    ends = jnp.stack([found[..., 0:-1:2], found[..., 1::2], found[..., 2::2]], axis=-1)
    return Lists(entries, ends)


def _ranges(
    tile: Tile,
    length: int,
    keys: int,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
) -> tuple[schedule.Ranges, schedule.Ranges]:
    """Ranges of positions and segments of the query tiles and the key tiles."""
    if q_positions is not None:
        q = schedule.position_ranges(_pad(q_positions, tile.block_m, None), tile.block_m, empty=False)
        kv = schedule.position_ranges(_pad(kv_positions, tile.block_n, -1), tile.block_n, empty=True)
    else:
        q = schedule.index_ranges(length, tile.block_m, keys - length, mask_tail=False)
        kv = schedule.index_ranges(keys, tile.block_n, 0, mask_tail=True)
    if q_segments is not None:
        q = schedule.with_segments(q, _pad(q_segments, tile.block_m, None), tile.block_m)
        kv = schedule.with_segments(kv, _pad(kv_segments, tile.block_n, schedule.NO_SEGMENT), tile.block_n)
    return q, kv


def _pad(x: jax.Array, block: int, value: int | None) -> jax.Array:
    """[b, L] padded to whole blocks with a value or (None) with its last element."""
    widths = ((0, 0), (0, -x.shape[1] % block))
    return jnp.pad(x, widths, mode="edge") if value is None else jnp.pad(x, widths, constant_values=value)

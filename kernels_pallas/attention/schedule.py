"""Which pairs of a query block and a key block a kernel visits, in which order, and with what mask.

A kernel walks a flat list of pairs, so that a causal or windowed call spends no grid step on a hidden block and a block
list costs exactly its entries. One int32 describes a step:

    bits 0-13   block of the side that streams (keys in the forward and dq kernels, queries in the dk, dv kernel)
    bits 14-27  block of the side that stays (whose result accumulates)
    bits 28-29  kind: SKIP, PARTIAL (some pairs hidden: apply the masks) or FULL (no mask needed)
    bit 30      first step of the block that stays: reset the accumulators
    bit 31      last step of it: write the result

Skipped steps repeat the last streamed block, so that nothing is fetched for them. The lists of static calls are numpy
constants; segment ids, explicit positions and block lists give lists that XLA computes on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SKIP, PARTIAL, FULL = 0, 1, 2
INDEX_BITS = 14
MAX_BLOCKS = 1 << INDEX_BITS
_INDEX_MASK = MAX_BLOCKS - 1
# A segment id that no query carries; padding keys get it.
NO_SEGMENT = -(2**31)


class Ranges(NamedTuple):
    """Smallest and largest position and segment id of every block of one side, each [b, blocks], b = 1 or B.

    Attributes:
        low: smallest position (of the keys that are not empty).
        high: largest position; below `low` where a block has no key at all.
        complete: False where a block holds a key that must be masked (empty slot or padding).
        segment_low: smallest segment id, or None.
        segment_high: largest segment id, or None.
    """

    low: Any
    high: Any
    complete: Any
    segment_low: Any = None
    segment_high: Any = None


def index_ranges(length: int, block: int, offset: int, mask_tail: bool) -> Ranges:
    """Ranges of a side whose element i stands at position i + offset.

    Args:
        length: elements before padding.
        block: elements per block.
        offset: position of element 0.
        mask_tail: whether padding elements must be masked.
    """
    start = np.arange(0, length, block)
    stop = np.minimum(start + block, length)
    complete = (stop - start == block) | (not mask_tail)
    return Ranges((start + offset)[None], (stop - 1 + offset)[None], complete[None])


def position_ranges(positions: jax.Array, block: int, *, empty: bool) -> Ranges:
    """Ranges from explicit positions [b, padded length]; with `empty`, negative ones stand for absent keys."""
    blocks = positions.reshape(positions.shape[0], -1, block)
    if not empty:
        low, high = blocks.min(-1), blocks.max(-1)
        return Ranges(low, high, jnp.ones_like(low, dtype=bool))
    low = jnp.where(blocks < 0, np.iinfo(np.int32).max // 2, blocks).min(-1)
    return Ranges(low, blocks.max(-1), (blocks >= 0).all(-1))


def with_segments(ranges: Ranges, segment_ids: jax.Array, block: int) -> Ranges:
    """Adds the ranges of segment ids [B, padded length]."""
    blocks = segment_ids.reshape(segment_ids.shape[0], -1, block)
    return ranges._replace(segment_low=blocks.min(-1), segment_high=blocks.max(-1))


def _take(values: Any, index: Any) -> Any:
    """values [b, blocks] at index [L] or [B, G, L] -> [b, 1, L] or [B, G, L]."""
    if isinstance(values, np.ndarray) and isinstance(index, np.ndarray):
        return values[:, None, index]
    values, index = jnp.asarray(values), jnp.asarray(index)
    if index.ndim == 1:
        return values[:, None, index]
    values = jnp.broadcast_to(values, (index.shape[0], values.shape[1]))
    return jnp.take_along_axis(values[:, None, :], index, axis=-1)


def classify(q: Ranges, kv: Ranges, q_index: Any, kv_index: Any, window: tuple[int | None, int | None]) -> Any:
    """Returns the kind of every pair; arrays of numpy stay numpy.

    Args:
        q: ranges of the query blocks.
        kv: ranges of the key blocks.
        q_index: [L] or [B, G, L] int32.
        kv_index: [L] or [B, G, L] int32.
        window: canonical (left, right), right = 0 when causal.

    Returns:
        int32 [b, G or 1, L].
    """
    left, right = window
    q_low, q_high = _take(q.low, q_index), _take(q.high, q_index)
    kv_low, kv_high = _take(kv.low, kv_index), _take(kv.high, kv_index)
    seen = (kv_high >= kv_low) & (q_high >= q_low)
    full = _take(kv.complete, kv_index) & (q_high >= q_low)
    if right is not None:
        seen = seen & (kv_low <= q_high + right)
        full = full & (kv_high <= q_low + right)
    if left is not None:
        seen = seen & (kv_high >= q_low - left)
        full = full & (kv_low >= q_high - left)
    if q.segment_low is not None:
        q_first, q_last = _take(q.segment_low, q_index), _take(q.segment_high, q_index)
        kv_first, kv_last = _take(kv.segment_low, kv_index), _take(kv.segment_high, kv_index)
        seen = seen & (kv_first <= q_last) & (kv_last >= q_first)
        full = full & (q_first == q_last) & (kv_first == kv_last) & (q_first == kv_first)
    xp = np if isinstance(seen, np.ndarray) else jnp
    return xp.where(seen, xp.where(full, FULL, PARTIAL), SKIP).astype(np.int32)


def dense(q: Ranges, kv: Ranges, window: tuple[int | None, int | None], *, transposed: bool) -> Any:
    """The steps of a call without a block list, packed, int32 [b, 1, L].

    Args:
        q: ranges of the query blocks.
        kv: ranges of the key blocks.
        window: canonical (left, right).
        transposed: walk by key blocks (for dk, dv) in place of query blocks.
    """
    q_blocks, kv_blocks = q.low.shape[1], kv.low.shape[1]
    q_index = np.repeat(np.arange(q_blocks, dtype=np.int32), kv_blocks)
    kv_index = np.tile(np.arange(kv_blocks, dtype=np.int32), q_blocks)
    if isinstance(q.low, np.ndarray) and isinstance(kv.low, np.ndarray):
        # Pairs that the positions alone hide are dropped here, whatever the segments say later.
        plain = classify(
            q._replace(segment_low=None, segment_high=None),
            kv._replace(segment_low=None, segment_high=None),
            q_index,
            kv_index,
            window,
        )
        keep = plain[0, 0] != SKIP
        stays, blocks = (kv_index, kv_blocks) if transposed else (q_index, q_blocks)
        visited = np.zeros(blocks, dtype=bool)
        visited[stays[keep]] = True
        # A block without any pair still has to write its zeros: its first pair stays, as a skipped step.
        _, first_pair = np.unique(stays, return_index=True)
        keep[first_pair[~visited]] = True
        q_index, kv_index = q_index[keep], kv_index[keep]
    if transposed:
        order = np.argsort(kv_index, kind="stable")
        q_index, kv_index = q_index[order], kv_index[order]
    kind = classify(q, kv, q_index, kv_index, window)
    return pack(kv_index, q_index, kind) if transposed else pack(q_index, kv_index, kind)


def listed(
    block_index: jax.Array, q: Ranges, kv: Ranges, window: tuple[int | None, int | None], *, transposed: bool
) -> jax.Array:
    """The steps of a call with block lists, packed, int32 [B, G, L].

    Args:
        block_index: [B, G, T/bq, J] int32, -1 = none.
        q: ranges of the query blocks.
        kv: ranges of the key blocks.
        window: canonical (left, right).
        transposed: walk by key blocks: the pairs sorted by key block, L = T/bq * J + S/bkv, since every key block has
            one more step that only makes sure that its gradient is written.
    """
    batch, groups, q_blocks, width = block_index.shape
    kv_blocks = kv.low.shape[1]
    flat = block_index.reshape(batch, groups, q_blocks * width).astype(jnp.int32)
    there = (flat >= 0) & (flat < kv_blocks)
    kv_index = jnp.where(there, flat, 0)
    q_index = np.repeat(np.arange(q_blocks, dtype=np.int32), width)
    kind = jnp.where(there, classify(q, kv, q_index, kv_index, window), SKIP)
    if not transposed:
        return pack(q_index, kv_index, kind)
    q_index = jnp.broadcast_to(q_index, kind.shape)
    every = jnp.broadcast_to(jnp.arange(kv_blocks, dtype=jnp.int32), (batch, groups, kv_blocks))
    # Skipped pairs go to the end, where they repeat the last block.
    major = jnp.concatenate([every, jnp.where(kind == SKIP, kv_blocks, kv_index)], axis=-1)
    minor = jnp.concatenate([jnp.zeros_like(every), q_index], axis=-1)
    kind = jnp.concatenate([jnp.full_like(every, SKIP), kind], axis=-1)
    order = jnp.argsort(major, axis=-1, stable=True)
    major, minor, kind = (jnp.take_along_axis(x, order, axis=-1) for x in (major, minor, kind))
    return pack(jnp.minimum(major, kv_blocks - 1), minor, kind)


def pack(stays: Any, streams: Any, kind: Any) -> Any:
    """Packs the steps: blocks that stay and stream, [L] or [B, G, L], and kinds [b, G or 1, L]; see the module's text."""
    if all(isinstance(x, np.ndarray) for x in (stays, streams, kind)):
        xp, cummax = np, np.maximum.accumulate
    else:
        xp, cummax = jnp, lambda x, axis: jax.lax.cummax(x, axis=axis % x.ndim)
    shape = np.broadcast_shapes(np.shape(stays), np.shape(streams), np.shape(kind))
    stays, streams, kind = (xp.broadcast_to(xp.asarray(x, dtype=np.int32), shape) for x in (stays, streams, kind))
    steps = xp.arange(shape[-1], dtype=np.int32)
    latest = cummax(xp.where(kind != SKIP, steps, -1), axis=-1)
    ahead = xp.argmax(kind != SKIP, axis=-1).astype(np.int32)[..., None]  # before the first visit: its block already
    streams = xp.take_along_axis(streams, xp.where(latest < 0, ahead, latest), axis=-1)
    change = stays[..., 1:] != stays[..., :-1]
    edge = xp.ones_like(change[..., :1]) if shape[-1] > 1 else xp.ones(shape, dtype=bool)
    first = xp.concatenate([edge, change], axis=-1) if shape[-1] > 1 else edge
    last = xp.concatenate([change, edge], axis=-1) if shape[-1] > 1 else edge
    packed = streams | (stays << INDEX_BITS) | (kind << 28) | (first.astype(np.int32) << 30)
    return xp.where(last, packed | np.int32(-(2**31)), packed).astype(np.int32)


def streams(step: Any) -> Any:
    """Block of the side that streams."""
    return step & _INDEX_MASK


def stays(step: Any) -> Any:
    """Block of the side that stays."""
    return (step >> INDEX_BITS) & _INDEX_MASK


def kind(step: Any) -> Any:
    """SKIP, PARTIAL or FULL."""
    return (step >> 28) & 3


def is_first(step: Any) -> Any:
    """First step of the block that stays."""
    return ((step >> 30) & 1) == 1


def is_last(step: Any) -> Any:
    """Last step of the block that stays."""
    return step < 0

"""Dense attention by query chunks: the values and gradients of the reference without its [T, S] scores.

Queries are cut into bands with a static range of keys each, so that keys which the causal order hides cost nothing; a
band is scanned chunk by chunk, and each chunk is recomputed in the backward pass. Inside a window of both sides a chunk
looks only at the keys that the window can reach.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.ops import dispatch, sharding
from attnlab.ops.attention import AttentionCall, attend
from attnlab.types import Array

# Query bands of a causal call: with 8, a sixteenth of the hidden half is computed in vain.
_BANDS = 8
_CHUNK_BYTES = 64 * 2**20
# Scores beyond which the chunked form takes over: on a CPU it is then faster (1.4 times at T = 2048 and four heads, twice inside
# a window of 256, with gradients); elsewhere only memory counts.
_SCORE_BYTES = {"cpu": 32 * 2**20}
_SCORE_BYTES_ELSEWHERE = 256 * 2**20


def chunk_length(call: AttentionCall) -> int:
    """Returns how many queries to take at a time: a multiple of 128, at most 1024, for 64 MiB of scores per device."""
    length, keys = call.lengths
    shards = sharding.shard_count("batch") * sharding.shard_count("heads")
    per_query = max(4 * call.q.shape[0] * call.q.shape[2] * keys // shards, 1)
    chunk = min(max(_CHUNK_BYTES // per_query // 128 * 128, 128), 1024)
    return min(chunk, length)


def attend_chunked(call: AttentionCall, chunk: int | None = None) -> Array:
    """Attention with [chunk, S] scores in memory; returns [B, T, N, H] in the type of q.

    Dropout draws differ from those of the reference: every chunk has a key of its own.

    Args:
        call: the call.
        chunk: queries at a time; the default is `chunk_length(call)`.
    """
    length, keys = call.lengths
    chunk = chunk_length(call) if chunk is None else min(chunk, length)
    left, right = call.window
    by_index = call.q_positions is None
    # Keys are carried in float32: the backward scan adds a chunk's gradient to theirs in that type.
    wide = dataclasses.replace(call, k=call.k.astype(jnp.float32), v=call.v.astype(jnp.float32))
    if not by_index or right is None:
        return _band(wide, 0, length, keys, chunk)
    if left is not None and chunk + left + right < keys:
        return _band(wide, 0, length, keys, chunk, span=chunk + left + right)
    size = -(-length // (_BANDS * chunk)) * chunk
    bands = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        last = min(max(stop - 1 + keys - length + right + 1, 1), keys)
        bands.append(_band(wide, start, stop, last, chunk))
    return bands[0] if len(bands) == 1 else jnp.concatenate(bands, axis=1)


def _band(wide: AttentionCall, start: int, stop: int, last: int, chunk: int, span: int | None = None) -> Array:
    """Queries start..stop against the keys before `last`, or `span` keys around each chunk, a chunk at a time."""
    dtype = wide.q.dtype
    length = stop - start
    chunk = min(chunk, length)
    count = -(-length // chunk)
    padding = count * chunk - length
    left, _ = wide.window
    q_positions, kv_positions = wide.positions()
    total, keys = wide.lengths

    def queries(x: Array | None, axis: int = 1) -> Array | None:
        """Rows start..stop of the query axis as [count, ..., chunk, ...]."""
        if x is None or x.shape[axis] == 1 != total:
            return None
        x = jax.lax.slice_in_dim(x, start, stop, axis=axis)
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def one(carry: None, inputs: tuple) -> tuple[None, Array]:
        index, q, positions, segments, mask, dense_bias = inputs
        offset, width = 0, last
        if span is not None:
            at = start + index * chunk + (keys - total) - left  # leftmost key in reach of the chunk
            offset, width = jnp.clip(at, 0, keys - span), span

        def near(x: Array | None, axis: int = 1) -> Array | None:
            if x is None or x.shape[axis] == 1 != keys:
                return x
            if isinstance(offset, int):
                return jax.lax.slice_in_dim(x, offset, offset + width, axis=axis)
            return jax.lax.dynamic_slice_in_dim(x, offset, width, axis=axis)

        part = dataclasses.replace(
            wide,
            q=q,
            k=near(wide.k).astype(dtype),
            v=near(wide.v).astype(dtype),
            q_positions=positions,
            kv_positions=near(kv_positions),
            q_segment_ids=segments,
            kv_segment_ids=near(wide.kv_segment_ids),
            kv_mask=near(wide.kv_mask),
            mask=near(wide.mask if mask is None else mask, 3),
            dense_bias=near(wide.dense_bias if dense_bias is None else dense_bias, 3),
            dropout_key=None if wide.dropout_key is None else jax.random.fold_in(wide.dropout_key, start + index),
        )
        return carry, attend(part)

    inputs = (
        jnp.arange(count),
        queries(wide.q),
        queries(q_positions),
        queries(wide.q_segment_ids),
        queries(wide.mask, 2) if wide.mask is not None else None,
        queries(wide.dense_bias, 2) if wide.dense_bias is not None else None,
    )
    _, out = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, inputs)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], count * chunk, *out.shape[3:])[:, :length]


def score_reason(call: AttentionCall) -> str | None:
    """Returns why the chunked form serves better than the reference (many scores), or None."""
    length, keys = call.lengths
    batch, heads = call.q.shape[0], call.q.shape[2]
    shards = sharding.shard_count("batch") * sharding.shard_count("heads") * sharding.shard_count("sequence")
    size = 4 * batch * heads * length * keys // shards
    limit = _SCORE_BYTES.get(dispatch.target_platform(), _SCORE_BYTES_ELSEWHERE)
    if size > limit and length > 256:
        return f"its scores would take {size / 2**20:.0f} MiB per device, more than {limit >> 20}"
    return None

"""Softmax attention on TPU through JAX's own splash attention kernel.

Sequences are padded to whole blocks: padded keys are hidden by segment ids, padded queries cut off. The kernel does not
scale: queries are scaled before, in their own type.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnlab.ops import dispatch, masks, sharding
from attnlab.ops.attention import AttentionCall
from attnlab.ops.softmax import plain_reason
from attnlab.types import Array

_LANES = 128
_BLOCK = 512


def attend_splash(call: AttentionCall) -> Array:
    """Computes the call by splash attention; returns [B, T, N, H] in the type of q."""
    length, keys = call.lengths
    block_q, block_kv = block_length(length), block_length(keys)
    pad_q, pad_kv = -length % block_q, -keys % block_kv
    q = (call.q.astype(jnp.float32) * call.scale).astype(call.q.dtype)
    k, v = sharding.repeat_kv_heads(call.k, call.v, call.q.shape[2])
    q_segments, kv_segments = _segments(call, pad_q, pad_kv)
    padded = (_pad(q, pad_q), _pad(k, pad_kv), _pad(v, pad_kv), q_segments, kv_segments)
    local = functools.partial(_local, length=length, keys=keys, window=call.window, blocks=(block_q, block_kv))
    out = sharding.shard_over_mesh(local, padded, ("BTNH", "BSKH", "BSKH", "BT", "BS"), "BTNH")[:, :length]
    if call.kv_mask is not None:
        alive = masks.rows_with_keys(length, call.kv_mask, call.window)
        out = jnp.where(alive[:, :, None, None], out, 0)
    return out


def block_length(length: int) -> int:
    """Returns the block along a sequence: all of it in whole lanes if short, else the block that pads least."""
    lanes = -(-length // _LANES) * _LANES
    return lanes if lanes <= _BLOCK else min((_BLOCK, 384, 256), key=lambda block: (-length % block, -block))


def refuse(call: AttentionCall) -> str | None:
    """Returns why splash attention cannot do the call, or None."""
    length, keys = call.lengths
    _, right = call.window
    reason = plain_reason(call, "splash attention", segments=True, padding=True)
    if reason is not None:
        return reason
    if right is not None and right + keys < length:
        return "queries before the first key would see none, which splash attention does not know: it needs T <= S"
    if call.q_segment_ids is not None and not call.self_segments:
        return "segment ids of keys that are not the queries' may leave a query without a key"
    if call.q_segment_ids is not None and call.kv_mask is not None:
        return "segment ids together with a padding mask may leave a query without a key; give padding a segment"
    return sharding.sequence_reason()


def defer(call: AttentionCall) -> str | None:
    """Returns why XLA serves better, or None."""
    if call.q.dtype == jnp.float32:
        return "float32 inputs would multiply in the MXU's bfloat16 passes; name it to have that"
    if call.lengths[0] < _LANES:
        return f"fewer than {_LANES} queries do not fill a block"
    return None


def _segments(call: AttentionCall, pad_q: int, pad_kv: int) -> tuple[Array | None, Array | None]:
    """Returns segment ids [B, T'] and [B, S'] that hide padding (keys -1, queries take part), or None and None."""
    length, keys = call.lengths
    _, right = call.window
    hidden_by_order = right is not None and right == 0  # the last query stands at the last key
    if call.q_segment_ids is None and call.kv_mask is None and (not pad_kv or hidden_by_order):
        return None, None
    batch = call.q.shape[0]
    q_ids, kv_ids = call.q_segment_ids, call.kv_segment_ids
    if q_ids is None:
        q_ids, kv_ids = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, keys), jnp.int32)
    if call.kv_mask is not None:
        kv_ids = jnp.where(call.kv_mask, kv_ids, -1)
    q_ids = jnp.pad(q_ids.astype(jnp.int32), ((0, 0), (0, pad_q)))
    return q_ids, jnp.pad(kv_ids.astype(jnp.int32), ((0, 0), (0, pad_kv)), constant_values=-1)


def _local(q, k, v, q_segments, kv_segments, *, length, keys, window, blocks):
    """The kernel over one device's rows and heads, [b, T', n, H] with T' in whole blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    shape, offset = (q.shape[1], k.shape[1]), keys - length
    if window == (None, None):
        mask = splash_mask.FullMask(shape)
    elif window == (None, 0):
        mask = splash_mask.CausalMask(shape, offset)
    else:
        mask = splash_mask.LocalMask(shape, window, offset)
    block_q, block_kv = blocks
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kernel = splash.make_splash_mha(
        mask=splash_mask.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=dispatch.interpreting(),
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if q_segments is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(lambda *x: kernel(*x[:3], splash.SegmentIds(*x[3:])))(q, k, v, q_segments, kv_segments)
    return jnp.swapaxes(out, 1, 2)


def _pad(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x


IMPLEMENTATION = dispatch.Implementation(attend_splash, refuse, defer)

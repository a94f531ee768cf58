"""Attention over listed key blocks: every query block visits only the key blocks that its list names.

The lists come from `ops.select` or from any rule of a family; see `ops.block_index` for their form. On TPU a Pallas kernel
walks them; elsewhere XLA gathers the listed blocks, so that the others cost nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from attnlab.ops import dispatch
from attnlab.ops.attention import MASKED, AttentionCall, attend, make_call
from attnlab.ops.block_index import BlockIndex, check, to_mask
from attnlab.types import Array, Bool, Float, Int, Window

# Bytes of scores that the gather form holds at a time: what stays in a CPU's cache, and what fills an accelerator.
_CHUNK_BYTES = {"cpu": 2 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 32 * 2**20


def block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_index: Int[Array, "B G R J"],
    *,
    block_q: int,
    block_kv: int,
    normalization: Literal["softmax", "sigmoid"] = "softmax",
    causal: bool = False,
    window: Window = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "#B T"] | None = None,
    kv_positions: Int[Array, "#B S"] | None = None,
    kv_mask: Bool[Array, "B S"] | None = None,
    alibi_slopes: Float[Array, "#B N"] | Float[Array, " N"] | None = None,
    scale: float | None = None,
    bias: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax or sigmoid attention in which query block r sees only the key blocks `block_index[b, g, r]`.

    A query without any visible key gets zeros. Gradients flow to q, k and v of listed blocks; the list is a constant. The
    arguments that are not named here are those of `softmax_attention`.

    Args:
        q: queries; head n attends with key/value head n // (N // K).
        k: keys.
        v: values.
        block_index: numbers of key blocks, -1 = none; G = 1, K or N lists per batch row, R = ceil(T / block_q).
        block_q: queries per block (the kernel needs a multiple of 128).
        block_kv: keys per block (alike).
        normalization: "softmax" over the visible keys of the listed blocks, or "sigmoid" of every score.
        causal: hide keys after the query, inside the listed blocks too.
        window: keys seen (left, right) of the query.
        q_segment_ids: attention stays inside equal segments.
        kv_segment_ids: of the keys.
        q_positions: override the default order.
        kv_positions: the same of the keys; negative = empty.
        kv_mask: False = padding key.
        alibi_slopes: adds -slope * distance; constants.
        scale: of the products, default H^-1/2.
        bias: constant of all scores (sigmoid).
        implementation: "pallas", "triton", "xla" (gathers the listed blocks) or "xla_dense" (the reference: a mask); None takes the
            best that can.

    Returns:
        Attended values in the type of q.

    Raises:
        ConfigError: a list of the wrong type, shape or range, naming it; shapes that do not fit.
        NotImplementedError: the named implementation cannot do this call.
    """
    call = make_call(
        q,
        k,
        v,
        normalization=normalization,
        causal=causal,
        window=window,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        kv_mask=kv_mask,
        alibi_slopes=None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes),
        scale=scale,
        bias=bias,
        q_positions=q_positions,
        kv_positions=kv_positions,
    )
    blocks = BlockIndex(block_index, block_q, block_kv)
    length, keys = call.lengths
    check(blocks, batch=q.shape[0], length=length, keys=keys, heads=q.shape[2], kv_heads=k.shape[2])
    return dispatch.call("block_attention", implementation, call, blocks)


def attend_listed(call: AttentionCall, blocks: BlockIndex, chunk: int | None = None) -> Array:
    """Gathers the listed key blocks of some query blocks at a time; unlisted blocks cost neither time nor memory.

    Args:
        call: the call.
        blocks: its block list.
        chunk: query blocks at a time; the default holds 2 MiB of scores on a CPU, 32 MiB elsewhere.
    """
    index, block_q, block_kv = blocks
    batch, length, heads, width = call.q.shape
    keys, kv_heads = call.k.shape[1:3]
    groups = index.shape[1]
    rows, listed = index.shape[2:]
    # One gathered set of keys per key/value head, or per query head where every query head has its own list.
    sets = heads if groups == heads else kv_heads
    if chunk is None:
        held = _CHUNK_BYTES.get(dispatch.target_platform(), _CHUNK_BYTES_ELSEWHERE)
        chunk = max(held // (4 * batch * heads * block_q * listed * block_kv), 1)
    chunk = min(chunk, rows)
    count = -(-rows // chunk)

    def blocked(x: Array, block: int, value: int | bool = 0) -> Array:
        """[b, L, ...] to [b, blocks, block, ...]."""
        padding = [(0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, [(0, 0), *padding], constant_values=value)
        return x.reshape(x.shape[0], -1, block, *x.shape[2:])

    def by_chunk(x: Array, value: int = 0) -> Array:
        """[b, R, ...] to [count, b, chunk, ...]."""
        x = jnp.pad(x, [(0, 0), (0, count * chunk - rows), *[(0, 0)] * (x.ndim - 2)], constant_values=value)
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    k, v = (jnp.moveaxis(blocked(x, block_kv), 3, 1) for x in (call.k, call.v))  # [B, K, C, bkv, H]
    member = jnp.arange(sets) // (sets // kv_heads)
    q = blocked(call.q, block_q).reshape(batch, rows, block_q, sets, heads // sets, width)
    q_positions, kv_positions = call.positions()
    alive = blocked(jnp.ones((1, keys), bool) if call.kv_mask is None else call.kv_mask, block_kv, False)
    kv_side = {"positions": blocked(kv_positions, block_kv), "alive": alive}
    q_side = {"positions": by_chunk(blocked(q_positions, block_q))}
    if call.q_segment_ids is not None:
        kv_side["segments"] = blocked(call.kv_segment_ids, block_kv)
        q_side["segments"] = by_chunk(blocked(call.q_segment_ids, block_q))
    index = jnp.moveaxis(jnp.where(index < 0, -1, index), 1, 2)  # [B, R, G, J]
    inputs = (by_chunk(q), by_chunk(index, -1), q_side)

    def one(inputs: tuple, k: Array, v: Array) -> Array:
        q, index, q_side = inputs
        index = jnp.moveaxis(index, 2, 1)  # [B, G, chunk, J]
        there = index >= 0
        safe = jnp.where(there, index, 0)
        per_set = jnp.broadcast_to(safe, (batch, sets, *safe.shape[2:])) if groups in (1, sets) else safe
        near_k, near_v = (
            x[jnp.arange(batch)[:, None, None, None], member[:, None, None], per_set].reshape(
                batch, sets, chunk, listed * block_kv, width
            )
            for x in (k, v)
        )

        def near(x: Array) -> Array:
            """[b, C, bkv] to [B, G, chunk, 1, J * bkv]."""
            rows = jnp.arange(batch)[:, None, None, None] if x.shape[0] > 1 else 0
            return x[rows, safe].reshape(batch, groups, chunk, 1, listed * block_kv)

        def here(x: Array) -> Array:
            """[b, chunk, bq] to [b, 1, chunk, bq, 1]."""
            return x[:, None, :, :, None]

        q_at, kv_at = here(q_side["positions"]), near(kv_side["positions"])
        left, right = call.window
        mask = near(kv_side["alive"]) & jnp.repeat(there, block_kv, axis=-1)[:, :, :, None, :]
        if right is not None:
            mask = mask & (kv_at <= q_at + right)
        if left is not None:
            mask = mask & (kv_at >= q_at - left)
        if call.empty_slots:
            mask = mask & (kv_at >= 0)
        if "segments" in q_side:
            mask = mask & (here(q_side["segments"]) == near(kv_side["segments"]))
        scores = jnp.einsum(
            "bctsgh,bscuh->bscgtu", q, near_k, precision=_precision(call), preferred_element_type=jnp.float32
        )
        scores = scores * call.scale + call.bias
        mask = mask[:, :, :, None]  # [B, G, chunk, 1, bq or 1, J * bkv]
        if call.alibi_slopes is not None:
            away = q_at - kv_at
            away = jnp.maximum(away, 0) if call.causal else jnp.abs(away)
            slopes = jnp.broadcast_to(call.alibi_slopes, (batch, heads)).reshape(batch, sets, 1, heads // sets, 1, 1)
            scores = scores - slopes * away[:, :, :, None].astype(jnp.float32)
        if call.normalization == "sigmoid":
            weights = jnp.where(mask, jax.nn.sigmoid(scores), 0.0)
            norm = None
        else:
            scores = jnp.where(mask, scores, MASKED)
            largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.exp(scores - largest)
            norm = jnp.where(largest > 0.5 * MASKED, 1.0 / jnp.sum(weights, axis=-1, keepdims=True), 0.0)
        out = jnp.einsum(
            "bscgtu,bscuh->bscgth",
            weights.astype(near_v.dtype),
            near_v,
            precision=_precision(call),
            preferred_element_type=jnp.float32,
        )
        out = out if norm is None else out * norm
        return jnp.transpose(out.astype(call.q.dtype), (0, 2, 4, 1, 3, 5))  # [B, chunk, bq, sets, heads/sets, H]

    one = jax.checkpoint(one, prevent_cse=False)
    out = jax.lax.scan(lambda _, x: (None, one(x, k, v)), None, inputs)[1]
    out = jnp.moveaxis(out, 0, 1).reshape(batch, count * chunk * block_q, heads, width)
    return out[:, :length]


def attend_masked(call: AttentionCall, blocks: BlockIndex) -> Array:
    """The reference: dense attention under the mask that the list stands for."""
    length, keys = call.lengths
    mask = to_mask(blocks, length, keys, call.q.shape[2])
    return attend(dataclasses.replace(call, mask=mask))


def _precision(call: AttentionCall) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if call.q.dtype == jnp.float32 else None


dispatch.register(
    "block_attention", "pallas", "kernels_pallas.attention.implementation:IMPLEMENTATION", platforms=("tpu",)
)
dispatch.register("block_attention", "triton", "kernels_pallas.attention_triton.implementation:IMPLEMENTATION", platforms=("gpu",))
dispatch.register("block_attention", "xla", dispatch.Implementation(attend_listed))
dispatch.register("block_attention", "xla_dense", dispatch.Implementation(attend_masked))

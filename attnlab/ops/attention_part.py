"""Attention over a part of the keys, and its gradient given the statistics of all of them: what a ring is made of.

The XLA form, a chunk of queries at a time; `kernels_pallas.attention.part` is the TPU's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.ops import dispatch
from attnlab.ops.alibi import alibi_bias
from attnlab.ops.attention import MASKED, AttentionCall, precision_of, scores_and_mask
from attnlab.ops.chunked import chunk_length
from attnlab.types import Array, Float


def attend_part(call: AttentionCall) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
    """Attends to the keys of the call.

    Args:
        call: with explicit positions; no dropout.

    Returns:
        The result in float32 (softmax: normalised over these keys, zeros where a query sees none of them) and the
        log-sum-exp of the scores (softmax; -infinity where there are none), else None.
    """

    def one(inputs: dict[str, Array]) -> tuple[Array, Array | None]:
        part = dataclasses.replace(call, **inputs)
        scores, mask = scores_and_mask(part)
        if call.normalization == "sigmoid":
            weights, norm, lse = jax.nn.sigmoid(scores), None, None
            weights = weights if mask is None else jnp.where(mask, weights, 0.0)
        else:
            scores = scores if mask is None else jnp.where(mask, scores, MASKED)
            largest = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            some = largest > 0.5 * MASKED
            norm = jnp.where(some, 1.0 / total, 0.0)
            lse = jnp.where(some, largest + jnp.log(total), -jnp.inf)
            lse = lse.reshape(lse.shape[0], -1, lse.shape[3])
        out = _product("bkgts,bskh->bkgth", weights.astype(call.v.dtype), call.v, call)
        out = out if norm is None else out * norm
        return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(part.q.shape), lse

    out, lse = jax.lax.map(one, _query_chunks(call))
    length = call.lengths[0]
    return _joined(out, 1)[:, :length], None if lse is None else _joined(lse, 2)[:, :, :length]


def attend_part_gradient(
    call: AttentionCall,
    cotangent: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"] | None,
    delta: Float[Array, "B N T"] | None,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients that flow through the keys of the call.

    Args:
        call: as in `attend_part`.
        cotangent: of the whole result.
        lse: log-sum-exp over all keys, -infinity where a query sees none (softmax; else None).
        delta: the sum over H of result times cotangent (softmax; else None).

    Returns:
        Those of q, k, v and of the slopes (None without ALiBi), in float32.
    """
    batch, _, heads, _ = call.q.shape
    kv_heads = call.k.shape[2]
    grouped = (batch, kv_heads, heads // kv_heads)
    rows = {"cotangent": (cotangent.astype(call.v.dtype), 1)}
    if lse is not None:
        rows |= {"lse": (jnp.where(lse == -jnp.inf, jnp.inf, lse), 2), "delta": (delta, 2)}

    def one(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        dk, dv, dslopes = carry
        queries, statistics = inputs
        part = dataclasses.replace(call, **queries)
        chunk = part.q.shape[1]
        do = statistics["cotangent"].reshape(batch, chunk, *grouped[1:], -1)
        scores, mask = scores_and_mask(part)
        upstream = _product("btkgh,bskh->bkgts", do, call.v, call)
        if lse is None:
            weights = jax.nn.sigmoid(scores)
            weights = weights if mask is None else jnp.where(mask, weights, 0.0)
            gradient = weights * (1.0 - weights) * upstream
        else:
            of_rows = (statistics[name].reshape(*grouped, chunk, 1) for name in ("lse", "delta"))
            whole, mean = of_rows
            weights = jnp.exp(scores - whole)
            weights = weights if mask is None else jnp.where(mask, weights, 0.0)
            gradient = weights * (upstream - mean)
        dv = dv + _product("bkgts,btkgh->bskh", weights.astype(do.dtype), do, call)
        narrow = gradient.astype(call.k.dtype)
        q = part.q.reshape(batch, chunk, *grouped[1:], -1)
        dk = dk + _product("bkgts,btkgh->bskh", narrow, q, call) * call.scale
        dq = _product("bkgts,bskh->btkgh", narrow, call.k, call) * call.scale
        if dslopes is not None:
            wanted = (part.q_positions, call.kv_positions)
            pullback = jax.vjp(lambda slopes: alibi_bias(slopes, *wanted, causal=call.causal), call.alibi_slopes)[1]
            whole_batch = gradient.reshape(batch, heads, *gradient.shape[3:])
            dslopes = dslopes + pullback(_summed_to(whole_batch, wanted, call.alibi_slopes))[0]
        return (dk, dv, dslopes), dq.reshape(part.q.shape)

    zeros = [None if x is None else jnp.zeros(x.shape, jnp.float32) for x in (call.k, call.v, call.alibi_slopes)]
    inputs = (_query_chunks(call), _query_chunks(call, rows))
    (dk, dv, dslopes), dq = jax.lax.scan(one, tuple(zeros), inputs)
    return _joined(dq, 1)[:, : call.lengths[0]], dk, dv, dslopes


def _query_chunks(call: AttentionCall, rows: dict[str, tuple[Array, int]] | None = None) -> dict[str, Array]:
    """Cuts arrays along their query axis (default: those of the call) to [count, ..., chunk, ...]."""
    length = call.lengths[0]
    chunk = chunk_length(call)
    count = -(-length // chunk)
    if rows is None:
        rows = {name: (getattr(call, name), 1) for name in ("q", "q_positions", "q_segment_ids")}

    def cut(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, count * chunk - length if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :]), axis, 0)

    return {name: cut(x, axis) for name, (x, axis) in rows.items() if x is not None}


def _joined(x: Array, axis: int) -> Array:
    """[count, ..., chunk, ...] back to [..., count * chunk, ...], the rows at `axis`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _summed_to(gradient: Array, positions: tuple[Array, Array], slopes: Array) -> Array:
    """Sums [B, N, T, S] over the batch where neither positions nor slopes have one."""
    batch = max(slopes.shape[0], *(x.shape[0] for x in positions))
    return gradient if batch == gradient.shape[0] else gradient.sum(0, keepdims=True)


def _product(equation: str, x: Array, y: Array, call: AttentionCall) -> Array:
    return jnp.einsum(equation, x, y, precision=precision_of(call), preferred_element_type=jnp.float32)


dispatch.register("attention_part", "pallas", "kernels_pallas.attention.part:FORWARD", platforms=("tpu",))
dispatch.register("attention_part", "xla", dispatch.Implementation(attend_part))
dispatch.register("attention_part_gradient", "pallas", "kernels_pallas.attention.part:GRADIENT", platforms=("tpu",))
dispatch.register("attention_part_gradient", "xla", dispatch.Implementation(attend_part_gradient))

"""Exact top-k attention: every query attends to its k best keys, with memory linear in the length.

Key chunks are streamed past some queries at a time; a running list keeps the k best scores of every query with their key
numbers. The softmax runs over the kept scores, the kept values are gathered. The choice is made once, in float32: the
backward pass uses the stored key numbers and weights, so recomputation cannot flip it, and gradients reach kept keys only.
"Memory-efficient Transformers via Top-k Attention" (Gupta et al., 2021, arXiv 2106.06899).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import ConfigError
from attnlab.ops import dispatch, masks, sharding
from attnlab.ops.alibi import alibi_bias
from attnlab.ops.attention import MASKED, AttentionCall, attend, make_call
from attnlab.types import Array, Bool, Float, Int, Window

# Bytes of scores, or of gathered keys, that a step holds per device.
_CHUNK_BYTES = 32 * 2**20
_KEYS_AT_A_TIME = 1024
_MOST_QUERIES = 512


class Chunks(NamedTuple):
    """How the stream is cut.

    Attributes:
        queries: at a time.
        keys: at a time, while the best are searched.
    """

    queries: int
    keys: int


def topk_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    top_k: int,
    causal: bool = False,
    window: Window = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "#B T"] | None = None,
    kv_positions: Int[Array, "#B S"] | None = None,
    kv_mask: Bool[Array, "B S"] | None = None,
    alibi_slopes: Float[Array, "#B N"] | Float[Array, " N"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of every query (and query head) over its `top_k` visible keys with the highest scores.

    Equal scores go to the lower key number. A query that sees fewer keys than `top_k` attends to those, one that sees none gets
    zeros. The choice is a constant: gradients flow to q and to the k and v that were kept. The arguments that are not
    named here are those of `softmax_attention`.

    Args:
        q: queries; head n attends with key/value head n // (N // K).
        k: keys.
        v: values.
        top_k: keys per query, 1 to S.
        causal: hide keys after the query.
        window: keys seen (left, right) of the query.
        q_segment_ids: attention stays inside equal segments.
        kv_segment_ids: of the keys.
        q_positions: override the default order.
        kv_positions: the same of the keys; negative = empty.
        kv_mask: False = padding key.
        alibi_slopes: adds -slope * distance before the choice; constants.
        scale: of the products, default H^-1/2.
        implementation: "xla" (streams) or "xla_dense" (the reference: all scores and a mask); None takes the best that can.

    Returns:
        Attended values in the type of q.

    Raises:
        ConfigError: `top_k` outside of 1 to S, or shapes that do not fit.
        NotImplementedError: the named implementation cannot do this call.
    """
    keys = k.shape[1]
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or not 1 <= top_k <= keys:
        raise ConfigError(f"top_k = {top_k!r}: there are S = {keys} keys. Give an int between 1 and {keys}.")
    call = make_call(
        q,
        k,
        v,
        normalization="softmax",
        causal=causal,
        window=window,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_positions=q_positions,
        kv_positions=kv_positions,
        kv_mask=kv_mask,
        alibi_slopes=None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes),
        scale=scale,
    )
    return dispatch.call("topk_attention", implementation, call, int(top_k))


def attend_topk(call: AttentionCall, top_k: int, chunks: Chunks | None = None) -> Array:
    """Streams: [chunk, S] scores are never whole in memory, and no [T, S] array is.

    Args:
        call: the call.
        top_k: keys per query.
        chunks: how to cut; the default holds 32 MiB at a time.
    """
    batch, length, heads, width = call.q.shape
    keys = call.lengths[1]
    if chunks is None:
        shards = sharding.shard_count("batch") * sharding.shard_count("heads")
        some = min(_KEYS_AT_A_TIME, keys)
        per_query = 4 * max(batch * heads // shards, 1) * max(some + 2 * top_k, top_k * width)
        queries = min(max(_CHUNK_BYTES // per_query, 16), _MOST_QUERIES, length)
        chunks = Chunks(queries, some)
    side = dataclasses.replace(call, q=None, k=None, v=None)
    spec = _Spec(top_k, chunks, length, keys)
    return _stream(spec, call.q, call.k, call.v, side)


def attend_topk_masked(call: AttentionCall, top_k: int) -> Array:
    """The reference: all scores, their top-k, and dense attention under the mask that it stands for."""
    choice, kept = choose(call, top_k)
    shape = (*choice.shape[:3], call.lengths[1])
    b, n, t, _ = jnp.ogrid[: shape[0], : shape[1], : shape[2], :1]
    # keys that were not kept are sent behind the end, where they are dropped
    mask = jnp.zeros(shape, bool).at[b, n, t, jnp.where(kept, choice, shape[3])].set(True, mode="drop")
    return attend(dataclasses.replace(call, mask=mask))


def choose(call: AttentionCall, top_k: int) -> tuple[Int[Array, "B N T k"], Bool[Array, "B N T k"]]:
    """The keys of every query by the reference, best first, and which of these entries are visible keys at all."""
    q, k = jax.lax.stop_gradient((call.q, call.k))
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    rows = jnp.moveaxis(q, 1, 2).reshape(batch, kv_heads, heads // kv_heads, length, width)
    q_positions, kv_positions = call.positions()
    scores = _scores(call, rows, k, q_positions, kv_positions, call.q_segment_ids, call.kv_segment_ids, call.kv_mask)
    best, choice = jax.lax.top_k(scores, top_k)
    shape = (batch, heads, length, top_k)
    return choice.reshape(shape), (best > 0.5 * MASKED).reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What is static of a stream: k, the chunks, T and S."""

    top_k: int
    chunks: Chunks
    length: int
    keys: int

    @property
    def count(self) -> int:
        """Chunks of queries."""
        return -(-self.length // self.chunks.queries)


def _scores(
    call: AttentionCall,
    q: Array,
    k: Array,
    q_positions: Array,
    kv_positions: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    kv_mask: Array | None,
) -> Array:
    """Masked float32 scores [B, K, G, t, s] of queries [B, K, G, t, H] and keys [B, s, K, H]."""
    scores = jnp.einsum("bkgth,bskh->bkgts", q, k, precision=_precision(q), preferred_element_type=jnp.float32)
    scores = scores * call.scale
    if call.alibi_slopes is not None:
        bias = alibi_bias(call.alibi_slopes, q_positions, kv_positions, causal=call.causal)
        scores = scores + bias.reshape(bias.shape[0], *scores.shape[1:3], *bias.shape[2:])
    mask = masks.block_mask(
        q_positions,
        kv_positions,
        call.window,
        empty_slots=call.empty_slots,
        q_segment_ids=q_segments,
        kv_segment_ids=kv_segments,
        kv_mask=kv_mask,
    )
    return scores if mask is None else jnp.where(mask[:, None, None], scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stream(spec: _Spec, q: Array, k: Array, v: Array, side: AttentionCall) -> Array:
    return _forward(spec, q, k, v, side)[0]


def _forward(spec: _Spec, q: Array, k: Array, v: Array, side: AttentionCall) -> tuple[Array, tuple]:
    """Returns the result, and (choice, weights) of every query as [chunks, B, K, G, chunk, k]."""
    batch, _, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = (kv_heads, heads // kv_heads)
    size, some = spec.chunks
    padded = -(-spec.keys // some) * some

    def by_key(x: Array | None, value: Any) -> Array | None:
        if x is None:
            return None
        return jnp.pad(x, [(0, 0), (0, padded - spec.keys), *[(0, 0)] * (x.ndim - 2)], constant_values=value)

    call = dataclasses.replace(side, q=q, k=k, v=v)
    q_positions, kv_positions = call.positions()
    alive = side.kv_mask
    if alive is None and padded != spec.keys:
        alive = jnp.ones((1, spec.keys), bool)
    streams = (by_key(k, 0), by_key(kv_positions, -1), by_key(side.kv_segment_ids, 0), by_key(alive, False))

    def one(_: None, inputs: tuple) -> tuple[None, tuple]:
        number, q_rows, at, segments = inputs
        rows = jnp.moveaxis(q_rows, 1, 2).reshape(batch, *grouped, size, width)

        def visit(step: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            start = step * some
            near = [None if x is None else jax.lax.dynamic_slice_in_dim(x, start, some, axis=1) for x in streams]
            scores = _scores(side, rows, near[0], at, near[1], segments, near[2], near[3])
            names = jnp.broadcast_to(start + jnp.arange(some, dtype=jnp.int32), scores.shape)
            # earlier keys stand before later ones, and top_k takes the first of equals: ties go to the lower number
            scores = jnp.concatenate([best[0], scores], axis=-1)
            names = jnp.concatenate([best[1], names], axis=-1)
            top, place = jax.lax.top_k(scores, spec.top_k)
            return top, jnp.take_along_axis(names, place, axis=-1)

        shape = (batch, *grouped, size, spec.top_k)
        empty = (jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.int32))
        first, last = _reach(spec, side, number)
        top, choice = jax.lax.fori_loop(first, last, visit, empty)
        seen = top > 0.5 * MASKED
        weights = jnp.where(seen, jnp.exp(top - top[..., :1]), 0.0)
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1.0)
        choice = jnp.where(seen, choice, 0)
        values = _gather(v, choice)
        out = jnp.einsum("bkgtj,bkgtjh->bkgth", weights, values.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        out = jnp.moveaxis(out.reshape(batch, heads, size, width), 2, 1).astype(q.dtype)
        return None, (out, choice, weights)

    inputs = (jnp.arange(spec.count), *(_by_chunk(spec, x) for x in (q, q_positions, side.q_segment_ids)))
    _, (out, choice, weights) = jax.lax.scan(one, None, inputs)
    return _joined(spec, out), (choice, weights)


def _reach(spec: _Spec, side: AttentionCall, number: Array) -> tuple[Array | int, Array | int]:
    """First and last key chunk that the order lets a chunk of queries see."""
    size, some = spec.chunks
    count = -(-spec.keys // some)
    if side.q_positions is not None:
        return 0, count
    left, right = side.window
    at = number * size + (spec.keys - spec.length)
    first = 0 if left is None else jnp.clip((at - left) // some, 0, count)
    last = count if right is None else jnp.clip((at + size - 1 + right) // some + 1, 0, count)
    return first, last


def _stream_forward(spec: _Spec, q: Array, k: Array, v: Array, side: AttentionCall) -> tuple[Array, tuple]:
    out, kept = _forward(spec, q, k, v, side)
    return out, (q, k, v, side, *kept)


def _stream_backward(spec: _Spec, residuals: tuple, do: Array) -> tuple:
    q, k, v, side, choice, weights = residuals
    batch, _, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = (kv_heads, heads // kv_heads)
    size = spec.chunks.queries
    exact = jax.lax.Precision.HIGHEST

    def one(sums: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], Array]:
        dk, dv = sums
        q_rows, do_rows, choice, weights = inputs
        rows, cotangent = (
            jnp.moveaxis(x, 1, 2).reshape(batch, *grouped, size, width).astype(jnp.float32) for x in (q_rows, do_rows)
        )
        keys, values = (_gather(x, choice).astype(jnp.float32) for x in (k, v))
        dp = jnp.einsum("bkgth,bkgtjh->bkgtj", cotangent, values, precision=exact)
        ds = weights * (dp - jnp.sum(weights * dp, axis=-1, keepdims=True)) * side.scale
        dq = jnp.einsum("bkgtj,bkgtjh->bkgth", ds, keys, precision=exact)
        dk = _scatter(dk, choice, ds, rows)
        dv = _scatter(dv, choice, weights, cotangent)
        return (dk, dv), jnp.moveaxis(dq.reshape(batch, heads, size, width), 2, 1).astype(q.dtype)

    zeros = jnp.zeros((batch, kv_heads, spec.keys, width), jnp.float32)
    inputs = (_by_chunk(spec, q), _by_chunk(spec, do), choice, weights)
    (dk, dv), dq = jax.lax.scan(one, (zeros, zeros), inputs)
    dk, dv = (jnp.moveaxis(x, 1, 2).astype(k.dtype) for x in (dk, dv))
    return _joined(spec, dq), dk, dv, jax.tree.map(_no_gradient, side)


_stream.defvjp(_stream_forward, _stream_backward)


def _no_gradient(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _gather(x: Array, choice: Array) -> Array:
    """Rows of x [B, S, K, H] by key numbers [B, K, G, t, k], as [B, K, G, t, k, H]."""
    batch, kv_heads = x.shape[0], x.shape[2]
    b, h = jnp.ogrid[:batch, :kv_heads]
    at = (b[..., None, None, None], choice, h[..., None, None, None])
    return x.at[at].get(mode="promise_in_bounds")


def _scatter(total: Array, choice: Array, factors: Array, rows: Array) -> Array:
    """Adds factors [B, K, G, t, k] times rows [B, K, G, t, H] to total [B, K, S, H] at the chosen keys."""
    batch, kv_heads = total.shape[:2]
    width = rows.shape[-1]
    updates = (factors[..., None] * rows[..., None, :]).reshape(batch, kv_heads, -1, width)
    b, h = jnp.ogrid[:batch, :kv_heads]
    at = (b[..., None], h[..., None], choice.reshape(batch, kv_heads, -1))
    return total.at[at].add(updates, mode="promise_in_bounds")


def _by_chunk(spec: _Spec, x: Array | None) -> Array | None:
    """[b, T, ...] to [chunks, b, chunk, ...], padded with zeros."""
    if x is None:
        return None
    size = spec.chunks.queries
    x = jnp.pad(x, [(0, 0), (0, spec.count * size - spec.length), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], spec.count, size, *x.shape[2:]), 1, 0)


def _joined(spec: _Spec, x: Array) -> Array:
    """The way back, [chunks, b, chunk, ...] to [b, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], math.prod(x.shape[1:3]), *x.shape[3:])[:, : spec.length]


def _precision(q: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None


dispatch.register("topk_attention", "xla", dispatch.Implementation(attend_topk))
dispatch.register("topk_attention", "xla_dense", dispatch.Implementation(attend_topk_masked))

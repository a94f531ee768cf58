"""The shared core of dense attention: one described call, and its reference by XLA.

`AttentionCall` is what the implementations of `softmax_attention` and `sigmoid_attention` receive: arguments checked
and brought into one form. `attend` is the readable reference and holds [T, S] scores; `attend_chunked` (ops/chunked.py)
gives the same values and gradients without. Scores and statistics are float32; float32 inputs multiply with
`Precision.HIGHEST`, bfloat16 inputs multiply as they are and accumulate in float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops import masks
from attnlab.ops.alibi import alibi_bias
from attnlab.types import Array, Window

# Stands for -infinity where a difference of two scores must stay finite.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of dense attention in canonical form; a pytree of its arrays.

    Attributes:
        q: [B, T, N, H]; query head n attends with key/value head n // (N // K).
        k: [B, S, K, H].
        v: [B, S, K, H].
        q_positions: [1 or B, T] int32, or None = bottom-right aligned.
        kv_positions: [1 or B, S] int32, negative = empty, or None; given exactly when `q_positions` is.
        q_segment_ids: [B, T] int32, or None.
        kv_segment_ids: [B, S] int32, or None.
        kv_mask: [B, S] bool, False = padding, or None.
        mask: bool, four dimensions broadcastable to [B, N, T, S], or None.
        dense_bias: added to the scores, four dimensions broadcastable to [B, N, T, S], or None.
        alibi_slopes: [1 or B, N] float32, or None.
        dropout_key: random key where `dropout_rate` > 0.
        normalization: "softmax" or "sigmoid".
        causal: whether keys after the query are hidden.
        window: (left, right), None = no limit; right is 0 when causal.
        scale: factor of q k^T; a temperature is already inside (as it is in the slopes).
        bias: constant added to every visible score (sigmoid).
        dropout_rate: share of weights dropped.
        broadcast_dropout: one draw for all batch rows and heads.
        precision: of the products, or None for the rule above.
        empty_slots: key positions may be negative.
        self_segments: query and key segments are the same array, so every query sees a key.
    """

    q: Array
    k: Array
    v: Array
    q_positions: Array | None
    kv_positions: Array | None
    q_segment_ids: Array | None
    kv_segment_ids: Array | None
    kv_mask: Array | None
    mask: Array | None
    dense_bias: Array | None
    alibi_slopes: Array | None
    dropout_key: Array | None
    normalization: Literal["softmax", "sigmoid"] = dataclasses.field(metadata=_STATIC)
    causal: bool = dataclasses.field(metadata=_STATIC)
    window: tuple[int | None, int | None] = dataclasses.field(metadata=_STATIC)
    scale: float = dataclasses.field(metadata=_STATIC)
    bias: float = dataclasses.field(default=0.0, metadata=_STATIC)
    dropout_rate: float = dataclasses.field(default=0.0, metadata=_STATIC)
    broadcast_dropout: bool = dataclasses.field(default=True, metadata=_STATIC)
    precision: Any = dataclasses.field(default=None, metadata=_STATIC)
    empty_slots: bool = dataclasses.field(default=False, metadata=_STATIC)
    self_segments: bool = dataclasses.field(default=False, metadata=_STATIC)

    @property
    def lengths(self) -> tuple[int, int]:
        """Returns (T, S)."""
        return self.q.shape[1], self.k.shape[1]

    def positions(self) -> tuple[Array, Array]:
        """Returns positions of queries [1 or B, T] and keys [1 or B, S], the default ones where none were given."""
        if self.q_positions is not None:
            return self.q_positions, self.kv_positions
        length, keys = self.lengths
        return default_positions(length, keys)


def default_positions(length: int, keys: int) -> tuple[Array, Array]:
    """Returns bottom-right aligned positions [1, T] and [1, S]: query i stands at key i + S - T."""
    kv_positions = jnp.arange(keys, dtype=jnp.int32)[None]
    return jnp.arange(length, dtype=jnp.int32)[None] + (keys - length), kv_positions


def make_call(
    q: Array,
    k: Array,
    v: Array,
    *,
    normalization: Literal["softmax", "sigmoid"],
    causal: bool = False,
    window: Window = None,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    kv_mask: Array | None = None,
    mask: Array | None = None,
    alibi_slopes: Array | None = None,
    scale: float | None = None,
    bias: Array | float | None = None,
    temperature: float = 0.0,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = True,
    dtype: Any = None,
    precision: Any = None,
) -> AttentionCall:
    """Checks the arguments of an attention op and brings them into canonical form; see `AttentionCall`.

    Raises:
        ConfigError: shapes that do not fit each other, or dropout without a random key.
    """
    if dtype is not None:
        q, k, v = (x.astype(dtype) for x in (q, k, v))
    batch, length, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (batch, width):
        raise ConfigError(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: they need [B,T,N,H] and twice [B,S,K,H]."
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise ConfigError(f"q, k, v have types {q.dtype}, {k.dtype}, {v.dtype}: cast them to one, or pass dtype=.")
    if heads % kv_heads:
        raise ConfigError(f"{kv_heads} key/value heads do not divide {heads} query heads.")
    self_segments = length == keys and (kv_segment_ids is None or kv_segment_ids is q_segment_ids)
    if q_segment_ids is not None and kv_segment_ids is None:
        if length != keys:
            raise ConfigError(f"q_segment_ids without kv_segment_ids needs T == S, not {length} and {keys}.")
        kv_segment_ids = q_segment_ids
    elif q_segment_ids is None and kv_segment_ids is not None:
        raise ConfigError("kv_segment_ids without q_segment_ids. Pass both.")
    empty_slots = kv_positions is not None
    if q_positions is not None or kv_positions is not None:
        q_default, kv_default = default_positions(length, keys)
        q_positions = q_default if q_positions is None else q_positions
        kv_positions = kv_default if kv_positions is None else kv_positions
    dense_bias = None
    if bias is None:
        bias = 0.0
    elif not isinstance(bias, int | float):
        bias, dense_bias = 0.0, _four_dimensions(jnp.asarray(bias), (batch, heads, length, keys), "bias")
    if mask is not None:
        mask = _four_dimensions(mask, (batch, heads, length, keys), "mask")
    scale = width**-0.5 if scale is None else float(scale)
    if temperature:
        factor = math.exp(temperature)
        scale = scale * factor
        alibi_slopes = None if alibi_slopes is None else alibi_slopes * factor
    if alibi_slopes is not None:
        alibi_slopes = jnp.atleast_2d(alibi_slopes).astype(jnp.float32)
        if alibi_slopes.shape not in ((1, heads), (batch, heads)):
            raise ConfigError(f"alibi_slopes has shape {alibi_slopes.shape}: it needs [N] or [B, N], N = {heads}.")
    dropout_rate = 0.0 if deterministic else float(dropout_rate)
    if dropout_rate > 0.0 and dropout_rng is None:
        raise ConfigError("dropout_rate > 0 needs dropout_rng. Pass a random key, or deterministic=True.")
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        kv_mask=kv_mask,
        mask=mask,
        dense_bias=dense_bias,
        alibi_slopes=alibi_slopes,
        dropout_key=dropout_rng if dropout_rate > 0.0 else None,
        normalization=normalization,
        causal=causal,
        window=masks.canonical_window(window, causal),
        scale=scale,
        bias=float(bias),
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
        empty_slots=empty_slots,
        self_segments=self_segments,
    )


def attend(call: AttentionCall) -> Array:
    """The reference: attention with its [B, N, T, S] scores in memory; returns [B, T, N, H] in the type of q."""
    weights, norm = _weights(call)
    return _apply(call, weights, norm)


def attention_matrix(call: AttentionCall) -> Array:
    """Returns the weights of a call, [B, N, T, S] float32, zero where masked; without dropout."""
    weights, norm = _weights(dataclasses.replace(call, dropout_rate=0.0, dropout_key=None))
    weights = weights if norm is None else weights * norm
    batch, _, _, length, keys = weights.shape
    return weights.reshape(batch, -1, length, keys)


def scores_and_mask(call: AttentionCall) -> tuple[Array, Array | None]:
    """Returns float32 scores [B, K, G, T, S], biases added, and where they count (broadcastable; None = everywhere)."""
    batch, length, heads, width = call.q.shape
    kv_heads = call.k.shape[2]
    grouped = (batch, kv_heads, heads // kv_heads)
    # Heads before rows, so that both products have their natural order and no [T, S] array is ever transposed.
    q = jnp.transpose(call.q.reshape(batch, length, *grouped[1:], width), (0, 2, 3, 1, 4))
    scores = jnp.einsum("bkgth,bskh->bkgts", q, call.k, precision=precision_of(call), preferred_element_type=jnp.float32)
    if call.scale != 1.0:
        scores = scores * call.scale
    q_positions, kv_positions = call.positions()
    if call.alibi_slopes is not None:
        bias = alibi_bias(call.alibi_slopes, q_positions, kv_positions, causal=call.causal)
        scores = scores + _group(bias, grouped)
    if call.bias:
        scores = scores + call.bias
    if call.dense_bias is not None:
        scores = scores + _group(call.dense_bias.astype(jnp.float32), grouped)
    mask = masks.block_mask(
        q_positions,
        kv_positions,
        call.window,
        empty_slots=call.empty_slots,
        q_segment_ids=call.q_segment_ids,
        kv_segment_ids=call.kv_segment_ids,
        kv_mask=call.kv_mask,
    )
    mask = None if mask is None else mask[:, None, None]
    if call.mask is not None:
        dense = _group(call.mask, grouped)
        mask = dense if mask is None else mask & dense
    return scores, mask


def _weights(call: AttentionCall) -> tuple[Array, Array | None]:
    """Returns float32 weights [B, K, G, T, S], and the factor [B, K, G, T, 1] of their rows (softmax) or None."""
    scores, mask = scores_and_mask(call)
    if call.normalization == "sigmoid":
        weights, norm = jax.nn.sigmoid(scores), None
        weights = weights if mask is None else jnp.where(mask, weights, 0.0)
    else:
        scores = scores if mask is None else jnp.where(mask, scores, MASKED)
        largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        norm = 1.0 / jnp.sum(weights, axis=-1, keepdims=True)
        if mask is not None:  # a row without any key has all its scores equal: its weights are 1, its factor 0
            norm = jnp.where(largest > 0.5 * MASKED, norm, 0.0)
    return weights, norm


def _apply(call: AttentionCall, weights: Array, norm: Array | None) -> Array:
    """Multiplies the values with the weights; the row factor is applied to the smaller side, the result."""
    if call.dropout_rate > 0.0:
        shape = weights.shape if not call.broadcast_dropout else (1, 1, 1, *weights.shape[-2:])
        keep = jax.random.bernoulli(call.dropout_key, 1.0 - call.dropout_rate, shape)
        weights = jnp.where(keep, weights / (1.0 - call.dropout_rate), 0.0)
    out = jnp.einsum(
        "bkgts,bskh->bkgth",
        weights.astype(call.v.dtype),
        call.v,
        precision=precision_of(call),
        preferred_element_type=jnp.float32,
    )
    if norm is not None:
        out = out * norm
    out = jnp.transpose(out.astype(call.q.dtype), (0, 3, 1, 2, 4))
    return out.reshape(call.q.shape)


def precision_of(call: AttentionCall) -> Any:
    """Precision of the products of a call: as asked for, else full for float32 inputs."""
    if call.precision is not None:
        return call.precision
    return jax.lax.Precision.HIGHEST if call.q.dtype == jnp.float32 else None


def _four_dimensions(x: Array, shape: tuple[int, ...], name: str) -> Array:
    if x.ndim > 4 or any(have not in (1, want) for have, want in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ConfigError(f"{name} has shape {x.shape}: it does not broadcast to [B, N, T, S] = {list(shape)}.")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _group(x: Array, grouped: tuple[int, int, int]) -> Array:
    """[b, n, t, s] to [b, k, g, t, s], n = 1 or N."""
    heads = (1, 1) if x.shape[1] == 1 else grouped[1:]
    return x.reshape(x.shape[0], *heads, *x.shape[2:])

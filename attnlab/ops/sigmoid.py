"""Sigmoid attention: an element-wise sigmoid of the scores in place of the row softmax.

"Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (Ramapuram et al., 2024, arXiv 2409.04431).
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.ops.attention import attend, make_call
from attnlab.ops.chunked import attend_chunked, score_reason
from attnlab.types import Array, Bool, DTypeLike, Float, Int, PRNGKey, Window

RowNormalization = Literal["row", "sqrt_row"] | None


def sigmoid_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: Window = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "#B T"] | None = None,
    kv_positions: Int[Array, "#B S"] | None = None,
    kv_mask: Bool[Array, "B S"] | None = None,
    mask: Bool[Array, ...] | None = None,
    alibi_slopes: Float[Array, "#B N"] | Float[Array, " N"] | None = None,
    scale: float | None = None,
    bias: Float[Array, ...] | float | None = 0.0,
    temperature: float = 0.0,
    row_normalization: RowNormalization = None,
    implementation: str | None = None,
    dropout_rng: PRNGKey | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = True,
    dtype: DTypeLike | None = None,
    precision: Any = None,
) -> Float[Array, "B T N H"]:
    """sigmoid((scale q k^T + ALiBi) exp(temperature) + bias) v over the keys that each query may see (section 3).

    Rows do not compete and need not sum to one; with a bias of about -ln S a row starts with a total weight near one.
    A query that may see no key gets zeros. The arguments are those of `softmax_attention`, and:

    Args:
        q: queries; head n attends with key/value head n // (N // K).
        k: keys; K divides N (grouped queries).
        v: values.
        causal: hide keys after the query. Query i stands at key i + S - T unless positions are given.
        window: keys seen (left, right) of the query, inclusive; an int is both sides; None or -1 = no limit.
        q_segment_ids: attention stays inside equal segments (packed documents).
        kv_segment_ids: of the keys; default the queries' (T == S).
        q_positions: override the default order (also for ALiBi).
        kv_positions: the same of the keys; negative = empty slot, never seen.
        kv_mask: False = padding key.
        mask: True = visible; any further rule, broadcastable to [B, N, T, S] (XLA only).
        alibi_slopes: adds -slope * distance; the distance is max(p - j, 0) when causal, else |p - j|.
        scale: of the products, default H^-1/2.
        bias: constant of all scores, -ln(training length) in the paper; or an array broadcastable to [B, N, T, S] (XLA
            only). None = 0.
        temperature: a constant; scores and ALiBi are multiplied by its exponential, the bias is not.
        row_normalization: divides row i of the weights by i + 1 ("row") or its root ("sqrt_row"), i the query's
            position.
        implementation: "xla", "xla_chunked", "pallas", "triton" or "ring" (sequences split by the mesh); None
            takes the best that can (`ops.explain`).
        dropout_rng: key for the dropout of weights.
        dropout_rate: share of the weights dropped (XLA only).
        broadcast_dropout: one draw for all rows of the batch and heads.
        deterministic: no dropout.
        dtype: type to compute in, default that of the inputs.
        precision: of the products; default HIGHEST for float32 inputs.

    Returns:
        Attended values in the type of q.

    Raises:
        ConfigError: shapes that do not fit, an unknown implementation.
        NotImplementedError: the named implementation cannot do this call (with the reason).
    """
    call = make_call(
        q,
        k,
        v,
        normalization="sigmoid",
        causal=causal,
        window=window,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_positions=q_positions,
        kv_positions=kv_positions,
        kv_mask=kv_mask,
        mask=mask,
        alibi_slopes=alibi_slopes,
        scale=scale,
        bias=bias,
        temperature=temperature,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        deterministic=deterministic,
        dtype=dtype,
        precision=precision,
    )
    out = dispatch.call("sigmoid_attention", implementation, call)
    if row_normalization is None:
        return out
    # A factor of a whole row: it commutes with the product with v, so no implementation needs to know of it.
    factor = row_factor(call.positions()[0], row_normalization)[:, :, None, None]
    return (out.astype(jnp.float32) * factor).astype(out.dtype)


def row_factor(positions: Int[Array, "b T"], row_normalization: str) -> Float[Array, "b T"]:
    """Returns the factor of every query's weights, 1 / (i + 1) ("row") or its root ("sqrt_row") at position i."""
    rows = jnp.maximum(positions, 0).astype(jnp.float32) + 1.0
    if row_normalization == "row":
        return 1.0 / rows
    if row_normalization == "sqrt_row":
        return 1.0 / jnp.sqrt(rows)
    raise ConfigError(f"row_normalization = {row_normalization!r}: unknown. Use None, 'row' or 'sqrt_row'.")


dispatch.register(
    "sigmoid_attention", "pallas", "kernels_pallas.attention.implementation:IMPLEMENTATION", platforms=("tpu",)
)
dispatch.register("sigmoid_attention", "triton", "kernels_pallas.attention_triton.implementation:IMPLEMENTATION", platforms=("gpu",))
dispatch.register("sigmoid_attention", "ring", "attnlab.ops.ring:IMPLEMENTATION")
dispatch.register("sigmoid_attention", "xla", dispatch.Implementation(attend, defer=score_reason))
dispatch.register("sigmoid_attention", "xla_chunked", dispatch.Implementation(attend_chunked))

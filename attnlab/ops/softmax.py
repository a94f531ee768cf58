"""Dense softmax attention: a dependency, not a kernel of ours. cuDNN on GPU, splash attention on TPU, else XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops import dispatch, sharding
from attnlab.ops.attention import AttentionCall, attend, make_call
from attnlab.ops.chunked import attend_chunked, score_reason
from attnlab.types import Array, Bool, DTypeLike, Float, Int, PRNGKey, Window


def softmax_attention(
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
    bias: Float[Array, ...] | float | None = None,
    implementation: str | None = None,
    dropout_rng: PRNGKey | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = True,
    dtype: DTypeLike | None = None,
    precision: Any = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T + ALiBi + bias) v over the keys that each query may see.

    Scores and statistics are float32. A query that may see no key gets zeros, with zero gradients. The signature is
    that of `flax.linen`'s `attention_fn`: `MultiHeadDotProductAttention(attention_fn=softmax_attention)`.

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
        bias: added to the scores, broadcastable to [B, N, T, S] (XLA only).
        implementation: "xla", "xla_chunked", "cudnn", "splash", "pallas", "triton" or "ring" (sequences split by the
            mesh); None takes the best that can (`ops.explain`).
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
        normalization="softmax",
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
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        deterministic=deterministic,
        dtype=dtype,
        precision=precision,
    )
    return dispatch.call("softmax_attention", implementation, call)


def _cudnn(call: AttentionCall) -> Array:
    left, right = call.window

    def local(q, k, v):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=call.scale,
            is_causal=right == 0,
            local_window_size=None if left is None else (left, 0),
            implementation="cudnn",
        )

    q, k, v = call.q, *sharding.repeat_kv_heads(call.k, call.v, call.q.shape[2])
    return sharding.shard_over_mesh(local, (q, k, v), ("BTNH", "BSKH", "BSKH"), "BTNH")


def _refuse_cudnn(call: AttentionCall) -> str | None:
    length, keys = call.lengths
    left, right = call.window
    width = call.q.shape[-1]
    absent = _cudnn_absent()
    if absent is not None:
        return absent
    if call.q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN computes in float16 and bfloat16, not {call.q.dtype}"
    if width % 8 or width > 256:
        return f"cuDNN needs a head width that is a multiple of 8 and at most 256, not {width}"
    if right is not None and length != keys:
        return "cuDNN aligns the causal order top-left: it needs T == S"
    if right not in (None, 0) or (left is not None and right != 0):
        return "cuDNN has windows only to the left of a causal query"
    return plain_reason(call, "cuDNN", segments=False, padding=False) or sharding.sequence_reason()


def _cudnn_absent() -> str | None:
    """Returns why jax cannot call cuDNN in this process, or None; jax itself asks only while it traces the call."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version
    except ImportError:  # moved: then the call itself tells
        return None
    try:
        check_cudnn_version()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def plain_reason(call: AttentionCall, who: str, *, segments: bool, padding: bool) -> str | None:
    """Returns why a kernel of plain attention cannot do the call, or None.

    Args:
        call: the call.
        who: name of the kernel, for the message.
        segments: whether it knows segment ids.
        padding: whether it knows padding keys.
    """
    unknown = {
        "explicit positions": call.q_positions is not None,
        "segment ids": call.q_segment_ids is not None and not segments,
        "a padding mask": call.kv_mask is not None and not padding,
        "a dense mask": call.mask is not None,
        "a bias": call.dense_bias is not None or call.bias != 0.0,
        "ALiBi": call.alibi_slopes is not None,
        "dropout": call.dropout_rate > 0.0,
    }
    found = [name for name, present in unknown.items() if present]
    return f"{who} does not do {' or '.join(found)}" if found else None


dispatch.register("softmax_attention", "cudnn", dispatch.Implementation(_cudnn, _refuse_cudnn), platforms=("gpu",))
dispatch.register("softmax_attention", "splash", "attnlab.ops.splash:IMPLEMENTATION", platforms=("tpu",))
dispatch.register(
    "softmax_attention", "pallas", "kernels_pallas.attention.implementation:IMPLEMENTATION", platforms=("tpu",)
)
dispatch.register("softmax_attention", "triton", "kernels_pallas.attention_triton.implementation:IMPLEMENTATION", platforms=("gpu",))
dispatch.register("softmax_attention", "ring", "attnlab.ops.ring:IMPLEMENTATION")
dispatch.register("softmax_attention", "xla", dispatch.Implementation(attend, defer=score_reason))
dispatch.register("softmax_attention", "xla_chunked", dispatch.Implementation(attend_chunked))

"""The TPU kernels as the parts of a ring (attnlab/ops/ring.py): attention over some keys, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.ops import dispatch
from attnlab.ops.attention import AttentionCall
from attnlab.types import Array
from kernels_pallas.attention.implementation import defer, refuse
from kernels_pallas.attention.spec import LOG2E
from kernels_pallas.attention.tpu import forward
from kernels_pallas.attention.vjp import Inputs, by_rows, gradients, natural, prepare, steps_of


def attend_part(call: AttentionCall) -> tuple[Array, Array | None]:
    """Attends to the keys of the call; see `attnlab.ops.attention_part.attend_part`."""
    length, width = call.q.shape[1], call.q.shape[3]
    inputs = _inputs(call)

    def run(spec, q, k, v, slopes, indices):
        steps = steps_of(spec, indices, transposed=False)
        return forward(spec, steps, indices.bounded, q, k, v, slopes, indices.q_vectors, indices.kv_vectors)

    out, lse = by_rows(inputs.spec, run, *inputs[1:])
    out = jnp.swapaxes(out[:, :, :length, :width], 1, 2)
    return out, None if lse is None else natural(lse, length)


def attend_part_gradient(
    call: AttentionCall, cotangent: Array, lse: Array | None, delta: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients through the keys of the call; see `attnlab.ops.attention_part`. Slopes are constants: theirs is zero."""
    length, width = call.q.shape[1], call.q.shape[3]
    keys = call.lengths[1]
    inputs = _inputs(call)
    spec = inputs.spec
    padding = inputs.q.shape[2] - length

    def row(x: Array, value: float) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=value)[:, :, None]

    if lse is not None:  # +infinity gives weights of zero
        lse, delta = row(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), jnp.inf), row(delta, 0.0)
    do = jnp.swapaxes(cotangent.astype(call.q.dtype), 1, 2)
    do = jnp.pad(do, ((0, 0), (0, 0), (0, padding), (0, spec.width - width)))

    def run(spec, q, k, v, do, lse, delta, slopes, indices):
        return gradients(spec, q, k, v, do, lse, delta, slopes, indices)

    dq, dk, dv = by_rows(spec, run, *inputs[1:4], do, lse, delta, *inputs[4:])
    dq, dk, dv = (jnp.swapaxes(x[:, :, :n, :width], 1, 2) for x, n in ((dq, length), (dk, keys), (dv, keys)))
    slopes = call.alibi_slopes
    # q was scaled on its way in
    return dq * (spec.scale * spec.factor), dk, dv, None if slopes is None else jnp.zeros_like(slopes)


def _inputs(call: AttentionCall) -> Inputs:
    return prepare(
        *jax.lax.stop_gradient((call.q, call.k, call.v)),
        normalization=call.normalization,
        causal=call.causal,
        window=call.window,
        q_segment_ids=call.q_segment_ids,
        kv_segment_ids=call.kv_segment_ids,
        q_positions=call.q_positions,
        kv_positions=call.kv_positions,
        kv_mask=call.kv_mask,
        alibi_slopes=call.alibi_slopes,
        scale=call.scale,
        bias=call.bias,
        device_kind=dispatch.target_device_kind(),
        interpret=dispatch.interpreting(),
        wide=True,
    )


FORWARD = dispatch.Implementation(attend_part, refuse, defer)
GRADIENT = dispatch.Implementation(
    attend_part_gradient, lambda call, *rest: refuse(call), lambda call, *rest: defer(call)
)

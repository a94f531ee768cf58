"""The scan kernels as entries of the ops' tables (attnlab/ops/dispatch.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.ops import chunk_scan, dispatch
from attnlab.ops.linear_scan import ScanCall
from attnlab.types import Array
from kernels_pallas.state_scan.vjp import LARGEST_CHUNK, SMALLEST_CHUNK, refusal, sharded_scan


def chunk_length(chunk: int, length: int) -> int:
    """The chunk length that the kernels use: that of `chunk_scan.fit_chunk`, within their limits."""
    return min(max(chunk_scan.fit_chunk(chunk, length), SMALLEST_CHUNK), LARGEST_CHUNK)


def scan_pallas(call: ScanCall) -> tuple[Array, Array]:
    """Computes a call of `gated_linear_scan` or `gated_delta_scan`."""
    stream = jnp.float32 if call.precision == jax.lax.Precision.HIGHEST else jnp.bfloat16

    def local(q, k, v, decay, beta, initial, axis):
        length = q.shape[1]
        chunk = chunk_length(call.chunk, length)
        q, k, v = (chunk_scan.to_chunks(x.astype(stream), chunk) for x in (q, k, v))
        decay = chunk_scan.to_chunks(decay, chunk, fill=1.0)
        beta = None if beta is None else chunk_scan.to_chunks(beta, chunk)
        initial = None if initial is None else initial[:, None]
        options = {"out_dtype": call.dtype, "interpret": dispatch.interpreting()}
        out, state = sharded_scan(q, k, v, decay, beta, None, initial, axis, call.precision, **options)
        return chunk_scan.from_chunks(out, length), state[:, 0]

    args = (call.q, call.k, call.v, call.decay, call.beta, call.initial)
    return chunk_scan.over_mesh(local, args, ("BTNH",) * 5 + ("BNKV",), ("BTNH", "BNKV"))


def refuse(call: ScanCall) -> str | None:
    """Says why the kernels cannot do a call, or None."""
    chunk = chunk_length(call.chunk, call.q.shape[1])
    return refusal(rows=call.q.shape[-1], width=call.v.shape[-1], chunk=chunk, dtype=call.dtype)


def defer(call: ScanCall) -> str | None:
    """Says why another implementation serves better, or None."""
    if call.q.shape[1] < SMALLEST_CHUNK:
        return f"{call.q.shape[1]} tokens: a chunk of the kernel has at least {SMALLEST_CHUNK}"
    return "no TPU has timed it against 'chunked' yet; name it to have it"


IMPLEMENTATION = dispatch.Implementation(scan_pallas, refuse, defer)

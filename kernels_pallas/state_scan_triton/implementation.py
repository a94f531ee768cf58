"""The Triton scan kernels as entries of the ops' tables (attnlab/ops/dispatch.py)."""

from __future__ import annotations

import functools
from typing import Any

from attnlab.ops import chunk_scan, dispatch, linear_scan, sparse_state
from attnlab.ops.linear_scan import ScanCall
from attnlab.ops.sparse_state import SparseCall
from attnlab.types import Array
from kernels_pallas.state_scan.vjp import sharded_scan
from kernels_pallas.state_scan_triton.vjp import LARGEST_CHUNK, SMALLEST_CHUNK, refusal, state_scan


def chunk_length(chunk: int, length: int) -> int:
    """The chunk length that the kernels use: that of `chunk_scan.fit_chunk`, within their limits."""
    return min(max(chunk_scan.fit_chunk(chunk, length), SMALLEST_CHUNK), LARGEST_CHUNK)


def _kernel(**options: Any) -> Any:
    where = {"device_kind": dispatch.target_device_kind(), "interpret": dispatch.interpreting()}
    return functools.partial(sharded_scan, scan=state_scan, **where, **options)


def scan_triton(call: ScanCall) -> tuple[Array, Array]:
    """Computes a call of `gated_linear_scan` or `gated_delta_scan`."""
    return linear_scan.chunked(call, _kernel(out_dtype=call.dtype), chunk_length)


def sparse_triton(call: SparseCall) -> tuple[Array, Array]:
    """Computes a call of `sparse_state_attention`: the sorted streams of `varlen`."""
    return sparse_state.varlen(call, _kernel(), chunk_length)


def refuse(call: ScanCall) -> str | None:
    """Says why the kernels cannot do a call, or None."""
    return refusal(rows=call.q.shape[-1], dtype=call.dtype, interpret=dispatch.interpreting())


def refuse_sparse(call: SparseCall) -> str | None:
    """Says why the kernels or sorted streams cannot do a call, or None."""
    reason = refusal(rows=call.q_shared.shape[-1], dtype=call.dtype, interpret=dispatch.interpreting())
    return sparse_state.refuse_varlen(call) or reason


def defer(call: ScanCall | SparseCall) -> str | None:
    """Says why another implementation serves better, or None."""
    length = call.v.shape[1]
    if length < SMALLEST_CHUNK:
        return f"{length} tokens: a chunk of the kernel has at least {SMALLEST_CHUNK}"
    return "no GPU has timed it against the chunks in XLA yet; name it to have it"


IMPLEMENTATION = dispatch.Implementation(scan_triton, refuse, defer)
SPARSE = dispatch.Implementation(sparse_triton, refuse_sparse, defer)

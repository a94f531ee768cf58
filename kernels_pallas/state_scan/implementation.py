"""The scan kernels as entries of the ops' tables (attnlab/ops/dispatch.py)."""

from __future__ import annotations

import functools
from typing import Any

from attnlab.ops import dispatch, sharding, sparse_state
from attnlab.ops.linear_scan import ScanCall
from attnlab.ops.sparse_state import SparseCall
from kernels_pallas.common.state_scan import chunk_length, implementations, sharded_scan
from kernels_pallas.state_scan.vjp import LARGEST_CHUNK, SMALLEST_CHUNK, refusal, state_scan

_LIMITS = {"smallest": SMALLEST_CHUNK, "largest": LARGEST_CHUNK}


def _kernel(**options: Any) -> Any:
    return functools.partial(sharded_scan, state_scan, interpret=dispatch.interpreting(), **options)


def refuse(call: ScanCall) -> str | None:
    """Says why the kernels cannot do a call, or None."""
    chunk = chunk_length(call.chunk, call.q.shape[1], **_LIMITS)
    return refusal(rows=call.q.shape[-1], width=call.v.shape[-1], chunk=chunk, dtype=call.dtype)


def refuse_sparse(call: SparseCall) -> str | None:
    """Says why the kernels or sorted streams cannot do a call, or None."""
    batch, length, _, rows = call.q_shared.shape
    chunk = chunk_length(call.chunk, length, **_LIMITS)
    entries = -(-batch // sharding.shard_count("batch")) * sparse_state.varlen_chunks(call, chunk)
    return sparse_state.refuse_varlen(call) or refusal(
        rows=rows, width=call.v.shape[-1], chunk=chunk, dtype=call.dtype, entries=entries
    )


IMPLEMENTATION, SPARSE = implementations(_kernel, refuse, refuse_sparse, device="TPU", **_LIMITS)

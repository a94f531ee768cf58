"""The Triton scan kernels as entries of the ops' tables (attnlab/ops/dispatch.py)."""

from __future__ import annotations

import functools
from typing import Any

from attnlab.ops import dispatch, sparse_state
from attnlab.ops.linear_scan import ScanCall
from attnlab.ops.sparse_state import SparseCall
from kernels_pallas.common.state_scan import implementations, sharded_scan
from kernels_pallas.state_scan_triton.vjp import LARGEST_CHUNK, SMALLEST_CHUNK, refusal, state_scan


def _kernel(**options: Any) -> Any:
    where = {"device_kind": dispatch.target_device_kind(), "interpret": dispatch.interpreting()}
    return functools.partial(sharded_scan, state_scan, **where, **options)


def refuse(call: ScanCall) -> str | None:
    """Says why the kernels cannot do a call, or None."""
    return refusal(rows=call.q.shape[-1], dtype=call.dtype, interpret=dispatch.interpreting())


def refuse_sparse(call: SparseCall) -> str | None:
    """Says why the kernels or sorted streams cannot do a call, or None."""
    reason = refusal(rows=call.q_shared.shape[-1], dtype=call.dtype, interpret=dispatch.interpreting())
    return sparse_state.refuse_varlen(call) or reason


IMPLEMENTATION, SPARSE = implementations(
    _kernel, refuse, refuse_sparse, device="GPU", smallest=SMALLEST_CHUNK, largest=LARGEST_CHUNK
)

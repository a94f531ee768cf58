"""What the scan kernels for TPU and for NVIDIA GPUs share: their description, padding, split sequences, and table entries."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from attnlab.ops import chunk_scan, dispatch, linear_scan, sparse_state
from attnlab.ops.chunk_scan import Chains
from attnlab.ops.linear_scan import ScanCall
from attnlab.ops.sparse_state import SparseCall

# Stands for log 0: exp of it is 0, and sums of it stay finite.
RESET = -1e4
# A decay below this is a reset: what it would keep is far below the last digit of anything.
_TINY = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanSpec:
    """Static description of a scan, in the kernels' own layout.

    Attributes:
        batch: B.
        heads: N.
        chunks: n, per batch row and head.
        chunk: C.
        rows: Hk, padded.
        width: Hv, padded.
        chains: S, chains of chunks per batch row.
        channel: decays are per key channel, else per head.
        delta: the delta rule.
        initial: initial states are given.
        listed: the chunks come with a table of their chains; else all of a row are one chain.
        exact: products in float32, else their factors are rounded to bfloat16.
        out_dtype: of the outputs.
        interpret: run in the interpreter.
    """

    batch: int
    heads: int
    chunks: int
    chunk: int
    rows: int
    width: int
    chains: int
    channel: bool
    delta: bool
    initial: bool
    listed: bool
    exact: bool
    out_dtype: Any
    interpret: bool = False

    @classmethod
    def of(
        cls,
        k: jax.Array,
        v: jax.Array,
        *,
        decay: jax.Array,
        beta: jax.Array | None,
        chains: Chains | None,
        initial: jax.Array | None,
        precision: Any,
        out_dtype: Any,
        **more: Any,
    ) -> Self:
        """Describes the arguments of a `state_scan`, with k [B, N, n, C, Hk] and v [B, N, n, C, Hv] padded already."""
        batch, heads, chunks, chunk, rows = k.shape
        return cls(
            batch=batch,
            heads=heads,
            chunks=chunks,
            chunk=chunk,
            rows=rows,
            width=v.shape[-1],
            chains=1 if chains is None else chains.last.shape[1],
            channel=decay.shape[-1] > 1,
            delta=beta is not None,
            initial=initial is not None,
            listed=chains is not None,
            exact=precision == jax.lax.Precision.HIGHEST,
            out_dtype=jnp.dtype(out_dtype),
            **more,
        )


def stream_dtype(precision: Any) -> Any:
    """The type that q, k and v are read in."""
    return jnp.float32 if precision == jax.lax.Precision.HIGHEST else jnp.bfloat16


def log_factors(decay: jax.Array) -> jax.Array:
    """Logarithms of decay factors in [0, 1], `RESET` for those below 1e-30."""
    return jnp.where(decay < _TINY, RESET, jnp.log(jnp.maximum(decay, _TINY)))


def cut(
    out: jax.Array, final: jax.Array, chains: Chains | None, rows: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, N, n, C, Hv] and final states [B, S, N, Hk, Hv] without padding; cleared chains end empty."""
    final = final[..., :rows, :width]
    if chains is not None and chains.cleared is not None:
        final = jnp.where(chains.cleared[..., None, None, None], 0.0, final)
    return out[..., :width], final


def sharded_scan(
    scan: Callable[..., tuple[jax.Array, jax.Array]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    beta: jax.Array | None,
    chains: Chains | None,
    initial: jax.Array | None,
    axis: Any,
    precision: Any,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs a scan where the manual mesh axis (or axes) `axis` splits the sequence; `axis` None = it does not.

    Every device first runs its chunks from probes: empty states, beside which extra value columns carry the identity (delta
    rule) or ones (diagonal decays) along and end as the map from a state before the device's part to one after. Maps and
    states are gathered and folded, and each device runs again from the state that reaches it.

    `scan` is one of the `state_scan` functions, and the other arguments are its; the final states are those of the whole
    sequence, on every device.
    """
    if axis is None:
        return scan(q, k, v, decay, beta, chains, initial, precision, **options)
    batch, heads, rows, width = *k.shape[:2], k.shape[-1], v.shape[-1]
    count = 1 if chains is None else chains.last.shape[1]
    columns = jnp.ones((rows, 1)) if beta is None else jnp.eye(rows)
    probe = jnp.concatenate([jnp.zeros((rows, width)), columns], axis=-1)
    probe = jnp.broadcast_to(probe, (batch, count, heads, *probe.shape))
    wide = jnp.pad(v, [(0, 0)] * 4 + [(0, columns.shape[-1])])
    _, after = scan(q, k, wide, decay, beta, chains, probe, precision, **options)
    state = jnp.zeros_like(after[..., :width]) if initial is None else initial
    starts = []
    for part in jax.lax.all_gather(after, axis):
        starts.append(state)
        alone, onward = part[..., :width], part[..., width:]
        if beta is None:
            state = alone + onward * state
        else:
            state = alone + jnp.einsum("bsnkl,bsnlv->bsnkv", onward, state, precision=precision)
    start = jnp.stack(starts)[jax.lax.axis_index(axis)]
    return scan(q, k, v, decay, beta, chains, start, precision, **options)[0], state


def chunk_length(chunk: int, length: int, *, smallest: int, largest: int) -> int:
    """The chunk length that kernels with such limits use for `length` tokens: that of `chunk_scan.fit_chunk`, within them."""
    return min(max(chunk_scan.fit_chunk(chunk, length), smallest), largest)


def implementations(
    kernel: Callable[..., Callable[..., Any]],
    refuse: Callable[[ScanCall], str | None],
    refuse_sparse: Callable[[SparseCall], str | None],
    *,
    device: str,
    **limits: int,
) -> tuple[dispatch.Implementation, dispatch.Implementation]:
    """Entries of the ops' tables (attnlab/ops/dispatch.py) for dense scans, and for the sorted streams of sparse states.

    Args:
        kernel: (options of a `state_scan`) -> its `sharded_scan`.
        refuse: says why the kernels cannot do a call, or None.
        refuse_sparse: likewise.
        device: "TPU" or "GPU".
        limits: `smallest` and `largest` chunk.
    """
    length_of = functools.partial(chunk_length, **limits)

    def dense(call: ScanCall) -> tuple[jax.Array, jax.Array]:
        return linear_scan.chunked(call, kernel(out_dtype=call.dtype), length_of)

    def sparse(call: SparseCall) -> tuple[jax.Array, jax.Array]:
        return sparse_state.varlen(call, kernel(), length_of)

    def defer(call: ScanCall | SparseCall) -> str | None:
        length = call.v.shape[1]
        if length < limits["smallest"]:
            return f"{length} tokens: a chunk of the kernel has at least {limits['smallest']}"
        return f"no {device} has timed it against the chunks in XLA yet; name it to have it"

    return dispatch.Implementation(dense, refuse, defer), dispatch.Implementation(sparse, refuse_sparse, defer)

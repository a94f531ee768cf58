"""The scan as a differentiable function of arrays: layouts, padding, gradients, and sequences split over a mesh axis."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.chunk_scan import Chains
from kernels_pallas.state_scan.chunk import RESET, Spec
from kernels_pallas.state_scan.tpu import Inputs, backward, forward, states_before

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128
LARGEST_ROWS, LARGEST_WIDTH = 256, 512
# A decay below this is a reset: what it would keep is far below the last digit of anything.
_TINY = 1e-30
# int32 entries of the table of chains that fit into scalar memory beside everything else
_SCALAR_ENTRIES = 128 * 1024
# Elements of the states of the heads that one step of the grid works on
_GROUP_STATE = 4 * 128 * 128
_LARGEST_GROUP = 4
_ALIGN = 64


def state_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    beta: jax.Array | None,
    chains: Chains | None,
    initial: jax.Array | None,
    precision: Any,
    *,
    out_dtype: Any = jnp.float32,
    group: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs chains of states through chunks: what `chunk_scan.contributions` and `run_chains` compute, in one kernel.

    Args:
        q: [B, N, n, C, Hk], scaled. Tokens that are padding have zeros in q, k, v and beta, and a decay of 1.
        k: [B, N, n, C, Hk].
        v: [B, N, n, C, Hv].
        decay: [B, N, n, C, Hk or 1], factors in [0, 1]; one below 1e-30 is taken for 0.
        beta: [B, N, n, C, 1] for the delta rule, else None.
        chains: of the chunks, each in one piece; None = each row is one chain.
        initial: states that the chains start from, [B, S, N, Hk, Hv] float32, or None = zeros.
        precision: HIGHEST computes in float32; else q, k and v are rounded to bfloat16, as are the factors of all products but
            those in the decays and in the delta rule's inverse.
        out_dtype: of the outputs.
        group: heads per step of the grid, a divisor of N; None = the kernel's choice.
        interpret: run in Pallas' interpreter.

    Returns:
        Outputs [B, N, n, C, Hv], and the states after each chain [B, S, N, Hk, Hv] float32, those of empty chains as they were.

    Source:
        arXiv 2312.06635 (gated linear attention), 2406.06484 and 2412.06464 (delta rule), 2507.16577 (chains).
    """
    batch, heads, count, size, rows = q.shape
    width = v.shape[-1]
    exact = precision == jax.lax.Precision.HIGHEST
    stream = jnp.float32 if exact else jnp.bfloat16
    channel = decay.shape[-1] > 1
    log_decay = log_factors(decay)
    numbers = ([] if channel else [log_decay]) + ([] if beta is None else [beta])
    inputs = Inputs(
        q=_pad(q.astype(stream)),
        k=_pad(k.astype(stream)),
        v=_pad(v.astype(stream)),
        g=_pad(log_decay) if channel else None,
        tokens=jnp.concatenate(numbers, axis=-1).swapaxes(-1, -2) if numbers else None,
    )
    spec = Spec(
        batch=batch,
        heads=heads,
        chunks=count,
        chunk=size,
        rows=inputs.k.shape[-1],
        width=inputs.v.shape[-1],
        chains=1 if chains is None else chains.last.shape[1],
        channel=channel,
        delta=beta is not None,
        initial=initial is not None,
        listed=chains is not None,
        group=1,
        exact=exact,
        out_dtype=jnp.dtype(out_dtype),
        interpret=interpret,
    )
    spec = dataclasses.replace(spec, group=_group(spec) if group is None else group)
    table = None if chains is None else chains.chain.astype(jnp.int32).reshape(-1)
    out, final = _scan(spec, table, None if chains is None else chains.last, inputs, None if initial is None else _turned(initial))
    final = _turned(final)[..., :rows, :width]
    if chains is not None and chains.cleared is not None:
        final = jnp.where(chains.cleared[..., None, None, None], 0.0, final)
    return out[..., :width], final


def log_factors(decay: jax.Array) -> jax.Array:
    """Logarithms of decay factors in [0, 1], `RESET` for those below 1e-30."""
    return jnp.where(decay < _TINY, RESET, jnp.log(jnp.maximum(decay, _TINY)))


def sharded_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    beta: jax.Array | None,
    chains: Chains | None,
    initial: jax.Array | None,
    axis: Any,
    precision: Any,
    *,
    scan: Any = state_scan,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs a scan where the manual mesh axis (or axes) `axis` splits the sequence; `axis` None = it does not.

    Every device first runs its chunks from probes: empty states, beside which extra value columns carry the identity (delta
    rule) or ones (diagonal decays) along and end as the map from a state before the device's part to one after. Maps and
    states are gathered and folded, and each device runs again from the state that reaches it.

    Arguments and results are those of `scan`, a function like `state_scan` that gets the `options` too; the final states are
    those of the whole sequence, on every device.
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


def refusal(*, rows: int, width: int, chunk: int, dtype: Any, entries: int = 0) -> str | None:
    """Says why the kernels cannot do a scan, or None.

    Args:
        rows: Hk.
        width: Hv.
        chunk: C.
        dtype: of queries and values.
        entries: of the table of chains, B n; 0 without a table.
    """
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernel computes in float32 and bfloat16, not {jnp.dtype(dtype).name}; cast q, k and v"
    if rows > LARGEST_ROWS or width > LARGEST_WIDTH:
        return f"the kernel holds states up to {LARGEST_ROWS} x {LARGEST_WIDTH}, not {rows} x {width}; use more heads, or 'chunked'"
    if not SMALLEST_CHUNK <= chunk <= LARGEST_CHUNK:
        return f"chunk_size = {chunk}: the kernel needs {SMALLEST_CHUNK} to {LARGEST_CHUNK} tokens"
    if entries > _SCALAR_ENTRIES:
        return f"the table of chains has {entries} entries and scalar memory holds {_SCALAR_ENTRIES}; use larger chunks"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    spec: Spec, table: jax.Array | None, last: jax.Array | None, inputs: Inputs, initial: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    out, final = forward(spec, table, inputs, initial)
    return out, _unless_empty(last, final, initial)


def _scan_forward(spec, table, last, inputs, initial):
    return _scan(spec, table, last, inputs, initial), (table, last, inputs, initial)


def _scan_backward(spec, residuals, cotangents):
    table, last, inputs, initial = residuals
    dout, dfinal = cotangents
    before = states_before(spec, table, inputs, initial)
    dinputs, dinitial = backward(spec, table, inputs, before, dout, dfinal)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (table, last))
    return *nothing, dinputs, None if initial is None else _unless_empty(last, dinitial, dfinal)


_scan.defvjp(_scan_forward, _scan_backward)


def _unless_empty(last: jax.Array | None, states: jax.Array, otherwise: jax.Array | None) -> jax.Array:
    """States [B, S, N, ...] of chains with chunks, `otherwise` (None = zeros) of those without, which no kernel writes."""
    if last is None:
        return states
    return jnp.where((last < 0)[..., None, None, None], 0.0 if otherwise is None else otherwise, states)


def _turned(state: jax.Array) -> jax.Array:
    """[..., Hk, Hv] padded to the kernels' [..., Hv, Hk], or back."""
    return _pad(_pad(state).swapaxes(-1, -2))


def _pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _ALIGN)])


def _group(spec: Spec) -> int:
    """Heads per step of the grid: a divisor of N whose states are small enough."""
    largest = max(min(_GROUP_STATE // (spec.rows * spec.width), _LARGEST_GROUP), 1)
    return next(size for size in range(min(largest, spec.heads), 0, -1) if spec.heads % size == 0)

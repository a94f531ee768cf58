"""The scan as a differentiable function of arrays: layouts, padding, gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.chunk_scan import Chains
from kernels_pallas.common.state_scan import cut, log_factors, stream_dtype
from kernels_pallas.state_scan.chunk import Spec
from kernels_pallas.state_scan.tpu import Inputs, backward, forward, states_before

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128
LARGEST_ROWS, LARGEST_WIDTH = 256, 512
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
    rows, width = k.shape[-1], v.shape[-1]
    log_decay, stream = log_factors(decay), stream_dtype(precision)
    channel = decay.shape[-1] > 1
    numbers = ([] if channel else [log_decay]) + ([] if beta is None else [beta])
    inputs = Inputs(
        q=_pad(q.astype(stream)),
        k=_pad(k.astype(stream)),
        v=_pad(v.astype(stream)),
        g=_pad(log_decay) if channel else None,
        tokens=jnp.concatenate(numbers, axis=-1).swapaxes(-1, -2) if numbers else None,
    )
    given = {"decay": decay, "beta": beta, "chains": chains, "initial": initial}
    spec = Spec.of(
        inputs.k, inputs.v, precision=precision, out_dtype=out_dtype, interpret=interpret, group=group or 1, **given
    )
    spec = spec if group else dataclasses.replace(spec, group=_group(spec))
    table = None if chains is None else chains.chain.astype(jnp.int32).reshape(-1)
    out, final = _scan(spec, table, None if chains is None else chains.last, inputs, None if initial is None else _turned(initial))
    return cut(out, _turned(final), chains, rows, width)


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

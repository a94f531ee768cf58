"""The memory as a differentiable function of arrays: padding, logarithms of the gates, gradients by the backward kernel."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.memory_chunk import log_factor
from kernels_pallas.memory_scan.chunk import Spec, State
from kernels_pallas.memory_scan.tpu import FRESH, RESET, USED, Inputs, backward, forward, states_before

LARGEST_CHUNK = 128
LARGEST_DEPTH = 2
# Elements of the weights of all layers: three states and their gradients share VMEM with the blocks in flight.
LARGEST_MEMORY = 2 * 128 * 512
_SMALLEST_CHUNK = 16
_ALIGN = 64
_SCALAR_ENTRIES = 128 * 1024  # int32 flags that fit into scalar memory beside everything else


def memory_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: tuple[jax.Array, jax.Array, jax.Array],
    valid: jax.Array,
    reset: jax.Array,
    fresh: jax.Array,
    initial: State,
    begin: State | None,
    *,
    before: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, State]:
    """Writes to and reads from memories, one chunk per tile: the rule of `attnlab.ops.neural_memory`, forward and backward.

    Args:
        q: [B, N, M, C, H] float32, M tiles of C slots, as all arrays here; zeros in empty slots.
        k: [B, N, M, C, H].
        v: [B, N, M, C, H].
        gates: theta, eta, alpha [B, N, M, C].
        valid: [B, M, C] bool, slots that hold a token.
        reset: [B, M] bool, a segment starts.
        fresh: [B, M] bool, a chunk starts (else that of `initial`, or of `begin` in a new segment, goes on).
        initial: what holds before the first tile, [B, N, I, O] per layer.
        begin: what holds at a segment's start; None = no tile resets, whatever `reset` says.
        before: read without the token's own write.
        interpret: run in Pallas' interpreter.

    Returns:
        y [B, N, M, C, H], losses |M(k) - v|^2 [B, N, M, C], and the state after the last tile.

    Source:
        arXiv 2501.00663, section 3.
    """
    batch, heads, number, size, width = q.shape
    flags = jnp.where(valid.any(axis=-1), USED, 0) + jnp.where(fresh, FRESH, 0) + jnp.where(reset, RESET, 0)
    there = jnp.broadcast_to(valid[:, None], gates[0].shape).astype(jnp.float32)
    theta, eta, alpha = gates
    numbers = [theta * there, log_factor(jnp.where(there > 0, eta, 1.0)), log_factor(jnp.where(there > 0, 1.0 - alpha, 1.0)), there]
    slots = max(_SMALLEST_CHUNK, -(-size // 8) * 8) - size
    inputs = Inputs(*(_pad(x, slots, -width % _ALIGN) for x in (q, k, v)), _pad(jnp.stack(numbers, axis=-2), 0, slots))
    shapes = [w.shape[2:] for w in initial.weights]
    initial, begin = jax.tree.map(lambda w: _pad(w, -w.shape[-2] % _ALIGN, -w.shape[-1] % _ALIGN), (initial, begin))
    spec = Spec(
        batch=batch,
        heads=heads,
        tiles=number,
        chunk=size + slots,
        widths=(*(w.shape[-2] for w in initial.weights), inputs.q.shape[-1]),
        before=before,
        resets=begin is not None,
        interpret=interpret,
    )
    y, loss, final = _scan(spec, flags.reshape(-1), inputs, initial, begin)
    final = State(*(tuple(w[..., :i, :o] for w, (i, o) in zip(part, shapes, strict=True)) for part in final))
    return y[..., :size, :width], loss[..., 0, :size], final


def refusal(*, widths: tuple[int, ...], chunk: int, entries: int) -> str | None:
    """Says why the kernels cannot do a memory, or None.

    Args:
        widths: of the memory's layers, input and output included.
        chunk: C.
        entries: of the table of flags, tiles of all rows.
    """
    depth = len(widths) - 1
    if depth > LARGEST_DEPTH:
        return f"the kernel holds memories of up to {LARGEST_DEPTH} layers, not {depth}; use 'xla_chunked'"
    padded = [-(-width // _ALIGN) * _ALIGN for width in widths]
    if sum(i * o for i, o in itertools.pairwise(padded)) > LARGEST_MEMORY:
        memory = " x ".join(map(str, widths))
        return f"a memory of {memory} does not fit the kernel's fast memory (128 x 512 x 128 does); use more heads"
    if chunk > LARGEST_CHUNK:
        return f"chunk_size = {chunk}: the kernel holds up to {LARGEST_CHUNK} tokens"
    if entries > _SCALAR_ENTRIES:
        return f"the flags of {entries} chunks do not fit scalar memory, which holds {_SCALAR_ENTRIES}; use larger chunks"
    return None


def _pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, columns)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(spec: Spec, flags: jax.Array, inputs: Inputs, initial: State, begin: State | None) -> tuple[Any, Any, State]:
    return forward(spec, flags, inputs, initial, begin)


def _scan_forward(spec, flags, inputs, initial, begin):
    return _scan(spec, flags, inputs, initial, begin), (flags, inputs, initial, begin)


def _scan_backward(spec, residuals, cotangents):
    flags, inputs, initial, begin = residuals
    before = states_before(spec, flags, inputs, initial, begin)
    dinputs, dinitial, dbegin = backward(spec, flags, inputs, initial, begin, before, *cotangents)
    return np.zeros(flags.shape, jax.dtypes.float0), dinputs, dinitial, dbegin


_scan.defvjp(_scan_forward, _scan_backward)

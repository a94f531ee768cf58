"""The memory with one layer by the Triton kernels, as one differentiable function of arrays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.memory_chunk import chunk_factors
from kernels_pallas.attention_triton import launch
from kernels_pallas.memory_scan.chunk import State

LARGEST_WIDTH = 64
LARGEST_CHUNK = 64
_KERNELS = "kernels_pallas.memory_scan_triton.kernels"
_SMALLEST = 16  # of the sides of a product
_RESET, _FRESH, _USED, _LAST = 1, 2, 4, 8  # as in kernels.py
# What a program holds: columns of the state, and warps. For H = C = 64 on H100, ptxas finds nothing to spill in the first two
# and 428 bytes a thread in the backward kernel; other settings spill more (compile_case.py).
_COLUMNS = {"forward": 32, "states": 32, "backward": 16}
_WARPS = {"forward": 4, "states": 4, "backward": 4}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static description of a scan.

    Attributes:
        heads: N.
        resets: segments start inside of rows.
        device_kind: the GPU to compile for where none is present.
        interpret: run in Triton's interpreter.
    """

    heads: int
    resets: bool
    device_kind: str | None
    interpret: bool


class Inputs(NamedTuple):
    """Arrays of the kernels, see kernels.py: tokens [G, M, C, H], vectors [G, M, 4, C], scalars [G, M, 4], scores [G, M, C, C]."""

    k: jax.Array
    v: jax.Array
    vectors: jax.Array
    scalars: jax.Array
    q: jax.Array
    scores: jax.Array


Layer = tuple[jax.Array, jax.Array, jax.Array]  # start, weights, momentum [G, H, H]


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
    device_kind: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, State]:
    """What `kernels_pallas.memory_scan.memory_scan` computes, for a memory of one layer; the arguments are the same.

    The factors and scores of the chunks, which need no state, are XLA's, for all chunks at once.

    Args:
        q: as there, like all that follow.
        k: as there.
        v: as there.
        gates: as there.
        valid: as there.
        reset: as there.
        fresh: as there.
        initial: as there.
        begin: as there.
        before: as there.
        device_kind: the GPU to compile for where none is present.
        interpret: run in Triton's interpreter.
    """
    batch, heads, number, size, width = q.shape
    factors = chunk_factors(gates, valid[:, None], before=before)
    scores = jnp.einsum("bnmti,bnmsi->bnmts", q, k, precision=jax.lax.Precision.HIGHEST) * factors.reads
    vectors = jnp.stack([factors.kept, factors.mixed, factors.writes, factors.leaves], axis=3)
    numbers = (factors.last_kept, factors.last_mixed, factors.stays)
    scalars = jnp.stack([*numbers, jnp.zeros_like(factors.stays)], axis=3)
    rows, columns = _larger(size), _larger(width)

    def grouped(x, *pads):
        x = x.reshape(batch * heads, *x.shape[2:])
        return jnp.pad(x, [(0, 0)] * (x.ndim - len(pads)) + [(0, pad) for pad in pads])

    inputs = Inputs(
        *(grouped(x, rows, columns) for x in (k, v)),
        grouped(vectors, rows),
        grouped(scalars),
        grouped(q, rows, columns),
        grouped(scores, rows, rows),
    )
    used = valid.any(axis=-1)
    order = jnp.arange(number)
    last = used & (order == jnp.max(jnp.where(used, order, -1), axis=1, keepdims=True))
    bits = ((reset, _RESET), (fresh, _FRESH), (used, _USED), (last, _LAST))
    flags = sum(jnp.where(flag, bit, 0) for flag, bit in bits).astype(jnp.int32)
    spec = Spec(heads, begin is not None, device_kind, interpret)
    layers = [None if x is None else tuple(grouped(part[0], columns, columns) for part in x) for x in (initial, begin)]
    y, loss, final = _scan(spec, flags, inputs, *layers)

    def split(x):
        return x.reshape(batch, heads, *x.shape[1:])

    start, w, s = (split(x)[..., :width, :width] for x in final)
    start = jnp.where(used.any(axis=1)[:, None, None, None], start, initial.start[0])  # a row of padding has no last tile
    return split(y)[..., :size, :width], split(loss)[..., :size], State((start,), (w,), (s,))


def refusal(*, widths: tuple[int, ...], chunk: int, interpret: bool = False) -> str | None:
    """Says why the kernels cannot do a memory, or None.

    Args:
        widths: of the memory's layers, input and output included.
        chunk: C.
        interpret: the call is for the interpreter.
    """
    absent = launch.missing(interpret)
    if absent is not None:
        return absent
    if len(widths) != 2:
        return (
            f"the kernel holds a memory of one layer in registers, not one of {len(widths) - 1}: beside it, the weights and "
            "momentum of a second do not fit; use 'xla_chunked'"
        )
    if widths[0] > LARGEST_WIDTH:
        return f"the kernel keeps memories of width H <= {LARGEST_WIDTH} in registers, not {widths[0]}, which spills; use more heads"
    if chunk > LARGEST_CHUNK:
        return f"chunk_size = {chunk}: the kernel holds up to {LARGEST_CHUNK} tokens"
    return None


def _larger(size: int) -> int:
    """What is missing to a power of two that a product can have as a side."""
    return max(_SMALLEST, 1 << (size - 1).bit_length()) - size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    spec: Spec, flags: jax.Array, inputs: Inputs, initial: Layer, begin: Layer | None
) -> tuple[jax.Array, jax.Array, Layer]:
    groups, tiles, size, width = inputs.q.shape
    blocks = width // _columns("forward", width)
    out = [_like(inputs.q), _array(blocks, groups, tiles, size), *map(_like, initial)]
    given = (*inputs[:4], flags, *initial, *(initial if begin is None else begin), *inputs[4:])
    y, loss, *final = _call("forward", spec, given, out)
    return y, loss.sum(axis=0), tuple(final)


def _scan_forward(spec, flags, inputs, initial, begin):
    return _scan(spec, flags, inputs, initial, begin), (flags, inputs, initial, begin)


def _scan_backward(spec, residuals, cotangents):
    flags, inputs, initial, begin = residuals
    dy, dloss, dfinal = cotangents
    groups, tiles, _, width = inputs.q.shape
    other = initial if begin is None else begin
    state = _array(groups, tiles, width, width)
    before = _call("states", spec, (*inputs[:4], flags, *initial, *other), [state, state])
    blocks = width // _columns("backward", width)
    shapes = [_array(*(() if x is inputs.v else (blocks,)), *x.shape) for x in inputs]
    given = (*inputs[:4], flags, initial[0], other[0], *inputs[4:], *before, dy, dloss, *dfinal)
    results = _call("backward", spec, given, shapes + 2 * [_like(x) for x in initial])
    dinputs = [x if like.ndim == x.ndim else x.sum(axis=0) for x, like in zip(results[:6], inputs, strict=True)]
    dbegin = None if begin is None else tuple(results[9:])
    return np.zeros(flags.shape, jax.dtypes.float0), Inputs(*dinputs), tuple(results[6:9]), dbegin


_scan.defvjp(_scan_forward, _scan_backward)


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return _array(*x.shape)


def _columns(kernel: str, width: int) -> int:
    return min(_COLUMNS[kernel], max(_SMALLEST, width // 2))


def _call(kernel: str, spec: Spec, arrays: tuple[Any, ...], out: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    groups, tiles, size, width = arrays[0].shape
    columns = _columns(kernel, width)
    return launch.call(
        f"{kernel}_kernel",
        arrays,
        out,
        programs=groups * (width // columns),
        num_warps=_WARPS[kernel],
        num_stages=1,
        interpret=spec.interpret,
        device_kind=spec.device_kind,
        module=_KERNELS,
        HEADS=spec.heads,
        TILES=tiles,
        C=size,
        H=width,
        COLUMNS=columns,
        RESETS=spec.resets,
    )

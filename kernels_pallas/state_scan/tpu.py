"""The scan on TPU: a grid over (batch, heads, chunks) that carries the state in VMEM, and the same backwards.

The chunks of a row follow each other; where the table names another chain than for the chunk before, the state is taken from
that chain's initial state, and where the next chunk belongs to another chain, it is handed out as the chain's final state.
Blocks of initial and final states are addressed by the table, so a chain costs one transfer each way whatever its length.

The backward pass first runs the states alone (`before`: the state before each chunk), then walks the chunks in reverse with the
gradient of the state in VMEM; a chunk's own gradients are `jax.vjp` of `chunk.chunk` inside the kernel's body.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.state_scan.chunk import Head, Spec, chunk, states_after


class Inputs(NamedTuple):
    """Arrays of a scan: q, k [B,N,n,C,Hk], v [B,N,n,C,Hv], g like k or None, tokens [B,N,n,numbers,C] or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array | None
    tokens: jax.Array | None


def forward(spec: Spec, table: jax.Array | None, inputs: Inputs, initial: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Runs the scan.

    Args:
        spec: the scan.
        table: [B * n] int32, the chain of every chunk, if `spec.listed`.
        inputs: the chunks.
        initial: [B, S, N, Hv, Hk] float32, transposed states, if `spec.initial`.

    Returns:
        Outputs [B, N, n, C, Hv], and the states after each chain [B, S, N, Hv, Hk]; undefined for chains without chunks.
    """
    out = jax.ShapeDtypeStruct(inputs.v.shape, spec.out_dtype)
    return _run(spec, table, inputs, initial, {"out": out, "final": _states(spec)})


def states_before(spec: Spec, table: jax.Array | None, inputs: Inputs, initial: jax.Array | None) -> jax.Array:
    """Returns the transposed states before each chunk, [B, N, n, Hv, Hk] float32; the arguments are those of `forward`."""
    before = jax.ShapeDtypeStruct((spec.batch, spec.heads, spec.chunks, spec.width, spec.rows), jnp.float32)
    return _run(spec, table, inputs._replace(q=None), initial, {"before": before})[0]


def backward(
    spec: Spec, table: jax.Array | None, inputs: Inputs, before: jax.Array, dout: jax.Array, dfinal: jax.Array
) -> tuple[Inputs, jax.Array]:
    """Runs the reverse scan.

    Args:
        spec: the scan.
        table: as in `forward`.
        inputs: as in `forward`.
        before: of `states_before`.
        dout: gradient of the outputs.
        dfinal: gradient of the final states.

    Returns:
        Gradients of the inputs, and of the initial states [B, S, N, Hv, Hk], undefined for chains without chunks.
    """
    arrays = {name: x for name, x in inputs._asdict().items() if x is not None}
    outs = {f"d{name}": jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    results = _call(
        spec,
        functools.partial(_backward_kernel, spec=spec),
        table,
        arrays | {"before": before, "dout": dout, "dfinal": dfinal},
        outs | {"dinitial": _states(spec)},
        reverse=True,
        name="state_scan_backward",
    )
    named = dict(zip(outs, results[:-1], strict=True))
    return Inputs(*(named.get(f"d{name}") for name in Inputs._fields)), results[-1]


def _run(spec: Spec, table: Any, inputs: Inputs, initial: Any, outs: dict[str, Any]) -> list[jax.Array]:
    arrays = {name: x for name, x in inputs._asdict().items() if x is not None}
    if spec.initial:
        arrays["initial"] = initial
    kernel = functools.partial(_forward_kernel, spec=spec, names=(*arrays, *outs))
    name = "state_scan_forward" if "out" in outs else "state_scan_states"
    return _call(spec, kernel, table, arrays, outs, reverse=False, name=name)


def _states(spec: Spec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((spec.batch, spec.chains, spec.heads, spec.width, spec.rows), jnp.float32)


def _forward_kernel(*refs: Any, spec: Spec, names: tuple[str, ...]) -> None:
    table, refs = (refs[0], refs[1:]) if spec.listed else (None, refs)
    *refs, state = refs
    named = dict(zip(names, refs, strict=True))
    at = pl.program_id(2)

    @pl.when(_starts(spec, table, at))
    def _():
        state[...] = named["initial"][...] if spec.initial else jnp.zeros_like(state)

    held = [state[head] for head in range(spec.group)]
    heads = [_head(named, head) for head in range(spec.group)]
    if "before" in named:
        for head, before in enumerate(held):
            named["before"][head] = before
        after = states_after(spec, heads, held)
    else:
        outs, after = chunk(spec, heads, held)
        for head, out in enumerate(outs):
            named["out"][head] = out.astype(spec.out_dtype)
    for head, new in enumerate(after):
        state[head] = new

    if "final" in named:

        @pl.when(_ends(spec, table, at))
        def _():
            named["final"][...] = state[...]


def _backward_kernel(*refs: Any, spec: Spec) -> None:
    table, refs = (refs[0], refs[1:]) if spec.listed else (None, refs)
    *refs, dstate = refs
    present = [name for name in Inputs._fields if (name != "g" or spec.channel) and (name != "tokens" or spec.vectors)]
    names = (*present, "before", "dout", "dfinal", *(f"d{name}" for name in present), "dinitial")
    named = dict(zip(names, refs, strict=True))
    at = spec.chunks - 1 - pl.program_id(2)

    @pl.when(_ends(spec, table, at))
    def _():
        dstate[...] = named["dfinal"][...]

    group = range(spec.group)
    heads, before = [_head(named, head) for head in group], [named["before"][head] for head in group]
    pull = jax.vjp(functools.partial(chunk, spec), heads, before)[1]
    gradients, dbefore = pull(([named["dout"][head].astype(jnp.float32) for head in group], [dstate[head] for head in group]))
    for head in group:
        for name in present:
            ref = named[f"d{name}"]
            ref[head] = getattr(gradients[head], name).astype(ref.dtype)
        dstate[head] = dbefore[head]

    @pl.when(_starts(spec, table, at))
    def _():
        named["dinitial"][...] = dstate[...]


def _head(named: dict[str, Any], head: int) -> Head:
    return Head(*(named[name][head].astype(jnp.float32) if name in named else None for name in Head._fields))


def _chain(spec: Spec, table: Any, at: Any) -> Any:
    return table[pl.program_id(0) * spec.chunks + at]


def _starts(spec: Spec, table: Any, at: Any) -> Any:
    """Whether chunk `at` is the first of its chain."""
    if table is None:
        return at == 0
    return (at == 0) | (_chain(spec, table, at) != _chain(spec, table, jnp.maximum(at - 1, 0)))


def _ends(spec: Spec, table: Any, at: Any) -> Any:
    """Whether chunk `at` is the last of its chain."""
    last = spec.chunks - 1
    if table is None:
        return at == last
    return (at == last) | (_chain(spec, table, at) != _chain(spec, table, jnp.minimum(at + 1, last)))


def _call(
    spec: Spec, kernel: Any, table: jax.Array | None, arrays: dict[str, Any], outs: dict[str, Any], *, reverse: bool, name: str
) -> list[jax.Array]:
    """Calls a kernel over (batch, groups of heads, chunks), with a state in VMEM."""

    def block(name: str, x: Any) -> pl.BlockSpec:
        def at(l):
            return spec.chunks - 1 - l if reverse else l

        if name in ("initial", "final", "dinitial", "dfinal"):
            shape = (None, None, spec.group, *x.shape[3:])
            return pl.BlockSpec(
                shape, lambda b, n, l, *refs: (b, refs[0][b * spec.chunks + at(l)] if spec.listed else 0, n, 0, 0)
            )
        return pl.BlockSpec((None, spec.group, None, *x.shape[3:]), lambda b, n, l, *refs: (b, n, at(l), 0, 0))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=int(spec.listed),
            grid=(spec.batch, spec.heads // spec.group, spec.chunks),
            in_specs=[block(*item) for item in arrays.items()],
            out_specs=[block(*item) for item in outs.items()],
            scratch_shapes=[pltpu.VMEM((spec.group, spec.width, spec.rows), jnp.float32)],
        ),
        out_shape=list(outs.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=spec.interpret,
        name=name,
    )(*([table] if spec.listed else []), *arrays.values())

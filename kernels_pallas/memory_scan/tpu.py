"""The memory on TPU: a grid over (batch, heads, tiles) that carries weights and momentum in VMEM, and the same backwards.

Every tile holds one chunk, with flags: a segment starts (the state is taken from its beginning), a chunk starts (gradients are
taken at the present weights; else an earlier call's chunk goes on), there are tokens (else nothing happens). The state lives
in the blocks of the results: they belong to (batch, head) and so stay in VMEM from tile to tile.

The backward pass first runs the states alone (`before`: weights and momentum before each tile), then walks the tiles in reverse
with the gradient of the state in VMEM; a chunk's own gradients are `jax.vjp` of `chunk.chunk` inside the kernel's body.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.memory_scan.chunk import Spec, State, Tokens, chunk, states_after

RESET, FRESH, USED = 1, 2, 4  # bits of the flags

# State, their gradients and both buffers of the blocks of a memory of 128 x 512 x 128; a TPU has 64 MiB of VMEM or more.
_VMEM_BYTES = 56 * 2**20
_TILED = ("q", "k", "v", "numbers", "y", "loss", "before", "dq", "dk", "dv", "dnumbers", "dy", "dloss")


class Inputs(NamedTuple):
    """Arrays of a scan: q, k, v [B, N, M, C, H], numbers [B, N, M, 4, C]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    numbers: jax.Array


def forward(
    spec: Spec, flags: jax.Array, inputs: Inputs, initial: State, begin: State | None
) -> tuple[jax.Array, jax.Array, State]:
    """Runs the scan.

    Args:
        spec: the scan.
        flags: [B * M] int32, bits `RESET`, `FRESH`, `USED` of every tile.
        inputs: the tiles.
        initial: what holds before the first tile.
        begin: what holds at a segment's start, if `spec.resets`.

    Returns:
        y [B, N, M, C, H], losses [B, N, M, 1, C], and the states after the last tile.
    """
    y = jax.ShapeDtypeStruct(inputs.q.shape, jnp.float32)
    loss = jax.ShapeDtypeStruct((spec.batch, spec.heads, spec.tiles, 1, spec.chunk), jnp.float32)
    arrays = inputs._asdict() | {"initial": _flat(initial)} | ({"begin": _flat(begin)} if spec.resets else {})
    outs = {"y": y, "loss": loss, "final": _like(initial)}
    found = _call(spec, _forward_kernel, flags, arrays, outs, name="memory_scan_forward")
    return found["y"], found["loss"], _unflat(found["final"])


def states_before(spec: Spec, flags: jax.Array, inputs: Inputs, initial: State, begin: State | None) -> tuple[jax.Array, ...]:
    """Returns weights and momentum before each tile (in a new segment: its beginning), [B, N, M, I, O] per layer each."""
    before = 2 * [jax.ShapeDtypeStruct((spec.batch, spec.heads, spec.tiles, *shape), jnp.float32) for shape in spec.shapes]
    arrays = inputs._asdict() | {"initial": _flat(initial)} | ({"begin": _flat(begin)} if spec.resets else {})
    arrays.pop("q")
    found = _call(
        spec, _forward_kernel, flags, arrays, {"before": before}, name="memory_scan_states", scratch={"final": 3 * spec.shapes}
    )
    return tuple(found["before"])


def backward(
    spec: Spec,
    flags: jax.Array,
    inputs: Inputs,
    initial: State,
    begin: State | None,
    before: tuple[jax.Array, ...],
    dy: jax.Array,
    dloss: jax.Array,
    dfinal: State,
) -> tuple[Inputs, State, State | None]:
    """Runs the reverse scan.

    Args:
        spec: the scan.
        flags: as in `forward`.
        inputs: as in `forward`.
        initial: as in `forward`.
        begin: as in `forward`.
        before: of `states_before`.
        dy: gradient of y.
        dloss: gradient of the losses.
        dfinal: gradient of the final states.

    Returns:
        Gradients of the inputs, the initial states and the beginnings.
    """
    starts = {"initial": list(initial.start)} | ({"begin": list(begin.start)} if spec.resets else {})
    arrays = inputs._asdict() | starts | {"before": list(before), "dy": dy, "dloss": dloss, "dfinal": _flat(dfinal)}
    outs = {f"d{name}": jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in inputs._asdict().items()}
    outs |= {"dinitial": _like(initial)} | ({"dbegin": _like(begin)} if spec.resets else {})
    found = _call(
        spec, _backward_kernel, flags, arrays, outs, name="memory_scan_backward", scratch={"start": spec.shapes}, reverse=True
    )
    dbegin = _unflat(found["dbegin"]) if spec.resets else None
    return Inputs(*(found[f"d{name}"] for name in Inputs._fields)), _unflat(found["dinitial"]), dbegin


def _forward_kernel(flags: Any, refs: dict[str, Any], *, spec: Spec) -> None:
    tile = pl.program_id(2)
    flag = flags[pl.program_id(0) * spec.tiles + tile]
    held = refs["final"]
    layers = len(spec.shapes)

    @pl.when(tile == 0)
    def _():
        _copy(refs["initial"], held)

    if spec.resets:

        @pl.when(flag & RESET != 0)
        def _():
            _copy(refs["begin"], held)

    @pl.when(flag & FRESH != 0)
    def _():
        _copy(held[layers : 2 * layers], held[:layers])

    if "before" in refs:
        _copy(held[layers:], refs["before"])

    @pl.when(flag & USED != 0)
    def _():
        state = _unflat([ref[...] for ref in held])
        if "y" in refs:
            refs["y"][...], refs["loss"][...], after = chunk(spec, _tokens(refs), state)
        else:
            after = states_after(spec, _tokens(refs), state)
        for ref, new in zip(held[layers:], (*after[0], *after[1]), strict=True):
            ref[...] = new

    if "y" in refs:

        @pl.when(flag & USED == 0)
        def _():
            for name in ("y", "loss"):
                refs[name][...] = jnp.zeros_like(refs[name])


def _backward_kernel(flags: Any, refs: dict[str, Any], *, spec: Spec) -> None:
    tile = spec.tiles - 1 - pl.program_id(2)
    flag = flags[pl.program_id(0) * spec.tiles + tile]
    layers = len(spec.shapes)
    gradient, start, before = refs["dinitial"], refs["start"], refs["before"]
    outs = [refs[f"d{name}"] for name in Inputs._fields]

    @pl.when(tile == spec.tiles - 1)
    def _():
        _copy(refs["dfinal"], gradient)
        if spec.resets:
            _clear(refs["dbegin"])

    @pl.when(flag & USED == 0)
    def _():
        _clear(outs)

    @pl.when(flag & USED != 0)
    def _():
        _copy(refs["initial"], start)
        if spec.resets:

            @pl.when(flag & RESET != 0)
            def _():
                _copy(refs["begin"], start)

        @pl.when(flag & FRESH != 0)
        def _():
            _copy(before[:layers], start)

        state = State(*(tuple(ref[...] for ref in part) for part in (start, before[:layers], before[layers:])))
        after = tuple(tuple(ref[...] for ref in gradient[at * layers : (at + 1) * layers]) for at in (1, 2))
        pull = jax.vjp(functools.partial(chunk, spec), _tokens(refs), state)[1]
        dtokens, dstate = pull((refs["dy"][...], refs["dloss"][...], after))
        for ref, value in zip(outs, dtokens, strict=True):
            ref[...] = value
        dstart = [ref[...] + value for ref, value in zip(gradient[:layers], dstate.start, strict=True)]
        fresh = flag & FRESH != 0
        for layer in range(layers):
            gradient[layer][...] = jnp.where(fresh, 0.0, dstart[layer])
            gradient[layers + layer][...] = dstate.weights[layer] + jnp.where(fresh, dstart[layer], 0.0)
            gradient[2 * layers + layer][...] = dstate.momentum[layer]

    if spec.resets:

        @pl.when(flag & RESET != 0)
        def _():
            for ref, total in zip(gradient, refs["dbegin"], strict=True):
                total[...] = total[...] + ref[...]
            _clear(gradient)


def _tokens(refs: dict[str, Any]) -> Tokens:
    return Tokens(*(refs[name][...] if name in refs else None for name in Tokens._fields))


def _copy(sources: list, targets: list) -> None:
    for source, target in zip(sources, targets, strict=True):
        target[...] = source[...]


def _clear(refs: list) -> None:
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def _flat(states: State) -> list:
    return [*states.start, *states.weights, *states.momentum]


def _unflat(parts: list) -> State:
    layers = len(parts) // 3
    return State(*(tuple(parts[at * layers : (at + 1) * layers]) for at in range(3)))


def _like(states: State) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in _flat(states)]


def _call(
    spec: Spec,
    kernel: Any,
    flags: jax.Array,
    arrays: dict[str, Any],
    outs: dict[str, Any],
    *,
    name: str,
    scratch: dict[str, Any] | None = None,
    reverse: bool = False,
) -> dict[str, Any]:
    """Calls a kernel over (batch, heads, tiles); arrays, results and scratch come to it by name, lists as lists of references."""
    scratch = {} if scratch is None else scratch
    named = {**arrays, **outs}

    def blocks(part: dict[str, Any]) -> list[pl.BlockSpec]:
        return [_block(spec, key, x, reverse) for key, group in part.items() for x in _items(group)]

    def body(flags, *refs):
        rest = iter(refs)
        groups = {**named, **scratch}
        given = {
            key: [next(rest) for _ in x] if key in scratch or isinstance(x, list) else next(rest) for key, x in groups.items()
        }
        kernel(flags, given, spec=spec)

    results = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(spec.batch, spec.heads, spec.tiles),
            in_specs=blocks(arrays),
            out_specs=blocks(outs),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shapes in scratch.values() for shape in shapes],
        ),
        out_shape=[x for group in outs.values() for x in _items(group)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=spec.interpret,
        name=name,
    )(flags, *(x for group in arrays.values() for x in _items(group)))
    rest = iter(results)
    return {key: [next(rest) for _ in x] if isinstance(x, list) else next(rest) for key, x in outs.items()}


def _items(group: Any) -> list:
    return group if isinstance(group, list) else [group]


def _block(spec: Spec, name: str, x: Any, reverse: bool) -> pl.BlockSpec:
    if name not in _TILED:  # states belong to a row and head
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, n, l, *_: (b, n, 0, 0))

    def at(l):
        return spec.tiles - 1 - l if reverse else l

    return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, n, l, *_: (b, n, at(l), 0, 0))

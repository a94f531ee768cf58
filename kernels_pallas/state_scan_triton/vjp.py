"""The scan by the Triton kernels as one differentiable function of arrays.

Hardware: these kernels have passed Triton's compiler and ptxas, and have run in Triton's interpreter; no GPU has run them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops.chunk_scan import Chains
from kernels_pallas.attention_triton import launch
from kernels_pallas.common.state_scan import ScanSpec, cut, log_factors, stream_dtype
from kernels_pallas.state_scan_triton import tuning

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 64
LARGEST_ROWS = 256
_MODULE = "kernels_pallas.state_scan_triton.kernels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(ScanSpec):
    """Static description of a scan.

    Attributes:
        device_kind: the GPU to compile for where none is present.
    """

    device_kind: str | None


class Inputs(NamedTuple):
    """Arrays of a scan: q, k [B,N,n,C,Hk], v [B,N,n,C,Hv], log decays g [B,N,n,C] or like k, beta [B,N,n,C] or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array | None


class _Prepared(NamedTuple):
    """Results of `prepare_kernel`; those that a kind of scan has no use for have one element."""

    scores: jax.Array
    coupling: jax.Array
    corrections: jax.Array
    targets: jax.Array
    reading: jax.Array
    writing: jax.Array
    whole: jax.Array


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
    device_kind: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """What `kernels_pallas.state_scan.state_scan` computes; the arguments are the same, but for the last two.

    Args:
        q: as there, like all that follow; C = 16, 32 or 64.
        k: as there.
        v: as there.
        decay: as there.
        beta: as there.
        chains: as there, and in ascending order.
        initial: as there.
        precision: as there.
        out_dtype: as there.
        device_kind: the GPU to compile for where none is present.
        interpret: run in Triton's interpreter.
    """
    rows, width = k.shape[-1], v.shape[-1]
    log_decay, stream = log_factors(decay), stream_dtype(precision)
    inputs = Inputs(
        q=_pad(q.astype(stream)),
        k=_pad(k.astype(stream)),
        v=_pad(v.astype(stream), tuning.padded_width),
        g=_pad(log_decay) if decay.shape[-1] > 1 else log_decay[..., 0],
        beta=None if beta is None else beta[..., 0],
    )
    given = {"decay": decay, "beta": beta, "chains": chains, "initial": initial}
    where = {"device_kind": device_kind, "interpret": interpret}
    spec = Spec.of(inputs.k, inputs.v, precision=precision, out_dtype=out_dtype, **given, **where)
    if initial is not None:
        initial = _pad(_pad(initial, tuning.padded_width).swapaxes(-1, -2)).swapaxes(-1, -2)
    out, final = _scan(spec, None if chains is None else _bounds(chains), inputs, initial)
    return cut(out, final, chains, rows, width)


def refusal(*, rows: int, dtype: Any, interpret: bool = False) -> str | None:
    """Says why the kernels cannot do a scan, or None.

    Args:
        rows: Hk.
        dtype: of queries and values.
        interpret: the call is for the interpreter.
    """
    absent = launch.missing(interpret)
    if absent is not None:
        return absent
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernel computes in float32 and bfloat16, not {jnp.dtype(dtype).name}; cast q, k and v"
    if rows > LARGEST_ROWS:
        return f"the kernel holds states of up to {LARGEST_ROWS} key channels, not {rows}; use more heads, or 'chunked'"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(spec: Spec, bounds: jax.Array | None, inputs: Inputs, initial: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    prepared = _prepare(spec, inputs)
    before, values, final = _states(spec, bounds, inputs, prepared, initial)
    arrays = (inputs.q, values, _given(inputs.beta), prepared.scores, prepared.reading, before)
    (out,) = _call(spec, "output", arrays, [jax.ShapeDtypeStruct(inputs.v.shape, spec.out_dtype)])
    return out, final


def _scan_forward(spec, bounds, inputs, initial):
    return _scan(spec, bounds, inputs, initial), (bounds, inputs, initial)


def _scan_backward(spec, residuals, cotangents):
    bounds, inputs, initial = residuals
    dout, dfinal = cotangents
    q, k, v, g, beta = inputs
    strength, dout = _given(beta), dout.astype(v.dtype)
    prepared = _prepare(spec, inputs)
    before, values, _ = _states(spec, bounds, inputs, prepared, initial)
    _, coupling, corrections, _, *decays = prepared

    arrays = (q, k, strength, prepared.scores, corrections, *decays, _given(bounds, jnp.int32), dout, dfinal)
    dafter, dwritten, dinitial = _call(spec, "state_gradients", arrays, [before, v, dfinal])
    arrays = (values, strength, coupling, dout, dwritten)
    outs = [prepared.scores, coupling, *((v, beta) if spec.delta else (_NOTHING, _NOTHING))]
    dscores, dpairs, dv, dbeta = _call(spec, "pair_gradients", arrays, outs)
    dv = dv if spec.delta else dwritten
    blocks = spec.rows // _tile(spec, "token_gradients").block_k
    dlog = g if spec.channel else jax.ShapeDtypeStruct((*g.shape[:3], blocks, spec.chunk), jnp.float32)
    arrays = (q, k, g, values, strength, before, dafter, dout, dv, dscores, dpairs)
    dq, dk, dg = _call(spec, "token_gradients", arrays, [q, k, dlog])
    dg = dg if spec.channel else dg.sum(axis=3)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), bounds)
    return nothing, Inputs(dq, dk, dv, dg, dbeta if spec.delta else None), None if initial is None else dinitial


_scan.defvjp(_scan_forward, _scan_backward)


def _prepare(spec: Spec, inputs: Inputs) -> _Prepared:
    q, k, v, g, beta = inputs
    lead = g.shape[:3]
    square = jax.ShapeDtypeStruct((*lead, spec.chunk, spec.chunk), k.dtype)
    outs = _Prepared(
        scores=square,
        coupling=square if spec.delta else _NOTHING,
        corrections=k if spec.delta else _NOTHING,
        targets=v if spec.delta else _NOTHING,
        reading=q if spec.channel else g,
        writing=k if spec.channel else g,
        whole=jax.ShapeDtypeStruct((*lead, spec.rows), jnp.float32) if spec.channel else _NOTHING,
    )
    return _Prepared(*_call(spec, "prepare", (q, k, v, g, _given(beta)), outs))


def _states(
    spec: Spec, bounds: jax.Array | None, inputs: Inputs, prepared: _Prepared, initial: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the states before each chunk [B,N,n,Hk,Hv], v or t of the delta rule, and the states after each chain."""
    values = prepared.targets if spec.delta else inputs.v
    arrays = (
        inputs.k, values, _given(inputs.beta), prepared.corrections, prepared.reading, prepared.writing, prepared.whole,
        _given(bounds, jnp.int32), _given(initial),
    )  # fmt: skip
    state = (spec.rows, spec.width)
    outs = [
        jax.ShapeDtypeStruct((*inputs.k.shape[:3], *state), inputs.k.dtype),
        values if spec.delta else _NOTHING,
        jax.ShapeDtypeStruct((spec.batch, spec.chains, spec.heads, *state), jnp.float32),
    ]
    before, new, final = _call(spec, "states", arrays, outs)
    return before, new if spec.delta else values, final


# A result that a kernel does not write, and an argument that it does not read, still need an address.
_NOTHING = jax.ShapeDtypeStruct((1,), jnp.float32)


def _given(x: jax.Array | None, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros((1,), dtype) if x is None else x


def _tile(spec: Spec, kernel: str) -> tuning.Tile:
    return tuning.lookup(kernel, rows=spec.rows, width=spec.width, channel=spec.channel, exact=spec.exact)


def _call(spec: Spec, kernel: str, arrays: tuple[jax.Array, ...], outs: Any) -> list[jax.Array]:
    """Calls a kernel; `outs` are arrays or shapes that the results are like."""
    tile = _tile(spec, kernel)
    chunks = spec.batch * spec.heads * spec.chunks
    blocks_v, blocks_k = spec.width // tile.block_v, spec.rows // tile.block_k
    chains = spec.batch * spec.heads * spec.chains * blocks_v
    programs = {"output": chunks * blocks_v, "token_gradients": chunks * blocks_k, "states": chains, "state_gradients": chains}
    constants = {
        "CHUNKS": spec.chunks,
        "HEADS": spec.heads,
        "CHAINS": spec.chains,
        "C": spec.chunk,
        "LEVELS": spec.chunk.bit_length() - 1,
        "ROWS": spec.rows,
        "WIDTH": spec.width,
        "BLOCK_K": tile.block_k,
        "BLOCK_V": tile.block_v,
        "CHANNEL": spec.channel,
        "DELTA": spec.delta,
        "INITIAL": spec.initial,
        "LISTED": spec.listed,
    }
    return launch.call(
        f"{kernel}_kernel",
        arrays,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        programs=programs.get(kernel, chunks),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=spec.interpret,
        device_kind=spec.device_kind,
        module=_MODULE,
        **{name: constants[name] for name in _CONSTANTS[kernel].split()},
    )


_CHAIN = "CHUNKS HEADS CHAINS C ROWS WIDTH BLOCK_V CHANNEL DELTA"
_CONSTANTS = {
    "prepare": "C LEVELS ROWS WIDTH BLOCK_K BLOCK_V CHANNEL DELTA",
    "states": f"{_CHAIN} INITIAL LISTED",
    "output": "C ROWS WIDTH BLOCK_K BLOCK_V CHANNEL DELTA",
    "state_gradients": f"{_CHAIN} LISTED",
    "pair_gradients": "C WIDTH BLOCK_V DELTA",
    "token_gradients": "C LEVELS ROWS WIDTH BLOCK_K BLOCK_V CHANNEL DELTA",
}


def _bounds(chains: Chains) -> jax.Array:
    """First chunk of every chain and the one behind its last, [B, S, 2] int32; padding at the end is the last chain's."""
    names = jnp.arange(chains.last.shape[1], dtype=jnp.int32)[:, None]
    chain = chains.chain[:, None].astype(jnp.int32)
    start = jnp.sum(chain < names, axis=-1, dtype=jnp.int32)
    return jnp.stack([start, jnp.sum(chain <= names, axis=-1, dtype=jnp.int32)], axis=-1)


def _pad(x: jax.Array, to: Any = tuning.padded_rows) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, to(x.shape[-1]) - x.shape[-1])])

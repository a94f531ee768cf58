"""Attention by the Triton kernels as one differentiable function of arrays in the ops' layout."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import schedule
from kernels_pallas.attention_triton import launch, lists, tuning

LARGEST_WIDTH = 256
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static description of a call; see `attention` for the meaning of its arguments."""

    normalization: str
    window: tuple[int | None, int | None]
    causal: bool
    scale: float
    bias: float
    block_q: int | None
    block_kv: int | None
    device_kind: str | None
    interpret: bool


class Indices(NamedTuple):
    """What decides which pairs are seen; no gradient flows here."""

    q_positions: jax.Array | None
    kv_positions: jax.Array | None
    q_segments: jax.Array | None
    kv_segments: jax.Array | None
    block_index: jax.Array | None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    normalization: Literal["softmax", "sigmoid"],
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    kv_mask: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    scale: float | None = None,
    bias: float = 0.0,
    block_index: jax.Array | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    return_lse: bool = False,
    device_kind: str | None = None,
    interpret: bool = False,
) -> Any:
    """Softmax or sigmoid attention, dense or over listed key blocks, forward and backward by kernels.

    Shapes are taken as checked (`attnlab.ops` does); `refusal` says what the kernels cannot do.

    Args:
        q: [B, T, N, H], float32, bfloat16 or float16.
        k: [B, S, K, H]; query head n attends with head n // (N // K).
        v: [B, S, K, H].
        normalization: "softmax" or "sigmoid".
        causal: hide later keys; query i stands at S - T + i unless positions are given.
        window: canonical (left, right) with None = no limit.
        q_segment_ids: [B, T] int32.
        kv_segment_ids: [B, S] int32.
        q_positions: [1 or B, T] int32; given exactly when `kv_positions` is.
        kv_positions: [1 or B, S] int32, negative = empty.
        kv_mask: [B, S] bool, False = padding.
        alibi_slopes: [1 or B, N] float32, constants (no gradient).
        scale: of the products; default H^-1/2.
        bias: constant of all scores (sigmoid).
        block_index: [B, G, ceil(T / block_q), J] int32, G = 1, K or N; -1 = none; no block twice in a row.
        block_q: queries per block, a multiple of 16; needed with `block_index`.
        block_kv: keys per block, alike.
        return_lse: also return the log-sum-exp of the scores (softmax).
        device_kind: the GPU to compile for where none is present.
        interpret: run in Triton's interpreter.

    Returns:
        [B, T, N, H] in the type of q; with `return_lse` also [B, N, T] float32, -infinity where a query saw no key.
    """
    batch, length, heads, width = q.shape
    keys = k.shape[1]
    if kv_mask is not None:  # padding keys carry a segment that no query has
        kv_segment_ids = jnp.zeros((batch, keys), jnp.int32) if kv_segment_ids is None else kv_segment_ids
        q_segment_ids = jnp.zeros((batch, length), jnp.int32) if q_segment_ids is None else q_segment_ids
        kv_segment_ids = jnp.where(kv_mask, kv_segment_ids, schedule.NO_SEGMENT)

    def rows(x):
        return None if x is None else jnp.broadcast_to(x.astype(jnp.int32), (batch, x.shape[1]))

    spec = Spec(
        normalization=normalization,
        window=(window[0], 0) if causal else tuple(window),
        causal=causal,
        scale=float(width**-0.5 if scale is None else scale),
        bias=float(bias),
        block_q=None if block_index is None else block_q,
        block_kv=None if block_index is None else block_kv,
        device_kind=device_kind,
        interpret=interpret,
    )
    slopes = None
    if alibi_slopes is not None:
        slopes = jnp.broadcast_to(alibi_slopes.astype(jnp.float32) * LOG2E, (batch, heads))  # scores are base 2
        slopes = jax.lax.stop_gradient(slopes)
    vectors = (rows(x) for x in (q_positions, kv_positions, q_segment_ids, kv_segment_ids))
    out, lse = _attend(spec, q, k, v, slopes, Indices(*vectors, block_index))
    if not return_lse:
        return out
    return out, jnp.where(lse == jnp.inf, -jnp.inf, lse * LN2)


def refusal(
    shape: tuple[int, ...],
    dtype: Any,
    *,
    keys: int,
    kv_heads: int,
    scale: float = 1.0,
    block_q: int | None = None,
    block_kv: int | None = None,
    interpret: bool = False,
) -> str | None:
    """Says why the kernels cannot do a call, or None.

    Args:
        shape: of q.
        dtype: of q, k and v.
        keys: S.
        kv_heads: K.
        scale: of the products.
        block_q: queries per block of a block list, or None.
        block_kv: keys per block, alike.
        interpret: the call is for the interpreter.
    """
    _, length, heads, width = shape
    absent = launch.missing(interpret)
    if absent is not None:
        return absent
    if dtype not in DTYPES:
        return f"the kernel computes in float32, bfloat16 and float16, not {jnp.dtype(dtype).name}; cast q, k and v"
    if width > LARGEST_WIDTH:
        return f"the kernel holds heads of width H <= {LARGEST_WIDTH}, not {width}; use more heads, or 'xla'"
    if not scale > 0.0:
        return f"scale = {scale}: the kernel needs a positive one"
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if block is not None and block % tuning.SMALLEST:
            return f"{name} = {block}: the kernel needs a multiple of {tuning.SMALLEST}"
    if max(length * heads, keys * kv_heads) * width >= 2**31:
        return "one batch row of q or k has 2^31 or more elements: the kernel counts them in 32 bits"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array | None, indices: Indices
) -> tuple[jax.Array, jax.Array]:
    """Returns out, and the base-2 log-sum-exp [B, N, T] (of no size for the sigmoid)."""
    batch, length, heads, _ = q.shape
    rows = (batch, heads, length) if spec.normalization == "softmax" else (0,)
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(rows, jnp.float32)]
    if spec.normalization == "sigmoid":  # a buffer without elements has no address to pass
        out[1] = jax.ShapeDtypeStruct((1,), jnp.float32)
    result, lse = _call("forward", spec, (q, k, v), (), slopes, indices, out)
    return result, lse


def _attend_forward(spec, q, k, v, slopes, indices):
    out, lse = _attend(spec, q, k, v, slopes, indices)
    softmax = spec.normalization == "softmax"
    return (out, lse), (q, k, v, slopes, indices, out if softmax else None, lse if softmax else None)


def _attend_backward(spec, residuals, cotangents):
    q, k, v, slopes, indices, out, lse = residuals
    do, dlse = cotangents
    do = do.astype(q.dtype)
    if spec.normalization == "softmax":
        delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), do.astype(jnp.float32)) - dlse * LOG2E
    else:
        lse = delta = jnp.zeros((1,), jnp.float32)
    shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    (dq,) = _call("dq", spec, (q, k, v), (do, lse, delta), slopes, indices, shape[:1])
    dk, dv = _call("dkv", spec, (q, k, v), (do, lse, delta), slopes, indices, shape[1:])
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), indices)
    return dq, dk, dv, None if slopes is None else jnp.zeros_like(slopes), nothing


_attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kind: tuning.Pass,
    spec: Spec,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    rest: tuple[jax.Array, ...],
    slopes: jax.Array | None,
    indices: Indices,
    out: list[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Calls the kernel of one pass, with the lists that it walks."""
    q, k, _ = inputs
    arguments, constants = describe(kind, spec, q, k, slopes, indices)
    return launch.call(
        f"{kind}_kernel",
        (*inputs, *rest, *arguments),
        out,
        interpret=spec.interpret,
        device_kind=spec.device_kind,
        **constants,
    )


def describe(
    kind: tuning.Pass, spec: Spec, q: jax.Array, k: jax.Array, slopes: jax.Array | None, indices: Indices
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Returns the last array arguments of a kernel, and its constants (with the grid and the compiler's options)."""
    batch, length, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    padded = tuning.padded_width(width)
    sizes = {"length": length, "keys": keys, "block_q": spec.block_q, "block_kv": spec.block_kv}
    tile = tuning.lookup(kind, q.dtype, padded, spec.device_kind, **sizes)
    dense = all(x is None for x in indices)
    # an argument that a kernel does not use still needs an address
    empty = jnp.zeros((1,), jnp.int32)
    made = lists.Lists(empty[None, None], empty)
    if not dense:
        made = lists.build(tile, **sizes, window=spec.window, transposed=kind == "dkv", **indices._asdict())
    vectors = [empty if x is None else x for x in indices[:4]]
    arguments = (jnp.zeros((1,), jnp.float32) if slopes is None else slopes, *vectors, *made)
    tiles = batch * kv_heads * -(-keys // tile.block_n) if kind == "dkv" else batch * heads * -(-length // tile.block_m)
    constants = {
        "programs": tiles,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "LENGTH": length,
        "KEYS": keys,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "WIDTH": width,
        "PADDED": padded,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SCALE": spec.scale * LOG2E,
        "BIAS": spec.bias * LOG2E,
        "SIGMOID": spec.normalization == "sigmoid",
        "CAUSAL": spec.causal,
        "LEFT": spec.window[0],
        "RIGHT": spec.window[1],
        "POSITIONS": indices.q_positions is not None,
        "SEGMENTS": indices.q_segments is not None,
        "ALIBI": slopes is not None,
        "LISTED": not dense,
        "ENTRIES": made.entries.shape[-1],
        "TABLE_BATCH": made.entries.shape[0],
        "TABLE_GROUPS": made.entries.shape[1],
        "PRECISION": "ieee" if q.dtype == jnp.float32 else "tf32",
    }
    return arguments, constants

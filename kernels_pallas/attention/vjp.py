"""Attention by the TPU kernels as one differentiable function of arrays in the ops' layout."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import schedule, tuning
from kernels_pallas.attention.spec import BOUND, LANES, LN2, LOG2E, Spec
from kernels_pallas.attention.tpu import forward
from kernels_pallas.attention.tpu_backward import backward_dkv, backward_dq

LARGEST_WIDTH = 256
LARGEST_BLOCK = 2048
# Below this bias a weight is so small (e^-12) that the absolute error of tanh, 1e-7, would show in bfloat16.
_TANH_BIAS = -12.0
# int32 entries of the list of steps that fit into scalar memory beside everything else
_SCALAR_ENTRIES = 128 * 1024


class _Indices(NamedTuple):
    """What decides which pairs are seen; no gradient flows here."""

    q_vectors: dict[str, jax.Array]
    kv_vectors: dict[str, jax.Array]
    block_index: jax.Array | None
    bounded: jax.Array | None


class Inputs(NamedTuple):
    """Arguments in the kernels' layout.

    Attributes:
        spec: the static description.
        q: [B, N, padded T, padded H], scaled.
        k: [B, K, padded S, padded H].
        v: alike.
        slopes: [B, N] float32, or None.
        indices: what decides which pairs are seen.
    """

    spec: Spec
    q: jax.Array
    k: jax.Array
    v: jax.Array
    slopes: jax.Array | None
    indices: _Indices


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
        q: [B, T, N, H], float32 or bfloat16.
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
        block_q: queries per block, a multiple of 128; needed with `block_index`.
        block_kv: keys per block, alike.
        return_lse: also return the log-sum-exp of the scores (softmax).
        device_kind: whose sizes to take from the tuned tables.
        interpret: run in Pallas' interpreter.

    Returns:
        [B, T, N, H] in the type of q; with `return_lse` also [B, N, T] float32, -infinity where a query saw no key.
    """
    length, width = q.shape[1], q.shape[3]
    inputs = prepare(
        q,
        k,
        v,
        normalization=normalization,
        causal=causal,
        window=window,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_positions=q_positions,
        kv_positions=kv_positions,
        kv_mask=kv_mask,
        alibi_slopes=alibi_slopes,
        scale=scale,
        bias=bias,
        block_index=block_index,
        block_q=block_q,
        block_kv=block_kv,
        device_kind=device_kind,
        interpret=interpret,
    )
    out, lse = by_rows(inputs.spec, _attend, *inputs[1:])
    out = jnp.swapaxes(out[:, :, :length, :width], 1, 2)
    return (out, natural(lse, length)) if return_lse else out


def prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    normalization: Literal["softmax", "sigmoid"],
    causal: bool,
    window: tuple[int | None, int | None],
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
    kv_mask: jax.Array | None,
    alibi_slopes: jax.Array | None,
    scale: float | None,
    bias: float,
    block_index: jax.Array | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    device_kind: str | None = None,
    interpret: bool = False,
    wide: bool = False,
) -> Inputs:
    """Brings the arguments of `attention` into the kernels' layout; `wide` asks for results in float32."""
    batch, length, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    window = (window[0], 0) if causal else tuple(window)
    scale = width**-0.5 if scale is None else scale
    form = "softmax"
    if normalization == "sigmoid":
        form = "tanh" if q.dtype == jnp.bfloat16 and bias >= _TANH_BIAS else "logistic"
    tuned = tuning.lookup(device_kind, form)
    block_q, block_kv = _blocks(length, keys, tuned.block, block_q, block_kv)
    if kv_mask is not None:  # padding keys carry a segment that no query has
        kv_segment_ids = jnp.zeros((batch, keys), jnp.int32) if kv_segment_ids is None else kv_segment_ids
        q_segment_ids = jnp.zeros((batch, length), jnp.int32) if q_segment_ids is None else q_segment_ids
        kv_segment_ids = jnp.where(kv_mask, kv_segment_ids, schedule.NO_SEGMENT)
    spec = Spec(
        form=form,
        window=window,
        causal=causal,
        offset=keys - length,
        length=length,
        keys=keys,
        scale=float(scale),
        bias=float(bias),
        positions=q_positions is not None,
        segments=q_segment_ids is not None,
        alibi=alibi_slopes is not None,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        width=-(-width // 64) * 64,
        block_q=block_q,
        block_kv=block_kv,
        table_batch=batch if block_index is not None or q_positions is not None or q_segment_ids is not None else 1,
        table_groups=1 if block_index is None else block_index.shape[1],
        forward=tuned.forward,
        online=tuned.online,
        dq=tuned.dq,
        dkv=tuned.dkv,
        interpret=interpret,
        wide=wide,
    )
    padded_q, padded_kv = -length % block_q, -keys % block_kv
    scaled = (q.astype(jnp.float32) * (spec.scale * spec.factor)).astype(q.dtype)
    q_in, k_in, v_in = _heads_first(scaled, padded_q, spec), _heads_first(k, padded_kv, spec), _heads_first(v, padded_kv, spec)
    q_vectors, kv_vectors = {}, {}
    if spec.positions:
        q_vectors["positions"] = _vector(q_positions, padded_q, None)
        kv_vectors["positions"] = _vector(kv_positions, padded_kv, -1)
    if spec.segments:
        q_vectors["segments"] = _vector(q_segment_ids, padded_q, None)
        kv_vectors["segments"] = _vector(kv_segment_ids, padded_kv, schedule.NO_SEGMENT)
    slopes = None
    if spec.alibi:
        slopes = jax.lax.stop_gradient(jnp.broadcast_to(alibi_slopes.astype(jnp.float32), (batch, heads)))
    bounded = _certify(spec, q_in, k_in, slopes, q_vectors, kv_vectors) if form == "softmax" else None
    return Inputs(spec, q_in, k_in, v_in, slopes, _Indices(q_vectors, kv_vectors, block_index, bounded))


def natural(lse: jax.Array, length: int) -> jax.Array:
    """The kernels' log2-sum-exp2 [B, N, 1, padded T] as log-sum-exp [B, N, T], -infinity where a query saw no key."""
    lse = lse[:, :, 0, :length]
    return jnp.where(lse == jnp.inf, -jnp.inf, lse * LN2)


def refusal(
    shape: tuple[int, ...],
    dtype: Any,
    *,
    keys: int,
    block_q: int | None = None,
    block_kv: int | None = None,
    table: tuple[int, ...] | None = None,
) -> str | None:
    """Says why the kernels cannot do a call, or None.

    Args:
        shape: of q.
        dtype: of q, k and v.
        keys: S.
        block_q: queries per block, None = the kernel's choice.
        block_kv: keys per block, alike.
        table: shape of `block_index`, or None.
    """
    length, width = shape[1], shape[3]
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernel computes in float32 and bfloat16, not {jnp.dtype(dtype).name}; cast q, k and v"
    if width > LARGEST_WIDTH:
        return f"the kernel holds heads of width H <= {LARGEST_WIDTH}, not {width}; use more heads, or 'xla'"
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if block is not None and (block % LANES or not 0 < block <= LARGEST_BLOCK):
            return f"{name} = {block}: the kernel needs a multiple of {LANES} up to {LARGEST_BLOCK}"
    block_q, block_kv = _blocks(length, keys, LARGEST_BLOCK // 4, block_q, block_kv)
    q_blocks, kv_blocks = -(-length // block_q), -(-keys // block_kv)
    if max(q_blocks, kv_blocks) > schedule.MAX_BLOCKS:
        return f"{max(q_blocks, kv_blocks)} blocks: the kernel numbers at most {schedule.MAX_BLOCKS}; use larger blocks"
    entries = _entries(q_blocks, kv_blocks, table)
    if entries > _SCALAR_ENTRIES:
        return (
            f"the list of block pairs has {entries} entries and scalar memory holds {_SCALAR_ENTRIES}; use larger blocks, "
            "shorter lists or fewer groups"
        )
    return None


def _entries(q_blocks: int, kv_blocks: int, table: tuple[int, ...] | None) -> int:
    """Steps of one batch row at most, for a dense call or for lists of the shape `table`."""
    return q_blocks * kv_blocks if table is None else table[1] * (math.prod(table[2:]) + kv_blocks)


def _blocks(length: int, keys: int, largest: int, block_q: int | None, block_kv: int | None) -> tuple[int, int]:
    """Block sizes of a call: those given, else about `largest`, or larger where the list of pairs would be too long."""
    while True:
        q = tuning.block_size(length, largest) if block_q is None else block_q
        kv = tuning.block_size(keys, largest) if block_kv is None else block_kv
        if -(-length // q) * -(-keys // kv) <= _SCALAR_ENTRIES or largest >= LARGEST_BLOCK:
            return q, kv
        largest *= 2


def _heads_first(x: jax.Array, padding: int, spec: Spec) -> jax.Array:
    """[B, L, n, H] to [B, n, padded L, padded H]."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, spec.width - x.shape[3])))


def _vector(x: jax.Array, padding: int, value: int | None) -> jax.Array:
    """[b, L] to [b, 1, padded L] int32, padded with a value or (None) with the last one."""
    x = x.astype(jnp.int32)[:, None]
    widths = ((0, 0), (0, 0), (0, padding))
    return jnp.pad(x, widths, mode="edge") if value is None else jnp.pad(x, widths, constant_values=value)


def _certify(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    slopes: jax.Array | None,
    q_vectors: dict[str, jax.Array],
    kv_vectors: dict[str, jax.Array],
) -> jax.Array:
    """Returns [B, N] int32, 1 where no inner score can leave [-BOUND, BOUND] (Cauchy-Schwarz)."""
    q, k = jax.lax.stop_gradient((q, k))

    def longest(x):
        return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1), axis=-1))

    bound = longest(q) * jnp.repeat(longest(k), spec.group, axis=1)
    if slopes is not None:
        span = float(max(spec.length, spec.keys))
        if spec.positions:
            both = jnp.concatenate([q_vectors["positions"].ravel(), kv_vectors["positions"].ravel()])
            span = (jnp.max(both) - jnp.min(both)).astype(jnp.float32)
        bound = bound + jnp.abs(slopes) * (spec.factor * span)
    return (bound <= BOUND).astype(jnp.int32)


def _ranges(spec: Spec, indices: _Indices) -> tuple[schedule.Ranges, schedule.Ranges]:
    """Ranges of positions and segments of the query blocks and the key blocks."""
    if spec.positions:
        q = schedule.position_ranges(indices.q_vectors["positions"], spec.block_q, empty=False)
        kv = schedule.position_ranges(indices.kv_vectors["positions"], spec.block_kv, empty=True)
    else:
        q = schedule.index_ranges(spec.length, spec.block_q, spec.offset, mask_tail=False)
        kv = schedule.index_ranges(spec.keys, spec.block_kv, 0, mask_tail=spec.form == "softmax")
    if spec.segments:
        q = schedule.with_segments(q, indices.q_vectors["segments"], spec.block_q)
        kv = schedule.with_segments(kv, indices.kv_vectors["segments"], spec.block_kv)
    return q, kv


def steps_of(spec: Spec, indices: _Indices, *, transposed: bool) -> jax.Array:
    """The list of steps of a call (schedule.py), [table_batch, table_groups, L] int32; `transposed` = by key blocks."""
    q, kv = _ranges(spec, indices)
    if indices.block_index is None:
        steps = schedule.dense(q, kv, spec.window, transposed=transposed)
    else:
        steps = schedule.listed(indices.block_index, q, kv, spec.window, transposed=transposed)
    shape = (spec.table_batch, spec.table_groups, steps.shape[-1])
    return jnp.broadcast_to(jnp.asarray(steps, jnp.int32), shape)


def by_rows(spec: Spec, run: Any, *inputs: Any) -> Any:
    """Calls `run(spec, *inputs)` on so many batch rows at a time that their lists of steps fit into scalar memory."""
    indices = next(x for x in inputs if isinstance(x, _Indices))
    table = None if indices.block_index is None else indices.block_index.shape
    blocks = (-(-spec.length // spec.block_q), -(-spec.keys // spec.block_kv))
    rows = max(_SCALAR_ENTRIES // _entries(*blocks, table), 1)
    if spec.table_batch == 1 or rows >= spec.batch:
        return run(spec, *inputs)
    rows = next(r for r in range(rows, 0, -1) if spec.batch % r == 0)
    part = dataclasses.replace(spec, batch=rows, table_batch=rows)

    def cut(x):
        return jnp.broadcast_to(x, (spec.batch, *x.shape[1:])).reshape(-1, rows, *x.shape[1:])

    results = jax.lax.map(lambda cuts: run(part, *cuts), jax.tree.map(cut, inputs))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array | None, indices: _Indices
) -> tuple[jax.Array, jax.Array | None]:
    steps = steps_of(spec, indices, transposed=False)
    return forward(spec, steps, indices.bounded, q, k, v, slopes, indices.q_vectors, indices.kv_vectors)


def _attend_forward(spec, q, k, v, slopes, indices):
    out, lse = _attend(spec, q, k, v, slopes, indices)
    return (out, lse), (q, k, v, slopes, indices, out if spec.form == "softmax" else None, lse)


def _attend_backward(spec, residuals, cotangents):
    q, k, v, slopes, indices, out, lse = residuals
    do, dlse = cotangents
    delta = None
    if spec.form == "softmax":
        delta = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)[:, :, None] - dlse * LOG2E
    dq, dk, dv = gradients(spec, q, k, v, do, lse, delta, slopes, indices)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), indices)
    return dq, dk, dv, None if slopes is None else jnp.zeros_like(slopes), nothing


def gradients(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array | None,
    delta: jax.Array | None,
    slopes: jax.Array | None,
    indices: _Indices,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q (scaled), k and v by the kernels; `lse` and `delta` [B, N, 1, T] in base 2 (`tpu_backward`)."""
    arguments = (q, k, v, do, lse, delta, slopes, indices.q_vectors, indices.kv_vectors)
    dq = backward_dq(spec, steps_of(spec, indices, transposed=False), *arguments)
    return dq, *backward_dkv(spec, steps_of(spec, indices, transposed=True), *arguments)


_attend.defvjp(_attend_forward, _attend_backward)

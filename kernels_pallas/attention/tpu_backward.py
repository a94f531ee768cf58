"""Attention on TPU, backward: one kernel for dq that walks by query blocks, one for dk and dv that walks by key blocks.

Both recompute the weights from q, k (and the log-sum-exp of the forward pass for softmax; a sigmoid needs nothing more).
The dk, dv kernel works on transposed scores, k q^T, so that what belongs to a query lies along the lanes and its two
accumulating products need no transposition.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import schedule
from kernels_pallas.attention.spec import LANES, NN, NT, Spec, gradient_factor, output_factor, product, slope, weight
from kernels_pallas.attention.tpu import (
    across,
    compiler_params,
    hidden_zero,
    kv_head,
    pipelined,
    relations,
    shifted,
    side_specs,
    split_refs,
    stage_of,
    stages,
    table_index,
    to_column,
)


def _weights_and_gradient(
    spec: Spec, scores: jax.Array, mask: jax.Array | None, upstream: jax.Array, lse: Any, delta: Any
) -> tuple[jax.Array, jax.Array]:
    """Weights (up to `output_factor`) and score gradients (up to `gradient_factor`) of one sub-tile.

    Args:
        spec: the call.
        scores: inner scores, bias and ALiBi included.
        mask: or None.
        upstream: do v^T, or its transpose.
        lse: log2-sum-exp2 of the rows, of a shape that broadcasts to the scores; None for sigmoid.
        delta: row sums of o do (less the gradient of the log-sum-exp), alike.
    """
    if spec.form == "softmax":
        weights = jnp.exp2(scores - lse)
        if mask is not None:
            weights = jnp.where(mask, weights, 0.0)
        return weights, weights * (upstream - delta)
    weights = weight(spec, scores)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return weights, slope(spec, weights) * upstream


def _dq_kernel(*refs: Any, spec: Spec, steps: int) -> None:
    softmax = int(spec.form == "softmax")
    vectors = len(spec.vectors)
    counts = {"steps": 1, "q": 1, "k": 1, "v": 1, "do": 1, "lse": softmax, "delta": softmax, "slopes": int(spec.alibi)}
    counts |= {"q_vectors": vectors, "kv_vectors": vectors, "dq": 1, "acc": 1}
    counts |= {"lse_column": softmax, "delta_column": softmax, "columns_vectors": vectors}
    named = split_refs(spec, refs, counts)
    staged = refs[sum(counts.values()) :]
    q, k, v, do, acc = (named[name] for name in ("q", "k", "v", "do", "acc"))
    batch, head, at = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    step = named["steps"][table_index(spec, steps, batch, head) + at]
    kind = schedule.kind(step)

    @pl.when(schedule.is_first(step))
    def _():
        acc[...] = jnp.zeros_like(acc)
        if softmax:
            named["lse_column"][...] = to_column(named["lse"][...])
            named["delta_column"][...] = to_column(named["delta"][...])
        for name, column in named["columns_vectors"].items():
            column[...] = to_column(named["q_vectors"][name][...])

    def body(masked):
        def produce(rows, columns):
            scores = product(q[rows, :], k[columns, :], NT)
            between, mask = relations(
                spec,
                rows,
                columns,
                row_start=schedule.stays(step) * spec.block_q,
                column_start=schedule.streams(step) * spec.block_kv,
                row_vectors=named["columns_vectors"],
                column_vectors=named["kv_vectors"],
                rows_are_keys=False,
                masked=masked,
            )
            scores = shifted(spec, scores, between, named["slopes"], batch * spec.heads + head)
            upstream = product(do[rows, :], v[columns, :], NT)
            lse = across(named["lse_column"][rows, :], scores.shape[1]) if softmax else None
            delta = across(named["delta_column"][rows, :], scores.shape[1]) if softmax else None
            return (_weights_and_gradient(spec, scores, mask, upstream, lse, delta)[1].astype(k.dtype),)

        def consume(rows, columns, gradient):
            acc[rows, :] += product(gradient, k[columns, :], NN)

        stage = stage_of(spec.dq, masked, spec.block_q, spec.block_kv, staged, 1)
        pipelined(spec.dq[masked], spec.block_q, spec.block_kv, produce, consume, stage, hidden_zero(kind))

    pl.when(kind == schedule.FULL)(functools.partial(body, False))
    pl.when(kind == schedule.PARTIAL)(functools.partial(body, True))

    @pl.when(schedule.is_last(step))
    def _():
        named["dq"][...] = (acc[...] * (gradient_factor(spec) / spec.factor)).astype(named["dq"].dtype)


def _dkv_kernel(*refs: Any, spec: Spec, steps: int, per_query_head: bool) -> None:
    softmax = int(spec.form == "softmax")
    vectors = len(spec.vectors)
    counts = {"steps": 1, "q": 1, "k": 1, "v": 1, "do": 1, "lse": softmax, "delta": softmax, "slopes": int(spec.alibi)}
    counts |= {"q_vectors": vectors, "kv_vectors": vectors, "dk": 1, "dv": 1, "dk_acc": 1, "dv_acc": 1}
    counts |= {"columns_vectors": vectors}
    named = split_refs(spec, refs, counts)
    staged = refs[sum(counts.values()) :]
    q, k, v, do, dk_acc, dv_acc = (named[name] for name in ("q", "k", "v", "do", "dk_acc", "dv_acc"))
    batch, at, member = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    members = 1 if per_query_head else spec.group
    head = pl.program_id(1) * members + member
    step = named["steps"][table_index(spec, steps, batch, head) + at]
    kind = schedule.kind(step)

    @pl.when(jnp.logical_and(schedule.is_first(step), member == 0))
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)
        for name, column in named["columns_vectors"].items():
            column[...] = to_column(named["kv_vectors"][name][...])

    def body(masked):
        def produce(rows, columns):
            scores = product(k[rows, :], q[columns, :], NT)
            between, mask = relations(
                spec,
                rows,
                columns,
                row_start=schedule.stays(step) * spec.block_kv,
                column_start=schedule.streams(step) * spec.block_q,
                row_vectors=named["columns_vectors"],
                column_vectors=named["q_vectors"],
                rows_are_keys=True,
                masked=masked,
            )
            scores = shifted(spec, scores, between, named["slopes"], batch * spec.heads + head)
            upstream = product(v[rows, :], do[columns, :], NT)
            lse = named["lse"][:, columns] if softmax else None
            delta = named["delta"][:, columns] if softmax else None
            both = _weights_and_gradient(spec, scores, mask, upstream, lse, delta)
            return tuple(x.astype(q.dtype) for x in both)

        def consume(rows, columns, weights, gradient):
            dv_acc[rows, :] += product(weights, do[columns, :], NN)
            dk_acc[rows, :] += product(gradient, q[columns, :], NN)

        stage = stage_of(spec.dkv, masked, spec.block_kv, spec.block_q, staged, 2)
        pipelined(spec.dkv[masked], spec.block_kv, spec.block_q, produce, consume, stage, hidden_zero(kind))

    pl.when(kind == schedule.FULL)(functools.partial(body, False))
    pl.when(kind == schedule.PARTIAL)(functools.partial(body, True))

    @pl.when(jnp.logical_and(schedule.is_last(step), member == members - 1))
    def _():
        dk = dk_acc[...] * (gradient_factor(spec) / spec.factor)
        named["dk"][...] = dk.astype(named["dk"].dtype)
        named["dv"][...] = (dv_acc[...] * output_factor(spec)).astype(named["dv"].dtype)


def _statistics_arguments(lse: jax.Array | None, delta: jax.Array | None) -> list[jax.Array]:
    return [] if lse is None else [lse, delta]


def backward_dq(
    spec: Spec,
    steps: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array | None,
    delta: jax.Array | None,
    slopes: jax.Array | None,
    q_vectors: dict[str, jax.Array],
    kv_vectors: dict[str, jax.Array],
) -> jax.Array:
    """Gradient of the scaled q, [B, N, T, H]; arguments as in `tpu.forward`, `lse` and `delta` [B, N, 1, T] float32."""
    count = steps.shape[-1]

    def q_block(b, n, l, table):
        return schedule.stays(table[table_index(spec, count, b, n) + l])

    def kv_block(b, n, l, table):
        return schedule.streams(table[table_index(spec, count, b, n) + l])

    q_spec = pl.BlockSpec(
        (None, None, spec.block_q, spec.width), lambda b, n, l, table: (b, n, q_block(b, n, l, table), 0)
    )
    kv_spec = pl.BlockSpec(
        (None, None, spec.block_kv, spec.width),
        lambda b, n, l, table: (b, kv_head(spec, n), kv_block(b, n, l, table), 0),
    )
    row_spec = pl.BlockSpec((None, None, 1, spec.block_q), lambda b, n, l, table: (b, n, 0, q_block(b, n, l, table)))
    statistics = _statistics_arguments(lse, delta)
    in_specs = [q_spec, kv_spec, kv_spec, q_spec] + [row_spec] * len(statistics)
    arguments = [q, k, v, do, *statistics]
    if spec.alibi:
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
        arguments.append(slopes.reshape(-1))
    in_specs += side_specs(spec, q_vectors, spec.block_q, q_block)
    in_specs += side_specs(spec, kv_vectors, spec.block_kv, kv_block)
    arguments += [q_vectors[name] for name in spec.vectors] + [kv_vectors[name] for name in spec.vectors]
    column = pltpu.VMEM((spec.block_q, LANES), jnp.float32)
    scratch = [pltpu.VMEM((spec.block_q, spec.width), jnp.float32), *[column] * len(statistics)]
    scratch += [pltpu.VMEM((spec.block_q, LANES), jnp.int32) for _ in spec.vectors]
    scratch += stages(spec.dq, spec.block_q, spec.block_kv, k.dtype, 1)
    return pl.pallas_call(
        functools.partial(_dq_kernel, spec=spec, steps=count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(spec.batch, spec.heads, count),
            in_specs=in_specs,
            out_specs=q_spec,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32 if spec.wide else q.dtype),
        compiler_params=compiler_params(3),
        interpret=spec.interpret,
        name=f"attention_{spec.form}_dq",
    )(steps.reshape(-1), *arguments)


def backward_dkv(
    spec: Spec,
    steps: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array | None,
    delta: jax.Array | None,
    slopes: jax.Array | None,
    q_vectors: dict[str, jax.Array],
    kv_vectors: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Gradients of k and v, [B, K, S, H]; arguments as in `backward_dq`, but the steps go by key block.

    The query heads of a group follow each other inside a step. Where their lists differ (`table_groups` == N) every query
    head has a gradient of its own, and those are summed here.
    """
    count = steps.shape[-1]
    per_query_head = spec.table_groups == spec.heads and spec.group > 1
    members = 1 if per_query_head else spec.group
    outer = spec.heads // members

    def head_of(h, r):
        return h * members + r

    def q_block(b, h, l, r, table):
        return schedule.streams(table[table_index(spec, count, b, head_of(h, r)) + l])

    def kv_block(b, h, l, r, table):
        return schedule.stays(table[table_index(spec, count, b, head_of(h, r)) + l])

    q_spec = pl.BlockSpec(
        (None, None, spec.block_q, spec.width),
        lambda b, h, l, r, table: (b, head_of(h, r), q_block(b, h, l, r, table), 0),
    )
    row_spec = pl.BlockSpec(
        (None, None, 1, spec.block_q), lambda b, h, l, r, table: (b, head_of(h, r), 0, q_block(b, h, l, r, table))
    )
    kv_shape = (None, None, spec.block_kv, spec.width)
    kv_spec = pl.BlockSpec(
        kv_shape, lambda b, h, l, r, table: (b, kv_head(spec, head_of(h, r)), kv_block(b, h, l, r, table), 0)
    )
    out_spec = pl.BlockSpec(kv_shape, lambda b, h, l, r, table: (b, h, kv_block(b, h, l, r, table), 0))
    statistics = _statistics_arguments(lse, delta)
    in_specs = [q_spec, kv_spec, kv_spec, q_spec] + [row_spec] * len(statistics)
    arguments = [q, k, v, do, *statistics]
    if spec.alibi:
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
        arguments.append(slopes.reshape(-1))
    in_specs += side_specs(spec, q_vectors, spec.block_q, q_block)
    in_specs += side_specs(spec, kv_vectors, spec.block_kv, kv_block)
    arguments += [q_vectors[name] for name in spec.vectors] + [kv_vectors[name] for name in spec.vectors]
    accumulator = pltpu.VMEM((spec.block_kv, spec.width), jnp.float32)
    scratch = [accumulator, accumulator, *[pltpu.VMEM((spec.block_kv, LANES), jnp.int32) for _ in spec.vectors]]
    scratch += stages(spec.dkv, spec.block_kv, spec.block_q, q.dtype, 2)
    narrow = jnp.float32 if spec.wide else k.dtype
    dtype = jnp.float32 if per_query_head else narrow
    shape = jax.ShapeDtypeStruct((spec.batch, outer, *k.shape[2:]), dtype)
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, spec=spec, steps=count, per_query_head=per_query_head),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(spec.batch, outer, count, members),
            in_specs=in_specs,
            out_specs=[out_spec, out_spec],
            scratch_shapes=scratch,
        ),
        out_shape=[shape, shape],
        compiler_params=compiler_params(4),
        interpret=spec.interpret,
        name=f"attention_{spec.form}_dkv",
    )(steps.reshape(-1), *arguments)
    if per_query_head:
        grouped = (spec.batch, spec.kv_heads, spec.group, *k.shape[2:])
        dk, dv = (x.reshape(grouped).sum(2).astype(narrow) for x in (dk, dv))
    return dk, dv

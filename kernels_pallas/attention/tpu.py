"""Attention on TPU, forward: a flash-style kernel that walks a list of block pairs (schedule.py).

For every query block the listed key blocks stream through; the result accumulates in VMEM. Three things make it lean:

- Masks are applied only in blocks that hold a hidden pair. Whether a block does is in the list, not tested per element.
- A sigmoid needs no statistics. A softmax whose scores are certified small, max |q| max |k| below `BOUND`, needs none either
  but its sum: 2^s is summed as it is, and the sum stays spread over the lanes until the end. Other heads take the path
  with a running maximum; the choice is made per head and batch row by a scalar.
- The block is cut into sub-tiles whose score products run a fixed number of sub-tiles ahead (`Tiles`, tuned per device),
  so that the MXU, the transcendental unit and the vector registers are shared without spilling.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import schedule
from kernels_pallas.attention.spec import (
    LANES,
    MASKED,
    NN,
    NT,
    Spec,
    Tiles,
    distance,
    output_factor,
    product,
    weight,
)


def sub_tiles(tiles: Tiles, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """Cuts a block of scores into sub-tiles, in the order in which they are computed."""
    height, width = min(tiles.rows, rows), min(tiles.columns, columns)
    row_slices = [slice(at, min(at + height, rows)) for at in range(0, rows, height)]
    column_slices = [slice(at, min(at + width, columns)) for at in range(0, columns, width)]
    if tiles.column_major:
        return [(r, c) for c in column_slices for r in row_slices]
    return [(r, c) for r in row_slices for c in column_slices]


def pipelined(
    tiles: Tiles, rows: int, columns: int, produce: Any, consume: Any, stage: list[tuple] | None = None, nothing: Any = 0
) -> None:
    """Runs `consume(r, c, *produce(r, c))` over the sub-tiles, `produce` ahead by the depth of the tiles.

    Args:
        tiles: how the block is cut.
        rows: of the block.
        columns: of the block.
        produce: makes a tuple of arrays [r, c].
        consume: takes them.
        stage: refs (see `stages`) that hold them in between, for tiles that are staged.
        nothing: a zero that the compiler does not know. Read back from an address that it does know, the arrays would be
            forwarded in registers, and those spilled.
    """
    parts = sub_tiles(tiles, rows, columns)
    ready: list[Any] = []
    for step in range(len(parts) + tiles.depth):
        if step < len(parts):
            made = produce(*parts[step])
            if tiles.staged:
                for ref, array in zip(stage[step], made, strict=True):
                    ref[: array.shape[0], :] = array.astype(ref.dtype)
                made = [array.shape for array in made]
            ready.append(made)
        if step >= tiles.depth:
            at = step - tiles.depth
            made, ready[at] = ready[at], None
            if tiles.staged:
                made = [ref[pl.ds(nothing, shape[0]), :] for ref, shape in zip(stage[at], made, strict=True)]
            consume(*parts[at], *made)


_STAGE_ROWS = 16  # beyond the sub-tile's: where a read from another address than zero would end


def stages(tiles: tuple[Tiles, Tiles], rows: int, columns: int, dtype: Any, count: int) -> list[Any]:
    """Scratch shapes of `count` arrays per sub-tile, each of its own so that the compiler can tell them apart.

    Args:
        tiles: of FULL and PARTIAL blocks.
        rows: of the block.
        columns: of the block.
        dtype: of the arrays.
        count: arrays per sub-tile.
    """
    shapes = []
    for one in tiles:
        for r, c in sub_tiles(one, rows, columns) if one.staged else []:
            shapes += [pltpu.VMEM((r.stop - r.start + _STAGE_ROWS, c.stop - c.start), dtype)] * count
    return shapes


def stage_of(tiles: tuple[Tiles, Tiles], masked: bool, rows: int, columns: int, refs: tuple, count: int) -> list[tuple]:
    """The refs of `stages` that belong to FULL (`masked` False) or PARTIAL blocks, by sub-tile."""
    first = len(sub_tiles(tiles[0], rows, columns)) * count if masked and tiles[0].staged else 0
    parts = len(sub_tiles(tiles[masked], rows, columns)) if tiles[masked].staged else 0
    return [refs[first + part * count : first + (part + 1) * count] for part in range(parts)]


def row_blocks(tiles: Tiles, rows: int, columns: int) -> list[list[tuple[slice, slice]]]:
    """The sub-tiles of `tiles`, rows by rows."""
    parts = sub_tiles(tiles._replace(column_major=False), rows, columns)
    return [list(group) for _, group in itertools.groupby(parts, key=lambda part: part[0].start)]


def score_stages(tiles: tuple[Tiles, Tiles], rows: int, columns: int) -> list[Any]:
    """Scratch shapes of the scores of FULL, then of PARTIAL blocks, one per sub-tile (see `stages`)."""
    parts = [part for one in tiles for blocks in row_blocks(one, rows, columns) for part in blocks]
    return [pltpu.VMEM((r.stop - r.start + _STAGE_ROWS, c.stop - c.start), jnp.float32) for r, c in parts]


def hidden_zero(kind: Any) -> Any:
    """A zero that the compiler cannot know to be one: the kind 3 does not exist."""
    return pl.multiple_of(jnp.where(kind == 3, _STAGE_ROWS, 0), _STAGE_ROWS)


def to_column(row: jax.Array) -> jax.Array:
    """[1, n] to [n, LANES], the same value in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def to_row(column: jax.Array) -> jax.Array:
    """[n, LANES] with one value in all lanes to [1, n]."""
    return column.T[:1]


def across(column: jax.Array, width: int) -> jax.Array:
    """[n, LANES] with one value in all lanes to [n, width]."""
    if width <= LANES:
        return column[:, :width]
    repeated = jnp.tile(column, (1, -(-width // LANES)))
    return repeated if width % LANES == 0 else repeated[:, :width]


def kv_head(spec: Spec, head: Any) -> Any:
    """Key/value head of a query head; `//` on traced integers would ask what device this process has."""
    return head if spec.group == 1 else lax.div(head, jnp.int32(spec.group))


def table_index(spec: Spec, steps: int, batch: Any, head: Any) -> Any:
    """Where the steps of a batch row and query head start in the flattened table."""
    group = {1: 0, spec.heads: head}.get(spec.table_groups)
    if group is None:
        group = kv_head(spec, head)
    row = (batch if spec.table_batch > 1 else 0) * spec.table_groups + group
    return row * steps


def relations(
    spec: Spec,
    rows: slice,
    columns: slice,
    *,
    row_start: Any,
    column_start: Any,
    row_vectors: dict[str, Any],
    column_vectors: dict[str, Any],
    rows_are_keys: bool,
    masked: bool,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Position differences p - j (for ALiBi) and mask of one sub-tile of scores; None where not needed.

    Args:
        spec: the call.
        rows: rows of the sub-tile inside the block.
        columns: columns of the sub-tile inside the block.
        row_start: index of the block's first row in its sequence.
        column_start: index of the block's first column.
        row_vectors: refs [block, LANES] by name (see `Spec.vectors`), one value in all lanes.
        column_vectors: refs [1, block].
        rows_are_keys: the scores are transposed.
        masked: whether the mask is wanted.
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    shape = (height, width)
    left, right = spec.window
    tail = spec.form == "softmax" and spec.keys % spec.block_kv and not (spec.positions or spec.segments)
    between = None
    if spec.alibi or (masked and (left is not None or right is not None)):
        if spec.positions:
            row_at = across(row_vectors["positions"][rows, :], width)
            column_at = column_vectors["positions"][:, columns]
            between = column_at - row_at if rows_are_keys else row_at - column_at
        else:
            inside = lax.broadcasted_iota(jnp.int32, shape, 0) - lax.broadcasted_iota(jnp.int32, shape, 1)
            start = (row_start + rows.start) - (column_start + columns.start)
            sign = -1 if rows_are_keys else 1
            between = sign * inside + (sign * start + spec.offset)
    if not masked:
        return between, None
    parts = []
    if right is not None:
        parts.append(between >= -right)
    if left is not None:
        parts.append(between <= left)
    if spec.positions:
        kv_at = (
            across(row_vectors["positions"][rows, :], width)
            if rows_are_keys
            else jnp.broadcast_to(column_vectors["positions"][:, columns], shape)
        )
        parts.append(kv_at >= 0)
    if spec.segments:
        parts.append(across(row_vectors["segments"][rows, :], width) == column_vectors["segments"][:, columns])
    if tail:
        axis, start = (0, row_start + rows.start) if rows_are_keys else (1, column_start + columns.start)
        parts.append(lax.broadcasted_iota(jnp.int32, shape, axis) < spec.keys - start)
    return between, functools.reduce(jnp.logical_and, parts) if parts else None


def shifted(spec: Spec, scores: jax.Array, between: jax.Array | None, slope_ref: Any, at: Any) -> jax.Array:
    """Adds the constant bias and ALiBi to inner scores."""
    if spec.bias:
        scores = scores + spec.bias * spec.factor
    if spec.alibi:
        scores = scores - (slope_ref[at] * spec.factor) * distance(spec, between)
    return scores


def split_refs(spec: Spec, refs: tuple, counts: dict[str, int]) -> dict[str, Any]:
    """Names the refs of a kernel: `counts` gives how many of each, in order; single ones come without a tuple."""
    named, at = {}, 0
    for name, count in counts.items():
        part = refs[at : at + count]
        at += count
        named[name] = dict(zip(spec.vectors, part, strict=True)) if name.endswith("vectors") else part
        if not name.endswith("vectors") and count == 1:
            named[name] = part[0]
    return named


def _forward_kernel(*refs: Any, spec: Spec, steps: int) -> None:
    softmax = spec.form == "softmax"
    vectors = len(spec.vectors)
    counts = {"steps": 1, "bounded": int(softmax), "q": 1, "k": 1, "v": 1, "slopes": int(spec.alibi)}
    counts |= {"q_vectors": vectors, "kv_vectors": vectors, "out": 1, "lse": int(softmax), "acc": 1}
    scores = len(score_stages(spec.online, spec.block_q, spec.block_kv)) if softmax else 0
    counts |= {"maximum": int(softmax), "total": int(softmax), "shrink": int(softmax), "scores": scores, "columns_vectors": vectors}
    named = split_refs(spec, refs, counts)
    staged = refs[sum(counts.values()) :]
    q, k, v, acc, total, maximum = (named[name] for name in ("q", "k", "v", "acc", "total", "maximum"))
    batch, head, at = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    step = named["steps"][table_index(spec, steps, batch, head) + at]
    kind = schedule.kind(step)
    slope_at = batch * spec.heads + head

    @pl.when(schedule.is_first(step))
    def _():
        acc[...] = jnp.zeros_like(acc)
        if softmax:
            maximum[...] = jnp.full_like(maximum, MASKED)
            total[...] = jnp.zeros_like(total)
        for name, column in named["columns_vectors"].items():
            column[...] = to_column(named["q_vectors"][name][...])

    where = {
        "row_start": schedule.stays(step) * spec.block_q,
        "column_start": schedule.streams(step) * spec.block_kv,
        "row_vectors": named["columns_vectors"],
        "column_vectors": named["kv_vectors"],
        "rows_are_keys": False,
    }

    def scores_of(rows, columns, masked):
        scores = product(q[rows, :], k[columns, :], NT)
        between, mask = relations(spec, rows, columns, masked=masked, **where)
        return shifted(spec, scores, between, named["slopes"], slope_at), mask

    def plain(masked):
        def produce(rows, columns):
            scores, mask = scores_of(rows, columns, masked)
            weights = weight(spec, scores)
            if mask is not None:
                weights = jnp.where(mask, weights, 0.0)
            if softmax:
                total[rows, :] += _fold_lanes(weights)
            return (weights.astype(v.dtype),)

        def consume(rows, columns, weights):
            acc[rows, :] += product(weights, v[columns, :], NN)

        stage = stage_of(spec.forward, masked, spec.block_q, spec.block_kv, staged, 1)
        pipelined(spec.forward[masked], spec.block_q, spec.block_kv, produce, consume, stage, hidden_zero(kind))

    def online(masked):
        """Scores wait in VMEM until the maximum of their rows is known; `produce` is a few rows ahead of `consume`."""
        tiles = spec.online[masked]
        blocks = row_blocks(tiles, spec.block_q, spec.block_kv)
        across_row = len(blocks[0])
        held = named["scores"][-len(blocks) * across_row :] if masked else named["scores"]

        def produce(at):
            peak, rows = None, blocks[at][0][0]
            for (rows, columns), ref in zip(blocks[at], held[at * across_row :], strict=False):
                scores, mask = scores_of(rows, columns, masked)
                if mask is not None:
                    scores = jnp.where(mask, scores, MASKED)
                ref[: scores.shape[0], :] = scores
                largest = _fold_lanes(scores, jnp.maximum)
                peak = largest if peak is None else jnp.maximum(peak, largest)
            before = maximum[rows, :]
            largest = jnp.maximum(before, jnp.max(peak, axis=1, keepdims=True))
            maximum[rows, :] = largest
            named["shrink"][rows, :] = jnp.exp2(before - largest)

        def consume(at):
            zero = hidden_zero(kind)
            for i, (rows, columns) in enumerate(blocks[at]):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                scores = held[at * across_row + i][pl.ds(zero, height), :]
                weights = jnp.exp2(scores - across(maximum[rows, :], width))
                summed, update = _fold_lanes(weights), product(weights.astype(v.dtype), v[columns, :], NN)
                if i == 0:
                    shrink = named["shrink"][rows, :]
                    total[rows, :] = total[rows, :] * shrink + summed
                    acc[rows, :] = acc[rows, :] * across(shrink, spec.width) + update
                else:
                    total[rows, :] += summed
                    acc[rows, :] += update

        for at in range(len(blocks) + tiles.depth):
            if at < len(blocks):
                produce(at)
            if at >= tiles.depth:
                consume(at - tiles.depth)

    for masked, wanted in ((False, schedule.FULL), (True, schedule.PARTIAL)):
        if not softmax:
            pl.when(kind == wanted)(functools.partial(plain, masked))
            continue
        bounded = named["bounded"][slope_at] == 1
        pl.when(jnp.logical_and(kind == wanted, bounded))(functools.partial(plain, masked))
        pl.when(jnp.logical_and(kind == wanted, jnp.logical_not(bounded)))(functools.partial(online, masked))

    @pl.when(schedule.is_last(step))
    def _():
        if not softmax:
            named["out"][...] = (acc[...] * output_factor(spec)).astype(named["out"].dtype)
            return
        largest = jnp.where(named["bounded"][slope_at] == 1, 0.0, maximum[...])
        summed = jnp.broadcast_to(jnp.sum(total[...], axis=1, keepdims=True), total.shape)
        summed = jnp.where(largest > 0.5 * MASKED, summed, 0.0)
        some = summed > 0.0
        inverse = jnp.where(some, 1.0 / summed, 0.0)
        named["out"][...] = (acc[...] * across(inverse, spec.width)).astype(named["out"].dtype)
        # +infinity for a row without any key: its weights 2^(s - lse) are zero in the backward pass.
        named["lse"][...] = to_row(jnp.where(some, largest + jnp.log2(summed), jnp.inf))


def _fold_lanes(x: jax.Array, join: Any = jnp.add) -> jax.Array:
    """Sums (or joins) columns [n, m * LANES] to [n, LANES], lane by lane."""
    parts = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
    return functools.reduce(join, parts)


def side_specs(spec: Spec, arrays: dict[str, Any], block: int, block_of: Any) -> list[pl.BlockSpec]:
    """Block specs of a side's integer vectors [1 or B, 1, length]."""

    def index(batched):
        return lambda b, n, l, *rest: (b if batched else 0, 0, block_of(b, n, l, *rest))

    return [pl.BlockSpec((None, 1, block), index(arrays[name].shape[0] > 1)) for name in spec.vectors]


def compiler_params(grid: int) -> pltpu.CompilerParams:
    """Batch and heads may run on any core; the steps of a block follow each other."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", *["arbitrary"] * (grid - 2)))


def forward(
    spec: Spec,
    steps: jax.Array,
    bounded: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array | None,
    q_vectors: dict[str, jax.Array],
    kv_vectors: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
    """Runs the forward kernel.

    Args:
        spec: the call.
        steps: [table_batch, table_groups, L] int32, by query block.
        bounded: [B, N] int32, 1 where scores are certified to stay within `BOUND`; softmax only.
        q: [B, N, T, H], padded to whole blocks and scaled by `scale * factor`.
        k: [B, K, S, H], padded.
        v: [B, K, S, H], padded.
        slopes: [B, N] float32, or None.
        q_vectors: int32 [1 or B, 1, T] by name.
        kv_vectors: int32 [1 or B, 1, S] by name.

    Returns:
        The result [B, N, T, H] in the type of q (float32 if `wide`), and log2-sum-exp2 [B, N, 1, T] float32 of the inner
        scores (softmax).
    """
    softmax = spec.form == "softmax"
    count = steps.shape[-1]

    def q_block(b, n, l, table, *_):
        return schedule.stays(table[table_index(spec, count, b, n) + l])

    def kv_block(b, n, l, table, *_):
        return schedule.streams(table[table_index(spec, count, b, n) + l])

    q_spec = pl.BlockSpec(
        (None, None, spec.block_q, spec.width), lambda b, n, l, *rest: (b, n, q_block(b, n, l, *rest), 0)
    )
    kv_spec = pl.BlockSpec(
        (None, None, spec.block_kv, spec.width),
        lambda b, n, l, *rest: (b, kv_head(spec, n), kv_block(b, n, l, *rest), 0),
    )
    in_specs = [q_spec, kv_spec, kv_spec]
    arguments = [q, k, v]
    if spec.alibi:
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
        arguments.append(slopes.reshape(-1))
    in_specs += side_specs(spec, q_vectors, spec.block_q, q_block)
    in_specs += side_specs(spec, kv_vectors, spec.block_kv, kv_block)
    arguments += [q_vectors[name] for name in spec.vectors] + [kv_vectors[name] for name in spec.vectors]
    out_shape = [jax.ShapeDtypeStruct(q.shape, jnp.float32 if spec.wide else q.dtype)]
    out_specs = [q_spec]
    statistic = pltpu.VMEM((spec.block_q, LANES), jnp.float32)
    scratch = [pltpu.VMEM((spec.block_q, spec.width), jnp.float32)]
    if softmax:
        out_shape.append(jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32))
        out_specs.append(
            pl.BlockSpec((None, None, 1, spec.block_q), lambda b, n, l, *rest: (b, n, 0, q_block(b, n, l, *rest)))
        )
        scratch += [statistic] * 3 + score_stages(spec.online, spec.block_q, spec.block_kv)
    scratch += [pltpu.VMEM((spec.block_q, LANES), jnp.int32) for _ in spec.vectors]
    scratch += stages(spec.forward, spec.block_q, spec.block_kv, v.dtype, 1)
    prefetched = [steps.reshape(-1)] + ([bounded.reshape(-1)] if softmax else [])
    results = pl.pallas_call(
        functools.partial(_forward_kernel, spec=spec, steps=count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(spec.batch, spec.heads, count),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=compiler_params(3),
        interpret=spec.interpret,
        name=f"attention_{spec.form}_forward",
    )(*prefetched, *arguments)
    return results[0], results[1] if softmax else None

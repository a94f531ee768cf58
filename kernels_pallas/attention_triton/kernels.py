"""Attention kernels in Triton: softmax or sigmoid weights, dense or over listed tiles, forward, dq, and dk with dv.

A program owns one tile of queries (forward, dq) or of keys (dk, dv) and walks the tiles of the other side: a range that
follows from the causal order and the window, or a list (lists.py). Tiles whose pairs are all visible come in a
loop of their own that has no mask. Scores are base 2: `SCALE` holds log2(e). Only builtins of `tl` are called, and no
function of its library, so that Triton's interpreter runs this file in any process (launch.py).
"""

import triton
import triton.language as tl

# Stands for -infinity where a difference of two scores must stay finite.
MASKED = tl.constexpr(-1e30)


@triton.jit
def _rows(base, at, LENGTH: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECK: tl.constexpr):
    """Loads rows `at` as [rows, PADDED], zeros outside of LENGTH (with CHECK) and WIDTH."""
    column = tl.arange(0, PADDED)
    pointers = base + at[:, None] * STRIDE + column[None, :]
    if CHECK and WIDTH != PADDED:
        x = tl.load(pointers, mask=(at[:, None] < LENGTH) & (column[None, :] < WIDTH), other=0.0)
    elif CHECK:
        x = tl.load(pointers, mask=at[:, None] < LENGTH, other=0.0)
    elif WIDTH != PADDED:
        x = tl.load(pointers, mask=column[None, :] < WIDTH, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _write(base, at, x, LENGTH: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Stores [rows, PADDED] to the rows `at` that exist."""
    column = tl.arange(0, PADDED)
    pointers = base + at[:, None] * STRIDE + column[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(at[:, None] < LENGTH) & (column[None, :] < WIDTH))


@triton.jit
def _positions(pointer, at, LENGTH: tl.constexpr, OFFSET: tl.constexpr, GIVEN: tl.constexpr, EMPTY: tl.constexpr):
    """Positions of the elements `at`: given ones, or index + OFFSET."""
    if GIVEN:
        return tl.load(pointer + at, mask=at < LENGTH, other=EMPTY)
    else:
        return at + OFFSET


@triton.jit
def _segments(pointer, at, LENGTH: tl.constexpr, GIVEN: tl.constexpr):
    """Segment ids of the elements `at`; where there are none, anything of that shape."""
    if GIVEN:
        return tl.load(pointer + at, mask=at < LENGTH, other=0)
    else:
        return at


@triton.jit
def _scores(
    s, q_at, kv_at, q_segment, kv_segment, kv_index, slope,
    KEYS: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr,
    ALIBI: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Base-2 scores of a tile of products, masked; a softmax without ALiBi leaves SCALE to its exponent.

    Works in both orders of queries and keys: vectors come with the axis of the other side added.
    """
    if SIGMOID or ALIBI:
        s = s * SCALE
        if ALIBI:
            away = q_at - kv_at
            if CAUSAL:
                away = tl.where(away > 0, away, 0)
            else:
                away = tl.where(away > 0, away, -away)
            s = s - slope * away.to(tl.float32)
        if SIGMOID:
            s = s + BIAS
    if MASK:
        if KEYS % BLOCK_N != 0:
            s = tl.where(kv_index < KEYS, s, MASKED)
        if RIGHT is not None:
            s = tl.where(kv_at <= q_at + RIGHT, s, MASKED)
        if LEFT is not None:
            s = tl.where(kv_at >= q_at - LEFT, s, MASKED)
        if POSITIONS:
            s = tl.where(kv_at >= 0, s, MASKED)
        if SEGMENTS:
            s = tl.where(q_segment == kv_segment, s, MASKED)
    return s


@triton.jit
def _sigmoid(s):
    """1 / (1 + 2^-s): accurate relative to small weights; masked scores give exact zeros."""
    return tl.math.fdiv(1.0, 1.0 + tl.math.exp2(-s))


@triton.jit
def _key_ranges(
    tile, LENGTH: tl.constexpr, KEYS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key tiles of a query tile: [start, inner) partly visible, [inner, outer) wholly, [outer, stop) partly."""
    first = tile * BLOCK_M + (KEYS - LENGTH)
    last = tl.minimum(tile * BLOCK_M + BLOCK_M, LENGTH) - 1 + (KEYS - LENGTH)
    stop = (KEYS + BLOCK_N - 1) // BLOCK_N
    outer = KEYS // BLOCK_N
    start = 0
    inner = 0
    if RIGHT is not None:
        stop = (tl.minimum(tl.maximum(last + RIGHT + 1, 0), KEYS) + BLOCK_N - 1) // BLOCK_N
        outer = tl.minimum(tl.maximum(first + RIGHT + 1, 0), KEYS) // BLOCK_N
    if LEFT is not None:
        start = tl.minimum(tl.maximum(first - LEFT, 0) // BLOCK_N, stop)
        inner = tl.minimum((tl.maximum(last - LEFT, 0) + BLOCK_N - 1) // BLOCK_N, stop)
    outer = tl.maximum(outer, inner)
    return start, inner, outer, stop


@triton.jit
def _query_ranges(
    tile, LENGTH: tl.constexpr, KEYS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Query tiles of a key tile, as `_key_ranges`; keys behind the end need no mask: their gradients are not stored."""
    first = tile * BLOCK_N - (KEYS - LENGTH)
    last = tl.minimum(tile * BLOCK_N + BLOCK_N, KEYS) - 1 - (KEYS - LENGTH)
    stop = (LENGTH + BLOCK_M - 1) // BLOCK_M
    outer = stop
    start = 0
    inner = 0
    if LEFT is not None:
        stop = (tl.minimum(tl.maximum(last + LEFT + 1, 0), LENGTH) + BLOCK_M - 1) // BLOCK_M
        outer = tl.minimum(tl.maximum(first + LEFT + 1, 0) // BLOCK_M, stop)
    if RIGHT is not None:
        start = tl.minimum(tl.maximum(first - RIGHT, 0) // BLOCK_M, stop)
        inner = tl.minimum((tl.maximum(last - RIGHT, 0) + BLOCK_M - 1) // BLOCK_M, stop)
    outer = tl.maximum(outer, inner)
    return start, inner, outer, stop


@triton.jit
def _list(
    entries, ends, batch, head, tile, ROWS: tl.constexpr, ENTRIES: tl.constexpr, HEADS: tl.constexpr,
    TABLE_BATCH: tl.constexpr, TABLE_GROUPS: tl.constexpr,
):  # fmt: skip
    """The list of a tile: its entries, wholly visible ones in [inner, outer), partly visible ones in [outer, stop)."""
    table = head // (HEADS // TABLE_GROUPS)
    if TABLE_BATCH != 1:
        table += batch * TABLE_GROUPS
    table = table.to(tl.int64)
    ends += (table * ROWS + tile) * 3
    return entries + table * ENTRIES, tl.load(ends), tl.load(ends + 1), tl.load(ends + 2)


@triton.jit
def _forward_loop(
    acc, largest, total, q, k, v, entries, first, last, q_at, q_segment, slope, kv_positions, kv_segments,
    KEYS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr,
    ALIBI: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    FACTOR: tl.constexpr = 1.0 if ALIBI else SCALE
    CHECK: tl.constexpr = MASK and KEYS % BLOCK_N != 0
    for i in range(first, last):
        if LISTED:
            tile = tl.load(entries + i)
        else:
            tile = i
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = _rows(k, n, KEYS, STRIDE, WIDTH, PADDED, CHECK)
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        kv_at = _positions(kv_positions, n, KEYS, 0, POSITIONS, -1)
        kv_segment = _segments(kv_segments, n, KEYS, SEGMENTS and MASK)
        s = _scores(
            s, q_at[:, None], kv_at[None, :], q_segment[:, None], kv_segment[None, :], n[None, :], slope,
            KEYS, BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, MASK,
        )  # fmt: skip
        if SIGMOID:
            p = _sigmoid(s)
        else:
            higher = tl.maximum(largest, tl.reduce(s, 1, tl.standard._elementwise_max))
            shrink = tl.math.exp2((largest - higher) * FACTOR)
            p = tl.math.exp2(s * FACTOR - (higher * FACTOR)[:, None])
            total = total * shrink + tl.reduce(p, 1, tl.standard._sum_combine)
            acc = acc * shrink[:, None]
            largest = higher
        values = _rows(v, n, KEYS, STRIDE, WIDTH, PADDED, CHECK)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, largest, total


@triton.jit
def forward_kernel(
    q, k, v, slopes, q_positions, kv_positions, q_segments, kv_segments, entries, ends, out, lse,
    LENGTH: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, POSITIONS: tl.constexpr,
    SEGMENTS: tl.constexpr, ALIBI: tl.constexpr, LISTED: tl.constexpr, ENTRIES: tl.constexpr, TABLE_BATCH: tl.constexpr,
    TABLE_GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, T, N, H] and lse [B, N, T] (base 2; infinity where a query saw no key; nothing for the sigmoid)."""
    ROWS: tl.constexpr = (LENGTH + BLOCK_M - 1) // BLOCK_M
    FACTOR: tl.constexpr = 1.0 if ALIBI else SCALE
    program = tl.program_id(0)
    tile = ROWS - 1 - program % ROWS  # the longest rows of a causal call start first
    head = program // ROWS % HEADS
    batch = program // ROWS // HEADS
    q += batch.to(tl.int64) * (LENGTH * HEADS * WIDTH) + head * WIDTH
    out += batch.to(tl.int64) * (LENGTH * HEADS * WIDTH) + head * WIDTH
    k += batch.to(tl.int64) * (KEYS * KV_HEADS * WIDTH) + head // (HEADS // KV_HEADS) * WIDTH
    v += batch.to(tl.int64) * (KEYS * KV_HEADS * WIDTH) + head // (HEADS // KV_HEADS) * WIDTH
    kv_positions += batch * KEYS
    kv_segments += batch * KEYS
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = _rows(q, m, LENGTH, HEADS * WIDTH, WIDTH, PADDED, LENGTH % BLOCK_M != 0)
    q_at = _positions(q_positions + batch * LENGTH, m, LENGTH, KEYS - LENGTH, POSITIONS, 0)
    q_segment = _segments(q_segments + batch * LENGTH, m, LENGTH, SEGMENTS)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * HEADS + head)
    acc = tl.full([BLOCK_M, PADDED], 0.0, tl.float32)
    largest = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    if LISTED:
        entries, inner, outer, stop = _list(entries, ends, batch, head, tile, ROWS, ENTRIES, HEADS, TABLE_BATCH, TABLE_GROUPS)
    else:
        start, inner, outer, stop = _key_ranges(tile, LENGTH, KEYS, LEFT, RIGHT, BLOCK_M, BLOCK_N)
        if LEFT is not None:
            acc, largest, total = _forward_loop(
                acc, largest, total, queries, k, v, entries, start, inner, q_at, q_segment, slope, kv_positions, kv_segments,
                KEYS, KV_HEADS * WIDTH, WIDTH, PADDED, BLOCK_M, BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT,
                POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, True,
            )  # fmt: skip
    acc, largest, total = _forward_loop(
        acc, largest, total, queries, k, v, entries, inner, outer, q_at, q_segment, slope, kv_positions, kv_segments,
        KEYS, KV_HEADS * WIDTH, WIDTH, PADDED, BLOCK_M, BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT,
        POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, False,
    )  # fmt: skip
    if LISTED or LEFT is not None or RIGHT is not None or KEYS % BLOCK_N != 0:
        acc, largest, total = _forward_loop(
            acc, largest, total, queries, k, v, entries, outer, stop, q_at, q_segment, slope, kv_positions, kv_segments,
            KEYS, KV_HEADS * WIDTH, WIDTH, PADDED, BLOCK_M, BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT,
            POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, True,
        )  # fmt: skip
    if not SIGMOID:
        seen = largest > 0.5 * MASKED
        acc = acc * tl.where(seen, 1.0 / total, 0.0)[:, None]
        base2 = tl.where(seen, largest * FACTOR + tl.math.log2(tl.where(seen, total, 1.0)), float("inf"))
        tl.store(lse + (batch * HEADS + head).to(tl.int64) * LENGTH + m, base2, mask=m < LENGTH)
    _write(out, m, acc, LENGTH, HEADS * WIDTH, WIDTH, PADDED)


@triton.jit
def _dq_loop(
    dq, q, k, v, do, lse, delta, entries, first, last, q_at, q_segment, slope, kv_positions, kv_segments,
    KEYS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr,
    ALIBI: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    FACTOR: tl.constexpr = 1.0 if ALIBI else SCALE
    CHECK: tl.constexpr = MASK and KEYS % BLOCK_N != 0
    for i in range(first, last):
        if LISTED:
            tile = tl.load(entries + i)
        else:
            tile = i
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = _rows(k, n, KEYS, STRIDE, WIDTH, PADDED, CHECK)
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        kv_at = _positions(kv_positions, n, KEYS, 0, POSITIONS, -1)
        kv_segment = _segments(kv_segments, n, KEYS, SEGMENTS and MASK)
        s = _scores(
            s, q_at[:, None], kv_at[None, :], q_segment[:, None], kv_segment[None, :], n[None, :], slope,
            KEYS, BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, MASK,
        )  # fmt: skip
        values = _rows(v, n, KEYS, STRIDE, WIDTH, PADDED, CHECK)
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        if SIGMOID:
            p = _sigmoid(s)
            ds = p * (1.0 - p) * dp
        else:
            ds = tl.math.exp2(s * FACTOR - lse[:, None]) * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, do, lse, delta, slopes, q_positions, kv_positions, q_segments, kv_segments, entries, ends, dq,
    LENGTH: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, POSITIONS: tl.constexpr,
    SEGMENTS: tl.constexpr, ALIBI: tl.constexpr, LISTED: tl.constexpr, ENTRIES: tl.constexpr, TABLE_BATCH: tl.constexpr,
    TABLE_GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, T, N, H] from do, lse (base 2) and delta = sum(out do) - dlse, both [B, N, T]."""
    ROWS: tl.constexpr = (LENGTH + BLOCK_M - 1) // BLOCK_M
    LN2: tl.constexpr = 0.6931471805599453
    program = tl.program_id(0)
    tile = ROWS - 1 - program % ROWS
    head = program // ROWS % HEADS
    batch = program // ROWS // HEADS
    q += batch.to(tl.int64) * (LENGTH * HEADS * WIDTH) + head * WIDTH
    do += batch.to(tl.int64) * (LENGTH * HEADS * WIDTH) + head * WIDTH
    dq += batch.to(tl.int64) * (LENGTH * HEADS * WIDTH) + head * WIDTH
    k += batch.to(tl.int64) * (KEYS * KV_HEADS * WIDTH) + head // (HEADS // KV_HEADS) * WIDTH
    v += batch.to(tl.int64) * (KEYS * KV_HEADS * WIDTH) + head // (HEADS // KV_HEADS) * WIDTH
    kv_positions += batch * KEYS
    kv_segments += batch * KEYS
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = _rows(q, m, LENGTH, HEADS * WIDTH, WIDTH, PADDED, LENGTH % BLOCK_M != 0)
    cotangents = _rows(do, m, LENGTH, HEADS * WIDTH, WIDTH, PADDED, LENGTH % BLOCK_M != 0)
    q_at = _positions(q_positions + batch * LENGTH, m, LENGTH, KEYS - LENGTH, POSITIONS, 0)
    q_segment = _segments(q_segments + batch * LENGTH, m, LENGTH, SEGMENTS)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * HEADS + head)
    row_lse = tl.full([BLOCK_M], 0.0, tl.float32)
    row_delta = tl.full([BLOCK_M], 0.0, tl.float32)
    if not SIGMOID:
        row = (batch * HEADS + head).to(tl.int64) * LENGTH + m
        row_lse = tl.load(lse + row, mask=m < LENGTH, other=float("inf"))
        row_delta = tl.load(delta + row, mask=m < LENGTH, other=0.0)
    acc = tl.full([BLOCK_M, PADDED], 0.0, tl.float32)
    if LISTED:
        entries, inner, outer, stop = _list(entries, ends, batch, head, tile, ROWS, ENTRIES, HEADS, TABLE_BATCH, TABLE_GROUPS)
    else:
        start, inner, outer, stop = _key_ranges(tile, LENGTH, KEYS, LEFT, RIGHT, BLOCK_M, BLOCK_N)
        if LEFT is not None:
            acc = _dq_loop(
                acc, queries, k, v, cotangents, row_lse, row_delta, entries, start, inner, q_at, q_segment, slope,
                kv_positions, kv_segments, KEYS, KV_HEADS * WIDTH, WIDTH, PADDED, BLOCK_M, BLOCK_N, SCALE, BIAS, SIGMOID,
                CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, True,
            )  # fmt: skip
    acc = _dq_loop(
        acc, queries, k, v, cotangents, row_lse, row_delta, entries, inner, outer, q_at, q_segment, slope,
        kv_positions, kv_segments, KEYS, KV_HEADS * WIDTH, WIDTH, PADDED, BLOCK_M, BLOCK_N, SCALE, BIAS, SIGMOID,
        CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, False,
    )  # fmt: skip
    if LISTED or LEFT is not None or RIGHT is not None or KEYS % BLOCK_N != 0:
        acc = _dq_loop(
            acc, queries, k, v, cotangents, row_lse, row_delta, entries, outer, stop, q_at, q_segment, slope,
            kv_positions, kv_segments, KEYS, KV_HEADS * WIDTH, WIDTH, PADDED, BLOCK_M, BLOCK_N, SCALE, BIAS, SIGMOID,
            CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, True,
        )  # fmt: skip
    _write(dq, m, acc * (SCALE * LN2), LENGTH, HEADS * WIDTH, WIDTH, PADDED)


@triton.jit
def _dkv_loop(
    dk, dv, q, k, v, do, lse, delta, entries, first, last, kv_at, kv_segment, kv_index, slope, q_positions, q_segments,
    LENGTH: tl.constexpr, KEYS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr,
    ALIBI: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    FACTOR: tl.constexpr = 1.0 if ALIBI else SCALE
    CHECK: tl.constexpr = LENGTH % BLOCK_M != 0
    for i in range(first, last):
        if LISTED:
            tile = tl.load(entries + i)
        else:
            tile = i
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        queries = _rows(q, m, LENGTH, STRIDE, WIDTH, PADDED, CHECK)
        s = tl.dot(k, tl.trans(queries), input_precision=PRECISION)
        q_at = _positions(q_positions, m, LENGTH, KEYS - LENGTH, POSITIONS, 0)
        q_segment = _segments(q_segments, m, LENGTH, SEGMENTS and MASK)
        s = _scores(
            s, q_at[None, :], kv_at[:, None], q_segment[None, :], kv_segment[:, None], kv_index[:, None], slope,
            KEYS, BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, MASK,
        )  # fmt: skip
        if SIGMOID:
            p = _sigmoid(s)
        else:
            row_lse = tl.load(lse + m, mask=m < LENGTH, other=float("inf"))
            p = tl.math.exp2(s * FACTOR - row_lse[None, :])
        cotangents = _rows(do, m, LENGTH, STRIDE, WIDTH, PADDED, CHECK)
        dv = tl.dot(p.to(cotangents.dtype), cotangents, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(cotangents), input_precision=PRECISION)
        if SIGMOID:
            ds = p * (1.0 - p) * dp
        else:
            row_delta = tl.load(delta + m, mask=m < LENGTH, other=0.0)
            ds = p * (dp - row_delta[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkv_kernel(
    q, k, v, do, lse, delta, slopes, q_positions, kv_positions, q_segments, kv_segments, entries, ends, dk, dv,
    LENGTH: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    SIGMOID: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, POSITIONS: tl.constexpr,
    SEGMENTS: tl.constexpr, ALIBI: tl.constexpr, LISTED: tl.constexpr, ENTRIES: tl.constexpr, TABLE_BATCH: tl.constexpr,
    TABLE_GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, S, K, H]; the query heads of a key head are summed in a fixed order, without atomics."""
    COLUMNS: tl.constexpr = (KEYS + BLOCK_N - 1) // BLOCK_N
    GROUP: tl.constexpr = HEADS // KV_HEADS
    LN2: tl.constexpr = 0.6931471805599453
    program = tl.program_id(0)
    tile = program % COLUMNS
    kv_head = program // COLUMNS % KV_HEADS
    batch = program // COLUMNS // KV_HEADS
    rows = batch.to(tl.int64) * (LENGTH * HEADS * WIDTH)
    columns = batch.to(tl.int64) * (KEYS * KV_HEADS * WIDTH) + kv_head * WIDTH
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = _rows(k + columns, n, KEYS, KV_HEADS * WIDTH, WIDTH, PADDED, KEYS % BLOCK_N != 0)
    values = _rows(v + columns, n, KEYS, KV_HEADS * WIDTH, WIDTH, PADDED, KEYS % BLOCK_N != 0)
    kv_at = _positions(kv_positions + batch * KEYS, n, KEYS, 0, POSITIONS, -1)
    kv_segment = _segments(kv_segments + batch * KEYS, n, KEYS, SEGMENTS)
    q_positions += batch * LENGTH
    q_segments += batch * LENGTH
    dk_sum = tl.full([BLOCK_N, PADDED], 0.0, tl.float32)
    dv_sum = tl.full([BLOCK_N, PADDED], 0.0, tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_q = q + rows + head * WIDTH
        head_do = do + rows + head * WIDTH
        head_lse = lse
        head_delta = delta
        if not SIGMOID:
            head_lse = lse + (batch * HEADS + head).to(tl.int64) * LENGTH
            head_delta = delta + (batch * HEADS + head).to(tl.int64) * LENGTH
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + batch * HEADS + head)
        head_entries = entries
        if LISTED:
            head_entries, inner, outer, stop = _list(
                entries, ends, batch, head, tile, COLUMNS, ENTRIES, HEADS, TABLE_BATCH, TABLE_GROUPS
            )
        else:
            start, inner, outer, stop = _query_ranges(tile, LENGTH, KEYS, LEFT, RIGHT, BLOCK_M, BLOCK_N)
            if RIGHT is not None:
                dk_sum, dv_sum = _dkv_loop(
                    dk_sum, dv_sum, head_q, keys, values, head_do, head_lse, head_delta, head_entries, start, inner, kv_at,
                    kv_segment, n, slope, q_positions, q_segments, LENGTH, KEYS, HEADS * WIDTH, WIDTH, PADDED, BLOCK_M,
                    BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, True,
                )  # fmt: skip
        dk_sum, dv_sum = _dkv_loop(
            dk_sum, dv_sum, head_q, keys, values, head_do, head_lse, head_delta, head_entries, inner, outer, kv_at,
            kv_segment, n, slope, q_positions, q_segments, LENGTH, KEYS, HEADS * WIDTH, WIDTH, PADDED, BLOCK_M,
            BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, False,
        )  # fmt: skip
        if LISTED or LEFT is not None:
            dk_sum, dv_sum = _dkv_loop(
                dk_sum, dv_sum, head_q, keys, values, head_do, head_lse, head_delta, head_entries, outer, stop, kv_at,
                kv_segment, n, slope, q_positions, q_segments, LENGTH, KEYS, HEADS * WIDTH, WIDTH, PADDED, BLOCK_M,
                BLOCK_N, SCALE, BIAS, SIGMOID, CAUSAL, LEFT, RIGHT, POSITIONS, SEGMENTS, ALIBI, LISTED, PRECISION, True,
            )  # fmt: skip
    _write(dk + columns, n, dk_sum * (SCALE * LN2), KEYS, KV_HEADS * WIDTH, WIDTH, PADDED)
    _write(dv + columns, n, dv_sum, KEYS, KV_HEADS * WIDTH, WIDTH, PADDED)

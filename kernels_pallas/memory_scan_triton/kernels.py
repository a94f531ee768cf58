"""Kernels of the neural memory with one layer in Triton: one program carries a block of columns of W and S in registers.

Columns of M(x) = x W do not meet: each is a memory of its own, with the same keys and factors. So a program owns H rows and
`COLUMNS` columns of one row's and head's state, in float32, and walks the tiles, one chunk of C tokens each. What needs no
state comes as arrays: the scores of a chunk (`ChunkFactors.reads` times the products of queries and keys), and the other
factors (attnlab/ops/memory_chunk.py). Per tile, with A the weights at the chunk's start,

    d  = 2 (k A - v)                       y  = kept (q W) + mixed (q S) + scores d
    W' = last_kept W + last_mixed S + k^T (writes d)                    S' = stays S + k^T (leaves d)

The backward kernel walks the tiles in reverse with the gradients of W and S, from the states before each tile. Gradients that
sum over columns come out per block of columns.

Arrays are contiguous and float32; tokens [G, M, C, H] for G rows and heads, M tiles; scores [G, M, C, C]; vectors
[G, M, 4, C]: kept, mixed, writes, leaves; scalars [G, M, 4]: last_kept, last_mixed, stays, 0; states [G, H, H]. Only builtins of
`tl` are called (attention_triton/launch.py).
"""

import triton
import triton.language as tl

# Products of float32 factors: three passes of TF32, close to float32.
PASSES = tl.constexpr("tf32x3")
# Bits of the flags of a tile
RESET = tl.constexpr(1)  # a segment starts
FRESH = tl.constexpr(2)  # a chunk starts
USED = tl.constexpr(4)  # there are tokens
LAST = tl.constexpr(8)  # the last used tile of its row


@triton.jit
def _load(base, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """[ROWS, COLUMNS] of rows that are STRIDE elements apart."""
    return tl.load(base + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _store(base, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    tl.store(base + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :], x)


@triton.jit
def _vector(vectors, at, WHICH: tl.constexpr, C: tl.constexpr):
    """One of the vectors of tile `at`, [C, 1]."""
    return tl.load(vectors + at * (4 * C) + WHICH * C + tl.arange(0, C))[:, None]


@triton.jit
def _reset(w, s, flag, begin_w, begin_s, H: tl.constexpr, COLUMNS: tl.constexpr):
    """Weights and momentum that a tile starts from."""
    if flag & RESET != 0:
        w = _load(begin_w, H, COLUMNS, H)
        s = _load(begin_s, H, COLUMNS, H)
    return w, s


@triton.jit
def _origin(flag, initial, begin):
    """Where a chunk that goes on was carried in."""
    if flag & RESET != 0:
        initial = begin
    return initial


@triton.jit
def _start(w, flag, initial, begin, state, H: tl.constexpr, COLUMNS: tl.constexpr, RESETS: tl.constexpr):
    """Weights at the start of the chunk: the present ones, unless it goes on from what was carried in."""
    start = w
    if flag & FRESH == 0:
        source = initial
        if RESETS:
            source = _origin(flag, initial, begin)
        start = _load(source + state, H, COLUMNS, H)
    return start


@triton.jit
def forward_kernel(
    k, v, vectors, scalars, flags, initial_start, initial_w, initial_s, begin_start, begin_w, begin_s, q, scores,
    y, loss, final_start, final_w, final_s,
    HEADS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """y [G, M, C, H], losses [H / COLUMNS, G, M, C] by block of columns, and the state after the last tile."""
    BLOCKS: tl.constexpr = H // COLUMNS
    group = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    groups = tl.num_programs(0) // BLOCKS
    state = group.to(tl.int64) * (H * H) + block * COLUMNS
    w = _load(initial_w + state, H, COLUMNS, H)
    s = _load(initial_s + state, H, COLUMNS, H)
    flags += group // HEADS * TILES
    for tile in range(TILES):
        at = group.to(tl.int64) * TILES + tile
        flag = tl.load(flags + tile)
        if RESETS:
            w, s = _reset(w, s, flag, begin_w + state, begin_s + state, H, COLUMNS)
        start = _start(w, flag, initial_start, begin_start, state, H, COLUMNS, RESETS)
        if flag & LAST != 0:
            _store(final_start + state, start, H, COLUMNS, H)
        keys = _load(k + at * (C * H), C, H, H)
        miss = tl.dot(keys, start, input_precision=PASSES) - _load(v + at * (C * H) + block * COLUMNS, C, COLUMNS, H)
        rows = (block * groups).to(tl.int64) * (TILES * C) + at * C + tl.arange(0, C)
        tl.store(loss + rows, tl.reduce(miss * miss, 1, tl.standard._sum_combine))
        d = 2.0 * miss
        queries = _load(q + at * (C * H), C, H, H)
        out = tl.dot(queries, w, input_precision=PASSES) * _vector(vectors, at, 0, C)
        out += tl.dot(queries, s, input_precision=PASSES) * _vector(vectors, at, 1, C)
        out = tl.dot(_load(scores + at * (C * C), C, C, C), d, out, input_precision=PASSES)
        _store(y + at * (C * H) + block * COLUMNS, out, C, COLUMNS, H)
        w, s = _write(w, s, keys, d, vectors, scalars, at, C)
    _store(final_w + state, w, H, COLUMNS, H)
    _store(final_s + state, s, H, COLUMNS, H)


@triton.jit
def _write(w, s, keys, d, vectors, scalars, at, C: tl.constexpr):
    """Weights and momentum after a tile."""
    turned = tl.trans(keys)
    w = w * tl.load(scalars + at * 4) + s * tl.load(scalars + at * 4 + 1)
    w = tl.dot(turned, d * _vector(vectors, at, 2, C), w, input_precision=PASSES)
    s = s * tl.load(scalars + at * 4 + 2)
    s = tl.dot(turned, d * _vector(vectors, at, 3, C), s, input_precision=PASSES)
    return w, s


@triton.jit
def states_kernel(
    k, v, vectors, scalars, flags, initial_start, initial_w, initial_s, begin_start, begin_w, begin_s, before_w, before_s,
    HEADS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """Weights and momentum before each tile (in a new segment: its beginning), [G, M, H, H]."""
    BLOCKS: tl.constexpr = H // COLUMNS
    group = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    state = group.to(tl.int64) * (H * H) + block * COLUMNS
    w = _load(initial_w + state, H, COLUMNS, H)
    s = _load(initial_s + state, H, COLUMNS, H)
    flags += group // HEADS * TILES
    for tile in range(TILES):
        at = group.to(tl.int64) * TILES + tile
        flag = tl.load(flags + tile)
        if RESETS:
            w, s = _reset(w, s, flag, begin_w + state, begin_s + state, H, COLUMNS)
        _store(before_w + at * (H * H) + block * COLUMNS, w, H, COLUMNS, H)
        _store(before_s + at * (H * H) + block * COLUMNS, s, H, COLUMNS, H)
        start = _start(w, flag, initial_start, begin_start, state, H, COLUMNS, RESETS)
        keys = _load(k + at * (C * H), C, H, H)
        miss = tl.dot(keys, start, input_precision=PASSES) - _load(v + at * (C * H) + block * COLUMNS, C, COLUMNS, H)
        w, s = _write(w, s, keys, 2.0 * miss, vectors, scalars, at, C)


@triton.jit
def backward_kernel(
    k, v, vectors, scalars, flags, initial_start, begin_start, q, scores, before_w, before_s,
    dy, dloss, dfinal_start, dfinal_w, dfinal_s,
    dk, dv, dvectors, dscalars, dq, dscores, dinitial_start, dinitial_w, dinitial_s, dbegin_start, dbegin_w, dbegin_s,
    HEADS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """Gradients; dk, dq [H / COLUMNS, G, M, C, H], dscores, dvectors and dscalars are by block of columns."""
    BLOCKS: tl.constexpr = H // COLUMNS
    group = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    groups = tl.num_programs(0) // BLOCKS
    state = group.to(tl.int64) * (H * H) + block * COLUMNS
    part = (block * groups).to(tl.int64) * TILES  # of results by block of columns
    flags += group // HEADS * TILES
    c = tl.arange(0, C)
    gw = _load(dfinal_w + state, H, COLUMNS, H)
    gs = _load(dfinal_s + state, H, COLUMNS, H)
    zero = tl.full([H, COLUMNS], 0.0, tl.float32)
    _store(dinitial_start + state, zero, H, COLUMNS, H)
    if RESETS:
        _store(dbegin_start + state, zero, H, COLUMNS, H)
        _store(dbegin_w + state, zero, H, COLUMNS, H)
        _store(dbegin_s + state, zero, H, COLUMNS, H)
    tl.debug_barrier()
    for reverse in range(TILES):
        tile = TILES - 1 - reverse
        at = group.to(tl.int64) * TILES + tile
        flag = tl.load(flags + tile)
        w = _load(before_w + at * (H * H) + block * COLUMNS, H, COLUMNS, H)
        start = _start(w, flag, initial_start, begin_start, state, H, COLUMNS, RESETS)
        keys = _load(k + at * (C * H), C, H, H)
        miss = tl.dot(keys, start, input_precision=PASSES) - _load(v + at * (C * H) + block * COLUMNS, C, COLUMNS, H)
        d = 2.0 * miss
        gout = _load(dy + at * (C * H) + block * COLUMNS, C, COLUMNS, H)
        # of what is written
        writes = _vector(vectors, at, 2, C)
        leaves = _vector(vectors, at, 3, C)
        dw = tl.dot(keys, gw, input_precision=PASSES)
        ds = tl.dot(keys, gs, input_precision=PASSES)
        to = dvectors + (part + at) * (4 * C) + c
        tl.store(to + 2 * C, tl.reduce(d * dw, 1, tl.standard._sum_combine))
        tl.store(to + 3 * C, tl.reduce(d * ds, 1, tl.standard._sum_combine))
        dmiss = dw * writes + ds * leaves
        dmiss = tl.dot(tl.trans(_load(scores + at * (C * C), C, C, C)), gout, dmiss, input_precision=PASSES)
        dmiss = 2.0 * (dmiss + miss * tl.load(dloss + at * C + c)[:, None])
        _store(dv + at * (C * H) + block * COLUMNS, -dmiss, C, COLUMNS, H)
        dkeys = tl.dot(dmiss, tl.trans(start), input_precision=PASSES)
        dkeys = tl.dot(d * writes, tl.trans(gw), dkeys, input_precision=PASSES)
        dkeys = tl.dot(d * leaves, tl.trans(gs), dkeys, input_precision=PASSES)
        _store(dk + (part + at) * (C * H), dkeys, C, H, H)
        _store(dscores + (part + at) * (C * C), tl.dot(gout, tl.trans(d), input_precision=PASSES), C, C, C)
        gstart = tl.dot(tl.trans(keys), dmiss, input_precision=PASSES)
        if flag & LAST != 0:
            gstart += _load(dfinal_start + state, H, COLUMNS, H)
        # of what is read
        s = _load(before_s + at * (H * H) + block * COLUMNS, H, COLUMNS, H)
        queries = _load(q + at * (C * H), C, H, H)
        kept = gout * _vector(vectors, at, 0, C)
        mixed = gout * _vector(vectors, at, 1, C)
        seen = tl.dot(queries, w, input_precision=PASSES)
        tl.store(to, tl.reduce(gout * seen, 1, tl.standard._sum_combine))
        seen = tl.dot(queries, s, input_precision=PASSES)
        tl.store(to + C, tl.reduce(gout * seen, 1, tl.standard._sum_combine))
        dqueries = tl.dot(kept, tl.trans(w), input_precision=PASSES)
        dqueries = tl.dot(mixed, tl.trans(s), dqueries, input_precision=PASSES)
        _store(dq + (part + at) * (C * H), dqueries, C, H, H)
        numbers = dscalars + (part + at) * 4
        tl.store(numbers, _total(gw * w))
        tl.store(numbers + 1, _total(gw * s))
        tl.store(numbers + 2, _total(gs * s))
        tl.store(numbers + 3, 0.0)
        turned = tl.trans(queries)
        gs = gs * tl.load(scalars + at * 4 + 2) + gw * tl.load(scalars + at * 4 + 1)
        gs = tl.dot(turned, mixed, gs, input_precision=PASSES)
        gw = tl.dot(turned, kept, gw * tl.load(scalars + at * 4), input_precision=PASSES)
        if flag & FRESH != 0:
            gw += gstart
        elif flag & USED != 0:
            to_start = dinitial_start
            if RESETS:
                to_start = _origin(flag, dinitial_start, dbegin_start)
            gstart += _load(to_start + state, H, COLUMNS, H)
            tl.debug_barrier()
            _store(to_start + state, gstart, H, COLUMNS, H)
            tl.debug_barrier()
        if RESETS:
            gw = _handed_over(gw, flag, dbegin_w + state, H, COLUMNS)
            gs = _handed_over(gs, flag, dbegin_s + state, H, COLUMNS)
    _store(dinitial_w + state, gw, H, COLUMNS, H)
    _store(dinitial_s + state, gs, H, COLUMNS, H)


@triton.jit
def _handed_over(gradient, flag, to, H: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a segment starts, adds the gradient to that of the beginnings and goes on with none."""
    if flag & RESET != 0:
        gradient += _load(to, H, COLUMNS, H)
        tl.debug_barrier()
        _store(to, gradient, H, COLUMNS, H)
        tl.debug_barrier()
        gradient = tl.full([H, COLUMNS], 0.0, tl.float32)
    return gradient


@triton.jit
def _total(x):
    return tl.reduce(tl.reduce(x, 1, tl.standard._sum_combine), 0, tl.standard._sum_combine)

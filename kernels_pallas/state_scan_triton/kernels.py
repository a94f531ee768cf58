"""Kernels of the gated linear and gated delta scan in Triton: chunks in parallel, states from chunk to chunk, chunks again.

With C tokens, log decays g <= 0 (per head or per key channel), the state S [Hk, Hv] before the chunk and

    G_ij  = sum_{j < m <= i} g_m                              0 for i <= j
    P     = tril(q_i k_j exp(G_ij)),  A = strictly tril(k_i k_j exp(G_ij)),  N = A (I + beta A)^-1
    t     = (I - N beta) (v - (k exp(G_i0)) S),  u = beta t   gated delta rule; (I - N beta) = (I + A beta)^-1
    u     = v                                                 gated linear attention
    out   = (q exp(G_i0)) S + P u
    S'    = exp(G_C0) S + (k exp(G_Cj))^T u

a call runs `prepare_kernel` (P, N, and what N makes of keys and values: no state is needed), `states_kernel` (one program per
chain of chunks and block of value channels, S in registers in float32), `output_kernel`. The backward pass runs the first two
again, `state_gradients_kernel` (the chains backwards), `pair_gradients_kernel` and `token_gradients_kernel`. Writing
both inverses of the delta rule with N, I - beta N and I - N beta, spares every division by beta.

Every G is a sum of its own terms: nothing cancels, no exponent is positive, and a log decay of -1e4 is an exact reset.
Per-channel decays build P by doubling: at each level a query in an odd block of s tokens meets the keys of the block before it,
both decayed to the boundary between them; sums over blocks are products with zeros and ones.

Arrays are contiguous. `at` counts chunks of all rows and heads. Array types: q, k, v and what is stored of products are float32
or bfloat16, everything else is float32. Only builtins of `tl` are called (attention_triton/launch.py).
"""

import triton
import triton.language as tl

# Products of float32 factors: three passes of TF32, close to float32. Factors in bfloat16 need one pass.
PASSES = tl.constexpr("tf32x3")


@triton.jit
def _load(base, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """[ROWS, COLUMNS] of rows that are STRIDE elements apart."""
    return tl.load(base + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _store(base, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    to = base + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]
    tl.store(to, x.to(base.dtype.element_ty))


@triton.jit
def _decayed(x, factor, C: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, CHANNEL: tl.constexpr):
    """Queries or keys of a chunk times their decay: stored as such per channel, a factor per token else."""
    if CHANNEL:
        y = _load(factor, C, COLUMNS, STRIDE)
    else:
        y = _load(x, C, COLUMNS, STRIDE).to(tl.float32) * tl.load(factor + tl.arange(0, C))[:, None]
    return y.to(x.dtype.element_ty)


@triton.jit
def _token_decays(g, C: tl.constexpr):
    """From log decays [C] per token, exp(G_i0) [C], exp(G_Cj) [C] and exp(G_ij) [C, C], zero above the diagonal."""
    token = tl.arange(0, C)
    i = token[:, None]
    j = token[None, :]
    onward = tl.load(g + token + 1, mask=token + 1 < C, other=0.0)
    since = tl.associative_scan(tl.load(g + token), 0, tl.standard._sum_combine)
    until = tl.associative_scan(onward, 0, tl.standard._sum_combine, reverse=True)
    between = tl.associative_scan(tl.where(j < i, onward[None, :], 0.0), 1, tl.standard._sum_combine, reverse=True)
    return tl.math.exp(since), tl.math.exp(until), tl.where(j <= i, tl.math.exp(between), 0.0)


@triton.jit
def _channel_decays(g, C: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """From log decays [C, COLUMNS] per channel, exp(G_i0) and exp(G_Cj)."""
    token = tl.arange(0, C)[:, None]
    onward = tl.load(g + (token + 1) * STRIDE + tl.arange(0, COLUMNS)[None, :], mask=token + 1 < C, other=0.0)
    since = tl.associative_scan(_load(g, C, COLUMNS, STRIDE), 0, tl.standard._sum_combine)
    until = tl.associative_scan(onward, 0, tl.standard._sum_combine, reverse=True)
    return tl.math.exp(since), tl.math.exp(until)


@triton.jit
def _block_decays(high, low, i, j, block):
    """exp of sums over a token's block of `block` tokens, up to the token and after it, of log decays in two parts [C, H].

    Parts of 11 bits: products with zeros and ones are exact in float16.
    """
    same = (i & -block) == (j & -block)
    up_to = tl.where(same & (j <= i), 1.0, 0.0).to(tl.float16)
    after = tl.where(same & (j > i), 1.0, 0.0).to(tl.float16)
    return tl.math.exp(tl.dot(up_to, low, tl.dot(up_to, high))), tl.math.exp(tl.dot(after, low, tl.dot(after, high)))


@triton.jit
def _meets(i, j, block):
    """Pairs of a query in an odd block and a key in the block before it."""
    return ((i & block) != 0) & ((i & -block) == (j & -block) + block)


@triton.jit
def prepare_kernel(
    q, k, v, g, beta, scores, coupling, corrections, targets, reading, writing, whole,
    C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CHANNEL: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """What a chunk computes without its state; one program per chunk.

    Writes P [C, C]; for the delta rule N [C, C], corrections (I - N beta)(k exp(G_i0)) [C, Hk] and targets (I - N beta) v [C, Hv];
    and the decays: per head exp(G_i0) [C] to `reading` and exp(G_Cj) [C] to `writing`; per channel q and k times them [C, Hk], and
    exp(G_C0) [Hk] to `whole`.
    """
    at = tl.program_id(0).to(tl.int64)
    q += at * (C * ROWS)
    k += at * (C * ROWS)
    corrections += at * (C * ROWS)
    token = tl.arange(0, C)
    i = token[:, None]
    j = token[None, :]
    read_pairs = tl.full([C, C], 0.0, tl.float32)
    key_pairs = tl.full([C, C], 0.0, tl.float32)
    if CHANNEL:
        g += at * (C * ROWS)
        reading += at * (C * ROWS)
        writing += at * (C * ROWS)
        for row in range(0, ROWS, BLOCK_K):
            keys = _load(k + row, C, BLOCK_K, ROWS).to(tl.float32)
            queries = _load(q + row, C, BLOCK_K, ROWS).to(tl.float32)
            log = _load(g + row, C, BLOCK_K, ROWS)
            high = log.to(tl.float16)
            low = (log - high.to(tl.float32)).to(tl.float16)
            read_pairs += tl.where(i == j, tl.reduce(queries * keys, 1, tl.standard._sum_combine)[:, None], 0.0)
            for level in range(LEVELS):
                block = 1 << level
                arrive, leave = _block_decays(high, low, i, j, block)
                left = tl.trans((keys * leave).to(k.dtype.element_ty))
                pairs = tl.dot((queries * arrive).to(k.dtype.element_ty), left, input_precision=PASSES)
                read_pairs += tl.where(_meets(i, j, block), pairs, 0.0)
                if DELTA:
                    pairs = tl.dot((keys * arrive).to(k.dtype.element_ty), left, input_precision=PASSES)
                    key_pairs += tl.where(_meets(i, j, block), pairs, 0.0)
            since, until = _channel_decays(g + row, C, BLOCK_K, ROWS)
            _store(reading + row, queries * since, C, BLOCK_K, ROWS)
            _store(writing + row, keys * until, C, BLOCK_K, ROWS)
            total = tl.math.exp(tl.reduce(log, 0, tl.standard._sum_combine))
            tl.store(whole + at * ROWS + row + tl.arange(0, BLOCK_K), total)
    else:
        for row in range(0, ROWS, BLOCK_K):
            keys = _load(k + row, C, BLOCK_K, ROWS)
            read_pairs = tl.dot(_load(q + row, C, BLOCK_K, ROWS), tl.trans(keys), read_pairs, input_precision=PASSES)
            if DELTA:
                key_pairs = tl.dot(keys, tl.trans(keys), key_pairs, input_precision=PASSES)
        since, until, ratio = _token_decays(g + at * C, C)
        read_pairs = read_pairs * ratio
        key_pairs = tl.where(i > j, key_pairs * ratio, 0.0)
        tl.store(reading + at * C + token, since)
        tl.store(writing + at * C + token, until)
    _store(scores + at * (C * C), read_pairs, C, C, C)
    if DELTA:
        strength = tl.load(beta + at * C + token)
        lower = key_pairs * strength[:, None]
        # (I + beta A)^-1 by halves: X of blocks of s tokens, X - X (beta A where blocks meet) X of blocks of 2 s
        inverse = tl.where(i == j, 1.0, 0.0) - tl.where(_meets(i, j, 1), lower, 0.0)
        for level in range(1, LEVELS):
            meets = tl.where(_meets(i, j, 1 << level), lower, 0.0)
            inverse -= tl.dot(inverse, tl.dot(meets, inverse, input_precision=PASSES), input_precision=PASSES)
        coupled = tl.dot(key_pairs, inverse, input_precision=PASSES).to(k.dtype.element_ty)
        _store(coupling + at * (C * C), coupled, C, C, C)
        for row in range(0, ROWS, BLOCK_K):
            keys = _load(k + row, C, BLOCK_K, ROWS).to(tl.float32)
            if CHANNEL:
                since, _ = _channel_decays(g + row, C, BLOCK_K, ROWS)
                keys = keys * since
            else:
                keys = keys * since[:, None]
            strong = (keys * strength[:, None]).to(k.dtype.element_ty)
            _store(corrections + row, keys - tl.dot(coupled, strong, input_precision=PASSES), C, BLOCK_K, ROWS)
        for column in range(0, WIDTH, BLOCK_V):
            values = _load(v + at * (C * WIDTH) + column, C, BLOCK_V, WIDTH).to(tl.float32)
            strong = (values * strength[:, None]).to(k.dtype.element_ty)
            new = values - tl.dot(coupled, strong, input_precision=PASSES)
            _store(targets + at * (C * WIDTH) + column, new, C, BLOCK_V, WIDTH)


@triton.jit
def _chain(bounds, CHUNKS: tl.constexpr, HEADS: tl.constexpr, CHAINS: tl.constexpr, BLOCKS: tl.constexpr, LISTED: tl.constexpr):
    """Of this program: its block of value channels, its row and head, the index of its state, and its first and stop chunk."""
    program = tl.program_id(0)
    chain = program // BLOCKS % CHAINS
    row = program // (BLOCKS * CHAINS)
    batch = row // HEADS
    state = ((batch * CHAINS + chain) * HEADS + row % HEADS).to(tl.int64)
    if LISTED:
        start = tl.load(bounds + (batch * CHAINS + chain) * 2)
        stop = tl.load(bounds + (batch * CHAINS + chain) * 2 + 1)
    else:
        start = 0
        stop = CHUNKS
    return program % BLOCKS, row.to(tl.int64), state, start, stop


@triton.jit
def _kept(reading, whole, at, C: tl.constexpr, ROWS: tl.constexpr, CHANNEL: tl.constexpr):
    """exp(G_C0) as a column of the state's rows."""
    if CHANNEL:
        return tl.load(whole + at * ROWS + tl.arange(0, ROWS))[:, None]
    else:
        return tl.load(reading + at * C + C - 1)


@triton.jit
def states_kernel(
    k, values, beta, corrections, reading, writing, whole, bounds, initial, before, new, final,
    CHUNKS: tl.constexpr, HEADS: tl.constexpr, CHAINS: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, CHANNEL: tl.constexpr, DELTA: tl.constexpr, INITIAL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """States before each chunk [Hk, Hv], and after each chain; `values` are v, or the targets of the delta rule, whose t goes to
    `new`. One program per row and head, chain and block of value channels."""
    column, row, state_at, start, stop = _chain(bounds, CHUNKS, HEADS, CHAINS, WIDTH // BLOCK_V, LISTED)
    column = column * BLOCK_V
    state = tl.full([ROWS, BLOCK_V], 0.0, tl.float32)
    if INITIAL:
        state = _load(initial + state_at * (ROWS * WIDTH) + column, ROWS, BLOCK_V, WIDTH)
    for c in range(start, stop):
        at = row * CHUNKS + c
        _store(before + at * (ROWS * WIDTH) + column, state, ROWS, BLOCK_V, WIDTH)
        written = _load(values + at * (C * WIDTH) + column, C, BLOCK_V, WIDTH)
        if DELTA:
            known = _load(corrections + at * (C * ROWS), C, ROWS, ROWS)
            fresh = written.to(tl.float32) - tl.dot(known, state.to(known.dtype), input_precision=PASSES)
            _store(new + at * (C * WIDTH) + column, fresh, C, BLOCK_V, WIDTH)
            written = (fresh * tl.load(beta + at * C + tl.arange(0, C))[:, None]).to(known.dtype)
        factor = writing + at * (C * ROWS if CHANNEL else C)
        keys = _decayed(k + at * (C * ROWS), factor, C, ROWS, ROWS, CHANNEL)
        state = state * _kept(reading, whole, at, C, ROWS, CHANNEL)
        state = tl.dot(tl.trans(keys), written, state, input_precision=PASSES)
    _store(final + state_at * (ROWS * WIDTH) + column, state, ROWS, BLOCK_V, WIDTH)


@triton.jit
def _written(values, beta, at, column, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, DELTA: tl.constexpr):
    """u [C, BLOCK_V] of a chunk, from v or t."""
    x = _load(values + at * (C * WIDTH) + column, C, BLOCK_V, WIDTH)
    if DELTA:
        x = (x.to(tl.float32) * tl.load(beta + at * C + tl.arange(0, C))[:, None]).to(x.dtype)
    return x


@triton.jit
def output_kernel(
    q, values, beta, scores, reading, before, out,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHANNEL: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Outputs; `values` are v, or t of the delta rule. One program per chunk and block of value channels."""
    BLOCKS: tl.constexpr = WIDTH // BLOCK_V
    at = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK_V
    factor = reading + at * (C * ROWS if CHANNEL else C)
    acc = tl.full([C, BLOCK_V], 0.0, tl.float32)
    for row in range(0, ROWS, BLOCK_K):
        queries = _decayed(q + at * (C * ROWS) + row, factor + (row if CHANNEL else 0), C, BLOCK_K, ROWS, CHANNEL)
        state = _load(before + at * (ROWS * WIDTH) + row * WIDTH + column, BLOCK_K, BLOCK_V, WIDTH)
        acc = tl.dot(queries, state, acc, input_precision=PASSES)
    pairs = _load(scores + at * (C * C), C, C, C)
    acc = tl.dot(pairs, _written(values, beta, at, column, C, WIDTH, BLOCK_V, DELTA), acc, input_precision=PASSES)
    _store(out + at * (C * WIDTH) + column, acc, C, BLOCK_V, WIDTH)


@triton.jit
def state_gradients_kernel(
    q, k, beta, scores, corrections, reading, writing, whole, bounds, dout, dfinal, dafter, dwritten, dinitial,
    CHUNKS: tl.constexpr, HEADS: tl.constexpr, CHAINS: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, CHANNEL: tl.constexpr, DELTA: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """`states_kernel` backwards: gradients of the states after each chunk [Hk, Hv], of u [C, Hv], and of the initial states."""
    column, row, state_at, start, stop = _chain(bounds, CHUNKS, HEADS, CHAINS, WIDTH // BLOCK_V, LISTED)
    column = column * BLOCK_V
    dstate = _load(dfinal + state_at * (ROWS * WIDTH) + column, ROWS, BLOCK_V, WIDTH)
    for back in range(0, stop - start):
        at = row * CHUNKS + (stop - 1 - back)
        _store(dafter + at * (ROWS * WIDTH) + column, dstate, ROWS, BLOCK_V, WIDTH)
        cotangent = _load(dout + at * (C * WIDTH) + column, C, BLOCK_V, WIDTH)
        factors = at * (C * ROWS if CHANNEL else C)
        keys = _decayed(k + at * (C * ROWS), writing + factors, C, ROWS, ROWS, CHANNEL)
        du = tl.dot(keys, dstate.to(keys.dtype), input_precision=PASSES)
        pairs = _load(scores + at * (C * C), C, C, C)
        du = tl.dot(tl.trans(pairs), cotangent, du, input_precision=PASSES)
        _store(dwritten + at * (C * WIDTH) + column, du, C, BLOCK_V, WIDTH)
        dstate = dstate * _kept(reading, whole, at, C, ROWS, CHANNEL)
        queries = _decayed(q + at * (C * ROWS), reading + factors, C, ROWS, ROWS, CHANNEL)
        dstate = tl.dot(tl.trans(queries), cotangent, dstate, input_precision=PASSES)
        if DELTA:
            known = _load(corrections + at * (C * ROWS), C, ROWS, ROWS)
            taken = (-du * tl.load(beta + at * C + tl.arange(0, C))[:, None]).to(known.dtype)
            dstate = tl.dot(tl.trans(known), taken, dstate, input_precision=PASSES)
    _store(dinitial + state_at * (ROWS * WIDTH) + column, dstate, ROWS, BLOCK_V, WIDTH)


@triton.jit
def pair_gradients_kernel(
    values, beta, coupling, dout, dwritten, dscores, dpairs, dv, dbeta,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Gradients of P and A [C, C], v and beta; `values` are v, or t of the delta rule. One program per chunk.

    Without the delta rule the gradient of v is that of u, and only that of P is computed.
    """
    at = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, C)
    i = token[:, None]
    j = token[None, :]
    read_pairs = tl.full([C, C], 0.0, tl.float32)
    key_pairs = tl.full([C, C], 0.0, tl.float32)
    strengths = tl.full([C], 0.0, tl.float32)
    if DELTA:
        strength = tl.load(beta + at * C + token)
    for column in range(0, WIDTH, BLOCK_V):
        there = at * (C * WIDTH) + column
        written = _load(values + there, C, BLOCK_V, WIDTH)
        if DELTA:
            fresh = written.to(tl.float32)
            written = (fresh * strength[:, None]).to(written.dtype)
            # the other inverse: (I - beta N)^T du
            du = _load(dwritten + there, C, BLOCK_V, WIDTH).to(tl.float32)
            strong = (du * strength[:, None]).to(written.dtype)
            turned = tl.trans(_load(coupling + at * (C * C), C, C, C))
            du = du - tl.dot(turned, strong, input_precision=PASSES)
            strengths += tl.reduce(du * fresh, 1, tl.standard._sum_combine)
            dvalues = (du * strength[:, None]).to(written.dtype)
            _store(dv + there, dvalues, C, BLOCK_V, WIDTH)
            key_pairs = tl.dot(-dvalues, tl.trans(written), key_pairs, input_precision=PASSES)
        cotangent = _load(dout + there, C, BLOCK_V, WIDTH)
        read_pairs = tl.dot(cotangent, tl.trans(written), read_pairs, input_precision=PASSES)
    _store(dscores + at * (C * C), tl.where(i >= j, read_pairs, 0.0), C, C, C)
    if DELTA:
        _store(dpairs + at * (C * C), tl.where(i > j, key_pairs, 0.0), C, C, C)
        tl.store(dbeta + at * C + token, strengths)


@triton.jit
def token_gradients_kernel(
    q, k, g, values, beta, before, dafter, dout, dv, dscores, dpairs, dq, dk, dg,
    C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CHANNEL: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k [C, Hk] and the log decays; one program per chunk and block of key channels.

    Decays per head get the sum over the program's channels, [C] for each block. A log decay g_m is in every G_ij with
    j < m <= i: what an element of P, read at i and written at j, earns is counted at i, taken off at j, and summed over
    all tokens from m on; so does, with the sum over all tokens, what is in G_Cj.
    """
    BLOCKS: tl.constexpr = ROWS // BLOCK_K
    at = (tl.program_id(0) // BLOCKS).to(tl.int64)
    row = tl.program_id(0) % BLOCKS * BLOCK_K
    here = at * (C * ROWS) + row
    token = tl.arange(0, C)
    i = token[:, None]
    j = token[None, :]
    reads = tl.full([C, BLOCK_K], 0.0, tl.float32)
    writes = tl.full([C, BLOCK_K], 0.0, tl.float32)
    asks = tl.full([C, BLOCK_K], 0.0, tl.float32)
    kept = tl.full([BLOCK_K], 0.0, tl.float32)
    for column in range(0, WIDTH, BLOCK_V):
        there = at * (C * WIDTH) + column
        state = _load(before + at * (ROWS * WIDTH) + row * WIDTH + column, BLOCK_K, BLOCK_V, WIDTH)
        dstate = _load(dafter + at * (ROWS * WIDTH) + row * WIDTH + column, BLOCK_K, BLOCK_V, WIDTH)
        kept += tl.reduce(state.to(tl.float32) * dstate.to(tl.float32), 1, tl.standard._sum_combine)
        reads = tl.dot(_load(dout + there, C, BLOCK_V, WIDTH), tl.trans(state), reads, input_precision=PASSES)
        written = _written(values, beta, at, column, C, WIDTH, BLOCK_V, DELTA)
        writes = tl.dot(written, tl.trans(dstate), writes, input_precision=PASSES)
        if DELTA:
            asks = tl.dot(-_load(dv + there, C, BLOCK_V, WIDTH), tl.trans(state), asks, input_precision=PASSES)
    queries = _load(q + here, C, BLOCK_K, ROWS).to(tl.float32)
    keys = _load(k + here, C, BLOCK_K, ROWS).to(tl.float32)
    dread = _load(dscores + at * (C * C), C, C, C).to(tl.float32)
    dkey = dread
    if DELTA:
        dkey = _load(dpairs + at * (C * C), C, C, C).to(tl.float32)
    if CHANNEL:
        log = _load(g + here, C, BLOCK_K, ROWS)
        high = log.to(tl.float16)
        low = (log - high.to(tl.float32)).to(tl.float16)
        since, until = _channel_decays(g + here, C, BLOCK_K, ROWS)
    else:
        log = tl.load(g + at * C + token)
        since, until, ratio = _token_decays(g + at * C, C)
        since = since[:, None]
        until = until[:, None]
    total = tl.reduce(log, 0, tl.standard._sum_combine)
    kept = kept * tl.math.exp(total)
    reads = reads * since
    writes = writes * until
    from_start = reads * queries  # of the log decays up to a token
    to_end = writes * keys  # and of those after it
    if DELTA:
        asks = asks * since
        from_start += asks * keys
        writes += asks
    if CHANNEL:
        diagonal = tl.reduce(tl.where(i == j, dread, 0.0), 1, tl.standard._sum_combine)[:, None]
        reads += diagonal * keys
        writes += diagonal * queries
        for level in range(LEVELS):
            block = 1 << level
            arrive, leave = _block_decays(high, low, i, j, block)
            left = (keys * leave).to(k.dtype.element_ty)
            come = (queries * arrive).to(k.dtype.element_ty)
            pairs = tl.where(_meets(i, j, block), dread, 0.0).to(k.dtype.element_ty)
            dcome = tl.dot(pairs, left, input_precision=PASSES)
            dleft = tl.dot(tl.trans(pairs), come, input_precision=PASSES)
            reads += dcome * arrive
            from_start += dcome * come.to(tl.float32)  # the rounded factor: so that sums over reads and writes cancel
            if DELTA:
                come = (keys * arrive).to(k.dtype.element_ty)
                pairs = tl.where(_meets(i, j, block), dkey, 0.0).to(k.dtype.element_ty)
                dcome = tl.dot(pairs, left, input_precision=PASSES)
                dleft = tl.dot(tl.trans(pairs), come, dleft, input_precision=PASSES)
                writes += dcome * arrive
                from_start += dcome * come.to(tl.float32)
            writes += dleft * leave
            from_start -= dleft * left.to(tl.float32)
        kept += tl.reduce(to_end, 0, tl.standard._sum_combine)
        dlog = tl.associative_scan(from_start - to_end, 0, tl.standard._sum_combine, reverse=True)
        _store(dg + here, dlog + kept[None, :], C, BLOCK_K, ROWS)
    else:
        low_keys = keys.to(k.dtype.element_ty)
        pairs = (dread * ratio).to(k.dtype.element_ty)
        dqueries = tl.dot(pairs, low_keys, input_precision=PASSES)
        dkeys = tl.dot(tl.trans(pairs), queries.to(k.dtype.element_ty), input_precision=PASSES)
        reads += dqueries
        from_start += dqueries * queries
        if DELTA:
            pairs = (dkey * ratio).to(k.dtype.element_ty)
            dasks = tl.dot(pairs, low_keys, input_precision=PASSES)
            dkeys = tl.dot(tl.trans(pairs), low_keys, dkeys, input_precision=PASSES)
            writes += dasks
            from_start += dasks * keys
        writes += dkeys
        from_start -= dkeys * keys
        end = tl.reduce(to_end, 1, tl.standard._sum_combine)
        dlog = tl.reduce(from_start, 1, tl.standard._sum_combine) - end
        dlog = tl.associative_scan(dlog, 0, tl.standard._sum_combine, reverse=True)
        dlog += tl.reduce(kept, 0, tl.standard._sum_combine) + tl.reduce(end, 0, tl.standard._sum_combine)
        tl.store(dg + tl.program_id(0).to(tl.int64) * C + token, dlog)
    _store(dq + here, reads, C, BLOCK_K, ROWS)
    _store(dk + here, writes, C, BLOCK_K, ROWS)

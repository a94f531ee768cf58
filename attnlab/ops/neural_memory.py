"""Neural long-term memory: a small MLP per sequence, trained at test time by gradient descent with momentum and forgetting.

"Titans: Learning to Memorize at Test Time" (Behrouz, Zhong & Mirrokni, 2024, arXiv 2501.00663), section 3. The memory is
M(x) = gelu(x W_1) W_2 .. (exact gelu, no bias). For token t of a chunk with the weights M_c at its start,

    u_t = gradient at M_c of |M(k_t) - v_t|^2          (sum over features)
    S_t = eta_t S_{t-1} - theta_t u_t
    M_t = (1 - alpha_t) M_{t-1} + S_t
    y_t = M_t(q_t)                                     ("after"; "before": M_{t-1}(q_t))

The chunk size is part of the rule. Both forms give the same numbers: `xla_recurrent` keeps M_t token by token;
`xla_chunked` never does: since u_t is an outer product a_t d_t of what a layer reads and its error at M_c,

    M_t = A_t M + B_t S + sum_{s <= t} w_ts a_s d_s,    w_ts = -theta_s sum_{r=s..t} prod eta_{s+1..r} prod (1 - alpha)_{r+1..t}

holds for every layer (M and S are what is carried in), and reading is a causal linear attention over the chunk. All of it
in float32 with full precision: the outer gradient goes through the inner one (second order). `pallas` (TPU) and `triton` (NVIDIA
GPUs, one layer) do the same with the states in fast memory (`kernels_pallas/memory_scan`, `memory_scan_triton`).

The floor of a token and head (`memory_cost`), with P weights in all layers, P_1 of them in the first, chunks of C tokens: the
products take 12 P - 2 P_1 + 2 C sum (I + O) FLOPs: 2 P for what the layers read from the keys, 2 (P - P_1) for the errors, 4 P
each for reading and writing both weights and momentum, and the scores inside the chunk. The gated linear scan of width H takes
4 H^2 + 4 C H. With H = C = 64 that is 57 344 for one layer, 442 368 for two of inner width 4 H, and 32 768 for the scan: 1.75
and 13.5 times as much. Both must move q, k, v and y, 16 H bytes, and their gates. Where states go through memory between chunks, as
in XLA, the memory moves 16 P / C bytes more and the scan 8 H^2 / C: 1024 and 8192, and 512 against 1024 for the tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops import dispatch, sharding
from attnlab.ops.memory_chunk import einsum, enter_chunk, memory_chunk, read_memory, surprise
from attnlab.ops.tiles import scan_tiles, scan_tokens, token_flags, zero_padding
from attnlab.types import Array, Bool, Float, Int

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryState:
    """The memory of each row and head between two calls; float32, its size does not depend on the length.

    Attributes:
        start: weights at the start of the present chunk, one [B, N, I, O] per layer.
        weights: weights after the last token, the same shapes.
        momentum: S after the last token, the same shapes.
        count: [B] int32, tokens that the present chunk already has; 0 = the next token starts a chunk.
    """

    start: tuple[Array, ...]
    weights: tuple[Array, ...]
    momentum: tuple[Array, ...]
    count: Array


class MemoryResult(NamedTuple):
    """What `neural_memory` returns.

    Attributes:
        y: [B, T, N, H], what was read.
        loss: [B, T, N] float32, |M(k) - v|^2 at the chunk's start ("surprise").
        state: after the last token.
    """

    y: Array
    loss: Array
    state: MemoryState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryCall:
    """One call in canonical form; float32. Fields as the arguments of `neural_memory`; `gates` are theta, eta, alpha."""

    q: Array
    k: Array
    v: Array
    gates: tuple[Array, Array, Array]
    begin: MemoryState
    state: MemoryState | None
    segment_ids: Array | None
    mask: Array | None
    chunk_size: int = dataclasses.field(metadata=_STATIC)
    before: bool = dataclasses.field(metadata=_STATIC)
    start_count: int = dataclasses.field(metadata=_STATIC)


def fresh_memory(weights: Sequence[Float[Array, "N I O"]], batch: int, count: int = 0) -> MemoryState:
    """Returns the state before the first token: learnt weights, no momentum, for every row alike."""
    wide = tuple(jnp.broadcast_to(w.astype(jnp.float32), (batch, *w.shape)) for w in weights)
    return MemoryState(wide, wide, tuple(map(jnp.zeros_like, wide)), jnp.full((batch,), count, jnp.int32))


def neural_memory(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    theta: Float[Array, "B T N"],
    eta: Float[Array, "B T N"],
    alpha: Float[Array, "B T N"],
    weights: Sequence[Float[Array, "N I O"]],
    *,
    chunk_size: int = 64,
    retrieve: Literal["after", "before"] = "after",
    momentum: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    state: MemoryState | None = None,
    begin: MemoryState | None = None,
    begin_count: int = 0,
    implementation: str | None = None,
) -> MemoryResult:
    """Reads from, and writes to, a memory per row and head (the module's docstring has the rule).

    Args:
        q: what is read.
        k: keys that are written.
        v: their values.
        theta: step sizes, >= 0.
        eta: momentum, in [0, 1].
        alpha: forgetting, in [0, 1].
        weights: of the memory at the start of every segment, one [N, I, O] per layer, the first I and the last O being H.
        chunk_size: tokens per chunk; gradients are taken at the weights of its start.
        retrieve: a token reads with its own write ("after") or without.
        momentum: False ignores `eta` (S_t = -theta_t u_t).
        segment_ids: every segment (run of one id) has a memory of its own; 0 = padding.
        mask: False = padding, which neither writes nor decays nor counts in a chunk; its y is 0.
        state: continues an earlier call (the first segment of each row does).
        begin: state at the start of every segment instead of `weights`, batch 1 or B (as after a common prefix).
        begin_count: its `count`, known when tracing.
        implementation: "xla_recurrent", "xla_chunked", "pallas" or "triton"; None = the best that can run.

    Raises:
        ConfigError: shapes that do not fit each other, a state of another batch, type or memory.
        NotImplementedError: the named implementation cannot compute this call.
    """
    batch, _, heads, width = q.shape
    if not (q.shape == k.shape == v.shape):
        raise ConfigError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: the memory needs three equal ones [B,T,N,H].")
    for name, gate in (("theta", theta), ("eta", eta), ("alpha", alpha)):
        if gate.shape != q.shape[:3]:
            raise ConfigError(f"{name} has shape {gate.shape}: it needs [B, T, N] = {q.shape[:3]}.")
    if chunk_size < 1:
        raise ConfigError(f"chunk_size = {chunk_size}: a chunk has at least one token. Set 1 or more.")
    if retrieve not in ("after", "before"):
        raise ConfigError(f"retrieve = {retrieve!r}: unknown. Use 'after' or 'before'.")
    widths = [width, *(w.shape[-1] for w in weights)]
    fits = all(w.shape == (heads, *pair) for w, pair in zip(weights, itertools.pairwise(widths), strict=True))
    if not weights or widths[-1] != width or not fits:
        raise ConfigError(f"memory weights of shapes {[w.shape for w in weights]}: they need [N, {width}, ..] to [N, .., {width}].")
    if begin is None:
        begin, begin_count = fresh_memory(weights, 1), 0
    if state is not None:
        check_memory_state(state, batch, [w.shape for w in weights])
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    gates = tuple(x.astype(jnp.float32) for x in (theta, eta if momentum else jnp.zeros_like(theta), alpha))
    before = retrieve == "before"
    call = MemoryCall(*wide, gates, begin, state, segment_ids, mask, chunk_size, before, begin_count % chunk_size)
    y, loss, state = dispatch.call("neural_memory", implementation, call)
    return MemoryResult(y.astype(q.dtype), loss, state)


def memory_cost(widths: Sequence[int], chunk_size: int) -> dict[str, float]:
    """The least that a token of one head costs: FLOPs of the products, bytes of tokens and gates, and of states between chunks.

    Args:
        widths: of the memory's layers, input and output included.
        chunk_size: C.

    Returns:
        "flops", "bytes", and "state_bytes", which implementations that keep states in fast memory do not move. Forward only.
    """
    sizes = [i * o for i, o in itertools.pairwise(widths)]
    inside = sum(i + o for i, o in itertools.pairwise(widths))
    flops = 12.0 * sum(sizes) - 2.0 * sizes[0] + 2.0 * chunk_size * inside
    return {"flops": flops, "bytes": 16.0 * widths[0] + 16.0, "state_bytes": 16.0 * sum(sizes) / chunk_size}


def scan_cost(width: int, chunk_size: int) -> dict[str, float]:
    """The same of `gated_linear_scan` with states of `width` x `width` and a decay per head."""
    flops = 4.0 * width**2 + 4.0 * chunk_size * width
    return {"flops": flops, "bytes": 16.0 * width + 4.0, "state_bytes": 8.0 * width**2 / chunk_size}


def check_memory_state(state: MemoryState, batch: int, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuses a state that was made for another call.

    Raises:
        ConfigError: another batch, type or memory.
    """
    have = [(w.shape, str(w.dtype)) for w in state.weights]
    rows = state.count.shape[0]
    if rows != batch:
        raise ConfigError(f"memory state of batch {rows} used with batch {batch}. Make one with init_cache({batch}, max_len).")
    if have != [((batch, *shape), "float32") for shape in shapes]:
        raise ConfigError(f"memory state of {have} used with a memory of {[tuple(s) for s in shapes]} in float32. Remake it.")


def parts(state: MemoryState) -> tuple[tuple[Array, ...], ...]:
    """Returns (start, weights, momentum) of a state."""
    return state.start, state.weights, state.momentum


def _initial(call: MemoryCall) -> tuple[tuple[Array, ...], ...]:
    if call.state is not None:
        return parts(call.state)
    rows = call.q.shape[0]
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), parts(call.begin))


def recurrent(call: MemoryCall) -> tuple[Array, Array, MemoryState]:
    """Token by token, the reference; the backward pass keeps a state every few tokens and computes the others again."""
    batch, length = call.q.shape[:2]
    count = None if call.state is None else call.state.count
    flags = token_flags(
        batch, length, call.chunk_size, mask=call.mask, segment_ids=call.segment_ids, start=call.start_count, count=count
    )
    begin = parts(call.begin)
    tokens = (call.q, call.k, call.v, *call.gates, flags.valid, flags.reset, flags.valid & (flags.place == 0))

    def token(state, inputs):
        q, k, v, theta, eta, alpha, valid, reset, fresh = inputs
        start, weights, momentum = enter_chunk(state, begin, reset, fresh)
        reading, writing, loss = surprise(start, k[:, :, None], v[:, :, None])
        new_momentum, new_weights = [], []
        for w, s, a, d in zip(weights, momentum, reading, writing, strict=True):
            gradient = einsum("bni,bno->bnio", a[:, :, 0], d[:, :, 0])
            s_new = eta[..., None, None] * s - theta[..., None, None] * gradient
            w_new = (1.0 - alpha[..., None, None]) * w + s_new
            keep = valid[:, None, None, None]
            new_momentum.append(jnp.where(keep, s_new, s))
            new_weights.append(jnp.where(keep, w_new, w))
        y = read_memory(weights if call.before else new_weights, q[:, None])[:, 0]
        return (start, tuple(new_weights), tuple(new_momentum)), (y, loss[:, :, 0])

    state, (y, loss) = scan_tokens(token, _initial(call), tokens)
    return zero_padding(y, flags.valid), zero_padding(loss, flags.valid), MemoryState(*state, flags.count)


def _chunked(call: MemoryCall) -> tuple[Array, Array, MemoryState]:
    """One chunk after the other; the backward pass keeps the states between chunks and computes the rest again."""
    begin = parts(call.begin)

    def chunk(state, tile):
        q, k, v, gates = tile.tokens
        state = enter_chunk(state, begin, tile.reset, tile.fresh)
        state, y, loss = memory_chunk(state, q, k, v, gates, tile.valid, before=call.before)
        return state, (y, loss)

    count = None if call.state is None else call.state.count
    ragged = {"mask": call.mask, "segment_ids": call.segment_ids, "start": call.start_count, "count": count}
    tokens = (call.q, call.k, call.v, call.gates)
    state, (y, loss), count = scan_tiles(chunk, _initial(call), tokens, call.chunk_size, **ragged)
    return y, loss, MemoryState(*state, count)


def _defer_recurrent(call: MemoryCall) -> str | None:
    return None if call.q.shape[1] == 1 else "one token at a time: for single tokens"


def over_mesh(run: Callable[[MemoryCall], tuple], call: MemoryCall) -> tuple[Array, Array, MemoryState]:
    """Calls run(call) on each device's rows and heads: left to itself, XLA exchanges states at every chunk."""
    batch = call.q.shape[0]

    def states(state: MemoryState | None) -> MemoryState | None:
        return jax.tree.map(lambda x: ("B" if x.shape[0] == batch else "1") + "NIO"[: x.ndim - 1], state)

    token, gate = "BTNH", "BTN"
    layouts = dataclasses.replace(
        call,
        q=token,
        k=token,
        v=token,
        gates=(gate,) * 3,
        begin=states(call.begin),
        state=states(call.state),
        segment_ids=None if call.segment_ids is None else "BT",
        mask=None if call.mask is None else "BT",
    )
    arrays, tree = jax.tree.flatten(call)
    after = jax.tree.map(lambda x: "BNIO"[: x.ndim], call.begin)
    return sharding.shard_over_mesh(
        lambda *parts: run(tree.unflatten(parts)), arrays, jax.tree.leaves(layouts), (token, gate, after)
    )


dispatch.register("neural_memory", "pallas", "kernels_pallas.memory_scan.implementation:IMPLEMENTATION", platforms=("tpu",))
dispatch.register(
    "neural_memory", "triton", "kernels_pallas.memory_scan_triton.implementation:IMPLEMENTATION", platforms=("gpu",)
)
for _name, _run, _defer in (("xla_recurrent", recurrent, _defer_recurrent), ("xla_chunked", _chunked, lambda call: None)):
    dispatch.register(
        "neural_memory", _name, dispatch.Implementation(functools.partial(over_mesh, _run), defer=_defer)
    )

"""Sparse state expansion: linear attention with P sparse partitions of its state beside one that is always on.

"Scaling Linear Attention with Sparse State Expansion" (arXiv 2507.16577). A router gives every token probabilities p over the
partitions; the token writes its `w` likeliest and reads its `r` likeliest. With the shared queries and keys q1, k1, the sparse
ones q2, k2, and the state update of gated linear attention (per head, scale Hk^-1/2 on q everywhere),

    S^0_t = exp(g1_t) S^0_{t-1} + k1_t^T v_t                                                     always
    S^i_t = exp(g2_t) S^i_{t-1} + p_t^i k2_t^T v_t   if t writes i, else S^i_{t-1}               no decay either
    o_t   = q1_t S^0_t + sum over the read i of p_t^i q2_t S^i_t                                 after t's own write

With the gated delta rule (`beta_*` given) queries and keys are L2-normalised after they were multiplied by p, as published:
that cancels p but for the epsilon, so only the balance loss trains the router.

Implementations: "varlen" sorts tokens by partition and scans each partition's own tokens, work O((1 + k) T) whatever P; it
needs w == r == k. "mask" repeats all tokens for every partition, work O((1 + P) T). "recurrent" goes token by token and touches
only the partitions of the token: the reference, and the step of decoding. "pallas" (TPU) and "triton" (NVIDIA GPUs) are "varlen"
with the scan over chunks as a kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops import chunk_scan, dispatch, partition_streams
from attnlab.ops.linear_scan import CHUNK, decay_factors, l2_normalize, only, segment_starts, valid_tokens
from attnlab.types import Array, Bool, Float, Int

_OP = "sparse_state_attention"
_STATIC = {"static": True}


class Routing(NamedTuple):
    """Which partitions each token writes and reads; chosen once, in float32, without gradient.

    Attributes:
        probability: [B, T, P] float32, p.
        write_index: [B, T, w] int32, likeliest first; ties go to the lower index.
        read_index: [B, T, r] int32.
    """

    probability: Array
    write_index: Array
    read_index: Array

    def write_mask(self) -> Bool[Array, "B T P"]:
        """True where the token writes."""
        return _chosen(self.write_index, self.probability.shape[-1])

    def read_mask(self) -> Bool[Array, "B T P"]:
        """True where the token reads."""
        return _chosen(self.read_index, self.probability.shape[-1])


def route(logits: Float[Array, "B T P"], num_writers: int, num_readers: int) -> Routing:
    """Softmax over the partitions in float32 and its top choices; the chosen probabilities are not renormalised.

    Raises:
        ConfigError: `num_writers` or `num_readers` is not in 1 .. P - 1.
    """
    check_choices(logits.shape[-1], num_writers, num_readers)
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, index = jax.lax.top_k(jax.lax.stop_gradient(probability), max(num_writers, num_readers))
    return Routing(probability, index[..., :num_writers], index[..., :num_readers])


def check_choices(num_partitions: int, num_writers: int, num_readers: int) -> None:
    """Refuses choices that are not sparse.

    Raises:
        ConfigError: `num_writers` or `num_readers` is not in 1 .. P - 1.
    """
    for name, value in (("num_writers", num_writers), ("num_readers", num_readers)):
        if not 1 <= value < num_partitions:
            raise ConfigError(f"{name} = {value}: needs 1 or more, and fewer than num_partitions = {num_partitions}.")


def load_balance_loss(routing: Routing, valid: Bool[Array, "B T"] | None = None) -> Float[Array, ""]:
    """(P / w) sum_i mean(p^i) mean(i is written), means over all real tokens: 1 when balanced, unweighted.

    Args:
        routing: of `route`.
        valid: [B, T], False = padding; None = all tokens are real.
    """
    written = routing.write_mask().astype(jnp.float32)
    weight = jnp.ones(written.shape[:2]) if valid is None else valid.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weight), 1.0)
    mean = lambda x: jnp.einsum("btp,bt->p", x, weight, precision=jax.lax.Precision.HIGHEST) / count  # noqa: E731
    partitions, writers = routing.probability.shape[-1], routing.write_index.shape[-1]
    return partitions / writers * jnp.sum(mean(routing.probability) * mean(written))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseCall:
    """One call in canonical form; arrays float32 (see `sparse_state_attention`), decays as factors [B, T, N, Hk or 1]."""

    q_shared: Array
    q_sparse: Array
    k_shared: Array
    k_sparse: Array
    v: Array
    decay_shared: Array
    decay_sparse: Array
    beta_shared: Array | None
    beta_sparse: Array | None
    routing: Routing
    valid: Array | None
    reset: Array | None
    initial: Array | None
    read_factor: bool = dataclasses.field(metadata=_STATIC)
    write_factor: bool = dataclasses.field(metadata=_STATIC)
    scale: float = dataclasses.field(metadata=_STATIC)
    chunk: int = dataclasses.field(metadata=_STATIC)
    dtype: Any = dataclasses.field(metadata=_STATIC)
    precision: Any = dataclasses.field(metadata=_STATIC)

    @property
    def partitions(self) -> int:
        """Returns P."""
        return self.routing.probability.shape[-1]

    def finish(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Returns queries and keys as the state sees them: normalised for the delta rule, queries scaled."""
        if self.beta_shared is not None:
            q, k = l2_normalize(q), l2_normalize(k)
        return q * self.scale, k


def sparse_state_attention(
    q_shared: Float[Array, "B T N Hk"],
    q_sparse: Float[Array, "B T N Hk"],
    k_shared: Float[Array, "B T N Hk"],
    k_sparse: Float[Array, "B T N Hk"],
    v: Float[Array, "B T N Hv"],
    log_decay_shared: Float[Array, "B T N Hk"] | Float[Array, "B T N"],
    log_decay_sparse: Float[Array, "B T N Hk"] | Float[Array, "B T N"],
    routing: Routing,
    *,
    beta_shared: Float[Array, "B T N"] | None = None,
    beta_sparse: Float[Array, "B T N"] | None = None,
    read_factor: bool = True,
    write_factor: bool = True,
    scale: float | None = None,
    initial_state: Float[Array, "B S N Hk Hv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    chunk_size: int = CHUNK,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B S N Hk Hv"]]:
    """Linear attention over 1 + P state partitions (arXiv 2507.16577); the formulas are in the module's docstring.

    Args:
        q_shared: queries of the partition that is always on.
        q_sparse: queries of the sparse partitions.
        k_shared: keys, the same.
        k_sparse: keys, the same.
        v: values of all partitions.
        log_decay_shared: <= 0, per key channel or per head.
        log_decay_sparse: the same.
        routing: of `route`.
        beta_shared: writing strength of the gated delta rule, which is used when both are given.
        beta_sparse: the same.
        read_factor: multiply the sparse queries by p.
        write_factor: multiply the sparse keys by p.
        scale: of the queries, default Hk^-1/2.
        initial_state: S = 1 + P states, the shared one first; default zeros.
        segment_ids: all states are cleared where the id changes; 0 is padding.
        mask: False = padding: neither writes nor decays, output zero.
        chunk_size: a power of two.
        implementation: "pallas", "triton", "varlen", "mask" or "recurrent"; None takes the best that can (`ops.explain`).

    Returns:
        o in the type of v, and the states after the last token, float32.

    Raises:
        ConfigError: shapes that do not fit each other.
        NotImplementedError: the named implementation cannot compute this call ("varlen" where w != r).
    """
    want = q_shared.shape
    batch, length, heads, rows = want
    if not (q_sparse.shape == k_shared.shape == k_sparse.shape == want) or v.shape[:3] != want[:3]:
        shapes = [x.shape for x in (q_shared, q_sparse, k_shared, k_sparse, v)]
        raise ConfigError(f"q, k, v have shapes {shapes}: they need four times [B,T,N,Hk] and [B,T,N,Hv].")
    for name, decay in (("log_decay_shared", log_decay_shared), ("log_decay_sparse", log_decay_sparse)):
        if decay.shape not in (want, want[:3]) or decay.ndim != log_decay_shared.ndim:
            raise ConfigError(f"{name} has shape {decay.shape}: it needs {list(want)} or {list(want[:3])}, as the other one.")
    if (beta_shared is None) != (beta_sparse is None):
        raise ConfigError("beta_shared and beta_sparse: one of them is missing. Give both (gated delta rule) or none.")
    if routing.probability.shape[:2] != want[:2]:
        raise ConfigError(f"routing of shape {routing.probability.shape}: it needs [B, T, P] with [B, T] = {list(want[:2])}.")
    states = (batch, 1 + routing.probability.shape[-1], heads, rows, v.shape[-1])
    if initial_state is not None and (initial_state.shape != states or initial_state.dtype != jnp.float32):
        raise ConfigError(f"initial_state is {initial_state.dtype}{list(initial_state.shape)}: it needs float32{list(states)}.")
    chunk_scan.check_chunk(chunk_size)
    valid = valid_tokens((batch, length), segment_ids, mask)
    reset = None if segment_ids is None else segment_starts(segment_ids, valid)
    real = lambda x: only(valid, x.astype(jnp.float32))  # noqa: E731
    call = SparseCall(
        q_shared=real(q_shared),
        q_sparse=real(q_sparse),
        k_shared=real(k_shared),
        k_sparse=real(k_sparse),
        v=real(v),
        decay_shared=decay_factors(log_decay_shared, want, valid, None),
        decay_sparse=decay_factors(log_decay_sparse, want, valid, None),
        beta_shared=None if beta_shared is None else real(beta_shared[..., None]),
        beta_sparse=None if beta_sparse is None else real(beta_sparse[..., None]),
        routing=routing._replace(probability=only(valid, routing.probability)),
        valid=valid,
        reset=reset,
        initial=initial_state,
        read_factor=read_factor,
        write_factor=write_factor,
        scale=rows**-0.5 if scale is None else scale,
        chunk=chunk_size,
        dtype=v.dtype,
        precision=jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None,
    )
    return dispatch.call(_OP, implementation, call)


def _chosen(index: Int[Array, "... k"], size: int) -> Bool[Array, "... size"]:
    return jnp.any(index[..., None] == jnp.arange(size), axis=-2)


_NAMES = ("q_shared", "q_sparse", "k_shared", "k_sparse", "v", "decay_shared", "decay_sparse", "beta_shared", "beta_sparse")


def _over_mesh(call: SparseCall, local: Any) -> tuple[Array, Array]:
    """Calls local(call, axis) on each device's part of batch, heads and sequence."""
    arrays = tuple(getattr(call, name) for name in _NAMES)
    rest = (*call.routing, call.valid, call.reset, call.initial)

    def run(*args, axis):
        *routing, valid, reset, initial = args[len(_NAMES) :]
        named = dict(zip(_NAMES, args, strict=False), routing=Routing(*routing), valid=valid, reset=reset, initial=initial)
        out, state = local(dataclasses.replace(call, **named), axis)
        return out.astype(call.dtype), state

    layouts = ("BTNH",) * len(_NAMES) + ("BTP",) * 3 + ("BT",) * 2 + ("BSNKV",)
    return chunk_scan.over_mesh(run, arrays + rest, layouts, ("BTNH", "BSNKV"))


def _mask(call: SparseCall, axis: Any) -> tuple[Array, Array]:
    """All tokens for every partition, partitions beside heads; what a token does not choose is zero."""
    batch, length, heads, _ = call.q_shared.shape
    copies = 1 + call.partitions
    writes, reads = (
        jnp.where(mask, call.routing.probability if factor else 1.0, 0.0)[..., None, None]
        for mask, factor in ((call.routing.write_mask(), call.write_factor), (call.routing.read_mask(), call.read_factor))
    )
    write_mask = call.routing.write_mask()[..., None, None]

    def together(shared: Array | None, sparse: Array | None) -> Array | None:
        if shared is None:
            return None
        sparse = jnp.broadcast_to(sparse, (batch, length, call.partitions, *sparse.shape[3:]))
        both = jnp.concatenate([shared[:, :, None], sparse], axis=2)
        return both.reshape(batch, length, copies * heads, -1)

    q = together(call.q_shared, call.q_sparse[:, :, None] * reads)
    k = together(call.k_shared, call.k_sparse[:, :, None] * writes)
    v = together(call.v, jnp.where(write_mask, call.v[:, :, None], 0.0))
    decay = together(call.decay_shared, jnp.where(write_mask, call.decay_sparse[:, :, None], 1.0))
    decay = decay if call.reset is None else only(~call.reset, decay)
    beta = None if call.beta_sparse is None else jnp.where(write_mask, call.beta_sparse[:, :, None], 0.0)
    beta = together(call.beta_shared, beta)
    q, k = call.finish(q, k)

    chunk = chunk_scan.fit_chunk(call.chunk, length)
    q, k, v = (chunk_scan.to_chunks(x, chunk) for x in (q, k, v))
    beta = None if beta is None else chunk_scan.to_chunks(beta, chunk)
    decay = chunk_scan.to_chunks(decay, chunk, fill=1.0)
    rows, width = q.shape[-1], v.shape[-1]
    initial = None if call.initial is None else call.initial.reshape(batch, 1, copies * heads, rows, width)
    out, state = chunk_scan.scan(q, k, v, decay, beta, None, initial, axis, call.precision)
    out = chunk_scan.from_chunks(out, length).reshape(batch, length, copies, heads, width).sum(axis=2)
    return out, state.reshape(batch, copies, heads, rows, width)


def varlen(call: SparseCall, scan: Any = chunk_scan.scan, fit: Any = chunk_scan.fit_chunk) -> tuple[Array, Array]:
    """Computes a call with `scan`, a function like `chunk_scan.scan`, over chunks of `fit(call.chunk, length)` tokens."""
    return _over_mesh(call, lambda part, axis: _varlen(part, axis, scan, fit(call.chunk, part.q_shared.shape[1])))


def _varlen(call: SparseCall, axis: Any, scan: Any, chunk: int) -> tuple[Array, Array]:
    """The shared stream and the sorted, padded streams of the partitions, in one scan over chunks."""
    length = call.q_shared.shape[1]
    streams = partition_streams.lay_out(call.routing.write_index, call.partitions, chunk, call.valid)
    factor = jnp.take_along_axis(call.routing.probability, call.routing.write_index, axis=-1)
    factor = streams.of_entries(factor)[..., None, None]
    spread = lambda x: partition_streams.expand(x, streams)  # noqa: E731
    q, k = spread(call.q_sparse), spread(call.k_sparse)
    q = q * factor if call.read_factor else q
    k = k * factor if call.write_factor else k
    # Empty slots: zeros write nothing, and a factor of 1 keeps the state.
    decay = jnp.where(streams.used[..., None, None], spread(call.decay_sparse), 1.0)
    decay_shared = call.decay_shared
    if call.reset is not None:
        decay = only(~streams.resets(call.reset), decay)
        decay_shared = only(~call.reset, decay_shared)
    q, k = call.finish(q, k)
    q_shared, k_shared = call.finish(call.q_shared, call.k_shared)

    def together(shared: Array, sparse: Array, fill: float = 0.0) -> Array:
        both = (chunk_scan.to_chunks(shared, chunk, fill), chunk_scan.to_chunks(sparse, chunk, fill))
        return jnp.concatenate(both, axis=2)

    shared_chunks = max(-(-length // chunk), 1)
    out, state = scan(
        together(q_shared, q),
        together(k_shared, k),
        together(call.v, spread(call.v)),
        together(decay_shared, decay, 1.0),
        None if call.beta_shared is None else together(call.beta_shared, spread(call.beta_sparse)),
        streams.chains(shared_chunks, call.reset),
        call.initial,
        axis,
        call.precision,
    )
    shared, sparse = jnp.split(out, [shared_chunks], axis=2)
    sparse = partition_streams.collapse(chunk_scan.from_chunks(sparse, streams.used.shape[1]), streams)
    return chunk_scan.from_chunks(shared, length) + sparse, state


def _recurrent(call: SparseCall, axis: Any = None) -> tuple[Array, Array]:
    """The reference: token by token in float32, touching only the partitions of the token."""
    del axis
    batch, _, heads, rows = call.q_shared.shape
    high = jax.lax.Precision.HIGHEST
    row = jnp.arange(batch)[:, None]
    routing = call.routing
    valid = jnp.ones(routing.probability.shape[:2], bool) if call.valid is None else call.valid
    reset = jnp.zeros_like(valid) if call.reset is None else call.reset
    write_p, read_p = (
        jnp.take_along_axis(routing.probability, index, axis=-1) if factor else jnp.ones(index.shape)
        for index, factor in ((routing.write_index, call.write_factor), (routing.read_index, call.read_factor))
    )

    def write(state, k, v, decay, beta):  # [B, w, N, ...]
        state = state * decay[..., None]
        if beta is not None:
            v = beta * (v - jnp.einsum("bwnk,bwnkv->bwnv", k, state, precision=high))
        return state + k[..., :, None] * v[..., None, :]

    def step(state, token):
        arrays, write_index, read_index, write_p, read_p, valid, reset = token
        q1, q2, k1, k2, v, decay1, decay2, beta1, beta2 = (None if x is None else x[:, None] for x in arrays)
        state = jnp.where(reset[:, None, None, None, None], 0.0, state)
        q1, k1 = call.finish(q1, k1)
        q2, k2 = call.finish(q2 * read_p[..., None, None], k2 * write_p[..., None, None])
        shared = write(state[:, :1], k1, v, decay1, beta1)
        touched = state[row, 1 + write_index]
        written = jnp.where(valid[:, None, None, None, None], write(touched, k2, v, decay2, beta2), touched)
        state = state.at[:, :1].set(shared).at[row, 1 + write_index].set(written)
        out = jnp.einsum("bsnk,bsnkv->bnv", q1, shared, precision=high)
        read = state[row, 1 + read_index]
        return state, out + jnp.einsum("bsnk,bsnkv->bnv", jnp.broadcast_to(q2, read.shape[:-1]), read, precision=high)

    state = call.initial
    if state is None:
        state = jnp.zeros((batch, 1 + call.partitions, heads, rows, call.v.shape[-1]))
    arrays = tuple(getattr(call, name) for name in _NAMES)
    tokens = (arrays, routing.write_index, routing.read_index, write_p, read_p, valid, reset)
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))
    return out.swapaxes(0, 1).astype(call.dtype), state


def varlen_chunks(call: SparseCall, chunk: int) -> int:
    """Returns how many chunks of `chunk` tokens a row has in `varlen`."""
    length, choices = call.routing.write_index.shape[1:]
    return max(-(-length // chunk), 1) + partition_streams.chunk_count(length * choices, call.partitions, chunk)


def refuse_varlen(call: SparseCall) -> str | None:
    """Says why sorted streams cannot do a call, or None."""
    writers, readers = call.routing.write_index.shape[-1], call.routing.read_index.shape[-1]
    if writers != readers:
        return f"sorted streams need as many writers as readers, and there are {writers} and {readers}"
    return None


def _defer_chunks(call: SparseCall) -> str | None:
    return "one or two tokens are quicker one by one" if call.q_shared.shape[1] <= 2 else None


dispatch.register(_OP, "pallas", "kernels_pallas.state_scan.implementation:SPARSE", platforms=("tpu",))
dispatch.register(_OP, "triton", "kernels_pallas.state_scan_triton.implementation:SPARSE", platforms=("gpu",))
dispatch.register(_OP, "varlen", dispatch.Implementation(varlen, refuse_varlen, _defer_chunks))
dispatch.register(_OP, "mask", dispatch.Implementation(lambda call: _over_mesh(call, _mask), defer=_defer_chunks))
dispatch.register(_OP, "recurrent", dispatch.Implementation(_recurrent))

"""Linear attention with a decaying state: gated linear attention and the gated delta rule, token by token and in chunks.

Per head, with a state S [Hk, Hv] in float32 and rows as vectors,

    gated_linear_scan:  S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t                                   o_t = scale q_t S_t
    gated_delta_scan:   S' = diag(exp(g_t)) S_{t-1};  S_t = S' + k_t^T beta_t (v_t - k_t S')       o_t = scale q_t S_t

g <= 0 is a log decay per key channel, or one per head. Gated linear attention: Yang et al., 2023, arXiv 2312.06635; gated
delta rule: Yang et al., 2024, arXiv 2412.06464. Implementations of both, all equal:

    recurrent   one token at a time: the reference, and the quickest for single tokens
    chunked     matrix products within chunks, a scan over chunks (`attnlab.ops.chunk_scan`)
    parallel    one chunk that holds the whole sequence: [T, T] products, for short sequences and for study
    pallas      the chunks in one kernel that carries the state in fast memory (`kernels_pallas/state_scan`), on TPU
    triton      kernels for the chunks and for the states between them (`kernels_pallas/state_scan_triton`), on NVIDIA GPUs

Where a mesh splits the sequence (axis `context`), every device scans its own part, states are exchanged once, and the result
is that of one device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops import chunk_scan, dispatch, sharding
from attnlab.types import Array, Bool, Float, Int

CHUNK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanCall:
    """One call in canonical form: padding and resets are inside the arrays, all of them float32.

    Attributes:
        q: [B, T, N, Hk], scaled; zero at padding, as are k, v and beta.
        k: [B, T, N, Hk].
        v: [B, T, N, Hv].
        decay: factors [B, T, N, Hk or 1] in [0, 1]: 0 where a segment starts, 1 at padding.
        beta: [B, T, N, 1] for the delta rule, else None.
        initial: [B, N, Hk, Hv], or None = zeros.
        chunk: tokens per chunk.
        dtype: of the result.
        precision: of the products.
    """

    q: Array
    k: Array
    v: Array
    decay: Array
    beta: Array | None
    initial: Array | None
    chunk: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    precision: Any = dataclasses.field(metadata={"static": True})


def gated_linear_scan(
    q: Float[Array, "B T N Hk"],
    k: Float[Array, "B T N Hk"],
    v: Float[Array, "B T N Hv"],
    log_decay: Float[Array, "B T N Hk"] | Float[Array, "B T N"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B N Hk Hv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    chunk_size: int = CHUNK,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N Hk Hv"]]:
    """Gated linear attention: S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t (arXiv 2312.06635).

    Args:
        q: queries.
        k: keys; no feature map is applied.
        v: values.
        log_decay: g <= 0 (-inf clears), per key channel or per head; None = no decay (plain linear attention).
        scale: of the queries, default Hk^-1/2.
        initial_state: S_0, default zeros.
        segment_ids: the state is cleared where the id changes from the last real token's; 0 is padding. With an initial state,
            that belongs to the first segment.
        mask: False = padding. Padding neither writes nor decays, and its output is zero.
        chunk_size: a power of two.
        implementation: "pallas", "triton", "chunked", "recurrent" or "parallel"; None takes the best that can (`ops.explain`).

    Returns:
        o in the type of v, and the state after the last token, float32.

    Raises:
        ConfigError: shapes that do not fit each other.
        NotImplementedError: the named implementation cannot compute this call.
    """
    call = make_scan(q, k, v, log_decay, None, scale, initial_state, segment_ids, mask, chunk_size)
    return dispatch.call("gated_linear_scan", implementation, call)


def gated_delta_scan(
    q: Float[Array, "B T N Hk"],
    k: Float[Array, "B T N Hk"],
    v: Float[Array, "B T N Hv"],
    log_decay: Float[Array, "B T N Hk"] | Float[Array, "B T N"] | None,
    beta: Float[Array, "B T N"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B N Hk Hv"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    chunk_size: int = CHUNK,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N Hk Hv"]]:
    """The gated delta rule: S' = diag(exp(g_t)) S_{t-1}, S_t = S' + k_t^T beta_t (v_t - k_t S'), o_t = scale q_t S_t.

    Keys are used as they come: normalise them (`l2_normalize`), else a step with beta |k|^2 > 2 makes the state grow. Source:
    arXiv 2412.06464. Other arguments, results and errors are those of `gated_linear_scan`.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: g <= 0, per head or per key channel; None = no decay (the delta rule).
        beta: writing strength, usually in [0, 1] or [0, 2].
        scale: of the queries, default Hk^-1/2.
        initial_state: S_0, default zeros.
        segment_ids: as there.
        mask: as there.
        chunk_size: a power of two.
        implementation: as there.
    """
    if beta.shape != q.shape[:3]:
        raise ConfigError(f"beta has shape {beta.shape}: it needs [B, T, N] = {list(q.shape[:3])}.")
    call = make_scan(q, k, v, log_decay, beta, scale, initial_state, segment_ids, mask, chunk_size)
    return dispatch.call("gated_delta_scan", implementation, call)


def l2_normalize(x: Float[Array, ...], epsilon: float = 1e-6) -> Float[Array, ...]:
    """x / sqrt(sum x^2 + epsilon) over the last axis, in float32: how the gated delta rule treats queries and keys."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def valid_tokens(
    shape: tuple[int, int], segment_ids: Int[Array, "B T"] | None, mask: Bool[Array, "B T"] | None
) -> Bool[Array, "B T"] | None:
    """Returns which tokens are real (mask True, segment not 0), None = all.

    Raises:
        ConfigError: an array that is not [B, T].
    """
    for name, x in (("segment_ids", segment_ids), ("mask", mask)):
        if x is not None and x.shape != shape:
            raise ConfigError(f"{name} has shape {x.shape}: it needs [B, T] = {list(shape)}.")
    if segment_ids is None:
        return mask
    real = segment_ids != 0
    return real if mask is None else real & mask


def segment_starts(segment_ids: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns the real tokens whose segment differs from that of the last real token before them (of which there is one)."""
    last = last_valid(valid)
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return valid & (before >= 0) & (segment_ids != previous)


def last_valid(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the index of the last real token at or before each token, -1 where there is none."""
    at = jnp.arange(valid.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(valid, at, -1), axis=1)


def make_scan(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    beta: Array | None,
    scale: float | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    mask: Array | None,
    chunk_size: int,
) -> ScanCall:
    """Checks the arguments of a scan and brings them into canonical form; see `ScanCall`.

    Raises:
        ConfigError: shapes that do not fit each other, or a chunk that is no power of two.
    """
    batch, length, heads, rows = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ConfigError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: they need twice [B,T,N,Hk] and [B,T,N,Hv].")
    if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
        raise ConfigError(f"log_decay has shape {log_decay.shape}: it needs {list(q.shape)} or {list(q.shape[:3])}.")
    if initial_state is not None:
        want = (batch, heads, rows, v.shape[-1])
        if initial_state.shape != want or initial_state.dtype != jnp.float32:
            raise ConfigError(
                f"initial_state is {initial_state.dtype}{list(initial_state.shape)}: it needs float32{list(want)}."
            )
    chunk_scan.check_chunk(chunk_size)
    valid = valid_tokens((batch, length), segment_ids, mask)
    reset = None if segment_ids is None else segment_starts(segment_ids, valid)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.astype(jnp.float32) * (rows**-0.5 if scale is None else scale)
    return ScanCall(
        q=only(valid, q),
        k=only(valid, k.astype(jnp.float32)),
        v=only(valid, v.astype(jnp.float32)),
        decay=decay_factors(log_decay, q.shape, valid, reset),
        beta=None if beta is None else only(valid, beta.astype(jnp.float32)[..., None]),
        initial=initial_state,
        chunk=chunk_size,
        dtype=v.dtype,
        precision=precision,
    )


def only(valid: Array | None, x: Array, other: float = 0.0) -> Array:
    """x [B, T, ...] where tokens are real, else a constant; what stood there, NaN too, has no part in value or gradient."""
    if valid is None:
        return x
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, other)


def decay_factors(
    log_decay: Array | None, shape: tuple[int, ...], valid: Array | None, reset: Array | None
) -> Array:
    """exp of a log decay [B, T, N, Hk], [B, T, N] or None as [B, T, N, Hk or 1] float32: 1 at padding, 0 at resets."""
    if log_decay is None:
        factors = jnp.ones((*shape[:3], 1), jnp.float32)
    else:
        log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        factors = jnp.exp(only(valid, log_decay.astype(jnp.float32)))
    return factors if reset is None else only(~reset, factors)


def _recurrent(call: ScanCall) -> tuple[Array, Array]:
    """The reference: a scan over tokens in float32."""
    high = jax.lax.Precision.HIGHEST

    def step(state, token):
        q, k, v, decay, beta = token  # [B, N, ...]
        state = state * decay[..., None]
        if beta is not None:
            v = beta * (v - jnp.einsum("bnk,bnkv->bnv", k, state, precision=high))
        state = state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bnk,bnkv->bnv", q, state, precision=high)

    batch, _, heads, rows = call.q.shape
    state = jnp.zeros((batch, heads, rows, call.v.shape[-1])) if call.initial is None else call.initial
    arrays = (call.q, call.k, call.v, call.decay, call.beta)
    xs = tuple(None if x is None else x.swapaxes(0, 1) for x in arrays)
    state, out = jax.lax.scan(step, state, xs)
    return out.swapaxes(0, 1).astype(call.dtype), state


def chunked(call: ScanCall, scan: Any = chunk_scan.scan, fit: Any = chunk_scan.fit_chunk) -> tuple[Array, Array]:
    """Computes a call with `scan`, a function like `chunk_scan.scan`, over chunks of `fit(call.chunk, length)` tokens."""
    args = (call.q, call.k, call.v, call.decay, call.beta, call.initial)

    def local(q, k, v, decay, beta, initial, axis):
        length = q.shape[1]
        chunk = fit(call.chunk, length)
        q, k, v = (chunk_scan.to_chunks(x, chunk) for x in (q, k, v))
        decay = chunk_scan.to_chunks(decay, chunk, fill=1.0)
        beta = None if beta is None else chunk_scan.to_chunks(beta, chunk)
        initial = None if initial is None else initial[:, None]
        out, state = scan(q, k, v, decay, beta, None, initial, axis, call.precision)
        return chunk_scan.from_chunks(out, length).astype(call.dtype), state[:, 0]

    token = "BTNH"
    return chunk_scan.over_mesh(local, args, (token,) * 5 + ("BNKV",), (token, "BNKV"))


def _parallel(call: ScanCall) -> tuple[Array, Array]:
    length = call.q.shape[1]
    return chunked(dataclasses.replace(call, chunk=1 << max(length - 1, 0).bit_length()))


def _defer_chunked(call: ScanCall) -> str | None:
    if call.q.shape[1] <= 2:
        return "one or two tokens are quicker one by one"
    return None


def _refuse_parallel(call: ScanCall) -> str | None:
    shards = sharding.shard_count("sequence")
    return f"the mesh splits the sequence over {shards} devices, and it needs all of it" if shards > 1 else None


for _op in ("gated_linear_scan", "gated_delta_scan"):
    dispatch.register(_op, "pallas", "kernels_pallas.state_scan.implementation:IMPLEMENTATION", platforms=("tpu",))
    dispatch.register(_op, "triton", "kernels_pallas.state_scan_triton.implementation:IMPLEMENTATION", platforms=("gpu",))
    dispatch.register(_op, "chunked", dispatch.Implementation(chunked, defer=_defer_chunked))
    dispatch.register(_op, "recurrent", dispatch.Implementation(_recurrent))
    dispatch.register(_op, "parallel", dispatch.Implementation(_parallel, refuse=_refuse_parallel))

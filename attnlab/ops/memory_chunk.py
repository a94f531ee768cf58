"""One chunk of the neural memory: gradients at its start, the gates as one linear map, reading and writing.

"Titans: Learning to Memorize at Test Time" (Behrouz, Zhong & Mirrokni, 2024, arXiv 2501.00663); the rule and its closed form are
in `attnlab.ops.neural_memory`. A state here is (start, weights, momentum), each a [B, N, I, O] per layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.types import Array

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
# Far below the last digit of anything; its logarithm is finite.
_SMALLEST_FACTOR = 1e-30


def read_memory(weights: Sequence[Array], x: Array) -> Array:
    """M(x) with the weights of each row and head: [B, N, I, O] and x [B, C, N, H] to [B, C, N, H], float32."""
    for i, w in enumerate(weights):
        x = _gelu(x)[0] if i else x
        x = einsum("bcni,bnio->bcno", x, w)
    return x


def surprise(weights: Sequence[Array], k: Array, v: Array) -> tuple[list[Array], list[Array], Array]:
    """Per layer what it reads a [B, N, C, I] and its error d [B, N, C, O], the gradient of token t being a_t d_t; and the losses.

    Args:
        weights: [B, N, I, O] per layer.
        k: [B, N, C, H].
        v: [B, N, C, H].
    """
    inputs, slopes = [k], []
    for w in weights[:-1]:
        z = einsum("bnci,bnio->bnco", inputs[-1], w)
        value, slope = _gelu(z)
        inputs.append(value)
        slopes.append(slope)
    miss = einsum("bnci,bnio->bnco", inputs[-1], weights[-1]) - v
    errors = [2.0 * miss]
    for w, slope in zip(weights[:0:-1], slopes[::-1], strict=True):
        errors.append(einsum("bnco,bnio->bnci", errors[-1], w) * slope)
    return inputs, errors[::-1], jnp.sum(miss * miss, axis=-1)


def memory_chunk(
    state: tuple[tuple[Array, ...], ...],
    q: Array,
    k: Array,
    v: Array,
    gates: Sequence[Array],
    valid: Array,
    *,
    before: bool = False,
) -> tuple[tuple[tuple[Array, ...], ...], Array, Array]:
    """One chunk, or the part of it that this call has.

    Args:
        state: (start, weights, momentum), each a [B, N, I, O] per layer.
        q: [B, C, N, H].
        k: [B, C, N, H].
        v: [B, C, N, H].
        gates: theta, eta, alpha [B, C, N].
        valid: [B, C] bool.
        before: read without the token's own write.

    Returns:
        The new state, y [B, C, N, H] and the losses [B, C, N].
    """
    start, weights, momentum = state
    y, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # heads in front: products without transposes
    inputs, errors, loss = surprise(start, k, v)
    factors = chunk_factors([jnp.swapaxes(gate, 1, 2) for gate in gates], valid[:, None], before=before)
    kept, mixed, writes, leaves = (x[..., None] for x in (factors.kept, factors.mixed, factors.writes, factors.leaves))
    last_kept, last_mixed, stays = (x[..., None, None] for x in (factors.last_kept, factors.last_mixed, factors.stays))
    new_weights, new_momentum = [], []
    for i, (w, s, a, d) in enumerate(zip(weights, momentum, inputs, errors, strict=True)):
        y = _gelu(y)[0] if i else y
        inside = einsum("bnci,bnsi->bncs", y, a) * factors.reads
        old = kept * einsum("bnci,bnio->bnco", y, w) + mixed * einsum("bnci,bnio->bnco", y, s)
        y = old + einsum("bncs,bnso->bnco", inside, d)
        new_weights.append(last_kept * w + last_mixed * s + einsum("bnsi,bnso->bnio", a * writes, d))
        new_momentum.append(stays * s + einsum("bnsi,bnso->bnio", a * leaves, d))
    return (start, tuple(new_weights), tuple(new_momentum)), jnp.swapaxes(y, 1, 2), jnp.swapaxes(loss, 1, 2)


class ChunkFactors(NamedTuple):
    """What the gates of a chunk make of its state W, S and its writes a_s d_s.

    M_t = kept_t W + mixed_t S + sum_s reads_ts a_s d_s is what token t reads; after the chunk come the weights
    last_kept W + last_mixed S + sum_s writes_s a_s d_s and the momentum stays S + sum_s leaves_s a_s d_s.

    Attributes:
        kept: [..., C].
        mixed: [..., C].
        reads: [..., C, C].
        last_kept: [...].
        last_mixed: [...].
        stays: [...].
        writes: [..., C].
        leaves: [..., C].
    """

    kept: Array
    mixed: Array
    reads: Array
    last_kept: Array
    last_mixed: Array
    stays: Array
    writes: Array
    leaves: Array


def chunk_factors(gates: Sequence[Array], valid: Array, *, before: bool) -> ChunkFactors:
    """The gates theta, eta, alpha [..., C] of a chunk as one linear map.

    Products of factors are sums of logarithms, each of its own terms (no differences: nothing cancels), and products with
    triangles of ones make them.

    Args:
        gates: theta, eta, alpha.
        valid: [..., C] bool: of padding, the momentum stays and is not added again.
        before: tokens read without their own write.
    """
    there = jnp.broadcast_to(valid, gates[0].shape).astype(jnp.float32)
    theta = gates[0] * there
    eta, keep = (log_factor(jnp.where(there > 0, x, 1.0)) for x in (gates[1], 1.0 - gates[2]))
    momenta, since = _products(eta)  # S_t = since_t S - sum_s momenta_ts theta_s u_s
    decays, kept = _products(keep, own=not before)
    until = _remaining(keep) * there
    return ChunkFactors(
        kept=kept,
        mixed=einsum("...tr,...r->...t", decays, there * since),
        reads=einsum("...tr,...rs->...ts", decays, there[..., None] * momenta) * -theta[..., None, :],
        last_kept=jnp.exp(jnp.sum(keep, axis=-1)),
        last_mixed=jnp.sum(until * since, axis=-1),
        stays=since[..., -1],
        writes=-theta * einsum("...r,...rs->...s", until, momenta),
        leaves=-theta * _remaining(eta),
    )


@jax.custom_jvp
def log_factor(factor: Array) -> Array:
    """log of a factor in [0, 1], floored at 1e-30; its derivative is not cut there, so that a factor of 0 has its gradient."""
    return jnp.log(jnp.maximum(factor, _SMALLEST_FACTOR))


@log_factor.defjvp
def _log_factor_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return log_factor(*primals), tangents[0] / jnp.maximum(primals[0], _SMALLEST_FACTOR)


def enter_chunk(
    state: tuple[tuple[Array, ...], ...], begin: tuple[tuple[Array, ...], ...], reset: Array, fresh: Array
) -> tuple[tuple[Array, ...], ...]:
    """What holds at the first token of a chunk: segments begin with `begin`, a new chunk starts at the present weights.

    Args:
        state: (start, weights, momentum).
        begin: the same at the start of a segment, batch 1 or B.
        reset: [B] bool, a segment starts.
        fresh: [B] bool, a chunk starts.
    """

    def choose(flag, yes, no):
        return tuple(jnp.where(flag[:, None, None, None], a, b) for a, b in zip(yes, no, strict=True))

    start, weights, momentum = (choose(reset, a, b) for a, b in zip(begin, state, strict=True))
    return choose(fresh, weights, start), weights, momentum


def _gelu(x: Array) -> tuple[Array, Array]:
    """The exact GELU and its derivative."""
    cumulative = 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))
    return x * cumulative, cumulative + x * (jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi)))


def _products(log: Array, own: bool = True) -> tuple[Array, Array]:
    """Of logarithms [.., C]: at (t, s) the product of the factors s + 1 .. t, 0 above the diagonal; and of all up to t, [.., C].

    Without `own` they stop at t - 1, and the diagonal is 0 too.
    """
    row, column = jnp.arange(log.shape[-1])[:, None], jnp.arange(log.shape[-1])
    shown = row >= column if own else row > column
    up_to = jnp.where(shown, log[..., None, :], 0.0)
    sums = einsum("...tr,rs->...ts", up_to, (row > column).astype(jnp.float32))
    return jnp.where(shown, jnp.exp(sums), 0.0), jnp.exp(jnp.sum(up_to, axis=-1))


def _remaining(log: Array) -> Array:
    """Of logarithms [.., C]: the products of the factors after each, [.., C]."""
    at = jnp.arange(log.shape[-1])
    return jnp.exp(jnp.sum(jnp.where(at[:, None] < at, log[..., None, :], 0.0), axis=-1))

"""The neural memory of the open implementation lucidrains/titans-pytorch, which differs from the paper's.

The memory is f(x) = LN(MLP(x)) (1 + gamma) + x, gamma being part of what is learned at test time. Weights change once per
chunk of C tokens. With g_n the gradient of sum_t lr_t mean_d (f(k_t) - v_t)^2 over chunk n at the weights of the present
update batch (those at the last multiple of `batch_size` tokens; None = at the start of the segment),

    S_n = eta_n S_{n-1} - g_n                          (of order o > 1: S^o_n = eta^o_n S^o_{n-1} + S^{o-1}_n)
    W_n = (1 - alpha_n) W_{n-1} + S_n

and token t reads with the weights after floor((t + 1) / C) chunks. What does not fill a chunk is not written yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.ops.tiles import Tile
from attnlab.types import Array

LN_EPSILON = 1e-5
Weights = tuple[Array, ...]  # gamma [B, N, H], then the MLP's [B, N, I, O]
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class LucidState(NamedTuple):
    """The memory of each row and head between chunks; float32.

    Attributes:
        weights: after the last full chunk.
        base: at the start of the present update batch.
        momentum: per weight [B, order, ...].
        chunks: [B] int32, chunks of the present update batch so far.
        tokens: [B, C, D], the tokens to write of the present chunk.
    """

    weights: Weights
    base: Weights
    momentum: tuple[Array, ...]
    chunks: Array
    tokens: Array


class ChunkInputs(NamedTuple):
    """What a full chunk writes, float32.

    Attributes:
        k: [B, C, N, H].
        v: [B, C, N, H].
        step: [B, C, N].
        decay: [B, N], alpha.
        momentum: [B, order, N], eta; None = none.
        modulation: [B, N, weights] factors of the gradient, or None.
    """

    k: Array
    v: Array
    step: Array
    decay: Array
    momentum: Array | None
    modulation: Array | None


def lucid_model(weights: Weights, x: Array) -> Array:
    """f(x), [B, C, N, H]: the MLP with exact gelu behind a layer norm, and a residual."""
    gamma, *layers = weights
    y = x
    for i, w in enumerate(layers):
        y = jax.nn.gelu(y, approximate=False) if i else y
        y = _einsum("bcni,bnio->bcno", y, w)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + LN_EPSILON)
    return y * (1.0 + gamma[:, None]) + x


def lucid_losses(weights: Weights, k: Array, v: Array) -> Array:
    """mean_d (f(k) - v)^2, [B, C, N]."""
    miss = lucid_model(weights, k) - v
    return jnp.mean(miss * miss, axis=-1)


def clamp_norm(gradient: Array, limit: float) -> Array:
    """Scales a gradient [B, N, ...] of each head to the norm h + h tanh(norm / h), h = limit / 2 (the published soft clamp)."""
    flat = gradient.reshape(*gradient.shape[:2], -1)
    square = jnp.sum(flat * flat, axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
    half = limit / 2
    return (flat * ((jnp.tanh(norm / half) * half + half) / norm)).reshape(gradient.shape)


def write_chunk(state: LucidState, inputs: ChunkInputs, max_grad_norm: float | None) -> tuple[LucidState, Array]:
    """Writes one full chunk: (the state with new weights and momentum, losses [B, C, N] at the base weights)."""

    def total(base):
        losses = lucid_losses(base, inputs.k, inputs.v)
        return jnp.sum(losses * inputs.step), losses

    gradients, losses = jax.grad(total, has_aux=True)(state.base)
    weights, momentum = [], []
    for i, (w, s, g) in enumerate(zip(state.weights, state.momentum, gradients, strict=True)):
        if max_grad_norm is not None:
            g = clamp_norm(g, max_grad_norm)
        rest = (1,) * (g.ndim - 2)
        if inputs.modulation is not None:
            g = g * inputs.modulation[..., i].reshape(*g.shape[:2], *rest)
        update = -g
        if inputs.momentum is not None:
            orders = []
            for o in range(s.shape[1]):
                update = inputs.momentum[:, o].reshape(*g.shape[:2], *rest) * s[:, o] + update
                orders.append(update)
            s = jnp.stack(orders, axis=1)
        weights.append((1.0 - inputs.decay).reshape(*g.shape[:2], *rest) * w + update)
        momentum.append(s)
    return state._replace(weights=tuple(weights), momentum=tuple(momentum)), losses


def lucid_tile(
    state: LucidState,
    tile: Tile,
    inputs_of: Callable[[Array], ChunkInputs],
    initial: Weights,
    chunk: int,
    batch_chunks: int | None,
    max_grad_norm: float | None,
) -> tuple[LucidState, tuple[Array, Array, Array]]:
    """A step of `ops.tiles.scan_tiles`.

    Args:
        state: carried.
        tile: its tokens are (queries [B, R, N, H], tokens to write [B, R, D]).
        inputs_of: from the tokens of a full chunk [B, C, D].
        initial: weights at the start of every segment, batch 1 or B.
        chunk: C.
        batch_chunks: chunks per update batch; None = the base never changes.
        max_grad_norm: limit of each weight's gradient, or None.

    Returns:
        The state, and (what is read [B, R, N, H], losses [B, R, N] and step sizes [B, R, N] of tokens now written, else 0).
    """
    queries, new = tile.tokens

    def choose(flag: Array, yes: Any, no: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(flag.reshape(-1, *(1,) * (b.ndim - 1)), a, b), yes, no)

    state = LucidState(
        weights=choose(tile.reset, initial, state.weights),
        base=choose(tile.reset, initial, state.base),
        momentum=choose(tile.reset, jax.tree.map(jnp.zeros_like, state.momentum), state.momentum),
        chunks=jnp.where(tile.reset, 0, state.chunks),
        tokens=state.tokens,
    )
    here = tile.valid if new.shape[1] == chunk else (tile.place == jnp.arange(chunk)) & tile.valid
    state = state._replace(tokens=jnp.where(here[..., None], new, state.tokens))
    last = tile.valid & (tile.place == chunk - 1)
    full = last.any(axis=1)

    def write(state):
        inputs = inputs_of(state.tokens)
        written, losses = write_chunk(state, inputs, max_grad_norm)
        chunks = state.chunks + 1
        base = state.base
        if batch_chunks is not None:
            base = choose(chunks == batch_chunks, written.weights, base)
            chunks = jnp.where(chunks == batch_chunks, 0, chunks)
        written = written._replace(base=base, chunks=chunks)
        there = full[:, None, None]
        return choose(full, written, state), (jnp.where(there, losses, 0.0), jnp.where(there, inputs.step, 0.0))

    def wait(state):
        none = jnp.zeros((*state.tokens.shape[:2], queries.shape[2]), jnp.float32)
        return state, (none, none)

    after, (losses, steps) = jax.lax.cond(full.any(), write, wait, state)
    if new.shape[1] == chunk:
        y = jnp.concatenate([lucid_model(state.weights, queries[:, :-1]), lucid_model(after.weights, queries[:, -1:])], axis=1)
    else:  # one token: the losses of its chunk belong to earlier calls' tokens too, and only its own are told
        y = lucid_model(choose(full, after.weights, state.weights), queries)
        losses, steps = losses[:, -1:], steps[:, -1:]
    return after, (y, losses, steps)


def lucid_start(initial: Sequence[Array], batch: int, order: int, chunk: int, dim: int) -> LucidState:
    """The state before the first token; `initial` are gamma [N, H] and the MLP's weights [N, I, O]."""
    wide = tuple(jnp.broadcast_to(w.astype(jnp.float32), (batch, *w.shape)) for w in initial)
    momentum = tuple(jnp.zeros((batch, order, *w.shape), jnp.float32) for w in initial)
    return LucidState(wide, wide, momentum, jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, chunk, dim), jnp.float32))

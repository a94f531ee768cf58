"""Magnitude-aware linear attention: kernel attention whose rows feel the length of the query.

"Rectifying Magnitude Neglect in Linear Attention" (Fan et al., 2025, arXiv 2507.00698). With phi = elu + 1, the division of
linear attention by s_i = phi(q_i) . sum_j phi(k_j) is replaced by a factor and a subtraction that depend on s_i:

    A_ij = beta_i phi(q_i) . phi(k_j) - gamma_i,      beta_i = 1 + 1 / s_i,      gamma_i = s_i / T

Rows sum to one, entries may be negative, the cost is linear in T. Variants:

    "paper"     as above
    "official"  the released code: the kernel is scaled by c / T, c = H^-1/2, and 1 / (s_i + eps) takes the place of 1 / s_i
    "divided"   plain normalised linear attention, A_ij = phi(q_i) . phi(k_j) / s_i (for comparisons)

A rotation acts on phi(q) and phi(k) in the product only: s is that of the unrotated features, as in the released code, so
with a rotation rows need not sum to one.

Published for images, where every token sees all. `causal=True` is attnlab's extension: sums over j become sums over j <= i,
and T becomes the number of tokens seen; it runs on `ops.linear_scan`, so it has chunked, recurrent and parallel forms, states,
and a sequence that a mesh may split.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from attnlab.errors import ConfigError, nearest
from attnlab.ops.linear_scan import CHUNK, gated_linear_scan, only, valid_tokens
from attnlab.types import Array, Bool, Float, Int

VARIANTS = ("official", "paper", "divided")
_HIGH = jax.lax.Precision.HIGHEST
_LEAST = 1e-18  # of a divisor: its square, of which gradients are made, is still a float32

# Factors of a rotation: (sin, cos), each broadcastable to [B, T, N, H] after an axis of heads is put in.
Rotation = tuple[Array, Array]


@struct.dataclass
class MagnitudeAwareState:
    """What causal attention keeps of the tokens so far; all float32, of a fixed size.

    Attributes:
        kv: [B, N, H, H], sum of rotated phi(k)^T v.
        k: [B, N, H, 1], sum of phi(k).
        v: [B, N, 1, H + 1], sum of v and the number of tokens.
    """

    kv: Array
    k: Array
    v: Array


def init_state(batch: int, num_heads: int, head_dim: int) -> MagnitudeAwareState:
    """Returns the state before the first token."""
    return MagnitudeAwareState(
        kv=jnp.zeros((batch, num_heads, head_dim, head_dim)),
        k=jnp.zeros((batch, num_heads, head_dim, 1)),
        v=jnp.zeros((batch, num_heads, 1, head_dim + 1)),
    )


def magnitude_aware_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    causal: bool = False,
    variant: str = "official",
    rotation: Rotation | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    eps: float = 1e-6,
    initial_state: MagnitudeAwareState | None = None,
    chunk_size: int = CHUNK,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], MagnitudeAwareState | None]:
    """Attends with the weights of `magnitude_aware_weights` in time linear in T; features, sums and divisions in float32.

    Args:
        q: queries, before phi.
        k: keys, before phi.
        v: values.
        causal: a token sees itself and those before it.
        variant: "official", "paper" or "divided".
        rotation: (sin, cos) of `axial_rotation` or `sequence_rotation`, or None.
        segment_ids: tokens see equal ones only, which stand side by side; 0 is padding.
        mask: False = padding: not seen, not counted in T; its own output is zero.
        eps: added to s before it is divided by.
        initial_state: of the tokens before (causal only).
        chunk_size: of the scan, a power of two (causal, or with segments).
        implementation: of `ops.linear_scan.gated_linear_scan`; None = the best that can.

    Returns:
        y in the type of v, and the state after the last token, None unless causal.

    Raises:
        ConfigError: shapes that do not fit, an unknown variant, a state without `causal`.
    """
    _check(q, k, v, variant, rotation)
    batch, length, heads, width = q.shape
    if initial_state is not None:
        if not causal:
            raise ConfigError("initial_state without causal=True: there is no order to continue. Pass one sequence at once.")
        _check_state(initial_state, batch, heads, width)
    valid = valid_tokens((batch, length), segment_ids, mask)
    fq, fk = feature_map(q), feature_map(k)
    rq, rk = (fq, fk) if rotation is None else (rotate_pairs(fq, *rotation), rotate_pairs(fk, *rotation))
    one = jnp.ones((*q.shape[:3], 1), jnp.float32)
    wide = v.astype(jnp.float32)
    state = None
    if causal or segment_ids is not None:
        start = initial_state or MagnitudeAwareState(None, None, None)
        scan: dict[str, Any] = {"scale": 1.0, "chunk_size": chunk_size, "implementation": implementation}

        def sums(rq, rk, fq, fk, wide, segment_ids, mask):
            rest = scan | {"segment_ids": segment_ids, "mask": mask}
            read, kv = gated_linear_scan(rq.astype(q.dtype), rk.astype(q.dtype), wide, initial_state=start.kv, **rest)
            s, ks = gated_linear_scan(fq, fk, one, initial_state=start.k, **rest)
            both = jnp.concatenate([wide, one], axis=-1)
            seen, vs = gated_linear_scan(one, one, both, initial_state=start.v, **rest)
            return (read, s, seen), MagnitudeAwareState(kv, ks, vs)

        (read, s, seen), state = sums(rq, rk, fq, fk, wide, segment_ids, mask)
        if not causal:  # what stands before, and what stands after, both with the token itself
            turned = [None if x is None else jnp.flip(x, axis=1) for x in (rq, rk, fq, fk, wide, segment_ids, mask)]
            after = [jnp.flip(x, axis=1) for x in sums(*turned)[0]]
            own = jnp.sum(rq * rk, axis=-1, keepdims=True) * wide, jnp.sum(fq * fk, axis=-1, keepdims=True)
            own = [only(valid, x) for x in (*own, jnp.concatenate([wide, one], axis=-1))]
            read, s, seen = (
                before + later - itself for before, later, itself in zip((read, s, seen), after, own, strict=True)
            )
            state = None
        vsum, count = seen[..., :-1], seen[..., -1:]
    else:
        rk, fk, wide = (only(valid, x) for x in (rk, fk, wide))
        count = jnp.full((batch, 1, 1, 1), float(length))
        if valid is not None:
            count = jnp.sum(valid, axis=1, dtype=jnp.float32)[:, None, None, None]
        share = jnp.maximum(count, 1.0)[:, 0]
        # Means and not sums: they stay near one however long the sequence is.
        precision = _HIGH if q.dtype == jnp.float32 else None
        kv = jnp.einsum("btnk,btnh->bnkh", rk, wide, precision=precision) / share[..., None]
        read = jnp.einsum("btnk,bnkh->btnh", rq, kv, precision=precision)
        read = read * count
        s = jnp.sum(fq * jnp.sum(fk, axis=1, keepdims=True), axis=-1, keepdims=True)
        vsum = jnp.sum(wide, axis=1, keepdims=True)
    scale, beta, gamma = _factors(s, count, variant, width, eps)
    y = beta * scale * read - gamma * vsum
    y = only(valid, jnp.where(count > 0, y, 0.0))
    return y.astype(v.dtype), state


def magnitude_aware_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    *,
    causal: bool = False,
    variant: str = "official",
    rotation: Rotation | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Array, "B N T T"], Float[Array, "B N T 1"], Float[Array, "B N T 1"]]:
    """The reference: returns the weights A, zero where nothing is seen, and their beta and gamma, all float32.

    Arguments are those of `magnitude_aware_attention`; the weights times v are its result.
    """
    _check(q, k, k, variant, rotation)
    batch, length, _, width = q.shape
    valid = valid_tokens((batch, length), segment_ids, mask)
    seen = jnp.ones((1, 1, length, length), bool)
    if causal:
        seen = jnp.tril(seen)
    if valid is not None:
        seen = seen & (valid[:, :, None] & valid[:, None, :])[:, None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    fq, fk = feature_map(q), feature_map(k)
    rq, rk = (fq, fk) if rotation is None else (rotate_pairs(fq, *rotation), rotate_pairs(fk, *rotation))
    plain = jnp.einsum("btnh,bsnh->bnts", fq, fk, precision=_HIGH)
    product = plain if rotation is None else jnp.einsum("btnh,bsnh->bnts", rq, rk, precision=_HIGH)
    count = jnp.sum(seen, axis=-1, keepdims=True, dtype=jnp.float32)
    s = jnp.sum(jnp.where(seen, plain, 0.0), axis=-1, keepdims=True)
    scale, beta, gamma = _factors(s, count, variant, width, eps)
    weights = jnp.where(seen, beta * scale * product - gamma, 0.0)
    return weights, jnp.broadcast_to(beta, s.shape), jnp.broadcast_to(gamma, s.shape)


def feature_map(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """elu(x) + 1 in float32, positive down to the smallest exponentials (elu alone would round to -1)."""
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0)))


def axial_frequencies(head_dim: int, *, base: float = 10000.0) -> Float[Array, " h"]:
    """Returns the angles per step, [H / 2]: H // 4 frequencies base^-linspace(0, 1), both ends included, each twice.

    Raises:
        ConfigError: H is no multiple of 4.
    """
    if head_dim < 4 or head_dim % 4:
        raise ConfigError(
            f"head_dim = {head_dim}: the rotation of images needs two pairs of features. Use a multiple of 4, or rope=False."
        )
    return jnp.repeat(base ** -jnp.linspace(0.0, 1.0, head_dim // 4), 2)


def axial_rotation(height: int, width: int, head_dim: int, *, base: float = 10000.0) -> Rotation:
    """Returns (sin, cos) [height * width, H] of a map, row by row: the first half turns with the row, the second with the column.

    Computed from the size at hand: any resolution will do. Raises `ConfigError` where H is no multiple of 4.
    """
    angle = axial_frequencies(head_dim, base=base)
    rows = jnp.arange(height, dtype=jnp.float32)[:, None, None] * angle
    columns = jnp.arange(width, dtype=jnp.float32)[None, :, None] * angle
    shape = (height, width, head_dim // 2)
    turned = jnp.concatenate([jnp.broadcast_to(rows, shape), jnp.broadcast_to(columns, shape)], axis=-1)
    turned = turned.reshape(height * width, head_dim)
    return jnp.sin(turned), jnp.cos(turned)


def sequence_rotation(positions: Int[Array, "B T"], head_dim: int, *, base: float = 10000.0) -> Rotation:
    """Returns (sin, cos) [B, T, H] of the usual rotary embedding (arXiv 2104.09864) with neighbouring features as pairs.

    Raises:
        ConfigError: H is odd.
    """
    if head_dim % 2:
        raise ConfigError(f"head_dim = {head_dim}: rotary embedding needs pairs. Use an even head width or rope=False.")
    angle = jnp.repeat(base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim), 2)
    turned = positions[..., None].astype(jnp.float32) * angle
    return jnp.sin(turned), jnp.cos(turned)


def rotate_pairs(x: Float[Array, "B T N H"], sin: Array, cos: Array) -> Float[Array, "B T N H"]:
    """x * cos + rot(x) * sin, rot turning neighbours (x0, x1) into (-x1, x0); sin and cos are [T, H] or [B, T, H]."""
    turned = jnp.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
    return x * cos[..., None, :] + turned * sin[..., None, :]


def _factors(s: Array, count: Array, variant: str, width: int, eps: float) -> tuple[Array, Array, Array]:
    """Returns the kernel's scale, beta and gamma out of s = phi(q) . sum phi(k) and the number of keys."""
    keys = jnp.maximum(count, 1.0)
    scale = width**-0.5 / keys if variant == "official" else 1.0
    s = s * scale
    inverse = 1.0 / jnp.maximum(s + eps, _LEAST)
    if variant == "divided":
        return scale, inverse, jnp.zeros_like(s)
    return scale, 1.0 + inverse, s / keys


def _check(q: Array, k: Array, v: Array, variant: str, rotation: Rotation | None) -> None:
    if not q.shape == k.shape == v.shape:
        raise ConfigError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: they need [B, T, N, H], all three.")
    if variant not in VARIANTS:
        raise ConfigError(f"variant = {variant!r}: unknown, {nearest(variant, VARIANTS)}")
    if rotation is not None and rotation[0].shape[-2:] != (q.shape[1], q.shape[-1]):
        raise ConfigError(f"rotation of shape {rotation[0].shape}: it needs [..., T, H] = {[q.shape[1], q.shape[-1]]}.")


def _check_state(state: MagnitudeAwareState, batch: int, heads: int, width: int) -> None:
    want = (batch, heads, width, width)
    if state.kv.shape != want or state.kv.dtype != jnp.float32:
        raise ConfigError(f"state is {state.kv.dtype}{list(state.kv.shape)}: it needs float32{list(want)}. Remake it.")

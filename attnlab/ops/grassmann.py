"""Pluecker coordinates of token pairs: the mixing of causal Grassmann layers, linear in the length.

"Attention Is Not What You Need" (Zhang, 2025, arXiv 2512.19428). A token z_t in R^r and the one d places before it span a
plane; its Pluecker coordinates p_ij = z_t,i z_s,j - z_t,j z_s,i (i < j, P = r (r - 1) / 2 of them), scaled to length one,
are the feature of the pair. Because what follows is linear, the features of all offsets are averaged first and projected
once.

Everything is float32: the products cancel, in bfloat16 they would leave nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import ConfigError, nearest
from attnlab.types import Array, Bool, Float, Int

DIRECTIONS = ("past", "future", "both")
NORMS = ("max", "smooth")
FORMS = ("frame", "pairs")
_SMOOTH = 1e-12  # of the "smooth" norm
_TINY = 1e-30  # keeps the quotients of a zero vector finite
# Below this share of |a| |b| a float32 product of equal tokens is rounding: rows of one matmul may differ in the last bit.
_NOISE = 4 * float(np.finfo(np.float32).eps)


def plucker(a: Float[Array, "*rows r"], b: Float[Array, "*rows r"]) -> Float[Array, "*rows P"]:
    """Returns a_i b_j - a_j b_i for i < j in the order (0,1), (0,2), .., (1,2), ..; float32, exactly zero for a = b.

    Args:
        a: first vectors of the pairs.
        b: second vectors, of the same shape; r >= 2.

    Raises:
        ConfigError: r < 2, which spans no plane.
    """
    _check_width(a.shape[-1])
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return _wedge(a, _apart(a, b))


def plucker_unit(
    a: Float[Array, "*rows r"], b: Float[Array, "*rows r"], *, eps: float = 1e-8, norm: str = "max"
) -> Float[Array, "*rows P"]:
    """Returns Pluecker coordinates of length one, the direction of the plane without its area.

    Args:
        a: first vectors of the pairs.
        b: second vectors.
        eps: least length that is divided by.
        norm: "max" divides by max(|p|, eps), as published: its gradient at p = 0 is 1 / eps. "smooth" multiplies by
            (|p|^2 + 1e-12)^(-1/2), better for training.

    Raises:
        ConfigError: unknown norm, or r < 2.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    p = plucker(a, b)
    size = jnp.sum(p * p, axis=-1, keepdims=True)
    scale = jnp.sum(a * a, axis=-1, keepdims=True) * jnp.sum(b * b, axis=-1, keepdims=True)
    return p * _inverse_length(size, scale, eps, norm)


def plucker_pairs(
    z: Float[Array, "B T r"], offset: int, *, direction: str = "past", eps: float = 1e-8, norm: str = "max"
) -> tuple[Float[Array, "B n P"], Float[Array, "B n P"]]:
    """Returns the coordinates of all pairs at one offset, raw and of length one; n = max(T - offset, 0).

    Args:
        z: reduced tokens.
        offset: distance of the two, >= 1.
        direction: "past": row n is token n + offset with token n; "future": token n with token n + offset. The token
            itself is always the first factor.
        eps: as in `plucker_unit`.
        norm: as in `plucker_unit`.

    Raises:
        ConfigError: bad offset, direction, norm or width.
    """
    check_offsets((offset,), direction)
    if direction == "both":
        raise ConfigError("direction = 'both': pairs of one offset need 'past' or 'future'. Call it for each.")
    later, earlier = z[:, offset:], z[:, : max(z.shape[1] - offset, 0)]
    first, second = (later, earlier) if direction == "past" else (earlier, later)
    return plucker(first, second), plucker_unit(first, second, eps=eps, norm=norm)


def grassmann_features(
    z: Float[Array, "B T r"],
    offsets: Sequence[int],
    *,
    direction: str = "past",
    num_heads: int = 1,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    history: tuple[Float[Array, "B M r"], Bool[Array, "B M"]] | None = None,
    eps: float = 1e-8,
    norm: str = "max",
    form: str = "frame",
) -> tuple[Float[Array, "B T F"], Bool[Array, "B T"]]:
    """Averages the unit Pluecker coordinates of a token with those at its valid offsets.

    An offset is valid where its token exists, is no padding and is in the same segment; a duplicate counts twice, one that
    reaches outside the sequence not at all. A token without a valid offset has a zero feature.

    Args:
        z: reduced tokens.
        offsets: distances, each >= 1; a multiset.
        direction: "past" pairs t with t - d (causal), "future" with t + d, "both" with both.
        num_heads: groups of r / num_heads consecutive features with coordinates and length of their own, concatenated.
        mask: False = padding, which has no pairs.
        segment_ids: tokens pair only with equal ones; 0 is padding.
        history: the M >= max(offsets) tokens before the first, and which of them exist (`direction="past"` only).
        eps: least length that is divided by.
        norm: "max" or "smooth", see `plucker_unit`.
        form: "pairs" computes P coordinates for every offset; "frame" only once, since a ^ b is linear in b: each
            partner is reduced to its unit part normal to z_t, which takes r and not P numbers. The same values.

    Returns:
        features [B, T, F], F = num_heads * P(r / num_heads), float32; and [B, T] bool, whether any offset was valid.

    Raises:
        ConfigError: bad offsets, direction, norm, form or widths; history with a direction that looks ahead.
    """
    z, mean, found = _mean(_term(form, eps, norm), z, offsets, direction, num_heads, mask, segment_ids, history)
    features = _wedge(z, mean) if form == "frame" else mean
    return features.reshape(*found.shape, -1), found


def grassmann_projection(
    z: Float[Array, "B T r"],
    weight: Float[Array, "F D"],
    offsets: Sequence[int],
    *,
    direction: str = "past",
    num_heads: int = 1,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    history: tuple[Float[Array, "B M r"], Bool[Array, "B M"]] | None = None,
    eps: float = 1e-8,
    norm: str = "max",
    form: str = "frame",
    dtype: Any = None,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
    """Returns `grassmann_features(...)` times the weight, with one matmul for all offsets; arguments as there.

    With form "frame" the (i, j) pairs are never gathered: the outer product of z_t and the mean normal, r^2 numbers, meets
    the weight made antisymmetric, [r^2, D].

    Args:
        z: reduced tokens.
        weight: rows in the order of `plucker`, head after head.
        offsets: distances.
        direction: of the pairs.
        num_heads: groups of features.
        mask: False = padding.
        segment_ids: of packed documents.
        history: tokens before the first.
        eps: least length.
        norm: "max" or "smooth".
        form: "frame" or "pairs".
        dtype: of the matmul; None = float32, with `Precision.HIGHEST`.

    Returns:
        projection [B, T, D] in `dtype`; and [B, T] bool, whether any offset was valid.
    """
    z, mean, found = _mean(_term(form, eps, norm), z, offsets, direction, num_heads, mask, segment_ids, history)
    if form == "frame":
        width = z.shape[-1]
        mean = (z[..., :, None] * mean[..., None, :]).reshape(*z.shape[:-1], width * width)
        weight = _antisymmetric(weight, num_heads, width)
    return _matmul(mean.reshape(*found.shape, -1), weight, dtype), found


def pair_projection(
    z: Float[Array, "B T r"],
    weight: Float[Array, "2*r D"],
    offsets: Sequence[int],
    *,
    direction: str = "past",
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    history: tuple[Float[Array, "B M r"], Bool[Array, "B M"]] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
    """The control without geometry: the mean over valid offsets of [z_t; z_(t-d)] times the weight.

    Arguments and results are those of `grassmann_projection`; the weight has 2 r rows.
    """
    z, mean, found = _mean(lambda _, partner: partner, z, offsets, direction, 1, mask, segment_ids, history)
    pair = jnp.concatenate([jnp.where(found[:, :, None], z[:, :, 0], 0.0), mean[:, :, 0]], axis=-1)
    return _matmul(pair, weight, dtype), found


def _mean(
    term: Callable[[Array, Array], Array],
    z: Array,
    offsets: Sequence[int],
    direction: str,
    num_heads: int,
    mask: Array | None,
    segment_ids: Array | None,
    history: tuple[Array, Array] | None,
) -> tuple[Array, Array, Array]:
    """Returns z by heads [B, T, N, r], the mean of term(z_t, partner) over valid offsets, and whether there was any."""
    check_offsets(offsets, direction)
    batch, length, width = z.shape
    if width % num_heads:
        raise ConfigError(f"num_heads = {num_heads}: does not divide the reduced width {width}. Choose a divisor.")
    _check_width(width // num_heads)
    if history is not None:
        if direction != "past":
            raise ConfigError(f"direction = {direction!r}: a history holds the past only. Use direction='past'.")
        if history[0].shape[1] < max(offsets):
            raise ConfigError(f"history of {history[0].shape[1]} tokens: the largest offset is {max(offsets)}.")

    valid = jnp.ones((batch, length), bool) if mask is None else mask
    valid = valid if segment_ids is None else valid & (segment_ids > 0)
    z = z.astype(jnp.float32).reshape(batch, length, num_heads, width // num_heads)
    z = jnp.where(valid[:, :, None, None], z, 0.0)  # whatever padding holds, it must not meet a weight of zero
    terms = _signed_offsets(offsets, direction, length, unlimited=history is not None)
    reach = max((abs(shift) for shift in terms), default=0)
    earlier, existed = jnp.zeros((batch, reach, *z.shape[2:])), jnp.zeros((batch, reach), bool)
    if history is not None:
        start = history[0].shape[1] - reach
        earlier = history[0][:, start:].astype(jnp.float32).reshape(earlier.shape)
        existed = history[1][:, start:]
    ahead = 0 if direction == "past" else reach
    padded = jnp.pad(jnp.concatenate([earlier, z], axis=1), ((0, 0), (0, ahead), (0, 0), (0, 0)))
    exists = jnp.pad(jnp.concatenate([existed, valid], axis=1), ((0, 0), (0, ahead)))
    segments = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (reach, ahead)))

    total = jnp.zeros(jax.eval_shape(term, z, z).shape)
    count = jnp.zeros((batch, length), jnp.float32)
    for shift, times in terms.items():
        here = slice(reach + shift, reach + shift + length)
        ok = valid & exists[:, here]
        if segments is not None:
            ok = ok & (segments[:, here] == segment_ids)
        # An invalid partner is replaced by the token itself: zero coordinates, finite gradients, and no weight.
        partner = jnp.where(ok[:, :, None, None], padded[:, here], jax.lax.stop_gradient(z))
        total = total + jnp.where(ok[:, :, None, None], term(z, partner) * times, 0.0)
        count = count + jnp.where(ok, float(times), 0.0)
    return z, total / jnp.maximum(count, 1.0)[:, :, None, None], count > 0


def check_offsets(offsets: Sequence[int], direction: str, length: int = 0) -> None:
    """Refuses offsets and directions that mean nothing.

    Args:
        offsets: distances of the pairs.
        direction: "past", "future" or "both".
        length: of the sequences, 0 = not known; an offset that reaches over all of them is refused.

    Raises:
        ConfigError: no offset, one below 1 or not below `length`, or an unknown direction.
    """
    _one_of("direction", direction, DIRECTIONS)
    if not offsets:
        raise ConfigError("offsets = (): nothing to mix. Give distances such as (1, 2, 4, 8).")
    for offset in offsets:
        if isinstance(offset, bool) or int(offset) != offset or offset < 1:
            raise ConfigError(f"offsets = {tuple(offsets)}: {offset!r} is no distance. Give whole numbers >= 1.")
        if length and offset >= length:
            raise ConfigError(
                f"offsets = {tuple(offsets)}: {offset} is not shorter than the sequence of {length}, so it never pairs two "
                f"tokens. Leave it out, or use longer sequences."
            )


def _term(form: str, eps: float, norm: str) -> Callable[[Array, Array], Array]:
    """What is averaged over the offsets: normals for "frame", coordinates for "pairs"."""
    _one_of("form", form, FORMS)
    _one_of("norm", norm, NORMS)
    if form == "frame":
        return lambda a, b: _normal(a, b, eps, norm)
    return lambda a, b: plucker_unit(a, b, eps=eps, norm=norm)


def _signed_offsets(offsets: Sequence[int], direction: str, length: int, *, unlimited: bool) -> dict[int, int]:
    """Returns {signed shift: how often it counts}, without those that reach outside every sequence of this length."""
    signs = {"past": (-1,), "future": (1,), "both": (-1, 1)}[direction]
    terms: dict[int, int] = {}
    for offset in offsets:
        for sign in signs:
            if unlimited or offset < length:
                terms[sign * int(offset)] = terms.get(sign * int(offset), 0) + 1
    return terms


def _inverse_length(square: Array, scale: Array, eps: float, norm: str) -> Array:
    """1 / |p| by the named norm, zero where |p|^2 is no more than the rounding of products of size `scale`."""
    _one_of("norm", norm, NORMS)
    if norm == "smooth":
        inverse = jax.lax.rsqrt(square + _SMOOTH)
    else:
        inverse = jax.lax.rsqrt(jnp.maximum(square, eps * eps))
    return jnp.where((square > 0) & (square <= (_NOISE * _NOISE) * scale), 0.0, inverse)


def _normal(a: Array, b: Array, eps: float, norm: str) -> Array:
    """Returns n with a ^ n = unit(a ^ b): the part of b normal to a, over |a ^ b| = |a| |part|."""
    d = _apart(a, b)
    square = jnp.sum(a * a, axis=-1, keepdims=True)
    part = d - (jnp.sum(a * d, axis=-1, keepdims=True) / jnp.maximum(square, _TINY)) * a
    scale = square * jnp.sum(b * b, axis=-1, keepdims=True)
    return part * _inverse_length(square * jnp.sum(part * part, axis=-1, keepdims=True), scale, eps, norm)


def _apart(a: Array, b: Array) -> Array:
    """Returns d with a ^ d = a ^ b: b less the whole multiple of a that is nearest to it.

    Equal tokens then vanish exactly, even where the compiler fuses the products of a ^ b into their difference.
    """
    square = jnp.sum(a * a, axis=-1, keepdims=True)
    times = jnp.round(jnp.sum(a * b, axis=-1, keepdims=True) / jnp.maximum(square, _TINY))
    return b - jax.lax.stop_gradient(times) * a


def _wedge(a: Array, b: Array) -> Array:
    rows, columns = np.triu_indices(a.shape[-1], 1)
    return a[..., rows] * b[..., columns] - a[..., columns] * b[..., rows]


def _antisymmetric(weight: Array, num_heads: int, width: int) -> Array:
    """[N P, D] to [N r r, D]: row (i, j) is that of the pair for i < j, its negative for i > j, zero for i = j."""
    rows, columns = np.triu_indices(width, 1)
    index, sign = np.zeros((width, width), np.int32), np.zeros((width, width), np.float32)
    index[rows, columns] = index[columns, rows] = np.arange(rows.size)
    sign[rows, columns], sign[columns, rows] = 1.0, -1.0
    by_head = weight.reshape(num_heads, rows.size, -1)[:, index.reshape(-1)]
    return (by_head * sign.reshape(-1, 1).astype(weight.dtype)).reshape(num_heads * width * width, -1)


def _matmul(features: Array, weight: Array, dtype: Any) -> Array:
    dtype = jnp.dtype(dtype or jnp.float32)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.matmul(features.astype(dtype), weight.astype(dtype), precision=precision)


def _check_width(width: int) -> None:
    if width < 2:
        raise ConfigError(f"reduced width = {width}: a plane needs at least 2 features. Set reduced_dim >= 2 per head.")


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{field} = {value!r}: unknown, {nearest(value, known)}")

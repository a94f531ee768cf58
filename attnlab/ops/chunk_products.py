"""Products inside a chunk of tokens: scores under a decay, and the inverse of the delta rule, without any division.

Products of decay factors over a range of tokens are built by doubling, [1], [2], [4], ... tokens; see `chunk_scan`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.types import Array

# Below this size a product of blocks is written as multiply and sum: tiny batched matrix products are all overhead.
_TINY = 8


def decayed_scores(
    queries: tuple[Array, ...], k: Array, decay: Array, precision: Any
) -> tuple[list[Array], list[Array], Array, Array]:
    """Lower triangular products q_i (prod_{j < m <= i} a_m) k_j of a chunk, and the decayed sides.

    Args:
        queries: each [..., C, H].
        k: [..., C, H].
        decay: factors a, [..., C, H] or [..., C, 1].
        precision: of the products.

    Returns:
        scores [..., C, C] per query array, zero above the diagonal; queries times the decay since the chunk's start (their own
        included); keys times the decay up to the chunk's end; the decay of the whole chunk [..., H or 1].
    """
    # One leading axis: the CPU compiler of jax 0.10 crashes on sums of products of seven and more axes.
    lead = k.shape[:-2]
    queries, k, decay = (tuple(_merge(q) for q in queries), _merge(k), _merge(decay))
    results = _decayed_scores(queries, k, decay, precision)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), results)


def _merge(x: Array) -> Array:
    return x.reshape(-1, *x.shape[-2:])


def _decayed_scores(
    queries: tuple[Array, ...], k: Array, decay: Array, precision: Any
) -> tuple[list[Array], list[Array], Array, Array]:
    if decay.shape[-1] == 1:
        ratio, since, until, total = _decay_ratios(decay[..., 0])
        scores = [jnp.einsum("...ih,...jh->...ij", q, k, precision=precision) * ratio for q in queries]
        return scores, [q * since for q in queries], k * until, total
    chunk = k.shape[-2]
    # Blocks of one token; `arrive` and `leave` are decayed from the block's start and to its end.
    scores = [jnp.sum(q * k, axis=-1)[..., None, None] for q in queries]
    arrive = [(q * decay)[..., None, :] for q in queries]
    leave, total = k[..., None, :], decay[..., None, :]
    while leave.shape[-2] < chunk:
        first, _ = _pairs(leave)
        scores = [
            _lower(*_pairs(part), _transposed_product(_pairs(side)[1], first, precision))
            for part, side in zip(scores, arrive, strict=True)
        ]
        total_first, total_second = _pairs(total)
        onward = jnp.ones_like(total_first)
        arrive = [_scale_pairs(side, onward, total_first) for side in arrive]
        leave = _scale_pairs(leave, total_second, onward)
        total = total_first * total_second
    return [part[..., 0, :, :] for part in scores], [side[..., 0, :, :] for side in arrive], leave[..., 0, :, :], total[..., 0, 0, :]


def _decay_ratios(decay: Array) -> tuple[Array, Array, Array, Array]:
    """Products of [..., C] factors: over (j, i] as [..., C, C], from the start, to the end, and over all [..., 1]."""
    ratio = jnp.ones_like(decay)[..., None, None]
    since = total = decay[..., None, None]  # [..., blocks, size, 1]
    until = jnp.ones_like(since)
    while until.shape[-2] < decay.shape[-1]:
        ratio = _lower(*_pairs(ratio), _pairs(since)[1] * _pairs(until)[0].swapaxes(-1, -2))
        total_first, total_second = _pairs(total)
        onward = jnp.ones_like(total_first)
        since, until = _scale_pairs(since, onward, total_first), _scale_pairs(until, total_second, onward)
        total = total_first * total_second
    return ratio[..., 0, :, :], since[..., 0, :, :], until[..., 0, :, :], total[..., 0, 0, :]


def _pairs(x: Array) -> tuple[Array, Array]:
    """Splits the block axis of [..., blocks, s, H] into first and second blocks of each pair."""
    x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def _scale_pairs(x: Array, first: Array, second: Array) -> Array:
    """Joins pairs of blocks [..., blocks, s, H] to [..., blocks / 2, 2 s, H], each half times a factor [..., blocks / 2, 1, H]."""
    *lead, blocks, size, width = x.shape
    x = x.reshape(*lead, blocks // 2, 2, size, width) * jnp.stack([first, second], axis=-3)
    return x.reshape(*lead, blocks // 2, 2 * size, width)


def _lower(first: Array, second: Array, below: Array) -> Array:
    """[[first, 0], [below, second]] of square blocks."""
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _transposed_product(a: Array, b: Array, precision: Any) -> Array:
    """a b^T of [..., s, H] blocks."""
    if a.shape[-2] < _TINY:
        return jnp.sum(a[..., :, None, :] * b[..., None, :, :], axis=-1)
    return jnp.einsum("...ih,...jh->...ij", a, b, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_lower_inverse(lower: Array, precision: Any = None) -> Array:
    """(I + lower)^-1 of strictly lower triangular [..., C, C], C a power of two.

    By halves, X = [[X1, 0], [-X2 L21 X1, X2]], as stable as forward substitution. (The shorter product of I + (-L)^(2^i) is not:
    with repeated keys its powers grow beyond float32 before they vanish.)
    """
    return _inverse(_merge(lower), precision).reshape(lower.shape)


def _inverse(lower: Array, precision: Any) -> Array:
    size = lower.shape[-1]
    if size == 1:
        return jnp.ones_like(lower)
    half = size // 2
    both = _inverse(jnp.concatenate([lower[:, :half, :half], lower[:, half:, half:]]), precision)
    first, second = jnp.split(both, 2)
    below = _product(second, _product(lower[:, half:, :half], first, precision), precision)
    return _lower(first, second, -below)


def _product(a: Array, b: Array, precision: Any) -> Array:
    if a.shape[-1] < _TINY:
        return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)
    return jnp.matmul(a, b, precision=precision)


def _inverse_forward(lower: Array, precision: Any) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(lower, precision)
    return inverse, inverse


def _inverse_backward(precision: Any, inverse: Array, cotangent: Array) -> tuple[Array]:
    turned = jnp.swapaxes(inverse, -1, -2)
    product = jnp.matmul(jnp.matmul(turned, cotangent, precision=precision), turned, precision=precision)
    return (-jnp.tril(product, -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)

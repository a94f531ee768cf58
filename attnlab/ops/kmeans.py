"""Online spherical k-means: which centroid is nearest, the commitment loss, and moving averages of the centroids.

Centroids are learned: they are no neighbours and no data points. Every head n has its own C of them, [C, H]. A vector
belongs to the centroid with the largest product with it. Over training, a centroid follows the mean of the vectors that
belong to it (an exponential moving average), and the commitment loss pulls the vectors to their centroid. Nothing here
passes a gradient to centroids or choices. Sums and counts are float32.

Two published forms: `update_centroids` keeps sums and counts (van den Oord et al., 2017, arXiv 1711.00937, appendix A.1;
Roy et al., 2021, arXiv 2003.05997), `lloyd_step` makes one step of Lloyd's algorithm on unit vectors, whose result is
averaged into the means (the PyTorch port lucidrains/routing-transformer).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.types import Array, Float, Int, PRNGKey


class Centroids(NamedTuple):
    """The state of `update_centroids`, float32.

    Attributes:
        means: [N, C, H], the centroids.
        counts: [N, C], moving averages of how many vectors belong to each.
        sums: [N, C, H], moving averages of the sums of these vectors.
    """

    means: Array
    counts: Array
    sums: Array


def plain_layer_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """Layer normalisation over the last axis without scale and bias, float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def unit_vectors(x: Array, epsilon: float = 1e-12) -> Array:
    """x / |x| over the last axis, float32; zeros stay zeros, and have a gradient."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jnp.where(squares > epsilon**2, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0)), 1.0 / epsilon)


def init_centroids(rng: PRNGKey, heads: int, clusters: int, width: int) -> Centroids:
    """Layer-normalised normal means; the sums begin as the means and the counts at zero, as published."""
    means = plain_layer_norm(jax.random.normal(rng, (heads, clusters, width), jnp.float32))
    return Centroids(means, jnp.zeros((heads, clusters), jnp.float32), means)


def centroid_scores(x: Float[Array, "B T N H"], means: Float[Array, "N C H"]) -> Float[Array, "B N C T"]:
    """Products of vectors with the centroids of their head, float32 in full precision; no gradient."""
    x, means = (jax.lax.stop_gradient(y).astype(jnp.float32) for y in (x, means))
    return jnp.einsum("btnh,nch->bnct", x, means, precision=jax.lax.Precision.HIGHEST)


def nearest_centroid(scores: Float[Array, "B N C T"]) -> Int[Array, "B N T"]:
    """The centroid with the largest score, the lower number in a tie."""
    return jnp.argmax(scores, axis=2).astype(jnp.int32)


def commitment_loss(x: Float[Array, "B T N H"], means: Float[Array, "N C H"]) -> Float[Array, ""]:
    """Mean over all elements of (x - its nearest centroid)^2; the gradient flows to x alone.

    All-zero vectors (padding) count in this mean, as published.
    """
    means = jax.lax.stop_gradient(means).astype(jnp.float32)
    nearest = nearest_centroid(centroid_scores(x, means))
    target = jnp.moveaxis(jax.vmap(lambda table, index: table[index], in_axes=(0, 1), out_axes=1)(means, nearest), 1, 2)
    return jnp.mean(jnp.square(x.astype(jnp.float32) - target))


def update_centroids(
    state: Centroids,
    x: Float[Array, "B T N H"],
    *,
    decay: float = 0.999,
    epsilon: float = 1e-5,
    counting: Literal["per_head", "official"] = "per_head",
    axis_name: str | tuple[str, ...] | None = None,
) -> Centroids:
    """One step of the moving averages: counts and sums decay towards those of x; means = sums / smoothed counts.

    Early steps are rough: counts begin at 0 and sums at the means, so norms of centroids jump after the first step, and
    a centroid that is rarely chosen keeps a large norm.

    Args:
        state: before the step.
        x: vectors, assigned by `state.means`; all-zero ones (padding) do not count.
        decay: of the averages.
        epsilon: added to every count before the division, with the total kept.
        counting: "per_head", or "official" with the published code's mistake: it credits vector i of the flattened
            (batch, head, position) to head i mod N. Sums are right in both; with one head there is no difference.
        axis_name: mapped axes to sum over (under `jax.pmap`, `jax.vmap`, `jax.shard_map`); a sharded batch under jit
            needs none.
    """
    heads, clusters, _ = state.means.shape
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    nearest = nearest_centroid(centroid_scores(x, state.means))  # [B, N, T]
    there = jnp.any(x != 0.0, axis=-1).swapaxes(1, 2)
    chosen = jax.nn.one_hot(nearest, clusters) * there[..., None]  # [B, N, T, C]
    if counting == "per_head":
        counts = jnp.sum(chosen, axis=(0, 2))
    elif counting == "official":
        counts = jnp.sum(chosen.reshape(-1, heads, clusters), axis=0)
    else:
        raise ConfigError(f"counting = {counting!r}: unknown. Use 'per_head' or 'official'.")
    sums = jnp.einsum("bntc,btnh->nch", chosen, x, precision=jax.lax.Precision.HIGHEST)
    if axis_name is not None:
        counts, sums = jax.lax.psum((counts, sums), axis_name)
    counts = decay * state.counts + (1.0 - decay) * counts
    sums = decay * state.sums + (1.0 - decay) * sums
    total = jnp.sum(counts, axis=-1, keepdims=True)
    smoothed = (counts + epsilon) / (total + clusters * epsilon) * total
    # Before anything was counted (a batch of padding alone) the smoothed counts are zero, and the means stay.
    means = jnp.where(smoothed[..., None] > 0, sums / jnp.where(smoothed > 0, smoothed, 1.0)[..., None], state.means)
    return Centroids(means, counts, sums)


def lloyd_step(
    x: Float[Array, "B T N H"],
    means: Float[Array, "N C H"],
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "N C H"]:
    """One step of spherical k-means: the normalised sums of the members of each centroid; an empty one keeps its mean.

    Args:
        x: unit vectors.
        means: centroids.
        axis_name: as of `update_centroids`.
    """
    x, means = jax.lax.stop_gradient(x).astype(jnp.float32), jax.lax.stop_gradient(means)
    chosen = jax.nn.one_hot(nearest_centroid(centroid_scores(x, means)), means.shape[1])
    counts = jnp.sum(chosen, axis=(0, 2))
    sums = jnp.einsum("bntc,btnh->nch", chosen, x, precision=jax.lax.Precision.HIGHEST)
    if axis_name is not None:
        counts, sums = jax.lax.psum((counts, sums), axis_name)
    return jnp.where(counts[..., None] > 0, unit_vectors(sums), means)


def lloyd(
    x: Float[Array, "B T N H"], rng: PRNGKey, clusters: int, steps: int = 10, axis_name: str | tuple[str, ...] | None = None
) -> Float[Array, "N C H"]:
    """Centroids of the first batch: some of its vectors, drawn at random, after a number of Lloyd steps.

    Args:
        x: unit vectors.
        rng: of the draw; without replacement where the batch has enough vectors.
        clusters: C.
        steps: Lloyd steps.
        axis_name: as of `update_centroids`.
    """
    vectors = jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3])
    count = vectors.shape[1]

    def draw(key: PRNGKey, rows: Array) -> Array:
        return rows[jax.random.choice(key, count, (clusters,), replace=count < clusters)]

    means = jax.vmap(draw)(jax.random.split(rng, x.shape[2]), vectors.astype(jnp.float32))
    if axis_name is not None:
        means = unit_vectors(jax.lax.pmean(means, axis_name))
    return jax.lax.fori_loop(0, steps, lambda _, means: lloyd_step(x, means, axis_name), means)


def average_means(means: Float[Array, "N C H"], new: Float[Array, "N C H"], decay: float = 0.999) -> Float[Array, "N C H"]:
    """The moving average of the PyTorch port: centroids that follow `lloyd_step` without being normalised again."""
    return decay * means + (1.0 - decay) * new

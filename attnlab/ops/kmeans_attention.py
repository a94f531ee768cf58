"""k-means attention as in the PyTorch port lucidrains/routing-transformer.

Another system than `ops.routing` in many details: unit vectors route (cosine similarity), but queries attend as they are;
members stand in the order of their similarity; causal order compares positions, so queries and keys need not be shared;
with shared ones the own position is all but hidden; memory keys and values per head and cluster come before the members.
The choice sees all of the row here too: see `ops.routing` on what that means for causality.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops.block_window import in_chunks
from attnlab.ops.kmeans import centroid_scores, unit_vectors
from attnlab.ops.relative import precision_of
from attnlab.ops.routing import check_means, gather_members, scatter_members
from attnlab.types import Array, Bool, Float

# The score that a position has with itself when queries and keys are shared: chosen only where nothing else is.
SELF_SCORE = -5e4
SCATTER_EPSILON = 1e-5


class KMeansRouted(NamedTuple):
    """What `kmeans_attention` returns.

    Attributes:
        out: [B, T, N, V].
        x: [B, T or 2 T, N, H] float32, the unit vectors that k-means learns from: queries, then keys unless shared.
        q_members: [B, N, C, W] int32, the most similar position first.
        k_members: the same of keys.
    """

    out: Array
    x: Array
    q_members: Array
    k_members: Array


def kmeans_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"] | None,
    v: Float[Array, "B T N V"],
    means: Float[Array, "N C H"],
    *,
    window: int,
    causal: bool = False,
    mask: Bool[Array, "B T"] | None = None,
    visible: Bool[Array, "B T"] | None = None,
    mem_key: Float[Array, "N C M H"] | None = None,
    mem_value: Float[Array, "N C M V"] | None = None,
    self_score: float = SELF_SCORE,
    scatter_epsilon: float = SCATTER_EPSILON,
) -> KMeansRouted:
    """Attention inside clusters of the most similar positions.

    Args:
        q: queries.
        k: keys, or None = the queries; shared keys attend as unit vectors.
        v: values.
        means: centroids, unit vectors at the start of training.
        window: W, positions per cluster; all of the row where that is shorter.
        causal: hide later positions.
        mask: False = padding, hidden from others and blind itself (it can be a member all the same).
        visible: False = a member only where visible positions run out (later ones, in decoding).
        mem_key: M memory keys in front of every cluster, never hidden; None = none.
        mem_value: their values.
        self_score: see `SELF_SCORE`.
        scatter_epsilon: added to the number of clusters that a position is in, when its outputs are averaged.

    Raises:
        ConfigError: causal with unshared keys and no memory (a query may have nothing to attend to), shapes that do not
            fit, an empty window.
    """
    batch, length, heads, width = q.shape
    check_means(means, heads, width)
    memory = 0 if mem_key is None else mem_key.shape[2]
    if causal and k is not None and not memory:
        raise ConfigError(
            "num_mem_kv = 0 with causal, unshared queries and keys: a query can be left without any key. Set 1 or more."
        )
    if window < 1:
        raise ConfigError(f"window = {window}: no position would be in a cluster. Choose 1 or more.")
    window = min(window, length)
    unit_q = unit_vectors(q)
    unit_k = unit_q if k is None else unit_vectors(k)
    q_members = similar_members(centroid_scores(unit_q, means), window, visible)
    k_members = q_members if k is None else similar_members(centroid_scores(unit_k, means), window, visible)
    near_q = gather_members(q, q_members)
    near_k = gather_members(unit_k.astype(q.dtype) if k is None else k, k_members)
    near_v = gather_members(v, k_members)

    def picked(members: Array) -> Array:
        spread = jnp.broadcast_to(mask[:, None, None], (batch, heads, 1, length))
        return jnp.take_along_axis(spread, members.reshape(batch, heads, 1, -1), axis=-1).reshape(members.shape)

    alive = None if mask is None else (picked(q_members), picked(k_members))
    if memory:
        near_k, near_v = (
            jnp.concatenate([jnp.broadcast_to(mem.astype(near.dtype), (batch, *mem.shape)), near], axis=3)
            for mem, near in ((mem_key, near_k), (mem_value, near_v))
        )

    def some(inputs: tuple) -> Array:
        q, k, v, q_at, k_at, alive = inputs
        scores = jnp.einsum(
            "...wh,...uh->...wu", q, k, precision=precision_of(q), preferred_element_type=jnp.float32
        ) * (width**-0.5)
        remembered, scores = scores[..., :memory], scores[..., memory:]
        q_at, k_at = q_at[..., None], k_at[..., None, :]
        lowest = jnp.finfo(jnp.float32).min
        if alive is not None:
            scores = jnp.where(alive[0][..., None] & alive[1][..., None, :], scores, lowest)
        if causal:
            scores = jnp.where(q_at >= k_at, scores, lowest)
        if shared:
            scores = jnp.where(q_at == k_at, self_score, scores)
        weights = jax.nn.softmax(jnp.concatenate([remembered, scores], axis=-1), axis=-1).astype(v.dtype)
        return jnp.einsum(
            "...wu,...uh->...wh", weights, v, precision=precision_of(q), preferred_element_type=jnp.float32
        ).astype(q.dtype)

    shared = k is None
    inputs = (near_q, near_k, near_v, q_members, k_members, alive)
    out = in_chunks(some, inputs, 4 * batch * heads * window * (window + memory))
    out = scatter_members(out, q_members, length, scatter_epsilon)
    x = unit_q if shared else jnp.concatenate([unit_q, unit_k], axis=1)
    return KMeansRouted(out, x, q_members, k_members)


def similar_members(scores: Float[Array, "B N C T"], window: int, visible: Bool[Array, "B T"] | None = None) -> Array:
    """The `window` positions most similar to every centroid, the most similar first: [B, N, C, W] int32."""
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, -1e9)
    return jax.lax.top_k(jax.lax.stop_gradient(scores), window)[1].astype(jnp.int32)

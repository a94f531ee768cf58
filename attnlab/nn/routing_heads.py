"""The routed heads of the Routing Transformer as a part of a mixer, their centroids and their cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab.nn.local_heads import project, relative_tables, value_rows
from attnlab.nn.mixer import KVCache, check_kv_cache, extend_kv_cache
from attnlab.nn.partitioning import constrain, named
from attnlab.ops import kmeans, routing
from attnlab.ops.relative import attend_relative


@struct.dataclass
class RoutingCache:
    """What a `RoutingAttention` remembers.

    Attributes:
        local: of the local heads, or None where there are none.
        routed: of the routing heads, or None: queries (which are the keys) and values.
        clusters: [B, S, R] int32, the cluster of each slot, -1 = empty or padding; of the causal rule only, as what follows.
        ranks: [B, S, R] int32, how many earlier members its cluster has.
        counts: [B, R, C] int32, members of each cluster so far.
    """

    local: KVCache | None
    routed: KVCache | None
    clusters: jax.Array | None = None
    ranks: jax.Array | None = None
    counts: jax.Array | None = None


class RoutingHeads(nn.Module):
    """Projections, centroids and `ops.routing`; maps [B, T, D] to heads [B, T, N, H]. Fields: see `RoutingAttention`.

    Parameters: `query`, `value` [D, N, H], `key` alike unless shared, `rel_keys` and `rel_values` [2m + 1, H].
    Collection `centroids`: `means` and `sums` [N, C, H], `counts` [N, C], float32.
    """

    dim: int
    heads: int
    head_dim: int
    num_clusters: int
    cluster_size: int
    block: int
    causal: bool
    share_qk: bool
    rule: str
    relative: bool
    max_relative_position: int
    beta: float
    decay: float
    counting: str
    norm_epsilon: float
    scatter_epsilon: float
    axis_name: Any = None
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, keep: jax.Array | None, segment_ids: jax.Array | None, cache: RoutingCache | None
    ) -> tuple[jax.Array, RoutingCache | None, jax.Array | None]:
        """Returns the heads, the cache and, with `capture_attention` and no cache, the weights [B, N, T, T]."""
        q, v = project(self, x, ("query", "value"), keep)
        k = None if self.share_qk else project(self, x, ("key",), keep)[0]
        # Clusters are made over the whole row.
        q, k, v = (y if y is None else constrain(y, "act_batch", None, "act_heads", None) for y in (q, k, v))
        q = q * self.head_dim**-0.5  # as published; the normalisation takes it out again
        tables = relative_tables(self)
        variables = self._centroids()
        state = kmeans.Centroids(**{name: variable.value for name, variable in variables.items()})
        if cache is not None:
            attend = self._cached_strictly if self.rule == "causal" else self._cached
            return *attend(q, v, keep, state.means, tables, cache), None
        length = x.shape[1]
        out, learned = self._attend(q, k, v, state.means, keep, segment_ids, tables, self.implementation)
        self._learn(variables, state, learned)
        weights = None
        if self.capture_attention:
            tables["rel_values"] = None
            rows, _ = self._attend(q, k, value_rows(v), state.means, keep, segment_ids, tables, "xla")
            weights = jnp.moveaxis(rows, 1, 2)
        return out[:, :length], None, weights

    def _centroids(self) -> dict[str, nn.Variable]:
        """Declares the state of k-means; replicated, as it is small and every token reads it."""
        fields = (self.heads, self.num_clusters, self.head_dim)

        def declare(name: str, make: Any, axes: int) -> nn.Variable:
            return self.variable("centroids", name, named(make, *("norm",) * axes))

        means = declare("means", lambda: kmeans.init_centroids(self.make_rng("params"), *fields).means, 3)
        counts = declare("counts", lambda: jnp.zeros(fields[:2], jnp.float32), 2)
        return {"means": means, "counts": counts, "sums": declare("sums", lambda: means.value, 3)}

    def _attend(self, q, k, v, means, keep, segment_ids, tables, implementation) -> tuple[jax.Array, tuple]:
        """Attends by the rule; returns the heads and what k-means learns from, a tuple of normalised vectors."""
        options = {"segment_ids": segment_ids, "scatter_epsilon": self.scatter_epsilon, "implementation": implementation}
        options |= {"norm_epsilon": self.norm_epsilon, **tables}
        if self.rule == "causal":
            routed = routing.causal_routing_attention(q, v, means, window=self.cluster_size, mask=keep, **options)
            return routed.out, (routed.q, routed.q)
        length = q.shape[1]
        short = max(self.cluster_size - length, 0)  # rows shorter than a cluster are one cluster, with padding

        def pad(x: jax.Array | None) -> jax.Array | None:
            return x if x is None else jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))

        q, k, v = map(pad, (q, k, v))
        options["segment_ids"] = pad(segment_ids)
        if self.rule == "random":
            del options["norm_epsilon"]
            vectors = [kmeans.plain_layer_norm(y, self.norm_epsilon).astype(q.dtype) for y in (q, q if k is None else k)]
            shape = (self.heads, self.num_clusters, q.shape[1])
            scores = jax.random.normal(jax.random.key(0), shape)  # the same members in every layer, row and step
            members = routing.top_members(jnp.broadcast_to(scores, (q.shape[0], *shape)), self.cluster_size)
            return routing.clustered_attention(*vectors, v, members, members, causal=self.causal, **options), ()
        routed = routing.routing_attention(
            q, k, v, means, window=self.cluster_size, causal=self.causal, block=self.block, **options
        )
        known = length + -length % self.block  # the published padding counts in the loss, ours does not
        return routed.out, (routed.q[:, :known], routed.k[:, :known])

    def _learn(self, variables: dict[str, nn.Variable], state: kmeans.Centroids, learned: tuple) -> None:
        """Sows the commitment loss, and moves the centroids where their collection is mutable."""
        if not learned:
            return
        losses = [kmeans.commitment_loss(x, state.means) for x in learned]
        self.sow("losses", "commitment", self.beta * sum(losses))
        scores = kmeans.centroid_scores(learned[0], state.means)
        used = jnp.any(jax.nn.one_hot(kmeans.nearest_centroid(scores), self.num_clusters, dtype=jnp.bool_), axis=(0, 2))
        self.sow("metrics", "centroids_used", jnp.mean(used.astype(jnp.float32)))
        if self.is_initializing() or not self.is_mutable_collection("centroids"):
            return
        for x in learned[: 1 if self.share_qk else 2]:
            state = kmeans.update_centroids(
                state, x, decay=self.decay, counting=self.counting, axis_name=self.axis_name
            )
        for name, value in state._asdict().items():
            variables[name].value = value

    def _cached(self, q, v, keep, means, tables, cache) -> tuple[jax.Array, RoutingCache]:
        """The published decoding: clusters are made anew from all tokens so far, at every call."""
        batch, length = q.shape[:2]
        check_kv_cache(cache.routed, batch, length, q.dtype)
        start = cache.routed.index
        stored = extend_kv_cache(cache.routed, q, v, start + jnp.arange(length, dtype=jnp.int32)[None], keep)
        slots = stored.k.shape[1]
        pad = [(0, 0), (0, max(self.cluster_size - slots, 0)), (0, 0), (0, 0)]
        visible = jnp.broadcast_to(jnp.arange(slots + pad[1][1])[None] < stored.index, (batch, slots + pad[1][1]))
        routed = routing.routing_attention(
            jnp.pad(stored.k, pad),
            None,
            jnp.pad(stored.v, pad),
            means,
            window=self.cluster_size,
            causal=True,
            block=self.block,
            visible=visible,
            norm_epsilon=self.norm_epsilon,
            scatter_epsilon=self.scatter_epsilon,
            **tables,
        )
        out = jax.lax.dynamic_slice_in_dim(routed.out, start, length, axis=1)
        return out, cache.replace(routed=stored)

    def _cached_strictly(self, q, v, keep, means, tables, cache) -> tuple[jax.Array, RoutingCache]:
        """Every new token joins its cluster behind the members that the cache knows."""
        batch, length = q.shape[:2]
        check_kv_cache(cache.routed, batch, length, q.dtype)
        vectors = kmeans.plain_layer_norm(q, self.norm_epsilon)
        nearest = kmeans.nearest_centroid(kmeans.centroid_scores(vectors, means)).swapaxes(1, 2)  # [B, T, R]
        if keep is not None:
            nearest = jnp.where(keep[:, :, None], nearest, -1)
        joins = jax.nn.one_hot(nearest, self.num_clusters, dtype=jnp.int32)  # [B, T, R, C], nothing for -1
        before = cache.counts[:, None] + jnp.cumsum(joins, axis=1) - joins
        ranks = jnp.take_along_axis(before, jnp.maximum(nearest, 0)[..., None], axis=-1)[..., 0]
        start, vectors = cache.routed.index, vectors.astype(q.dtype)
        stored = extend_kv_cache(cache.routed, vectors, v, start + jnp.arange(length, dtype=jnp.int32)[None], keep)
        cache = cache.replace(
            routed=stored,
            clusters=jax.lax.dynamic_update_slice_in_dim(cache.clusters, nearest, start, axis=1),
            ranks=jax.lax.dynamic_update_slice_in_dim(cache.ranks, ranks, start, axis=1),
            counts=cache.counts + jnp.sum(joins, axis=1),
        )

        def pairs(new: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
            """[B, T, R] and [B, S, R] to [B, R, T, 1] and [B, R, 1, S]."""
            return new.swapaxes(1, 2)[..., None], old.swapaxes(1, 2)[:, :, None]

        mine, theirs = pairs(nearest, cache.clusters)
        rank, other = pairs(ranks, cache.ranks)
        seen = (mine == theirs) & (theirs >= 0) & (other <= rank) & (other > rank - self.cluster_size)
        heads = (y.swapaxes(1, 2) for y in (vectors, stored.k, stored.v))
        out = attend_relative(*heads, hidden=~seen, offsets=other - rank, **tables)
        return (out.astype(jnp.float32) / (1.0 + self.scatter_epsilon)).astype(q.dtype).swapaxes(1, 2), cache

"""Routing attention: positions are routed to learned centroids, and attention happens inside a cluster.

Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers" (TACL 2021, arXiv
2003.05997). Every head has C centroids, learned by online k-means (`ops.kmeans`; they are no nearest neighbours). A query
needs the keys with which its product is large; vectors that lie near one centroid lie near each other; so it is enough to
attend among the positions that are near the same centroid. With C about sqrt(T) clusters of W about T / C positions the
cost is T^1.5 instead of T^2.

    routing_attention           the published rule: every centroid takes the W positions of the whole row that score best.
                                A position can be in several clusters or in none.
    causal_routing_attention    a strictly causal rule: every position joins its nearest centroid, and attends to the last W
                                members of that cluster, itself included.

The published rule is not strictly causal although later positions are hidden: which positions are admitted to a cluster
depends on all of the row, so an output depends on later tokens through the choice (by value, not by gradient), and token
by token decoding differs from the whole pass. Perplexities in the literature share this. The strict rule has neither.
Choices are made once, in float32, and carry no gradient; ties go to the lower position.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.ops.block_attention import block_attention
from attnlab.ops.block_window import BlockWindow, in_chunks, needs_plain_scores, no_kernel
from attnlab.ops.kmeans import centroid_scores, nearest_centroid, plain_layer_norm
from attnlab.ops.relative import attend_relative
from attnlab.ops.select import cluster_blocks
from attnlab.types import Array, Bool, Float, Int

# Added to the number of clusters that a position is in, when its outputs are averaged (the published constant).
SCATTER_EPSILON = 0.01


class Routed(NamedTuple):
    """What `routing_attention` returns; P is T padded to a multiple of the block.

    Attributes:
        out: [B, T, N, V].
        q_members: [B, N, C, W] int32, positions in ascending order, of queries.
        k_members: the same of keys.
        q: [B, P, N, H] float32, normalised queries: what k-means learns from.
        k: the same of keys; `q` itself when shared.
    """

    out: Array
    q_members: Array
    k_members: Array
    q: Array
    k: Array


def routing_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"] | None,
    v: Float[Array, "B T N V"],
    means: Float[Array, "N C H"],
    *,
    window: int,
    causal: bool = False,
    block: int = 1,
    kv_mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    visible: Bool[Array, "B T"] | None = None,
    rel_keys: Float[Array, "R H"] | None = None,
    rel_values: Float[Array, "R V"] | None = None,
    norm_epsilon: float = 1e-6,
    scatter_epsilon: float = SCATTER_EPSILON,
    implementation: str | None = None,
) -> Routed:
    """The published routing heads; scores are q.k of layer-normalised vectors, with no 1/sqrt(H).

    Args:
        q: queries; normalised here.
        k: keys, or None = shared with the queries.
        v: values; a key whose value is all zero is padding.
        means: centroids.
        window: W, positions per cluster.
        causal: hide later positions inside the clusters; needs shared queries and keys.
        block: the row is padded with zeros to a multiple of it. Padding scores 0, so it can be a member of a cluster.
        kv_mask: False = padding key as well.
        segment_ids: attention stays inside equal segments; they compete for the places in a cluster all the same.
        visible: False = position is a member only where visible ones run out (later positions, in decoding).
        rel_keys: table [2m + 1, H] of relative positions added to the keys, or None. They count places in the cluster.
        rel_values: the same for the values.
        norm_epsilon: of the layer normalisation.
        scatter_epsilon: see `SCATTER_EPSILON`.
        implementation: "xla", "blocks" (through `ops.block_attention`, no relative positions; a query that sees
            padding alone gets zeros instead of the mean over its cluster), or None.

    Raises:
        ConfigError: clusters larger than the row, shapes that do not fit, causal with keys of their own.
    """
    length, heads, width = q.shape[1:]
    if causal and k is not None:
        raise ConfigError(
            "causal = True with unshared queries and keys: the places of a cluster are no order in time there. Pass k=None "
            "(share_qk=True), or causal=False."
        )
    check_means(means, heads, width)
    if block < 1:
        raise ConfigError(f"block = {block}: not a length. Choose 1 or more.")
    padded = length + -length % block
    if not 1 <= window <= padded:
        raise ConfigError(
            f"window = {window}: a cluster takes its members from {padded} positions. Choose between 1 and {padded}."
        )

    def pad(x: Array | None) -> Array | None:
        return x if x is None else jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))

    v, kv_mask, segment_ids, visible = map(pad, (v, kv_mask, segment_ids, visible))
    q_normal = plain_layer_norm(pad(q), norm_epsilon)
    k_normal = q_normal if k is None else plain_layer_norm(pad(k), norm_epsilon)
    q_members = top_members(centroid_scores(q_normal, means), window, visible)
    k_members = q_members if k is None else top_members(centroid_scores(k_normal, means), window, visible)
    out = clustered_attention(
        q_normal.astype(q.dtype),
        k_normal.astype(q.dtype),
        v,
        q_members,
        k_members,
        causal=causal,
        kv_mask=kv_mask,
        segment_ids=segment_ids,
        rel_keys=rel_keys,
        rel_values=rel_values,
        scatter_epsilon=scatter_epsilon,
        implementation=implementation,
    )
    return Routed(out[:, :length], q_members, k_members, q_normal, k_normal)


def top_members(
    scores: Float[Array, "B N C T"], window: int, visible: Bool[Array, "B T"] | None = None
) -> Int[Array, "B N C W"]:
    """The `window` positions with the largest scores of every centroid, in ascending order.

    Args:
        scores: of `ops.kmeans.centroid_scores`.
        window: W, at most T.
        visible: False = scored -1e9, below all that are visible.
    """
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, -1e9)
    members = jnp.sort(jax.lax.top_k(jax.lax.stop_gradient(scores), window)[1], axis=-1).astype(jnp.int32)
    # By this name a rematerialisation policy can keep the choice instead of making it again.
    return checkpoint_name(members, "selection")


def gather_members(x: Float[Array, "B T N H"], members: Int[Array, "B N C W"]) -> Float[Array, "B N C W H"]:
    """Lays the members of every cluster side by side."""
    index = members.reshape(*members.shape[:2], -1, 1)
    picked = jnp.take_along_axis(jnp.swapaxes(x, 1, 2), index, axis=2)
    return picked.reshape(*members.shape, x.shape[-1])


def scatter_members(
    x: Float[Array, "B N C W H"], members: Int[Array, "B N C W"], length: int, epsilon: float = SCATTER_EPSILON
) -> Float[Array, "B T N H"]:
    """Sum over the clusters that a position is in / (how many they are + epsilon), in float32; 0 where it is in none."""

    def one(x: Array, members: Array) -> Array:
        total = jnp.zeros((length, x.shape[-1]), jnp.float32).at[members].add(x.astype(jnp.float32))
        count = jnp.zeros(length, jnp.float32).at[members].add(1.0)
        return total / (count + epsilon)[:, None]

    batch, heads, _, _, width = x.shape
    out = jax.vmap(jax.vmap(one))(x.reshape(batch, heads, -1, width), members.reshape(batch, heads, -1))
    return jnp.swapaxes(out, 1, 2).astype(x.dtype)


def clustered_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    q_members: Int[Array, "B N C W"],
    k_members: Int[Array, "B N C W"],
    *,
    causal: bool = False,
    kv_mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    rel_keys: Float[Array, "R H"] | None = None,
    rel_values: Float[Array, "R V"] | None = None,
    scatter_epsilon: float = SCATTER_EPSILON,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Gathers clusters of given members, attends inside each, and averages where a position is in several.

    Queries and keys are used as they are. Causal order is that of the places in the cluster: give the same ascending
    members for both. The other arguments are those of `routing_attention`.
    """
    there = jnp.any(v != 0, axis=-1)  # [B, T, N]
    there = there if kv_mask is None else there & kv_mask[:, :, None]

    def pick(x: Array, members: Array) -> Array:
        return gather_members(x[..., None], members)[..., 0]

    segments = (None, None)
    if segment_ids is not None:
        spread = jnp.broadcast_to(segment_ids[:, :, None], there.shape)
        segments = (pick(spread, q_members), pick(spread, k_members))
    call = Clusters(
        q=gather_members(q, q_members),
        k=gather_members(k, k_members),
        v=gather_members(v, k_members),
        kv_mask=pick(there, k_members),
        q_segments=segments[0],
        kv_segments=segments[1],
        rel_keys=rel_keys,
        rel_values=rel_values,
        causal=causal,
    )
    out = dispatch.call("cluster_attention", implementation, call)
    return scatter_members(out, q_members, q.shape[1], scatter_epsilon)


class CausallyRouted(NamedTuple):
    """What `causal_routing_attention` returns.

    Attributes:
        out: [B, T, N, V].
        clusters: [B, N, T] int32, the nearest centroid of each position.
        q: [B, T, N, H] float32, normalised: what k-means learns from.
    """

    out: Array
    clusters: Array
    q: Array


def causal_routing_attention(
    q: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    means: Float[Array, "N C H"],
    *,
    window: int,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    rel_keys: Float[Array, "R H"] | None = None,
    rel_values: Float[Array, "R V"] | None = None,
    norm_epsilon: float = 1e-6,
    scatter_epsilon: float = SCATTER_EPSILON,
    implementation: str | None = None,
) -> CausallyRouted:
    """Routing heads of which no output depends on a later token; a rule of this library, not of the paper.

    A position joins the cluster of its nearest centroid and attends to the last `window` members of it, itself included.
    Scores, relative positions (by members between) and the factor 1 / (1 + scatter_epsilon) are the published ones, and so
    is the cost: T W. The row is sorted by cluster, so that members stand side by side. Segments are kept wholly apart.

    Args:
        q: queries and keys in one; normalised here.
        v: values.
        means: centroids.
        window: W.
        mask: False = padding: a member of no cluster; its outputs have no meaning.
        segment_ids: clusters are formed per segment.
        rel_keys: as of `routing_attention`.
        rel_values: alike.
        norm_epsilon: alike.
        scatter_epsilon: alike.
        implementation: "xla", "blocks", or None; as of `ops.block_window`.

    Raises:
        ConfigError: an empty window, shapes that do not fit.
    """
    length, heads, width = q.shape[1:]
    check_means(means, heads, width)
    if window < 1:
        raise ConfigError(f"window = {window}: a position attends to itself at least. Choose 1 or more.")
    clusters = means.shape[1]
    q_normal = plain_layer_norm(q, norm_epsilon)
    nearest = nearest_centroid(centroid_scores(q_normal, means))
    groups = nearest
    if segment_ids is not None:
        groups = groups + clusters * segment_ids[:, None]
    if mask is not None:
        groups = jnp.where(mask[:, None], groups, jnp.iinfo(jnp.int32).max)
    order = checkpoint_name(jnp.argsort(groups, axis=-1, stable=True), "selection")
    back = jnp.argsort(order, axis=-1)

    def sort(x: Array) -> Array:
        return jnp.take_along_axis(jnp.swapaxes(x, 1, 2), order[..., None], axis=2)

    block = min(window, length)
    sorted_q = sort(q_normal.astype(q.dtype))
    call = BlockWindow(
        q=sorted_q,
        k=sorted_q,
        v=sort(v),
        kv_mask=jnp.ones((1, 1, length), bool),
        groups=jnp.take_along_axis(groups, order, axis=-1),
        rel_keys=rel_keys,
        rel_values=rel_values,
        block=block,
        before=1 if length > block else 0,
        after=0,
        causal=True,
        left=window - 1,
    )
    out = dispatch.call("block_window", implementation, call).astype(jnp.float32) / (1.0 + scatter_epsilon)
    out = jnp.swapaxes(jnp.take_along_axis(out, back[..., None], axis=2), 1, 2)
    return CausallyRouted(out.astype(q.dtype), nearest, q_normal)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clusters:
    """Gathered clusters: q [B, N, C, W, H], k, v alike, masks and segments [B, N, C, W]; one call of the table below."""

    q: Array
    k: Array
    v: Array
    kv_mask: Array
    q_segments: Array | None
    kv_segments: Array | None
    rel_keys: Array | None
    rel_values: Array | None
    causal: bool = dataclasses.field(metadata={"static": True})


def attend_clusters(call: Clusters) -> Array:
    """The reference: [B, N, C, W, V], some clusters at a time."""
    batch, heads, _, window, _ = call.q.shape

    def some(inputs: tuple) -> Array:
        q, k, v, kv_mask, segments = inputs
        hidden = ~kv_mask[..., None, :]
        if call.causal:
            hidden |= ~jnp.tri(window, dtype=bool)
        if segments is not None:
            hidden |= segments[0][..., None] != segments[1][..., None, :]
        return attend_relative(q, k, v, hidden=hidden, rel_keys=call.rel_keys, rel_values=call.rel_values)

    segments = None if call.q_segments is None else (call.q_segments, call.kv_segments)
    return in_chunks(some, (call.q, call.k, call.v, call.kv_mask, segments), 4 * batch * heads * window**2)


def attend_as_blocks(call: Clusters) -> Array:
    """The same through `ops.block_attention`: clusters stand one after the other, and every block lists its cluster's."""
    batch, heads, clusters, window, width = call.q.shape
    block = next((size for size in (512, 256, 128) if window % size == 0), window)
    lists = jnp.asarray(cluster_blocks(clusters, window // block, window // block))

    def folded(x: Array) -> Array:
        return x.reshape(batch * heads, clusters * window, *x.shape[4:])

    # Places, not old positions: inside a cluster their order is the same.
    places = jnp.tile(jnp.arange(window, dtype=jnp.int32), clusters)[None]
    segments = {}
    if call.q_segments is not None:
        segments = {"q_segment_ids": folded(call.q_segments), "kv_segment_ids": folded(call.kv_segments)}
    out = block_attention(
        *(folded(x)[:, :, None] for x in (call.q, call.k, call.v)),
        jnp.broadcast_to(lists, (batch * heads, *lists.shape[1:])),
        block_q=block,
        block_kv=block,
        causal=call.causal,
        q_positions=places,
        kv_positions=places,
        kv_mask=folded(call.kv_mask),
        scale=1.0,
        **segments,
    )
    return out.reshape(batch, heads, clusters, window, width)


def check_means(means: Array, heads: int, width: int) -> None:
    """Refuses centroids of other heads or another width."""
    if means.ndim != 3 or (means.shape[0], means.shape[2]) != (heads, width):
        raise ConfigError(f"means has shape {means.shape}: it needs [N, C, H] with N = {heads} and H = {width}.")


dispatch.register(
    "cluster_attention",
    "blocks",
    dispatch.Implementation(
        attend_as_blocks,
        refuse=lambda call: needs_plain_scores(call.q, call.v, call.rel_keys, call.rel_values),
        defer=lambda call: no_kernel(),
    ),
)
dispatch.register("cluster_attention", "xla", dispatch.Implementation(attend_clusters))

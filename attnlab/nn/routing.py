"""The attention of the Routing Transformer as a token mixer: block-local heads beside heads routed by online k-means.

Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers" (TACL 2021, arXiv
2003.05997); how it works is told in `attnlab.ops.routing`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.nn.local_heads import LocalHeads
from attnlab.nn.mixer import init_kv_cache
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import Projection
from attnlab.nn.routing_heads import RoutingCache, RoutingHeads
from attnlab.ops import routing

RULES = ("official", "causal", "random")


class RoutingAttention(nn.Module):
    """Routing heads first, local heads after them; one [H, H] map for every head's vector; the output projection.

    Full pass, chunks and tokens: by the rule "causal" all give the same numbers. By the published rule they do not, and
    cannot: a cluster takes the best-scoring positions of the whole row, so a longer row may admit others. With a cache the
    clusters are made from all tokens so far, at every call: a call on an empty cache is the full pass (rows of whole
    blocks), and token by token is the published incremental decoding. `ops.routing` says more.

    Centroids live in the collection `centroids`: a call that has it mutable (training) uses the old centroids and then
    moves them; otherwise they are fixed. The commitment loss is sown to `losses`, twice where queries are keys, as
    published. In packed rows attention stays inside a document, and blocks and (by the published rule) the places in a
    cluster are those of the row.

    Parameters: `routing/*` (see `RoutingHeads`), `local/*` (see `LocalHeads`), `mix` [H, H], `routing_out` and `local_out`
    [heads, H, D]; no biases.

    Attributes:
        dim: D.
        num_heads: N, all heads.
        head_dim: H; None = D / N.
        routing_heads: R, how many of the heads route; None = half of them, 0 = a layer of local heads alone.
        num_clusters: C.
        cluster_size: W, positions per cluster; None = train_length / C, rounded up.
        block: tokens per block of the local heads.
        flange: tokens that they see before the block, a multiple of it; None = one block.
        causal: hide later tokens. A cache needs it.
        share_qk: queries of the routing heads are their keys. Causal routing needs it.
        rule: "official" (the published one), "causal" (strictly: no output depends on a later token), or "random" (fixed
            random members, the paper's ablation).
        cluster_relative: learned relative positions in the clusters (they count places).
        local_relative: the same in the local heads.
        max_relative_position: m; None = block + flange + 1.
        beta: weight of the commitment loss.
        decay: of the moving averages of the centroids, per step.
        counting: of `ops.kmeans.update_centroids`: "per_head", or "official" with the published code's mistake.
        norm_epsilon: of the normalisation of routed queries and keys.
        scatter_epsilon: added to the number of clusters that a token is in, before its outputs are divided by it.
        train_length: the sequence length trained with; see `cluster_size`.
        dropout: of the result.
        axis_name: mapped axes over which centroids are averaged (`jax.pmap`); a sharded batch under jit needs none.
        implementation: of the ops: "xla", "blocks" or None.
        capture_attention: as of `DenseAttention`. A row of a routing head sums to the share of its clusters, n / (n + 0.01).
    """

    dim: int
    num_heads: int
    head_dim: int | None = None
    routing_heads: int | None = None
    num_clusters: int = 16
    cluster_size: int | None = None
    block: int = 256
    flange: int | None = None
    causal: bool = True
    share_qk: bool = True
    rule: str = "official"
    cluster_relative: bool = True
    local_relative: bool = True
    max_relative_position: int | None = None
    beta: float = 1e-4
    decay: float = 0.999
    counting: str = "per_head"
    norm_epsilon: float = 1e-6
    scatter_epsilon: float = routing.SCATTER_EPSILON
    train_length: int | None = None
    dropout: float = 0.0
    axis_name: str | None = None
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def heads(self) -> tuple[int, int, int]:
        """Returns (routing heads, local heads, H).

        Raises:
            ConfigError: fields that do not fit.
        """
        routed = self.num_heads // 2 if self.routing_heads is None else self.routing_heads
        if not 0 <= routed <= self.num_heads:
            raise ConfigError(f"routing_heads = {routed}: num_heads = {self.num_heads} counts all heads. Choose at most that.")
        if not self.head_dim and self.dim % self.num_heads:
            raise ConfigError(
                f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor, or set head_dim."
            )
        if self.rule not in RULES:
            raise ConfigError(f"rule = {self.rule!r}: unknown, {nearest(self.rule, RULES)}")
        if routed and self.causal and not self.share_qk:
            raise ConfigError("share_qk = False with causal routing: clusters have no order in time. Set share_qk=True.")
        if routed and self.rule == "causal" and not (self.causal and self.share_qk):
            raise ConfigError("rule = 'causal': for causal, shared queries and keys. Set causal=True and share_qk=True.")
        if self.num_clusters < 1:
            raise ConfigError(f"num_clusters = {self.num_clusters}: not a number of clusters. Choose 1 or more.")
        if self.block < 1 or self._flange() % self.block:
            raise ConfigError(
                f"flange = {self._flange()}: block = {self.block} does not divide it. Choose a multiple of the block."
            )
        return routed, self.num_heads - routed, self.head_dim or self.dim // self.num_heads

    @nn.nowrap
    def window(self) -> int:
        """Returns W.

        Raises:
            ConfigError: neither it nor the training length is set, or it is not positive.
        """
        if self.cluster_size is None and not self.train_length:
            raise ConfigError("cluster_size = None: stands for train_length / num_clusters. Set train_length, or itself.")
        size = -(-self.train_length // self.num_clusters) if self.cluster_size is None else self.cluster_size
        if size < 1:
            raise ConfigError(f"cluster_size = {size}: no position would be in a cluster. Choose 1 or more.")
        return size

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> RoutingCache:
        """Returns an empty cache for `batch` rows of at most `max_len` tokens."""
        routed, local, width = self.heads()
        if not self.causal:
            raise ConfigError("causal = False: a cache holds the past only. Set causal=True, or pass whole sequences.")
        if routed and self.rule == "random":
            raise ConfigError("rule = 'random': an ablation for whole sequences, without a cache. Choose another rule.")
        dtype = self.dtype or jnp.float32
        cache = RoutingCache(
            *(init_kv_cache(batch, max_len, heads, width, dtype) if heads else None for heads in (local, routed))
        )
        if not routed or self.rule != "causal":
            return cache
        return cache.replace(
            clusters=jnp.full((batch, max_len, routed), -1, jnp.int32),
            ranks=jnp.zeros((batch, max_len, routed), jnp.int32),
            counts=jnp.zeros((batch, routed, self.num_clusters), jnp.int32),
        )

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of the products with keys, values and centroids, averaged over a sequence."""
        routed, local, width = self.heads()
        block = min(self.block, length)
        near = min((block + 1) / 2 + self._flange() if self.causal else block + 2 * self._flange(), length)
        total = 4.0 * local * width * near
        if routed:
            members = min(self.window(), length)
            total += routed * width * (4.0 * ((members + 1) / 2 if self.causal else members) + 2.0 * self.num_clusters)
        return total

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: RoutingCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, RoutingCache | None]:
        """The mixer contract (`attnlab.nn.mixer`). Order is that of the row: `positions` are not used.

        Raises:
            ConfigError: fields, cache or segments that do not fit.
        """
        routed, local, width = self.heads()
        dtype = self.dtype or x.dtype
        x = x.astype(dtype)
        if cache is not None and segment_ids is not None:
            raise ConfigError("segment_ids with a cache: rows of a cache are single sequences. Pass one of the two.")
        keep = mask
        if segment_ids is not None:
            keep = segment_ids > 0 if mask is None else mask & (segment_ids > 0)
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        common = {
            "dim": self.dim, "head_dim": width, "block": self.block, "causal": self.causal,
            "implementation": self.implementation, "capture_attention": self._captures(),
            "dtype": dtype, "param_dtype": self.param_dtype,
            "max_relative_position": self.max_relative_position or self.block + self._flange() + 1,
        }  # fmt: skip
        parts, maps = {}, []
        if routed:
            parts["routing_out"], cache, weights = RoutingHeads(
                heads=routed, num_clusters=self.num_clusters, cluster_size=self.window(), share_qk=self.share_qk,
                rule=self.rule, relative=self.cluster_relative, beta=self.beta, decay=self.decay, counting=self.counting,
                norm_epsilon=self.norm_epsilon, scatter_epsilon=self.scatter_epsilon, axis_name=self.axis_name,
                name="routing", **common,
            )(x, keep, segment_ids, cache)  # fmt: skip
            maps.append(weights)
        if local:
            heads = LocalHeads(heads=local, flange=self._flange(), relative=self.local_relative, name="local", **common)
            old = None if cache is None else cache.local
            parts["local_out"], new, weights = heads(x, keep, segment_ids, old, positions)
            cache = None if cache is None else cache.replace(local=new)
            maps.append(weights)
        if keep is not None:
            parts = {name: jnp.where(keep[:, :, None, None], part, 0.0) for name, part in parts.items()}
        if cache is not None:
            # A traced index cannot be checked beforehand, and beyond the last slot it would overwrite tokens unseen.
            stored = cache.local or cache.routed
            parts = {name: jnp.where(stored.index > stored.k.shape[1], jnp.nan, part) for name, part in parts.items()}
        elif self._captures():
            self.sow("intermediates", "attention", jnp.concatenate(maps, axis=1).astype(jnp.float32))
            self.sow("intermediates", "attended", jnp.concatenate(list(parts.values()), axis=2))
        mix = self.param("mix", named(nn.initializers.lecun_normal(), "head_dim", None), (width,) * 2, self.param_dtype)
        y = jnp.zeros((), dtype)
        for name, part in parts.items():
            part = jax.lax.dot_general(part, mix.astype(dtype), (((3,), (0,)), ((), ())))
            shape, names = (part.shape[2], width, self.dim), ("heads", "head_dim", "embed")
            types = {"dtype": dtype, "param_dtype": self.param_dtype}
            y = y + Projection(shape, names, inputs=2, name=name, **types)(part)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return constrain(y, "act_batch", "act_seq", "act_embed"), cache

    @nn.nowrap
    def _flange(self) -> int:
        return self.block if self.flange is None else self.flange

    @nn.nowrap
    def _captures(self) -> bool:
        return self.capture_attention and self.scope is not None and self.is_mutable_collection("intermediates")

"""k-means attention as in the PyTorch port lucidrains/routing-transformer, as a token mixer.

The published system is `attnlab.nn.routing`; this one differs as `attnlab.ops.kmeans_attention` says.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab.errors import ConfigError
from attnlab.nn.local_heads import LocalHeads, project, value_rows
from attnlab.nn.mixer import KVCache, check_kv_cache, extend_kv_cache, init_kv_cache
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.ops import kmeans
from attnlab.ops.kmeans_attention import SCATTER_EPSILON, SELF_SCORE, kmeans_attention
from attnlab.ops.rotary import rotary


@struct.dataclass
class KMeansCache:
    """Of the local heads, and of the k-means heads: rotated queries (which are the keys) and values."""

    local: KVCache | None
    routed: KVCache | None


class KMeansHeads(nn.Module):
    """Projections, centroids, memory and `ops.kmeans_attention`; maps [B, T, D] to heads [B, T, N, H].

    Parameters: `query`, `value` [D, N, H], `key` alike unless shared, `mem_key` and `mem_value` [N, C, M, H]. Collection
    `centroids`: `means` [N, C, H] and `ready`, whether they were made from a batch. Fields: see `KMeansAttention`.
    """

    dim: int
    heads: int
    head_dim: int
    num_clusters: int
    window: int
    causal: bool
    share_qk: bool
    num_mem_kv: int
    decay: float
    commitment: float
    lloyd_steps: int
    self_score: float
    scatter_epsilon: float
    axis_name: Any = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, keep: jax.Array | None, cache: KVCache | None, positions: jax.Array
    ) -> tuple[jax.Array, KVCache | None, jax.Array | None]:
        """Returns the heads, the cache and, with `capture_attention` and no cache, the weights [B, N, T, T]."""
        batch, length, _ = x.shape
        q, v = project(self, x, ("query", "value"), keep)
        k = None if self.share_qk else project(self, x, ("key",), keep)[0]
        q, k, v = (y if y is None else rotary(y, positions) for y in (q, k, v))
        q, k, v = (y if y is None else constrain(y, "act_batch", None, "act_heads", None) for y in (q, k, v))
        shape = (self.heads, self.num_clusters, self.head_dim)
        means = self.variable("centroids", "means", named(lambda: self._random(shape), *("norm",) * 3))
        ready = self.variable("centroids", "ready", lambda: jnp.zeros((), jnp.bool_))
        options = {"window": self.window, "causal": self.causal, "self_score": self.self_score}
        options["scatter_epsilon"] = self.scatter_epsilon
        if self.num_mem_kv:
            init = named(nn.initializers.normal(INIT_STD), "norm", None, None, "head_dim")
            for name in ("mem_key", "mem_value"):
                full = (self.heads, self.num_clusters, self.num_mem_kv, self.head_dim)
                options[name] = self.param(name, init, full, self.param_dtype)
        if cache is not None:
            check_kv_cache(cache, batch, length, q.dtype)
            start = cache.index
            cache = extend_kv_cache(cache, q, v, start + jnp.arange(length, dtype=jnp.int32)[None], keep)
            options["visible"] = jnp.broadcast_to(jnp.arange(cache.k.shape[1]) < cache.index, cache.positions.shape)
            out = kmeans_attention(cache.k, None, cache.v, means.value, mask=cache.positions >= 0, **options).out
            return jax.lax.dynamic_slice_in_dim(out, start, length, axis=1), cache, None

        centroids, learning = means.value, self.is_mutable_collection("centroids") and not self.is_initializing()
        vectors = kmeans.unit_vectors(q if k is None else jnp.concatenate([q, k], axis=1))
        if learning:
            first = jax.random.key(0), self.num_clusters, self.lloyd_steps, self.axis_name
            centroids = jax.lax.cond(ready.value, lambda: means.value, lambda: kmeans.lloyd(vectors, *first))
        routed = kmeans_attention(q, k, v, centroids, mask=keep, **options)
        self.sow("losses", "commitment", self.commitment * kmeans.commitment_loss(routed.x, centroids))
        if learning:
            step = kmeans.lloyd_step(routed.x, centroids, self.axis_name)
            means.value, ready.value = kmeans.average_means(centroids, step, self.decay), jnp.ones((), jnp.bool_)
        weights = None
        if self.capture_attention:
            if self.num_mem_kv:
                options["mem_value"] = jnp.zeros((*options["mem_value"].shape[:3], length), x.dtype)
            rows = kmeans_attention(q, k, value_rows(jnp.ones_like(v)), centroids, mask=keep, **options).out
            weights = jnp.moveaxis(rows, 1, 2)
        return routed.out, None, weights

    def _random(self, shape: tuple[int, ...]) -> jax.Array:
        """Unit vectors, so that a model that never saw a batch can be used."""
        return kmeans.unit_vectors(jax.random.normal(self.make_rng("params"), shape, jnp.float32))


class KMeansAttention(nn.Module):
    """Local heads first, k-means heads after them; rotary positions on queries, keys and values; the output projection.

    A call that has the collection `centroids` mutable (training) makes the centroids from its batch if it is the first, and
    moves them afterwards. With a cache, clusters are made from all tokens so far at every call, as the port does when it
    runs on a growing text: a call on an empty cache is the full pass, token by token is not (see `ops.routing`).

    Parameters: `local/*`, `routing/*` (see `KMeansHeads`), `local_out` and `routing_out` [heads, H, D]; no biases.

    Attributes:
        dim: D.
        num_heads: N, all heads.
        head_dim: H; None = D / N.
        local_heads: how many of the heads are local; None = half of them.
        window: W, positions per cluster.
        num_clusters: C; None = train_length / W, rounded up.
        local_window: tokens per block of the local heads, which see one block before their own; None = W.
        causal: hide later tokens.
        share_qk: queries of the k-means heads are their keys.
        num_mem_kv: M, memory keys and values per head and cluster; at least one where causal and not shared.
        decay: of the moving average of the centroids.
        commitment: weight of the commitment loss.
        lloyd_steps: steps of k-means on the first batch.
        self_score: what shared queries and keys score at their own position.
        scatter_epsilon: added to the number of clusters that a token is in.
        train_length: the sequence length trained with; see `num_clusters`.
        dropout: of the result.
        axis_name: as of `RoutingAttention`.
        capture_attention: as of `DenseAttention`; memory has its share of a row's weight and no column.
    """

    dim: int
    num_heads: int
    head_dim: int | None = None
    local_heads: int | None = None
    window: int = 128
    num_clusters: int | None = None
    local_window: int | None = None
    causal: bool = True
    share_qk: bool = True
    num_mem_kv: int = 0
    decay: float = 0.999
    commitment: float = 1e-4
    lloyd_steps: int = 10
    self_score: float = SELF_SCORE
    scatter_epsilon: float = SCATTER_EPSILON
    train_length: int | None = None
    dropout: float = 0.0
    axis_name: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def heads(self) -> tuple[int, int, int]:
        """Returns (k-means heads, local heads, H).

        Raises:
            ConfigError: fields that do not fit.
        """
        local = self.num_heads // 2 if self.local_heads is None else self.local_heads
        if not 0 <= local <= self.num_heads:
            raise ConfigError(f"local_heads = {local}: num_heads = {self.num_heads} counts all heads. Choose at most that.")
        if not self.head_dim and self.dim % self.num_heads:
            raise ConfigError(
                f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor, or set head_dim."
            )
        width = self.head_dim or self.dim // self.num_heads
        if width % 2:
            raise ConfigError(f"head_dim = {width}: rotary embedding needs an even head width. Change it.")
        return self.num_heads - local, local, width

    @nn.nowrap
    def clusters(self) -> int:
        """Returns C.

        Raises:
            ConfigError: neither it nor the training length is set.
        """
        if self.num_clusters is None and not self.train_length:
            raise ConfigError("num_clusters = None: stands for train_length / window. Set train_length, or itself.")
        return -(-self.train_length // self.window) if self.num_clusters is None else self.num_clusters

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> KMeansCache:
        """Returns an empty cache for `batch` rows of at most `max_len` tokens."""
        routed, local, width = self.heads()
        if not (self.causal and self.share_qk):
            raise ConfigError("a cache holds the past of shared queries and keys. Set causal=True and share_qk=True.")
        dtype = self.dtype or jnp.float32
        return KMeansCache(*(init_kv_cache(batch, max_len, heads, width, dtype) if heads else None for heads in (local, routed)))

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of the products with keys, values and centroids, averaged over a sequence."""
        routed, local, width = self.heads()
        near, members = min(2 * (self.local_window or self.window), length), min(self.window, length)
        return 4.0 * width * (local * near + routed * (members + self.num_mem_kv)) + 2.0 * routed * width * self.clusters()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: KMeansCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KMeansCache | None]:
        """The mixer contract (`attnlab.nn.mixer`), without segments.

        Raises:
            ConfigError: fields or cache that do not fit, or segments: the port's clusters know no documents.
        """
        routed, local, width = self.heads()
        if segment_ids is not None:
            raise ConfigError("segment_ids: clusters would mix documents. Use windows instead of packed rows, or the routing mixer.")
        dtype = self.dtype or x.dtype
        x = x.astype(dtype)
        if positions is None:
            start = 0 if cache is None else (cache.local or cache.routed).index
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None] + start
        captures = self.capture_attention and self.is_mutable_collection("intermediates")
        common = {
            "dim": self.dim, "head_dim": width, "causal": self.causal, "capture_attention": captures,
            "dtype": dtype, "param_dtype": self.param_dtype,
        }  # fmt: skip
        parts, maps, caches = {}, [], {"local": None, "routed": None}
        if local:
            block = self.local_window or self.window
            heads = LocalHeads(heads=local, block=block, flange=block, relative=False, rope=True, name="local", **common)
            old = None if cache is None else cache.local
            parts["local_out"], caches["local"], weights = heads(x, mask, None, old, positions)
            maps.append(weights)
        if routed:
            heads = KMeansHeads(
                heads=routed, num_clusters=self.clusters(), window=self.window, share_qk=self.share_qk,
                num_mem_kv=self.num_mem_kv, decay=self.decay, commitment=self.commitment, lloyd_steps=self.lloyd_steps,
                self_score=self.self_score, scatter_epsilon=self.scatter_epsilon, axis_name=self.axis_name,
                name="routing", **common,
            )  # fmt: skip
            old = None if cache is None else cache.routed
            parts["routing_out"], caches["routed"], weights = heads(x, mask, old, positions)
            maps.append(weights)
        if mask is not None:
            parts = {name: jnp.where(mask[:, :, None, None], part, 0.0) for name, part in parts.items()}
        if cache is not None:
            cache = KMeansCache(**caches)
            stored = cache.local or cache.routed
            parts = {name: jnp.where(stored.index > stored.k.shape[1], jnp.nan, part) for name, part in parts.items()}
        elif captures:
            self.sow("intermediates", "attention", jnp.concatenate(maps, axis=1).astype(jnp.float32))
            self.sow("intermediates", "attended", jnp.concatenate(list(parts.values()), axis=2))
        y = jnp.zeros((), dtype)
        for name, part in parts.items():
            shape, names = (part.shape[2], width, self.dim), ("heads", "head_dim", "embed")
            types = {"dtype": dtype, "param_dtype": self.param_dtype}
            y = y + Projection(shape, names, inputs=2, name=name, **types)(part)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return constrain(y, "act_batch", "act_seq", "act_embed"), cache

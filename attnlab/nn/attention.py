"""What softmax and sigmoid attention have in common: projections, QK-norm, rotary embedding, cache, capture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.nn.mixer import KVCache, check_kv_cache, extend_kv_cache, init_kv_cache
from attnlab.nn.norm import norm_of
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import Projection
from attnlab.ops.alibi import alibi_slopes
from attnlab.ops.rotary import rotary


class DenseAttention(nn.Module):
    """Base of the dense attention mixers; a subclass says how scores become weights.

    Parameters: `query` [D, N, H], `key` and `value` [D, K, H], `out` [N, H, D], and with QK-norm `query_norm` and
    `key_norm` [H].

    Attributes:
        dim: D.
        num_heads: N.
        num_kv_heads: K, divides N; None = N.
        head_dim: H; None = D / N.
        causal: hide later tokens. A cache needs it.
        window: tokens seen to the left of a token (or (left, right)); None = all.
        rope: rotary position embedding.
        rope_base: of its wavelengths.
        rope_interleaved: pairs (2i, 2i + 1) instead of (i, i + H/2).
        rope_scaling: position interpolation, 1 = off.
        alibi: linear biases by distance, with the published slopes.
        qk_norm: normalise queries and keys over H: None, "layernorm" or "rmsnorm"; one for all heads.
        proj_bias: biases in the projections.
        dropout: of the weights, and of the result.
        implementation: of the op, for whole sequences; None = the best that can run, as always with a cache.
        capture_attention: sow `attention`, the weights, and `attended` [B, T, N, H], weights times values, to
            `intermediates`.
    """

    dim: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool = True
    window: int | tuple[int, int] | None = None
    rope: bool = True
    rope_base: float = 10000.0
    rope_interleaved: bool = False
    rope_scaling: float = 1.0
    alibi: bool = False
    qk_norm: str | None = None
    proj_bias: bool = False
    dropout: float = 0.0
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, **masks: Any) -> jax.Array:
        """Calls the op."""
        raise NotImplementedError

    def weights(self, q: jax.Array, k: jax.Array, positions: jax.Array, **masks: Any) -> jax.Array:
        """Returns the weights [B, N, T, S] float32 by the reference."""
        raise NotImplementedError

    @nn.nowrap
    def attend_options(self, cache: Any, deterministic: bool) -> dict[str, Any]:
        """More keyword arguments for `attend` and `weights`, for a mixer that differs in training or with a cache."""
        return {}

    @nn.nowrap
    def input_bias(self) -> bool:
        """Whether the projections of queries, keys and values have biases."""
        return self.proj_bias

    def token_options(
        self, x: jax.Array, q: jax.Array, *, segment_ids: jax.Array | None, mask: jax.Array | None
    ) -> dict[str, Any]:
        """More keyword arguments for `attend` and `weights` that depend on the input [B, T, D] and the queries as projected."""
        return {}

    def attend_cached(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, mask: jax.Array | None, cache: Any, **masks: Any
    ) -> tuple[jax.Array, Any]:
        """Adds the tokens to the cache and attends to what it then holds: ([B, T, N, H], cache)."""
        check_kv_cache(cache, q.shape[0], q.shape[1], q.dtype)
        cache = extend_kv_cache(cache, k, v, positions, mask)
        masks |= {"q_positions": positions, "kv_positions": cache.positions}
        if self.capture_attention and self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", self.weights(q, cache.k, positions, **masks))
        y = self.attend(q, cache.k, cache.v, positions, **masks)
        # A traced index cannot be checked beforehand, and beyond the last slot it would overwrite tokens unseen.
        return jnp.where(cache.index > cache.k.shape[1], jnp.nan, y), cache

    @nn.nowrap
    def widths(self) -> tuple[int, int]:
        """Returns (K, H).

        Raises:
            ConfigError: heads that do not fit.
        """
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ConfigError(
                f"num_kv_heads = {kv_heads}: does not divide num_heads = {self.num_heads}. Choose a divisor."
            )
        if not self.head_dim and self.dim % self.num_heads:
            raise ConfigError(
                f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor, or set head_dim."
            )
        head_dim = self.head_dim or self.dim // self.num_heads
        if self.rope and head_dim % 2:
            raise ConfigError(
                f"head_dim = {head_dim}: rotary embedding needs an even head width. Change it or set rope=False."
            )
        return kv_heads, head_dim

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> KVCache:
        """Returns an empty cache for `batch` rows of at most `max_len` tokens."""
        if not self.causal:
            raise ConfigError("causal = False: a cache holds the past only. Set causal=True, or pass whole sequences.")
        return init_kv_cache(batch, max_len, *self.widths(), self.dtype or jnp.float32)

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of the two products with keys and values, averaged over a sequence."""
        _, head_dim = self.widths()
        left = self.window if isinstance(self.window, int) else (self.window or (-1,))[0]
        seen = (length + 1) / 2 if self.causal else length
        if left is not None and left >= 0:
            seen = min(seen, left + 1)
        return 4.0 * self.num_heads * head_dim * seen

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KVCache | None]:
        """The mixer contract (`attnlab.nn.mixer`).

        Without a cache the order is that of the sequence and `positions` only feed the rotary embedding.

        Raises:
            ConfigError: heads, cache or segments that do not fit.
        """
        kv_heads, head_dim = self.widths()
        length = x.shape[1]
        if cache is not None and segment_ids is not None:
            raise ConfigError("segment_ids with a cache: rows of a cache are single sequences. Pass one of the two.")
        if positions is None:
            # One row for the whole batch: the rotary embedding computes its angles once.
            positions = jnp.arange(length, dtype=jnp.int32)[None] + (0 if cache is None else cache.index)

        types = {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}
        q, k, v = (
            Projection((self.dim, heads, head_dim), ("embed", axis, "head_dim"), use_bias=self.input_bias(), name=name, **types)(x)
            for name, heads, axis in (
                ("query", self.num_heads, "heads"), ("key", kv_heads, "kv_heads"), ("value", kv_heads, "kv_heads"),
            )
        )  # fmt: skip
        chosen = self.token_options(x, q, segment_ids=segment_ids, mask=mask)
        if self.qk_norm is not None:
            norm = norm_of(self.qk_norm)
            q = norm(param_dtype=self.param_dtype, name="query_norm")(q)
            k = norm(param_dtype=self.param_dtype, name="key_norm")(k)
        if self.rope:
            options = {"base": self.rope_base, "interleaved": self.rope_interleaved, "scaling": self.rope_scaling}
            q, k = rotary(q, positions, **options), rotary(k, positions, **options)
        q = constrain(q, "act_batch", "act_seq", "act_heads", None)
        k = constrain(k, "act_batch", "act_seq", "act_kv_heads", None)
        v = constrain(v, "act_batch", "act_seq", "act_kv_heads", None)

        masks: dict[str, Any] = {"causal": self.causal, "window": self.window}
        if self.alibi:
            masks["alibi_slopes"] = alibi_slopes(self.num_heads)
        if self.dropout and not deterministic:
            masks |= {"dropout_rng": self.make_rng("dropout"), "dropout_rate": self.dropout, "deterministic": False}
        masks |= self.attend_options(cache, deterministic) | chosen
        if cache is not None:
            y, cache = self.attend_cached(q, k, v, positions, mask, cache, **masks)
        else:
            masks |= {"q_segment_ids": segment_ids, "kv_mask": mask}
            if self.capture_attention and self.is_mutable_collection("intermediates"):
                self.sow("intermediates", "attention", self.weights(q, k, positions, **masks))
            y = self.attend(q, k, v, positions, implementation=self.implementation, **masks)
        if self.capture_attention:
            self.sow("intermediates", "attended", y)
        options = {"inputs": 2, "use_bias": self.proj_bias, "name": "out"}
        out = Projection((self.num_heads, head_dim, self.dim), ("heads", "head_dim", "embed"), **options, **types)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(out(y))
        return constrain(y, "act_batch", "act_seq", "act_embed"), cache

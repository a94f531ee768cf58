"""Block-local heads as a part of a mixer: a block of tokens sees itself and a flange of earlier tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.nn.mixer import KVCache, check_kv_cache, extend_kv_cache
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.ops.block_window import local_block_attention
from attnlab.ops.relative import attend_relative
from attnlab.ops.rotary import rotary


class LocalHeads(nn.Module):
    """Projections and `ops.block_window.local_block_attention`; maps [B, T, D] to heads [B, T, N, H].

    Parameters: `query`, `key`, `value` [D, N, H], `rel_keys` and `rel_values` [2m + 1, H].

    Attributes:
        dim: D.
        heads: N.
        head_dim: H.
        block: tokens per block, counted along the row.
        flange: tokens seen before the block (and after it, unless causal), a multiple of the block.
        causal: hide later tokens.
        relative: learned relative positions.
        max_relative_position: m.
        rope: rotary positions on queries, keys and values.
    """

    dim: int
    heads: int
    head_dim: int
    block: int
    flange: int
    causal: bool
    relative: bool = True
    max_relative_position: int = 0
    rope: bool = False
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keep: jax.Array | None,
        segment_ids: jax.Array | None,
        cache: KVCache | None,
        positions: jax.Array,
    ) -> tuple[jax.Array, KVCache | None, jax.Array | None]:
        """Returns the heads, the cache and, with `capture_attention` and no cache, the weights [B, N, T, T].

        Args:
            x: [B, T, D].
            keep: [B, T] bool, False = padding, or None.
            segment_ids: [B, T], or None.
            cache: or None.
            positions: [1 or B, T] int32, for the rotary embedding.
        """
        q, k, v = project(self, x, ("query", "key", "value"), keep)
        if self.rope:
            q, k, v = (rotary(y, positions) for y in (q, k, v))
        q = q * self.head_dim**-0.5
        tables = relative_tables(self)
        if cache is not None:
            return *self._cached(q, k, v, keep, cache, tables), None
        options = {"block": self.block, "flange": self.flange, "causal": self.causal, "segment_ids": segment_ids}
        out = local_block_attention(q, k, v, implementation=self.implementation, **options, **tables)
        weights = None
        if self.capture_attention:
            rows = value_rows(v)
            tables["rel_values"] = None
            weights = jnp.moveaxis(local_block_attention(q, k, rows, implementation="xla", **options, **tables), 1, 2)
        return out, None, weights

    def _cached(
        self, q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, cache: KVCache, tables: dict[str, Any]
    ) -> tuple[jax.Array, KVCache]:
        """Scores the new tokens against all slots; blocks are counted by slots, as along the row."""
        batch, length = q.shape[:2]
        check_kv_cache(cache, batch, length, q.dtype)
        at = cache.index + jnp.arange(length, dtype=jnp.int32)
        cache = extend_kv_cache(cache, k, v, at[None], keep)
        slots = jnp.arange(cache.k.shape[1], dtype=jnp.int32)
        first = at // self.block * self.block - self.flange
        seen = (slots <= at[:, None]) & (slots >= first[:, None]) & (cache.positions >= 0)[:, None]
        q, k, v = (jnp.swapaxes(y, 1, 2) for y in (q, cache.k, cache.v))
        out = attend_relative(q, k, v, hidden=~seen[:, None], offsets=slots - at[:, None], **tables)
        return jnp.swapaxes(out, 1, 2), cache


def project(module: Any, x: jax.Array, names: tuple[str, ...], keep: jax.Array | None) -> list[jax.Array]:
    """Projects [B, T, D] to heads [B, T, N, H] under each name; padding becomes zero."""
    shape = (module.dim, module.heads, module.head_dim)
    types = {"dtype": module.dtype, "param_dtype": module.param_dtype}
    out = []
    for name in names:
        y = Projection(shape, ("embed", "heads", "head_dim"), name=name, **types)(x)
        y = y if keep is None else jnp.where(keep[:, :, None, None], y, 0.0)
        out.append(constrain(y, "act_batch", "act_seq", "act_heads", None))
    return out


def relative_tables(module: Any) -> dict[str, jax.Array | None]:
    """Declares the tables of relative positions where the module has them."""
    if not module.relative:
        return {"rel_keys": None, "rel_values": None}
    init = named(nn.initializers.normal(INIT_STD), "norm", "head_dim")
    shape = (2 * module.max_relative_position + 1, module.head_dim)
    return {name: module.param(name, init, shape, module.param_dtype) for name in ("rel_keys", "rel_values")}


def value_rows(v: jax.Array) -> jax.Array:
    """Values that turn an attention op into its weights: row s of the unit matrix, zero where the value is zero."""
    length = v.shape[1]
    rows = jnp.eye(length)[None, :, None] * jnp.any(v != 0, axis=-1, keepdims=True)
    return rows.astype(v.dtype)

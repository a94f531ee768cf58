"""Rows with padding anywhere brought into one form: valid tokens first; and what such rows keep of their past."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops.tiles import token_flags, zero_padding


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows whose valid tokens come first, in order.

    Attributes:
        x: [B, T, D], zeros in padding.
        valid: [B, T] bool, or None = all.
        segment_ids: [B, T] int32, 0 = padding; or None.
        group: [B, T] int32, number of the segment in its row; -1 = padding.
        since: [B, T] int32, tokens of the same segment and call before this one.
        count: [B] int32, valid tokens.
        order: [B, T] int32, where each came from, or None = where it is.
    """

    x: jax.Array
    valid: jax.Array | None
    segment_ids: jax.Array | None
    group: jax.Array
    since: jax.Array
    count: jax.Array
    order: jax.Array | None

    @property
    def ragged(self) -> dict[str, Any]:
        """The arguments `mask` and `segment_ids` of the ops."""
        return {"mask": self.valid, "segment_ids": self.segment_ids}

    def restore(self, y: jax.Array) -> jax.Array:
        """Brings results [B, T, ...] back to where the tokens came from; padding gets zeros."""
        if self.order is None:
            return y
        back = jnp.argsort(self.order, axis=1)
        return jax.vmap(lambda row, at: row[at])(zero_padding(y, self.valid), back)


def rows_of(x: jax.Array, segment_ids: jax.Array | None, mask: jax.Array | None) -> Rows:
    """Moves padding (mask False, or segment 0) behind the tokens of each row."""
    batch, length, _ = x.shape
    if segment_ids is None and mask is None:
        since = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return Rows(x, None, None, jnp.zeros_like(since), since, jnp.full((batch,), length, jnp.int32), None)
    valid = jnp.ones((batch, length), bool) if mask is None else mask
    valid = valid if segment_ids is None else valid & (segment_ids != 0)
    order = jnp.argsort(~valid, axis=1, stable=True)
    pick = jax.vmap(lambda row, at: row[at])
    valid, x = pick(valid, order), pick(x, order)
    segment_ids = None if segment_ids is None else jnp.where(valid, pick(segment_ids, order), 0)
    flags = token_flags(batch, length, length, mask=valid, segment_ids=segment_ids)
    group = jnp.where(valid, jnp.cumsum(flags.reset, axis=1, dtype=jnp.int32) - 1, -1)
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    return Rows(zero_padding(x, valid), valid, segment_ids, group, flags.since, count, order)


def last_tokens(past: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
    """The last W tokens [B, W, ...] of the W past ones and the first `count` [B] of the new [B, T, ...]."""
    width = past.shape[1]
    joined = jnp.concatenate([past, new.astype(past.dtype)], axis=1)
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width, axis=0))(joined, count)


def past_groups(seen: jax.Array, width: int) -> jax.Array:
    """Groups [B, W] of a window's past tokens: 0, or -1 = empty; `seen` [B] tokens came before."""
    return jnp.where(width - jnp.arange(width)[None] <= seen[:, None], 0, -1)


def check_cache(cache: Any, seen: Any, stored: Any, batch: int, segment_ids: jax.Array | None, dtype: Any) -> None:
    """Refuses a call that the cache was not made for.

    Args:
        cache: it.
        seen: [B] of it.
        stored: an array of it in the module's type, or None.
        batch: rows of the call.
        segment_ids: of the call.
        dtype: the module computes in it.

    Raises:
        ConfigError: another batch or type, or segments with a cache.
    """
    if cache is None:
        return
    if segment_ids is not None:
        raise ConfigError("segment_ids with a cache: rows of a cache are single sequences. Pass one of the two.")
    if seen.shape[0] != batch:
        rows = seen.shape[0]
        raise ConfigError(f"cache of batch {rows} used with batch {batch}. Make it with init_cache({batch}, max_len).")
    if stored is not None and stored.dtype != dtype:
        raise ConfigError(f"cache of type {stored.dtype} used with a module that computes in {jnp.dtype(dtype)}. Remake it.")

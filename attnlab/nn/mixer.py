"""The contract of a token mixer, and the key/value cache that attention mixers share.

A mixer is a linen module with at least the fields `dim`, `num_heads`, `dtype`, `param_dtype`, all with keywords, and

    y, cache = mixer(x, positions=None, segment_ids=None, mask=None, cache=None, deterministic=True)
    cache = mixer.init_cache(batch, max_len)          # callable on the unbound module

x, y          [B, T, D].
positions     [B, T] int32, for position embeddings. Default: arange(T), or what follows the cache.
segment_ids   [B, T] int32: tokens mix only within a segment (packed documents); 0 is padding.
mask          [B, T] bool, False = padding: such a token is never mixed into another one.
cache         None: the sequence is whole. Else the tokens follow those that the cache holds, one or many at a time:
              the full pass, any chunking and token by token give the same numbers. The cache returned has the same
              structure; without a cache it is None.

Auxiliary losses are sown to `losses` (scalars, weighted), figures to `metrics`, online statistics live in a collection
of their own. With the field `capture_attention` an attention mixer sows to `intermediates`: `attention`, its weights
[B, N, T, S] float32, recomputed by the reference, and `attended` [B, T, N, H], weights times values. A method
`sequence_flops(length)` of a mixer tells the forward FLOPs per token that are not in its parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from attnlab.errors import ConfigError


@struct.dataclass
class KVCache:
    """Keys and values of the tokens so far, in slots.

    Attributes:
        k: [B, S, K, H].
        v: [B, S, K, H].
        positions: [B, S] int32 of the token in each slot; -1 = empty or padding.
        index: int32 scalar, the first free slot (the same for all rows).
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    index: jax.Array


def init_kv_cache(batch: int, max_len: int, kv_heads: int, head_dim: int, dtype: Any) -> KVCache:
    """Returns an empty cache of `max_len` slots."""
    shape = (batch, max_len, kv_heads, head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, max_len), -1, jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def check_kv_cache(cache: KVCache, batch: int, length: int, dtype: Any) -> None:
    """Refuses a call that the cache was not made for.

    Raises:
        ConfigError: another batch or type, or more tokens than slots.
    """
    rows, slots = cache.positions.shape
    used = 0 if isinstance(cache.index, jax.core.Tracer) else int(cache.index)
    if rows != batch:
        raise ConfigError(f"cache of batch {rows} used with batch {batch}. Make it with init_cache({batch}, max_len).")
    if used + length > slots:
        raise ConfigError(
            f"sequence longer than the cache: {used} + {length} tokens, {slots} slots. "
            f"Make it with init_cache(batch, {used + length}) or more."
        )
    if cache.k.dtype != dtype:
        raise ConfigError(
            f"cache of type {cache.k.dtype} used with a module that computes in {jnp.dtype(dtype)}. Remake it."
        )


def extend_kv_cache(
    cache: KVCache, k: jax.Array, v: jax.Array, positions: jax.Array, mask: jax.Array | None
) -> KVCache:
    """Writes T tokens into the next slots.

    Args:
        cache: with at least T free slots (the caller of a jitted loop sees to it: the index is not known when tracing;
            the attention mixers return NaN beyond the last slot).
        k: [B, T, K, H].
        v: [B, T, K, H].
        positions: [1 or B, T] int32.
        mask: [B, T] bool, or None; padding tokens get position -1 and are never seen.
    """
    stored = jnp.broadcast_to(positions, k.shape[:2])
    stored = stored if mask is None else jnp.where(mask, stored, -1)
    start = cache.index
    return KVCache(
        k=jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), start, axis=1),
        v=jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), start, axis=1),
        positions=jax.lax.dynamic_update_slice_in_dim(cache.positions, stored.astype(jnp.int32), start, axis=1),
        index=start + k.shape[1],
    )

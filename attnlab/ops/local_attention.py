"""Softmax attention inside a window and a group, beside a prefix that may lie outside; time and memory linear in T."""

from __future__ import annotations

import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops.softmax import softmax_attention
from attnlab.types import Array, Bool, Float, Int

_MIN_BLOCK = 32  # queries that share their keys, where the window is smaller


def local_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_groups: Int[Array, "B T"],
    kv_groups: Int[Array, "B S"],
    *,
    window: int,
    prefix: tuple[Float[Array, "P K H"], Float[Array, "P K H"]] | None = None,
    prefix_mask: Bool[Array, "B T P"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Query t, standing at key S - T + t, sees itself and the window - 1 keys before it that are of its group, and the prefix.

    Args:
        q: queries.
        k: keys; those before the last T are of earlier tokens, at most window - 1.
        v: values.
        q_groups: attention stays inside equal groups.
        kv_groups: the same of the keys; negative = empty.
        window: keys seen, the query's own included.
        prefix: keys and values of P tokens in front of every group, the same for all rows.
        prefix_mask: which of them a query sees; None = all.
        scale: of the products, default H^-1/2.

    Raises:
        ConfigError: no window, or more earlier keys than it reaches.
    """
    batch, length, heads, width = q.shape
    past = k.shape[1] - length
    if window < 1 or not 0 <= past < window:
        raise ConfigError(f"window = {window}: holds {past} earlier keys. Give at least {max(past, 0) + 1}.")
    block = max(window - 1, _MIN_BLOCK)
    if length <= block:  # one block
        at = jnp.arange(length)[:, None] + past - jnp.arange(past + length)[None]
        mask = (at >= 0) & (at < window)
        mask = mask & (q_groups[:, :, None] == kv_groups[:, None, :]) & (kv_groups >= 0)[:, None, :]
        return _attend(q, k, v, mask, prefix, prefix_mask, scale)
    number = -(-length // block)
    behind = number * block - length

    def queries(x):
        x = jnp.pad(x, ((0, 0), (0, behind), *((0, 0),) * (x.ndim - 2)), constant_values=-1 if x.ndim == 2 else 0)
        return x.reshape(batch * number, block, *x.shape[2:])

    def keys(x):
        edge = ((0, 0), (block - past, behind), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, edge, constant_values=-1 if x.ndim == 2 else 0).reshape(batch, number + 1, block, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2).reshape(batch * number, 2 * block, *x.shape[3:])

    at = jnp.arange(block)[:, None] + block - jnp.arange(2 * block)[None]
    groups, kv_groups = queries(q_groups), keys(kv_groups)
    mask = (at >= 0) & (at < window) & (groups[:, :, None] == kv_groups[:, None, :]) & (kv_groups >= 0)[:, None, :]
    prefix_mask = None if prefix_mask is None else queries(prefix_mask)
    y = _attend(queries(q), keys(k), keys(v), mask, prefix, prefix_mask, scale)
    return y.reshape(batch, number * block, heads, width)[:, :length]


def _attend(q, k, v, mask, prefix, prefix_mask, scale):
    if prefix is not None:
        shape = (k.shape[0], *prefix[0].shape)
        k, v = (
            jnp.concatenate([jnp.broadcast_to(p.astype(x.dtype), shape), x], axis=1) for p, x in zip(prefix, (k, v), strict=True)
        )
        if prefix_mask is None:
            prefix_mask = jnp.ones((*mask.shape[:2], shape[1]), bool)
        mask = jnp.concatenate([prefix_mask, mask], axis=2)
    return softmax_attention(q, k, v, mask=mask[:, None], scale=scale)

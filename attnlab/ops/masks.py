"""Masks that are described, not stored: causal order, windows, segments, padding; built block by block.

Order is that of positions. By default query i of T stands at key position i + S - T (bottom-right aligned, so that the
last query sees the last key); explicit positions override that, and a negative key position is an empty slot.
"""

from __future__ import annotations

import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.types import Array, Window


def canonical_window(window: Window, causal: bool) -> tuple[int | None, int | None]:
    """Returns (left, right) with None = no limit; `causal` forces right = 0.

    Raises:
        ConfigError: not an int or a pair, or below -1.
    """
    if window is None:
        left, right = None, None
    elif isinstance(window, int):
        left, right = window, window
    elif isinstance(window, tuple | list) and len(window) == 2:
        left, right = window
    else:
        raise ConfigError(f"window = {window!r}: not a width. Give an int, a pair (left, right) or None.")
    for side in (left, right):
        if side is not None and side < -1:
            raise ConfigError(f"window = {window!r}: negative width. Give widths >= 0, or -1 for no limit.")
    left = None if left == -1 else left
    right = None if right == -1 else right
    return left, 0 if causal else right


def block_mask(
    q_positions: Array,
    kv_positions: Array,
    window: tuple[int | None, int | None],
    *,
    empty_slots: bool = False,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    kv_mask: Array | None = None,
) -> Array | None:
    """Builds the mask of one block of queries and keys, True where attention is allowed.

    Args:
        q_positions: [b, t] int32, b = 1 or B.
        kv_positions: [b, s] int32; negative = empty.
        window: canonical (left, right), right = 0 when causal.
        empty_slots: whether key positions can be negative.
        q_segment_ids: [B, t] int32, or None.
        kv_segment_ids: [B, s] int32, or None; attention stays inside equal segments.
        kv_mask: [B, s] bool, False = padding, or None.

    Returns:
        [b, t, s] bool, or None where everything is allowed.
    """
    left, right = window
    q_at, kv_at = q_positions[:, :, None], kv_positions[:, None, :]
    parts = []
    if right is not None:
        parts.append(kv_at <= (q_at + right if right else q_at))
    if left is not None:
        parts.append(kv_at >= q_at - left)
    if empty_slots:
        parts.append(kv_at >= 0)
    if q_segment_ids is not None:
        parts.append(q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])
    if kv_mask is not None:
        parts.append(kv_mask[:, None, :])
    if not parts:
        return None
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return mask


def rows_with_keys(length: int, kv_mask: Array, window: tuple[int | None, int | None]) -> Array:
    """Tells which queries see at least one key that is not padding, without the [T, S] mask.

    Args:
        length: number of queries T, bottom-right aligned to the keys.
        kv_mask: [B, S] bool, False = padding.
        window: canonical (left, right).

    Returns:
        [B, T] bool.
    """
    keys = kv_mask.shape[1]
    left, right = window
    counts = jnp.pad(jnp.cumsum(kv_mask.astype(jnp.int32), axis=1), ((0, 0), (1, 0)))
    at = jnp.arange(length) + keys - length
    first = jnp.zeros_like(at) if left is None else jnp.clip(at - left, 0, keys)
    end = jnp.full_like(at, keys) if right is None else jnp.clip(at + right + 1, 0, keys)
    return counts[:, end] > counts[:, first]

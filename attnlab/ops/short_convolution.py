"""A causal depthwise convolution over the last few tokens, with the tail that continues it."""

from __future__ import annotations

import jax.numpy as jnp

from attnlab.ops.linear_scan import last_valid
from attnlab.types import Array, Bool, Float, Int


def short_convolution(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "C W"],
    *,
    tail: Float[Array, "B M C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B M C"]]:
    """y_t = sum_j kernel[:, W - 1 - j] x_{t - j}, j = 0 .. W - 1, counted over real tokens; M = W - 1.

    Args:
        x: inputs.
        kernel: one filter per channel; its last tap is the present token.
        tail: the last M real inputs before x, default zeros.
        segment_ids: taps reach no further back than the token's segment; the tail belongs to the first one.
        valid: False = padding, skipped as if it were not there; its output is zero. None = all real.

    Returns:
        y, and the last M real inputs.
    """
    batch, length, channels = x.shape
    taps = kernel.shape[1]
    tail = jnp.zeros((batch, taps - 1, channels), x.dtype) if tail is None else tail.astype(x.dtype)
    kernel = kernel.astype(x.dtype)
    row = jnp.concatenate([tail, x], axis=1)
    segments = None
    if segment_ids is not None:
        # Any segment may stand in front of the first token: the tail is zero where it is not that token's own.
        segments = jnp.concatenate([jnp.broadcast_to(segment_ids[:, :1], (batch, taps - 1)), segment_ids], axis=1)
    if valid is None:
        y = x * kernel[:, -1]
        for j in range(1, taps):
            tap = row[:, taps - 1 - j : taps - 1 - j + length]
            if segments is not None:
                same = segments[:, taps - 1 - j : taps - 1 - j + length] == segment_ids
                tap = jnp.where(same[..., None], tap, 0)
            y = y + tap * kernel[:, taps - 1 - j]
        return y, row[:, length:]
    # Go back from each token to the real one before it, j times; -1 = none.
    real = jnp.concatenate([jnp.ones((batch, taps - 1), bool), valid], axis=1)
    last = last_valid(real)
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    rows = jnp.arange(batch)[:, None]
    y = jnp.where(valid[..., None], x, 0) * kernel[:, -1]
    at = jnp.broadcast_to(jnp.arange(taps - 1, taps - 1 + length), (batch, length))
    for j in range(1, taps):
        at = jnp.where(at >= 0, before[rows, jnp.maximum(at, 0)], -1)
        there = valid & (at >= 0)
        if segments is not None:
            there &= segments[rows, jnp.maximum(at, 0)] == segment_ids
        y = y + jnp.where(there[..., None], row[rows, jnp.maximum(at, 0)], 0) * kernel[:, taps - 1 - j]
    kept = [last[:, -1]]
    for _ in range(taps - 2):
        kept.append(jnp.where(kept[-1] >= 0, before[rows[:, 0], jnp.maximum(kept[-1], 0)], -1))
    kept = jnp.stack(kept[::-1], axis=1)[:, : taps - 1]
    return y, jnp.where(kept[..., None] >= 0, row[rows, jnp.maximum(kept, 0)], 0)

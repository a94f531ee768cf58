"""ALiBi: attention with linear biases (Press et al., 2021, arXiv 2108.12409)."""

from __future__ import annotations

import jax.numpy as jnp

from attnlab.types import Array, Float


def alibi_slopes(num_heads: int) -> Float[Array, " N"]:
    """Returns the published slope of each head, float32.

    For N a power of two: 2^(-8 m / N), m = 1 .. N. Else those of the power of two below, then every second one of the
    list for the power of two above.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * m / count) for m in range(1, count + 1)]

    below = 2 ** (num_heads.bit_length() - 1)
    slopes = geometric(below)
    if below != num_heads:
        slopes += geometric(2 * below)[0::2][: num_heads - below]
    return jnp.asarray(slopes, jnp.float32)


def alibi_bias(
    slopes: Float[Array, "#B N"], q_positions: Array, kv_positions: Array, *, causal: bool
) -> Float[Array, "b N t s"]:
    """Returns the additive scores of one block, -slope * distance.

    Args:
        slopes: float32, one row serves the whole batch.
        q_positions: [b, t] int32.
        kv_positions: [b, s] int32.
        causal: the distance is max(p - j, 0) instead of |p - j|, query at p and key at j.
    """
    distance = q_positions[:, None, :, None] - kv_positions[:, None, None, :]
    distance = jnp.maximum(distance, 0) if causal else jnp.abs(distance)
    return -slopes[:, :, None, None] * distance.astype(jnp.float32)

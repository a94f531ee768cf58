"""Softmax attention with grouped queries and windows, as a token mixer."""

from __future__ import annotations

from typing import Any

import jax

from attnlab import ops
from attnlab.nn.attention import DenseAttention


class SoftmaxAttention(DenseAttention):
    """Scaled dot-product attention (Vaswani et al., 2017, arXiv 1706.03762); fields as in `DenseAttention`."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, **masks: Any) -> jax.Array:
        """Calls `ops.softmax_attention`."""
        return ops.softmax_attention(q, k, v, **masks)

    def weights(self, q: jax.Array, k: jax.Array, positions: jax.Array, **masks: Any) -> jax.Array:
        """Rows sum to one."""
        return ops.attention_weights("softmax", q, k, **masks)

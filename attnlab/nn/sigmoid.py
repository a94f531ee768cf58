"""Sigmoid attention as a token mixer.

"Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (Ramapuram et al., 2024, arXiv 2409.04431).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab import ops
from attnlab.errors import ConfigError, nearest
from attnlab.nn.attention import DenseAttention
from attnlab.ops.sigmoid import row_factor

# activation -> row normalisation of the op
_ROWS = {"sigmoid": None, "seq_len_normalized_sigmoid": "row", "sqrt_seq_len_normalized_sigmoid": "sqrt_row"}
ACTIVATIONS = (*_ROWS, "softmax")


class SigmoidAttention(DenseAttention):
    """act((q k^T / sqrt(H) + ALiBi) exp(temperature) + bias) v, act the element-wise sigmoid.

    Attributes:
        bias: constant added to all scores. None = -ln(train_length), with which a row starts with a weight near one.
        train_length: n, the length trained with. The bias is a constant of the model: other lengths keep it.
        temperature: constant; its exponential multiplies scores and ALiBi, not the bias.
        activation: "sigmoid"; "seq_len_normalized_sigmoid" and "sqrt_seq_len_normalized_sigmoid" divide the weights of
            a row by i + 1 or its root, i the row's position (packed documents and chunks count from their own start);
            "softmax" for comparisons.
    """

    bias: float | None = None
    train_length: int | None = None
    temperature: float = 0.0
    activation: str = "sigmoid"
    rope_interleaved: bool = True

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, **masks: Any) -> jax.Array:
        """Calls `ops.sigmoid_attention`, or `ops.softmax_attention` for that activation."""
        kind, options = self._scores(q, masks)
        if kind == "softmax":
            return ops.softmax_attention(q, k, v, **options)
        out = ops.sigmoid_attention(q, k, v, **options)
        if _ROWS[self.activation] is None:
            return out
        factor = row_factor(positions, _ROWS[self.activation])[:, :, None, None]
        return (out.astype(jnp.float32) * factor).astype(out.dtype)

    def weights(self, q: jax.Array, k: jax.Array, positions: jax.Array, **masks: Any) -> jax.Array:
        """Rows need not sum to one."""
        kind, options = self._scores(q, masks)
        out = ops.attention_weights(kind, q, k, **options)
        if kind == "softmax" or _ROWS[self.activation] is None:
            return out
        return out * row_factor(positions, _ROWS[self.activation])[:, None, :, None]

    @nn.nowrap
    def constant_bias(self) -> float:
        """Returns the bias in use.

        Raises:
            ConfigError: it follows the training length, and that is not set.
        """
        if self.bias is not None:
            return float(self.bias)
        if not self.train_length:
            raise ConfigError(
                "bias = None: stands for -ln(train_length). Set train_length, or bias itself (0.0 = off)."
            )
        return -math.log(self.train_length)

    def _scores(self, q: jax.Array, masks: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Returns the kind of the op and its arguments."""
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation = {self.activation!r}: unknown, {nearest(self.activation, ACTIVATIONS)}")
        if self.activation != "softmax":
            return "sigmoid", masks | {"bias": self.constant_bias(), "temperature": self.temperature}
        # A softmax does not see a constant bias; the temperature moves into scale and slopes.
        factor = math.exp(self.temperature)
        options = masks | {"scale": factor * q.shape[-1] ** -0.5}
        if "alibi_slopes" in masks:
            options["alibi_slopes"] = masks["alibi_slopes"] * factor
        return "softmax", options

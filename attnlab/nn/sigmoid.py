"""Sigmoid attention as a token mixer.

"Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (Ramapuram et al., 2024, arXiv 2409.04431).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attnlab import ops
from attnlab.errors import ConfigError, nearest
from attnlab.nn.attention import DenseAttention

# activation -> exponent of 1 / (row index + 1)
_ROW_POWER = {"sigmoid": 0.0, "seq_len_normalized_sigmoid": 1.0, "sqrt_seq_len_normalized_sigmoid": 0.5}
ACTIVATIONS = (*_ROW_POWER, "softmax")


class SigmoidAttention(DenseAttention):
    """act((q k^T / sqrt(H) + ALiBi) exp(temperature) + bias) v, act the element-wise sigmoid.

    Attributes:
        bias: constant added to all scores. None = -ln(train_length), with which a row starts with a weight near one.
        train_length: n, the length trained with. The bias is a constant of the model: other lengths keep it.
        temperature: constant; its exponential multiplies scores and ALiBi, not the bias.
        activation: "sigmoid"; "seq_len_normalized_sigmoid" and "sqrt_seq_len_normalized_sigmoid" divide row i by i + 1 or
            its root; "softmax" for comparisons.
    """

    bias: float | None = None
    train_length: int | None = None
    temperature: float = 0.0
    activation: str = "sigmoid"
    rope_interleaved: bool = True

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, **masks: Any) -> jax.Array:
        """Calls `ops.sigmoid_attention`."""
        if self._power() is None:
            return ops.softmax_attention(q, k, v, **self._softmax_scores(q, masks))
        out = ops.sigmoid_attention(q, k, v, bias=self._bias(), temperature=self.temperature, **masks)
        factor = self._row_factor(positions)
        return out if factor is None else (out.astype(jnp.float32) * factor[:, :, None, None]).astype(out.dtype)

    def weights(self, q: jax.Array, k: jax.Array, positions: jax.Array, **masks: Any) -> jax.Array:
        """Rows need not sum to one."""
        if self._power() is None:
            return ops.attention_weights("softmax", q, k, **self._softmax_scores(q, masks))
        out = ops.attention_weights("sigmoid", q, k, bias=self._bias(), temperature=self.temperature, **masks)
        factor = self._row_factor(positions)
        return out if factor is None else out * factor[:, None, :, None]

    def _bias(self) -> float:
        if self.bias is not None:
            return self.bias
        if not self.train_length:
            raise ConfigError("bias = None: stands for -ln(train_length). Set train_length, or bias itself (0.0 = none).")
        return -math.log(self.train_length)

    def _power(self) -> float | None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation = {self.activation!r}: {nearest(self.activation, ACTIVATIONS)}")
        return _ROW_POWER.get(self.activation)

    def _row_factor(self, positions: jax.Array) -> jax.Array | None:
        """Of the rows, by their position: packed documents and chunks count from their own start."""
        power = self._power()
        return (jnp.maximum(positions, 0).astype(jnp.float32) + 1.0) ** -power if power else None

    def _softmax_scores(self, q: jax.Array, masks: dict[str, Any]) -> dict[str, Any]:
        """A softmax does not see the bias; the temperature moves into scale and slopes."""
        factor = math.exp(self.temperature)
        options = masks | {"scale": factor * q.shape[-1] ** -0.5}
        if "alibi_slopes" in masks:
            options["alibi_slopes"] = masks["alibi_slopes"] * factor
        return options

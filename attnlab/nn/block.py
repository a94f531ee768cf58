"""The residual block: a mixer and an MLP, each behind a norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.nn.mlp import mlp_of
from attnlab.nn.norm import LayerScale, norm_of
from attnlab.nn.partitioning import constrain


class Block(nn.Module):
    """x = x + LS(post(mixer(norm(x)))); x = x + LS(mlp(norm(x))).

    Attributes:
        mixer: any module of the mixer contract (`attnlab.nn.mixer`).
        norm: "rmsnorm" or "layernorm".
        mlp: "gated" (SwiGLU) or "gelu".
        mlp_dim: width inside the MLP; 0 = its default.
        layer_scale: initial value of LayerScale on both branches; 0 = none.
        hybrid_norm: one more norm on the mixer's output, before LayerScale (for long sequences and large models).
        dropout: of the MLP's output.
    """

    mixer: nn.Module
    norm: str = "rmsnorm"
    mlp: str = "gated"
    mlp_dim: int = 0
    layer_scale: float = 0.0
    hybrid_norm: bool = False
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: Any = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Any]:
        """Maps [B, T, D] to ([B, T, D], cache); the arguments are the mixer's."""
        norm = norm_of(self.norm)
        types = {"param_dtype": self.param_dtype}
        y, cache = self.mixer(
            norm(name="mixer_norm", **types)(x),
            positions=positions,
            segment_ids=segment_ids,
            mask=mask,
            cache=cache,
            deterministic=deterministic,
        )
        if self.hybrid_norm:
            y = norm(name="post_norm", **types)(y)
        x = x + self._scaled(y, "mixer_scale")
        mlp = mlp_of(self.mlp)(self.mlp_dim, self.dtype, self.param_dtype, name="mlp_block")
        y = mlp(norm(name="mlp_norm", **types)(x))
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return constrain(x + self._scaled(y, "mlp_scale"), "act_batch", "act_seq", "act_embed"), cache

    def _scaled(self, y: jax.Array, name: str) -> jax.Array:
        if not self.layer_scale:
            return y
        return LayerScale(self.layer_scale, self.param_dtype, name=name)(y)

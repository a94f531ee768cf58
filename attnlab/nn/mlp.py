"""Position-wise MLPs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import Projection


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases: SwiGLU (Shazeer, 2020, arXiv 2002.05202).

    Attributes:
        hidden: width inside; 0 = 8/3 D rounded up to a multiple of 64.
    """

    hidden: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        dim = x.shape[-1]
        hidden = self.hidden or -(-8 * dim // 3 // 64) * 64
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = Projection((dim, hidden), ("embed", "mlp"), name="gate", **types)(x)
        up = Projection((dim, hidden), ("embed", "mlp"), name="up", **types)(x)
        inner = constrain(nn.silu(gate) * up, "act_batch", "act_seq", "act_mlp")
        return Projection((hidden, dim), ("mlp", "embed"), name="down", **types)(inner)


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU, no biases.

    Attributes:
        hidden: width inside; 0 = 4 D.
    """

    hidden: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        dim = x.shape[-1]
        hidden = self.hidden or 4 * dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inner = nn.gelu(Projection((dim, hidden), ("embed", "mlp"), name="fc1", **types)(x), approximate=False)
        inner = constrain(inner, "act_batch", "act_seq", "act_mlp")
        return Projection((hidden, dim), ("mlp", "embed"), name="fc2", **types)(inner)


MLPS = {"gated": GatedMLP, "gelu": GeluMLP}


def mlp_of(name: str) -> type[GatedMLP] | type[GeluMLP]:
    """Returns the class of that name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in MLPS:
        raise ConfigError(f"mlp = {name!r}: unknown, {nearest(name, MLPS)}")
    return MLPS[name]

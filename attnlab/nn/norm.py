"""Normalisations over the last axis; statistics in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.nn.partitioning import named


class RMSNorm(nn.Module):
    """x / rms(x) * scale (Zhang & Sennrich, 2019, arXiv 1910.07467)."""

    epsilon: float = 1e-6
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis; the result has the type of x."""
        scale = _vector(self, "scale", nn.initializers.ones_init(), x.shape[-1])
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias (Ba et al., 2016, arXiv 1607.06450)."""

    epsilon: float = 1e-5
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis; the result has the type of x."""
        scale = _vector(self, "scale", nn.initializers.ones_init(), x.shape[-1])
        bias = _vector(self, "bias", nn.initializers.zeros_init(), x.shape[-1])
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale + bias).astype(x.dtype)


class LayerScale(nn.Module):
    """x * gamma, gamma of shape [D] (Touvron et al., 2021, arXiv 2103.17239)."""

    initial: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales the last axis."""
        gamma = _vector(self, "gamma", nn.initializers.constant(self.initial), x.shape[-1])
        return x * gamma.astype(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def norm_of(name: str) -> type[RMSNorm] | type[LayerNorm]:
    """Returns the class of that name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in NORMS:
        raise ConfigError(f"norm = {name!r}: unknown, {nearest(name, NORMS)}")
    return NORMS[name]


def _vector(module: nn.Module, name: str, init: Any, size: int) -> jax.Array:
    return module.param(name, named(init, "norm"), (size,), module.param_dtype).astype(jnp.float32)

"""Normalisation over the last axis, with float32 statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.nn.partitioning import named
from attnlab.types import Array, DTypeLike


class RMSNorm(nn.Module, kw_only=True):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises [..., D]; returns the compute type."""
        scale = self.param("scale", named(nn.initializers.ones, "norm"), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * scale.astype(jnp.float32)).astype(self.dtype)


class LayerNorm(nn.Module, kw_only=True):
    """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al., 2016, arXiv 1607.06450)."""

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises [..., D]; returns the compute type."""
        scale = self.param("scale", named(nn.initializers.ones, "norm"), (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", named(nn.initializers.zeros, "norm"), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


class LayerScale(nn.Module, kw_only=True):
    """Element-wise gain of a residual branch (Touvron et al., 2021, arXiv 2103.17239)."""

    init: float = 1e-4
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Scales [..., D]."""
        gamma = self.param(
            "gamma", named(nn.initializers.constant(self.init), "norm"), (x.shape[-1],), self.param_dtype
        )
        return x * gamma.astype(self.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def make_norm(kind: str, **fields) -> nn.Module:
    """Returns the norm of that name ("rmsnorm", eps 1e-6; "layernorm", eps 1e-5)."""
    if kind not in NORMS:
        raise ConfigError(f"model.norm = {kind!r}: unknown norm, {nearest(kind, NORMS)}")
    return NORMS[kind](**fields)

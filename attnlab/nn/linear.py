"""Linear maps over named axes, in a compute type apart from the parameters' type."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.nn.partitioning import named
from attnlab.types import Array, DTypeLike

INIT_STD = 0.02


def normal_init(std: float = INIT_STD):
    """The initialisation of every kernel and embedding: a normal of this deviation cut at two deviations."""
    return jax.nn.initializers.truncated_normal(std)


class Linear(nn.Module, kw_only=True):
    """y = x @ kernel (+ bias), contracting the last `contract` axes of x.

    Attributes:
        features: new axes, for example (heads, head width).
        names: logical axis names of the kernel: those contracted, then those of `features`.
        contract: how many axes of x are contracted.
        use_bias: whether a bias over `features` is added.
        dtype: compute type.
        param_dtype: type of the parameters.
        std: deviation of the kernel at initialisation; biases start at zero.
    """

    features: tuple[int, ...]
    names: tuple[str, ...]
    contract: int = 1
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    std: float = INIT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., contracted] to [..., *features] in the compute type."""
        inner = x.shape[x.ndim - self.contract :]
        kernel = self.param(
            "kernel", named(normal_init(self.std), *self.names), (*inner, *self.features), self.param_dtype
        )
        batch = x.shape[: x.ndim - self.contract]
        flat = x.astype(self.dtype).reshape(*batch, math.prod(inner))
        y = flat @ kernel.astype(self.dtype).reshape(math.prod(inner), math.prod(self.features))
        y = y.reshape(*batch, *self.features)
        if self.use_bias:
            names = self.names[self.contract :]
            bias = self.param("bias", named(nn.initializers.zeros, *names), self.features, self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y

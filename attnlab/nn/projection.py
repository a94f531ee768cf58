"""Linear maps whose kernels carry logical axis names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.nn.partitioning import named

INIT_STD = 0.02  # of every kernel and embedding (normal)


class Projection(nn.Module):
    """y = x @ kernel (+ bias), over the last axes of x.

    Attributes:
        shape: of the kernel, the input axes first.
        names: logical names of the kernel's axes.
        inputs: how many leading axes of the kernel are contracted with the last of x.
        use_bias: adds `bias`, of the shape of the output axes.
        kernel_init: initializer; None = normal with `INIT_STD`.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    inputs: int = 1
    use_bias: bool = False
    kernel_init: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *inputs] to [..., *outputs] in `dtype` (default: that of x)."""
        dtype = self.dtype or x.dtype
        init = self.kernel_init or nn.initializers.normal(INIT_STD)
        kernel = self.param("kernel", named(init, *self.names), self.shape, self.param_dtype)
        contracted = tuple(range(self.inputs))
        last = tuple(range(x.ndim - self.inputs, x.ndim))
        y = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), ((last, contracted), ((), ())))
        if self.use_bias:
            # A bias is a small vector: it is never cut, whatever its heads are called.
            out = self.shape[self.inputs :]
            zeros = named(nn.initializers.zeros_init(), *("norm",) * len(out))
            y = y + self.param("bias", zeros, out, self.param_dtype).astype(dtype)
        return y


class Embedding(nn.Module):
    """A table [V, D]; `attend` uses it the other way round, for tied output embeddings."""

    vocab_size: int
    dim: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the table; called by flax."""
        init = named(nn.initializers.normal(INIT_STD), "vocab", "embed")
        self.embedding = self.param("embedding", init, (self.vocab_size, self.dim), self.param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks up [B, T] int32 ids: [B, T, D]."""
        return jnp.take(self.embedding.astype(self.dtype or self.param_dtype), tokens, axis=0)

    def attend(self, x: jax.Array) -> jax.Array:
        """Returns logits [B, T, V] float32."""
        table = self.embedding.astype(x.dtype)
        return jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

"""The global attention of MoH-ViT (on TransNeXt): length-scaled cosine attention over a map, with a mixture of heads."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.nn.mixture_of_heads import HeadRouter, sow_route
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.ops.mixture_of_heads import mixture_of_heads_attention

_NORM_FLOOR = 1e-12  # of the length that queries and keys are divided by, as torch.nn.functional.normalize
_HIDDEN = 512  # of the position bias


class RelativePositionMLP(nn.Module):
    """fc2(relu(fc1(c))) of log-spaced relative coordinates c [P, 2]; parameters `fc1`, `fc2` with biases."""

    num_heads: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, coordinates: jax.Array) -> jax.Array:
        """Maps [P, 2] to [P, N] float32."""
        types = {"use_bias": True, "dtype": jnp.float32, "param_dtype": self.param_dtype}
        hidden = nn.relu(Projection((2, _HIDDEN), ("norm", "norm"), name="fc1", **types)(coordinates))
        return Projection((_HIDDEN, self.num_heads), ("norm", "norm"), name="fc2", **types)(hidden)


class MixtureOfHeadsMapAttention(nn.Module):
    """((q^ + E_n) softplus(tau_n) ln T) . k^ + bias_n(i, j), softmax, and the gates of a `HeadRouter`; not causal.

    q^ and k^ have unit length in each head; E_n is a learned query embedding; the bias is an MLP of the relative coordinates.
    Parameters: `query`, `key`, `value` [D, N, H] and `out` [N, H, D] with a bias, `temperature` [N] (tau; softplus starts at
    1 / 0.24), `query_embedding` [N, H], `position_bias` (`RelativePositionMLP`), `router`. Sows as `MixtureOfHeads`.

    Attributes:
        dim: D.
        num_heads: N.
        shared_heads: s; None = plain attention, without a router.
        top_k: k; 0 where all heads are shared.
        head_dim: H; None = D / N.
        qkv_bias: biases of queries, keys and values.
        balance_coefficient: of the balance loss.
        balance_layers: layers with routed heads in the model.
        axis_name: of `jax.pmap` or `jax.vmap`, for the means in the balance loss.
        implementation: of `ops.mixture_of_heads.mixture_of_heads_attention`.
        capture_attention: sow `attention` [B, N, T, T] and what the router decided to `intermediates`.
    """

    dim: int
    num_heads: int
    shared_heads: int | None = None
    top_k: int = 0
    head_dim: int | None = None
    qkv_bias: bool = True
    balance_coefficient: float = 0.01
    balance_layers: int = 1
    axis_name: str | None = None
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, *, relative: tuple[jax.Array, jax.Array] | None = None, length_scale: float | None = None
    ) -> jax.Array:
        """Maps [B, Y, X, D] to the same, or tokens [B, T, D] where `relative` says how they lie.

        Args:
            x: the map.
            relative: coordinates [P, 2] and index [T, T] int32 into them; default those of the map (`relative_coordinates`).
            length_scale: ln T by default.

        Raises:
            ConfigError: heads that do not fit, or tokens without `relative`.
        """
        if not self.head_dim and self.dim % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor, or set head_dim.")
        if relative is None:
            if x.ndim != 4:
                raise ConfigError(f"x has shape {x.shape}: it needs to be a map [B, Y, X, D], or pass relative=.")
            relative = relative_coordinates(x.shape[1:3])
        tokens = x.reshape(x.shape[0], -1, self.dim)
        length, heads = tokens.shape[1], (self.num_heads, self.head_dim or self.dim // self.num_heads)
        dtype = self.dtype or x.dtype
        types = {"dtype": dtype, "param_dtype": self.param_dtype}
        q, k, v = (
            Projection((self.dim, *heads), ("embed", "heads", "head_dim"), use_bias=self.qkv_bias, name=name, **types)(tokens)
            for name in ("query", "key", "value")
        )
        embedding = self.param(
            "query_embedding", named(nn.initializers.truncated_normal(INIT_STD), "norm", "head_dim"), heads, self.param_dtype
        )
        scale = length_temperature(self, self.num_heads) * (math.log(length) if length_scale is None else length_scale)
        q = ((unit_length(q, jnp.float32) + embedding.astype(jnp.float32)) * scale[:, None]).astype(dtype)
        k = unit_length(k)
        q, k, v = (constrain(y, "act_batch", None, "act_heads", None) for y in (q, k, v))
        table = RelativePositionMLP(self.num_heads, self.param_dtype, name="position_bias")(jnp.asarray(relative[0]))
        bias = jnp.moveaxis(table[jnp.asarray(relative[1])], -1, 0)  # [N, T, T]
        options = {"scale": 1.0, "bias": bias[None]}
        if self.capture_attention and self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", ops.attention_weights("softmax", q, k, **options))
        options["implementation"] = self.implementation
        if self.shared_heads is None:
            y = ops.softmax_attention(q, k, v, **options)
        else:
            router = HeadRouter(self.num_heads, self.shared_heads, self.top_k, "truncated", self.param_dtype, name="router")
            route = router(tokens)
            coefficient = self.balance_coefficient / self.balance_layers
            sow_route(self, route, None, coefficient=coefficient, axis_name=self.axis_name)
            y = mixture_of_heads_attention(q, k, v, route.gates, route.selected, top_k=self.top_k, **options)
        out = Projection((*heads, self.dim), ("heads", "head_dim", "embed"), inputs=2, use_bias=True, name="out", **types)
        return out(y).reshape(x.shape)


@functools.cache
def relative_coordinates(
    size: tuple[int, int], keys: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (coordinates [P, 2] float32, index [T, S] int32) of a map with its T positions row by row.

    Offsets are (query - key) / (size - 1) * 8 on each axis, then sign * log2(|offset| + 1) / log2(8); each pair once.

    Args:
        size: height and width of the map.
        keys: of the map that the keys are pooled to; None = the map itself.
    """
    axes = [np.arange(n, dtype=np.float64) for n in size]
    pooled = axes if keys is None else [pooling(len(axis), n) @ axis for axis, n in zip(axes, keys, strict=True)]
    queries, places = (np.stack(np.meshgrid(*pair, indexing="ij"), axis=-1).reshape(-1, 2) for pair in (axes, pooled))
    offset = (queries[:, None] - places[None]) / np.maximum(np.subtract(size, 1), 1) * 8.0
    spaced = np.sign(offset) * np.log2(np.abs(offset) + 1.0) / np.log2(8.0)
    table, index = np.unique(spaced.reshape(-1, 2).astype(np.float32), axis=0, return_inverse=True)
    return table, index.reshape(len(queries), -1).astype(np.int32)


def pooling(size: int, parts: int) -> np.ndarray:
    """Averages [parts, size] float32 over parts of an axis that begin and end as those of adaptive pooling in PyTorch."""
    where = np.arange(size)
    rows = [(where >= part * size // parts) & (where < -(-(part + 1) * size // parts)) for part in range(parts)]
    return np.stack([row / row.sum() for row in rows]).astype(np.float32)


def length_temperature(module: nn.Module, num_heads: int) -> jax.Array:
    """Declares `temperature` [N] (tau) and returns softplus(tau), 1 / 0.24 at the start."""
    start = nn.initializers.constant(math.log(math.expm1(1.0 / 0.24)))
    temperature = module.param("temperature", named(start, "norm"), (num_heads,), module.param_dtype)
    return jax.nn.softplus(temperature.astype(jnp.float32))


def unit_length(x: jax.Array, dtype: Any = None) -> jax.Array:
    """x over its length along the last axis, in float32; zero stays zero, with a finite gradient."""
    wide = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return (wide / jnp.maximum(jnp.where(squares > 0, length, 0.0), _NORM_FLOOR)).astype(dtype or x.dtype)

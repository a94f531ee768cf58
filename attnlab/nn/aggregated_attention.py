"""Aggregated attention of TransNeXt with a mixture of heads: near neighbours and a pooled map in one softmax.

"TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (Shi, 2023, arXiv 2311.17132), section 3; with the gates of
"MoH: Multi-Head Attention as Mixture-of-Head Attention" (2024, arXiv 2410.11842).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.nn.mixture_of_heads import HeadRouter, sow_route
from attnlab.nn.mixture_of_heads_map import RelativePositionMLP, length_temperature, pooling, relative_coordinates, unit_length
from attnlab.nn.norm import LayerNorm
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.types import Array, Float

_WINDOW = 3
_BIAS_STD = 4e-4


def aggregated_attention(
    q: Float[Array, "B Y X N H"],
    scale: Float[Array, "Y X N"],
    embedding: Float[Array, "N H"],
    near: tuple[Float[Array, "B Y X N H"], Float[Array, "B Y X N H"]],
    pooled: tuple[Float[Array, "B P N H"], Float[Array, "B P N H"]],
    near_bias: Float[Array, "N W"],
    pooled_bias: Float[Array, "N T P"],
    tokens: tuple[Float[Array, "N H W"], Float[Array, "N W"]],
) -> tuple[Array, Array, Array]:
    """Attends from each position to its window and to the pooled map at once.

    The weights are one softmax over ((q + E) s) . k + bias of the W = 9 neighbours (those outside of the map left out) and the P
    pooled positions; those of the neighbours then get q . L + l added, learned "tokens" that depend on the offset alone.

    Args:
        q: queries of unit length.
        scale: s.
        embedding: E.
        near: keys (of unit length) and values of the positions.
        pooled: keys (of unit length) and values of the pooled positions.
        near_bias: of the neighbours, row by row.
        pooled_bias: of the pooled positions, T = Y X queries.
        tokens: L and l.

    Returns:
        Values [B, Y, X, N, H], and the softmax's weights of the neighbours [B, Y, X, N, 9] and pooled positions
        [B, Y, X, N, P], float32.
    """
    height, width, heads = q.shape[1:4]
    asked = ((q.astype(jnp.float32) + embedding) * scale[..., None]).astype(q.dtype)
    wide = {"preferred_element_type": jnp.float32}
    scores = [jnp.einsum("byxnh,byxnh->byxn", asked, k, **wide) for k in _neighbours(near[0])]
    inside = jnp.stack(list(_neighbours(jnp.ones((1, height, width, 1), bool))), axis=-1)
    local = jnp.where(inside, jnp.stack(scores, axis=-1) + near_bias, -jnp.inf)
    far = jnp.einsum("byxnh,bpnh->byxnp", asked, pooled[0], **wide)
    far = far + jnp.moveaxis(pooled_bias, 0, 1).reshape(height, width, heads, -1)
    weights = jax.nn.softmax(jnp.concatenate([local, far], axis=-1), axis=-1)
    local, far = weights[..., : _WINDOW**2], weights[..., _WINDOW**2 :]
    extra = jnp.einsum("byxnh,nhw->byxnw", q, tokens[0].astype(q.dtype), **wide) + tokens[1]
    y = jnp.einsum("byxnp,bpnh->byxnh", far.astype(q.dtype), pooled[1], **wide)
    for place, value in enumerate(_neighbours(near[1])):
        y = y + (local + extra)[..., place, None] * value.astype(jnp.float32)
    return y.astype(q.dtype), local, far


class MixtureOfHeadsAggregatedAttention(nn.Module):
    """`aggregated_attention` over a map with the gates of a `HeadRouter`; not causal.

    Parameters: `query`, `key`, `value` [D, N, H] and `out` [N, H, D] with biases, `reduce` [D, D] with a bias and `reduce_norm`
    (a pooled map is norm(pool(gelu(reduce(x))))), `temperature` [N], `query_embedding` [N, H], `position_bias`, `near_bias`
    [N, 9], `tokens` [N, H, 9], `token_bias` [N, 9], `router`. Sows as `MixtureOfHeads`; a map of weights over all positions does
    not exist.

    Attributes:
        dim: D.
        num_heads: N, divides D.
        reduction: the map over the pooled map, in each direction.
        shared_heads: s; None = plain attention, without a router.
        top_k: k.
        balance_coefficient: of the balance loss.
        balance_layers: layers with routed heads in the model.
        capture_attention: sow what the router decided.
    """

    dim: int
    num_heads: int
    reduction: int
    shared_heads: int | None = None
    top_k: int = 0
    balance_coefficient: float = 0.01
    balance_layers: int = 1
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, Y, X, D] to the same.

        Raises:
            ConfigError: heads that do not fit, or a map smaller than `reduction`.
        """
        batch, height, width, _ = x.shape
        if self.dim % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor.")
        if min(height, width) < self.reduction:
            raise ConfigError(f"reduction = {self.reduction}: the map has {height} x {width} positions. Use larger images.")
        heads = (self.num_heads, self.dim // self.num_heads)
        small = height // self.reduction, width // self.reduction
        types = {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}
        project = {
            name: Projection((self.dim, *heads), ("embed", "heads", "head_dim"), use_bias=True, name=name, **types)
            for name in ("query", "key", "value")
        }
        q = constrain(unit_length(project["query"](x)), "act_batch", None, None, "act_heads", None)
        near = unit_length(project["key"](x)), project["value"](x)
        reduced = Projection((self.dim, self.dim), ("embed", None), use_bias=True, name="reduce", **types)(x)
        reduced = nn.gelu(reduced, approximate=False)
        down, across = (jnp.asarray(pooling(*sizes)) for sizes in ((height, small[0]), (width, small[1])))
        reduced = jnp.einsum("py,qx,byxd->bpqd", down, across, reduced.astype(jnp.float32)).reshape(batch, -1, self.dim)
        reduced = LayerNorm(1e-5, self.param_dtype, name="reduce_norm")(reduced).astype(types["dtype"])
        pooled = unit_length(project["key"](reduced)), project["value"](reduced)

        normal = nn.initializers.truncated_normal
        embedding = self.param("query_embedding", named(normal(INIT_STD), "norm", "head_dim"), heads, self.param_dtype)
        inits = {"near_bias": normal(_BIAS_STD), "token_bias": nn.initializers.zeros_init()}
        size = (self.num_heads, _WINDOW**2)
        biases = {name: self.param(name, named(init, "norm", None), size, self.param_dtype) for name, init in inits.items()}
        tokens = self.param("tokens", named(normal(INIT_STD), "norm", "head_dim", None), (*heads, _WINDOW**2), self.param_dtype)
        seen = sum(_neighbours(jnp.ones((1, height, width, 1))))[0] + math.prod(small)
        scale = jnp.log(seen) * length_temperature(self, self.num_heads)
        coordinates, index = relative_coordinates((height, width), small)
        table = RelativePositionMLP(self.num_heads, self.param_dtype, name="position_bias")(jnp.asarray(coordinates))
        bias = jnp.moveaxis(table[jnp.asarray(index)], -1, 0)
        y, _, _ = aggregated_attention(
            q, scale, embedding, near, pooled, biases["near_bias"], bias, (tokens, biases["token_bias"])
        )
        if self.shared_heads is not None:
            router = HeadRouter(self.num_heads, self.shared_heads, self.top_k, "truncated", self.param_dtype, name="router")
            route = router(x.reshape(batch, -1, self.dim))
            coefficient = self.balance_coefficient / self.balance_layers
            sow_route(self, route, None, coefficient=coefficient, axis_name=None)
            y = (y.astype(jnp.float32) * route.gates.reshape(batch, height, width, -1, 1)).astype(y.dtype)
        out = Projection((*heads, self.dim), ("heads", "head_dim", "embed"), inputs=2, use_bias=True, name="out", **types)
        return out(y)


def _neighbours(x: Any) -> Iterator[jax.Array]:
    """Yields the map [B, Y, X, ...] shifted to each place of the window, row by row; zeros outside."""
    height, width = x.shape[1:3]
    edge = (_WINDOW // 2,) * 2
    padded = jnp.pad(x, [(0, 0), edge, edge] + [(0, 0)] * (x.ndim - 3))
    for down, across in itertools.product(range(_WINDOW), repeat=2):
        yield padded[:, down : down + height, across : across + width]

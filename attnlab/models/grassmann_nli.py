"""A classifier of sentence pairs by Grassmann mixing, on the token features of any encoder.

"Attention Is Not What You Need" (Zhang, 2025, arXiv 2512.19428), the SNLI head on DistilBERT. The paper leaves much of it open;
here tokens are averaged over windows, the windows' means ("slots") are mixed by post-norm blocks whose reduced features form
several planes, and the mean slot is classified.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.nn.grassmann import GrassmannBlock, GrassmannMixing
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import Projection


class GrassmannNLI(nn.Module):
    """Token features [B, S, E] and a mask to logits [B, num_classes].

    Parameters: `input` [E, D], `blocks_{i}` (a `GrassmannBlock`), `output` [D, num_classes], with biases.

    Attributes:
        num_classes: entailment, neutral, contradiction.
        dim: D.
        num_layers: blocks.
        reduced_dim: of the mixing, all heads together.
        pair_heads: groups of reduced features with planes of their own.
        offsets: distances between slots, into the past.
        ff_dim: width inside the feed-forward.
        window: tokens per slot.
        stride: tokens from one slot to the next.
        norm: of the coordinates, "smooth" or "max".
        eps: of the "max" norm.
        dropout: of mixing and feed-forward.
    """

    num_classes: int = 3
    dim: int = 256
    num_layers: int = 2
    reduced_dim: int = 64
    pair_heads: int = 4
    offsets: tuple[int, ...] = (1, 2, 4)
    ff_dim: int = 512
    window: int = 8
    stride: int = 8
    norm: str = "smooth"
    eps: float = 1e-8
    dropout: float = 0.1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        if self.window < 1 or self.stride < 1:
            raise ConfigError(f"window = {self.window}, stride = {self.stride}: slots need tokens. Set both to 1 or more.")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.blocks = [
            GrassmannBlock(
                mixer=GrassmannMixing(
                    dim=self.dim,
                    reduced_dim=self.reduced_dim,
                    pair_heads=self.pair_heads,
                    offsets=self.offsets,
                    norm=self.norm,
                    eps=self.eps,
                    dropout=self.dropout,
                    parent=None,
                    **types,
                ),
                norm_style="post",
                ff_dim=self.ff_dim,
                dropout=self.dropout,
                **types,
            )
            for _ in range(self.num_layers)
        ]
        self.output = Projection((self.dim, self.num_classes), ("embed", None), use_bias=True, **types)
        self.input = InputProjection(self.dim, **types)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, *, deterministic: bool = True
    ) -> jax.Array:
        """Maps token features [B, S, E] and their mask [B, S] bool (False = padding) to logits [B, num_classes] float32."""
        slots, valid = self.slots(tokens, mask)
        return self.classify(self.pool(slots, valid, deterministic=deterministic))

    def slots(self, tokens: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns masked means of the projected tokens over windows [B, W, D], zero where a window is empty, and [B, W] bool."""
        x = self.input(tokens)
        batch, length, _ = x.shape
        mask = jnp.ones((batch, length), bool) if mask is None else mask
        count = 1 + max(-(-(length - self.window) // self.stride), 0)
        end = (count - 1) * self.stride + self.window
        x = jnp.pad(jnp.where(mask[:, :, None], x, 0), ((0, 0), (0, max(end - length, 0)), (0, 0)))
        mask = jnp.pad(mask, ((0, 0), (0, max(end - length, 0))))
        at = jnp.arange(count)[:, None] * self.stride + jnp.arange(self.window)
        tokens_in = jnp.sum(mask[:, at], axis=2, dtype=jnp.float32)
        means = jnp.sum(x[:, at].astype(jnp.float32), axis=2) / jnp.maximum(tokens_in, 1.0)[:, :, None]
        return means.astype(x.dtype), tokens_in > 0

    def pool(self, slots: jax.Array, valid: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Mixes slots [B, W, D] and returns the mean of the valid ones [B, D]; zero where none is."""
        x = constrain(slots, "act_batch", None, "act_embed")
        for block in self.blocks:
            x, _ = block(x, mask=valid, deterministic=deterministic)
        wide = jnp.where(valid[:, :, None], x.astype(jnp.float32), 0.0)
        return (wide.sum(axis=1) / jnp.maximum(valid.sum(axis=1, dtype=jnp.float32), 1.0)[:, None]).astype(x.dtype)

    def classify(self, pooled: jax.Array) -> jax.Array:
        """Maps [B, D] to logits [B, num_classes] float32."""
        return self.output(pooled).astype(jnp.float32)


class InputProjection(nn.Module):
    """A linear map from a width that only the input tells."""

    dim: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, S, E] to [B, S, D]."""
        types = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return Projection((x.shape[-1], self.dim), (None, "embed"), name="linear", **types)(x)

"""A Transformer block that works on the tokens which the class token attends to most, and on one token for all others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.nn.norm import LayerNorm, LayerScale
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import Projection
from attnlab.nn.vision import MLP, Conv
from attnlab.ops.token_pruning import choose_tokens, gather_tokens, merge_dropped, place_tokens


class ScoringAttention(nn.Module):
    """Softmax attention among tokens that also returns how much the first one attends to each.

    Parameters: `query`, `key`, `value` [D, N, H] and `out` [N, H, D], each with a bias.

    Attributes:
        num_heads: N, divides D.
        implementation: of `ops.softmax_attention`.
        capture_attention: sow `attention` [B, N, T, T] to `intermediates`.
    """

    num_heads: int
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps [B, T, D] to (the same, mean weights over the heads of the first row [B, T] float32).

        Raises:
            ConfigError: heads that do not divide D.
        """
        dim = x.shape[-1]
        if dim % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: does not divide dim = {dim}. Choose a divisor.")
        heads = (self.num_heads, dim // self.num_heads)
        types = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        names = ("embed", "heads", "head_dim")
        q, k, v = (
            constrain(Projection((dim, *heads), names, name=name, **types)(x), "act_batch", None, "act_heads", None)
            for name in ("query", "key", "value")
        )
        if self.capture_attention and self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", ops.attention_weights("softmax", q, k))
        row = ops.attention_weights("softmax", q[:, :1], k).mean((1, 2))
        y = ops.softmax_attention(q, k, v, implementation=self.implementation)
        return Projection((*heads, dim), ("heads", "head_dim", "embed"), inputs=2, name="out", **types)(y), row


class PruningBlock(nn.Module):
    """Position, attention and MLP of a class token and the best-scored tokens of a map (arXiv 2201.09450, light models).

    The other tokens enter as one, their mean weighted by score; what attention and MLP say about it is added to each of them.
    The score of a kept token is a running mean of the class token's attention to it.

    Parameters: `pos_embed`, `norm1`, `attention`, `norm2`, `mlp`; with layer scale `scale1`, `scale2`, and `scale3` of what
    dropped tokens get, where tokens are dropped.

    Attributes:
        num_heads: N, divides D.
        hidden: width inside the MLP.
        keep: part of the tokens that is kept, rounded down; 1 = all, and nothing is merged.
        trade_off: share of the present attention in the score.
        dpe_kernel: of the depthwise convolution for position; 0 = none.
        layer_scale: initial value of the factors; 0 = none.
        norm_epsilon: of the layer norms.
        implementation: of `ops.softmax_attention`.
        capture_attention: sow the weights.
    """

    num_heads: int
    hidden: int
    keep: float = 1.0
    trade_off: float = 0.5
    dpe_kernel: int = 3
    layer_scale: float = 0.0
    norm_epsilon: float = 1e-6
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, class_token: jax.Array, scores: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps (map [B, Y, X, D], class token [B, 1, D], scores [B, Y X] float32 or None) to the same.

        None are the scores of a net's first block: they become the class token's attention. Where tokens are dropped `kept`
        [B, J], the positions of those that are not, is sown to `intermediates`.

        Raises:
            ConfigError: the first block drops tokens.
        """
        shape, dim = x.shape, x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.dpe_kernel:
            x = x + Conv(dim, (self.dpe_kernel,) * 2, depthwise=True, name="pos_embed", **types)(x)
        x = x.reshape(shape[0], -1, dim)
        if self.keep >= 1:
            tokens, attended, _ = self._transform(jnp.concatenate([class_token, x], axis=1))
            return tokens[:, 1:].reshape(shape), tokens[:, :1], self._update(scores, attended[:, 1:])
        if scores is None:
            raise ConfigError(f"keep = {self.keep}: the first block has no scores to choose by. It keeps all (1).")
        count = int(x.shape[1] * self.keep)
        kept = choose_tokens(scores, count)
        self.sow("intermediates", "kept", kept)
        tokens = jnp.concatenate([class_token, gather_tokens(x, kept), merge_dropped(x, scores, kept)], axis=1)
        tokens, attended, change = self._transform(tokens)
        x = place_tokens(x + self._scale(3, change[:, -1:]), kept, tokens[:, 1:-1])
        scores = place_tokens(scores, kept, self._update(gather_tokens(scores, kept), attended[:, 1:-1]))
        return x.reshape(shape), tokens[:, :1], scores

    def _transform(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns tokens after attention and MLP, the first one's attention, and both branches' sum before their factors."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str) -> LayerNorm:
            return LayerNorm(self.norm_epsilon, self.param_dtype, name=name)

        attention = ScoringAttention(
            self.num_heads, self.implementation, self.capture_attention, name="attention", **types
        )
        attended, row = attention(norm("norm1")(tokens))
        tokens = tokens + self._scale(1, attended)
        changed = MLP(self.hidden, name="mlp", **types)(norm("norm2")(tokens))
        return tokens + self._scale(2, changed), row, attended + changed

    def _update(self, scores: jax.Array | None, attended: jax.Array) -> jax.Array:
        return attended if scores is None else (1 - self.trade_off) * scores + self.trade_off * attended

    def _scale(self, number: int, y: jax.Array) -> jax.Array:
        return LayerScale(self.layer_scale, self.param_dtype, name=f"scale{number}")(y) if self.layer_scale else y

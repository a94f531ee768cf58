"""A ViT with feature-selection gates on the branches of its blocks (arXiv 2407.04400).

The published one is ViT-tiny: patches of 16, width 192, 12 blocks, 3 heads, images of 384 pixels.

    model = GatedViT(num_classes=100, image_shape=(384, 384, 3))
    variables = model.init(jax.random.key(0), images)
    plain = model.clone(gates=False)                                         # for inference
    logits = plain.apply({"params": fold_gates(params)}, images)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.models.options import ImageModel
from attnlab.nn.feature_gates import GatedBlock
from attnlab.nn.norm import LayerNorm
from attnlab.nn.partitioning import named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.nn.vision import Conv


class GatedViT(ImageModel):
    """Patches, a class token, learned positions, gated blocks, final norm, a linear head.

    Parameters: `patches`, `class_token` [1, D] (where it pools), `positions` [T, D], `blocks_{i}` (`GatedBlock`), `final_norm`,
    `head`.

    Attributes:
        num_classes: of the logits.
        image_shape: (height, width, channels) of the images; patches divide it.
        patch: pixels of a patch's side.
        dim: D.
        num_layers: blocks.
        num_heads: N.
        mlp_ratio: width inside the MLP over D.
        qkv_bias: biases of queries, keys and values.
        gates: see `GatedBlock`.
        gate_init: as of `FeatureGate`.
        pool: "token" (the class token) or "mean" over the tokens.
        norm_last: the norm before the head.
        capture_attention: sow the weights [B, N, T, T] of every block.
    """

    num_classes: int = 1000
    image_shape: tuple[int, int, int] = (384, 384, 3)
    patch: int = 16
    dim: int = 192
    num_layers: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    gates: bool = True
    gate_init: str = "xavier"
    pool: str = "token"
    norm_last: bool = True
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        if self.pool not in ("mean", "token"):
            raise ConfigError(f"pool = {self.pool!r}: unknown. Use 'token' or 'mean'.")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal = nn.initializers.truncated_normal(INIT_STD)
        size, zeros = (self.patch, self.patch), nn.initializers.zeros_init()
        self.patches = Conv(self.dim, size, self.patch, 0, kernel_init=normal, bias_init=zeros, **types)
        self.blocks = [
            GatedBlock(
                num_heads=self.num_heads,
                hidden=int(self.dim * self.mlp_ratio),
                qkv_bias=self.qkv_bias,
                gates=self.gates,
                gate_init=self.gate_init,
                capture_attention=self.capture_attention,
                **types,
            )
            for _ in range(self.num_layers)
        ]
        if self.norm_last:
            self.final_norm = LayerNorm(1e-6, self.param_dtype)
        self.head = Projection((self.dim, self.num_classes), ("embed", "vocab"), use_bias=True, **types)

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, Y, X, C] to logits [B, num_classes] float32; evaluation and training do the same.

        Raises:
            ConfigError: images of other sizes than `image_shape`, or that patches do not divide.
        """
        del deterministic
        height, width, _ = self.image_shape
        if images.shape[1:] != tuple(self.image_shape):
            raise ConfigError(f"images have shape {images.shape}: the model is for {tuple(self.image_shape)}.")
        if height % self.patch or width % self.patch:
            raise ConfigError(f"patch = {self.patch}: does not divide images of {height} x {width}. Choose a divisor.")
        x = self.patches(images.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, self.dim)
        normal = nn.initializers.truncated_normal(INIT_STD)
        if self.pool == "token":
            token = self.param("class_token", named(normal, "norm", "embed"), (1, self.dim), self.param_dtype)
            x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.dim)), x], axis=1)
        positions = self.param("positions", named(normal, "norm", "embed"), (x.shape[1], self.dim), self.param_dtype)
        return self.classify(x + positions.astype(x.dtype))

    def classify(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, D] to logits [B, num_classes] float32."""
        for block in self.blocks:
            x = block(x)
        if self.norm_last:
            x = self.final_norm(x)
        x = x[:, 0] if self.pool == "token" else jnp.mean(x, axis=1)
        return self.head(x).astype(jnp.float32)

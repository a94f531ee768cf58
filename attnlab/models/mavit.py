"""MAViT: a four-stage convolutional hierarchy around magnitude-aware linear attention.

"Rectifying Magnitude Neglect in Linear Attention" (Fan et al., 2025, arXiv 2507.00698). The published sizes are hybrids:
linear attention in the two early stages, where maps are large, and softmax attention in the two late ones.

    model = MAViT.sized("tiny", num_classes=1000)
    variables = model.init(jax.random.key(0), images)             # images [B, Y, X, 3]
    logits = model.apply(variables, images)
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.models.options import ImageModel
from attnlab.nn.magnitude_aware import MagnitudeAwareMapAttention
from attnlab.nn.norm import LayerNorm, LayerScale
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.nn.vision import BatchNorm, Conv, DropPath, drop_path_rates

_FLAGS = {"l": "linear", "v": "softmax"}
# Every convolution starts at N(0, 0.02^2) (the published cut at +-2 is a hundred deviations away), every bias at zero.
_Conv = partial(Conv, kernel_init=nn.initializers.normal(INIT_STD), bias_init=nn.initializers.zeros_init())

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8),
        "drop_path": 0.1, "layer_scales": (1.0,) * 4, "projection": 2048,
    },
    "small": {
        "dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8),
        "drop_path": 0.15, "layer_scales": (1.0,) * 4, "projection": 2048,
    },
    "base": {
        "dims": (96, 192, 384, 512), "depths": (4, 6, 12, 6), "num_heads": (1, 2, 6, 8),
        "drop_path": 0.4, "layer_scales": (1.0, 1.0, 1e-6, 1e-6), "projection": 2048,
    },
    "large": {
        "dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "num_heads": (1, 2, 7, 10),
        "drop_path": 0.55, "layer_scales": (1e-6,) * 4, "projection": 2560,
    },
}  # fmt: skip


class Pyramid(NamedTuple):
    """Maps of a backbone, [B, y, x, C] each.

    Attributes:
        stem: at stride 4.
        stages: after the blocks of each stage, at strides 4, 8, 16, 32: what dense tasks take.
        merged: the same after the stage's downsampling; the last stage has none.
    """

    stem: jax.Array
    stages: tuple[jax.Array, ...]
    merged: tuple[jax.Array, ...]


class ConvFeedForward(nn.Module):
    """fc1, exact GELU, u + depthwise 3x3 of u, fc2; parameters `fc1`, `dwconv`, `fc2`, all with biases."""

    hidden: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, Y, X, D] to the same."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dim = x.shape[-1]
        u = Projection((dim, self.hidden), ("embed", "mlp"), use_bias=True, name="fc1", **types)(x)
        u = constrain(nn.gelu(u, approximate=False), "act_batch", None, None, "act_mlp")
        u = u + _Conv(self.hidden, (3, 3), depthwise=True, name="dwconv", **types)(u)
        return Projection((self.hidden, dim), ("mlp", "embed"), use_bias=True, name="fc2", **types)(u)


class MAViTBlock(nn.Module):
    """x = x + conv(x); x = x + LS(attend(norm(x))); x = x + LS(ffn(norm(x))), with a depthwise 3x3 `conv` for position.

    Attributes:
        kind: "linear" or "softmax".
        num_heads: N.
        hidden: width inside the feed-forward.
        drop_path: rate of both branches.
        layer_scale: initial value, or None for none.
        capture_attention: sow the weights.
    """

    kind: str
    num_heads: int
    hidden: int
    drop_path: float = 0.0
    layer_scale: float | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, D] to the same."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, 1e-6, self.param_dtype)
        x = x + _Conv(x.shape[-1], (3, 3), depthwise=True, name="position", **types)(x)
        attention = MagnitudeAwareMapAttention(
            x.shape[-1], self.num_heads, self.kind, capture_attention=self.capture_attention, name="attention", **types
        )
        x = x + self._branch(attention(norm(name="attention_norm")(x)), "attention", deterministic)
        ffn = ConvFeedForward(self.hidden, name="ffn", **types)
        x = x + self._branch(ffn(norm(name="ffn_norm")(x)), "ffn", deterministic)
        return constrain(x, "act_batch", None, None, "act_embed")

    def _branch(self, y: jax.Array, name: str, deterministic: bool) -> jax.Array:
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, self.param_dtype, name=f"{name}_scale")(y)
        return DropPath(self.drop_path, name=f"{name}_drop")(y, deterministic=deterministic)


class MAViT(ImageModel):
    """Stem (stride 4), four stages of blocks with a strided convolution between them, a convolutional head.

    Parameters: `stem_convs_{0..3}`, `stem_norms_{0..3}`, `stages_{i}_{j}` (block j of stage i), `merge_convs_{i}`,
    `merge_norms_{i}`, `project`, `project_norm`, `head`; running statistics in the collection `batch_stats`.

    Attributes:
        num_classes: of the logits.
        dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: of each stage.
        mlp_ratios: width inside the feed-forward over the channels, of each stage; rounded down.
        flags: of each stage, one letter for each block or one for all: "l" linear, "v" softmax attention.
        drop_path: rate of the last block, growing linearly from 0 at the first.
        layer_scales: initial value of each stage's layer scale, None = none.
        projection: channels of the head.
        remat: compute blocks again in the backward pass.
        capture_attention: every attention sows its weights [B, N, T, T].
    """

    sizes = SIZES

    num_classes: int = 1000
    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratios: tuple[float, ...] = (3.5, 3.5, 3.5, 3.5)
    flags: tuple[tuple[str, ...], ...] = (("l",), ("l",), ("v",), ("v",))
    drop_path: float = 0.0
    layer_scales: tuple[float | None, ...] = (1.0, 1.0, 1.0, 1.0)
    projection: int = 2048
    remat: bool = False
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        kinds = self.kinds()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        half, first = self.dims[0] // 2, self.dims[0]
        self.stem_convs = [_Conv(dim, (3, 3), 2 if i in (0, 3) else 1, **types) for i, dim in enumerate((half, half, half, first))]
        self.stem_norms = [BatchNorm(param_dtype=self.param_dtype) for _ in range(4)]
        block = nn.remat(MAViTBlock, static_argnums=(2,)) if self.remat else MAViTBlock
        rates = drop_path_rates(self.drop_path, self.depths)
        self.stages = [
            [
                block(
                    kind=kind,
                    num_heads=self.num_heads[i],
                    hidden=int(self.dims[i] * self.mlp_ratios[i]),
                    drop_path=rate,
                    layer_scale=self.layer_scales[i],
                    capture_attention=self.capture_attention,
                    **types,
                )
                for kind, rate in zip(kinds[i], rates[i], strict=True)
            ]
            for i in range(len(self.dims))
        ]
        self.merge_convs = [_Conv(dim, (3, 3), 2, **types) for dim in self.dims[1:]]
        self.merge_norms = [BatchNorm(param_dtype=self.param_dtype) for _ in self.dims[1:]]
        width = self.dims[-1]
        self.project = Projection((width, self.projection), ("embed", "mlp"), use_bias=True, **types)
        self.project_norm = BatchNorm(param_dtype=self.param_dtype)
        self.head = Projection((self.projection, self.num_classes), ("mlp", "vocab"), use_bias=True, **types)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, Y, X, 3] to logits [B, num_classes] float32; `deterministic=False` trains (stream `dropout`)."""
        return self.classify(self.features(images, deterministic=deterministic).stages[-1], deterministic=deterministic)

    def features(self, images: jax.Array, *, deterministic: bool = True) -> Pyramid:
        """Returns the maps of all stages.

        Raises:
            ConfigError: something other than [B, Y, X, C].
        """
        if images.ndim != 4:
            raise ConfigError(f"images have shape {images.shape}: they need [B, height, width, channels].")
        x = images.astype(self.dtype)
        for i, (conv, norm) in enumerate(zip(self.stem_convs, self.stem_norms, strict=True)):
            x = norm(conv(x), deterministic=deterministic)
            x = nn.gelu(x, approximate=False) if i < 3 else x
        stem, stages, merged = constrain(x, "act_batch", None, None, "act_embed"), [], []
        x = stem
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = block(x, deterministic)
            stages.append(x)
            if i < len(self.merge_convs):
                x = self.merge_norms[i](self.merge_convs[i](x), deterministic=deterministic)
                merged.append(x)
        return Pyramid(stem, tuple(stages), tuple(merged))

    def classify(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps the last stage [B, y, x, C] to logits [B, num_classes] float32."""
        x = nn.silu(self.project_norm(self.project(x), deterministic=deterministic))
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)

    @nn.nowrap
    def kinds(self) -> list[tuple[str, ...]]:
        """Returns the kind of attention of every block by stage.

        Raises:
            ConfigError: stages of different number among the fields, or flags that do not fit.
        """
        fields = ("dims", "depths", "num_heads", "mlp_ratios", "flags", "layer_scales")
        if len({len(getattr(self, name)) for name in fields}) != 1:
            counts = {name: len(getattr(self, name)) for name in fields}
            raise ConfigError(f"stages = {counts}: these fields need one entry for each stage.")
        kinds = []
        for stage, (flags, depth) in enumerate(zip(self.flags, self.depths, strict=True)):
            flags = tuple(flags) * depth if len(flags) == 1 else tuple(flags)
            if len(flags) != depth or not set(flags) <= set(_FLAGS):
                raise ConfigError(
                    f"flags[{stage}] = {flags}: stage {stage} has {depth} blocks. Give one letter for all or for each, 'l' "
                    f"(linear) or 'v' (softmax)."
                )
            kinds.append(tuple(_FLAGS[flag] for flag in flags))
        return kinds

"""MOAT: mobile convolution and attention in one block, an image backbone (Yang et al., 2022, arXiv 2210.01820).

The MLP of a Transformer block becomes an inverted bottleneck that stands before the attention, so that its strided
convolution also shrinks the map. Two stages of such convolutions alone, with squeeze-and-excitation, come first:

    stem -> [MBConv] * n1 -> [MBConv] * n2 -> [MOAT] * n3 -> [MOAT] * n4 -> mean -> layer norm -> logits

    model = MOAT.sized("moat_0")
    variables = model.init(jax.random.key(0), images)             # images [B, Y, X, 3]
    logits = model.apply(variables, images)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.models.lm import REMAT_POLICIES
from attnlab.models.options import ImageModel
from attnlab.nn.norm import LayerNorm
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.nn.vision import MLP, BatchNorm, Conv, ConvStem, DropPath, average_pool, drop_path_rates
from attnlab.nn.window_attention import WindowAttention

# Every kernel starts at N(0, 0.02^2), every bias at zero; batch norm is that of Keras.
_INIT = {"kernel_init": nn.initializers.normal(INIT_STD), "bias_init": nn.initializers.zeros_init()}
KERAS = {"epsilon": 1e-3, "momentum": 0.01, "unbiased": False}

# Kinds of blocks with attention: the published one, and two that the paper compares it with.
PARTS = {"moat": ("mbconv", "attention"), "attention_mbconv": ("attention", "mbconv"), "transformer": ("attention", "mlp")}

# Table 1 of the paper; `drop_path` of moat_2 to moat_4 is that of fine-tuning after ImageNet-22K.
_SHALLOW, _MIDDLE, _DEEP = {"depths": (2, 3, 7, 2)}, {"depths": (2, 6, 14, 2)}, {"depths": (2, 12, 28, 2)}
SIZES: dict[str, dict[str, Any]] = {
    "moat_0": {"stem": (64, 64), "dims": (96, 192, 384, 768), "drop_path": 0.2, **_SHALLOW},
    "moat_1": {"stem": (64, 64), "dims": (96, 192, 384, 768), "drop_path": 0.3, **_MIDDLE},
    "moat_2": {"stem": (128, 128), "dims": (128, 256, 512, 1024), "drop_path": 0.3, **_MIDDLE},
    "moat_3": {"stem": (160, 160), "dims": (160, 320, 640, 1280), "drop_path": 0.6, **_DEEP},
    "moat_4": {"stem": (256, 256), "dims": (256, 512, 1024, 2048), "drop_path": 0.7, **_DEEP},
    "tiny_moat_0": {"stem": (32, 32), "dims": (32, 64, 128, 256), "drop_path": 0.0, **_SHALLOW},
    "tiny_moat_1": {"stem": (40, 40), "dims": (40, 80, 160, 320), "drop_path": 0.0, **_SHALLOW},
    "tiny_moat_2": {"stem": (56, 56), "dims": (56, 112, 224, 448), "drop_path": 0.0, **_SHALLOW},
    "tiny_moat_3": {"stem": (80, 80), "dims": (80, 160, 320, 640), "drop_path": 0.1, **_SHALLOW},
}


class MBConv(nn.Module):
    """Inverted bottleneck: norm, 1x1 up, norm, GELU, depthwise, norm, GELU, squeeze-and-excitation, 1x1 down; a residual.

    The shortcut of a strided block is average pooling, and a 1x1 convolution where the channels change.

    Parameters: `pre_norm`, `expand`, `expand_norm`, `depthwise`, `depthwise_norm`, `shrink`; `shortcut` where the channels
    change; `squeeze` and `excite` where there is a squeeze ratio.

    Attributes:
        features: D, channels of the result.
        stride: of the depthwise convolution and the shortcut.
        expansion: inner channels over D (not over those of the input).
        kernel: of the depthwise convolution.
        se_ratio: channels inside squeeze-and-excitation over D (not over the inner ones); 0 = there is none.
        pool_size: of the shortcut's pooling.
        drop_path: rate of the residual branch.
        batch_norm: keyword arguments of `BatchNorm`.
    """

    features: int
    stride: int = 1
    expansion: float = 4
    kernel: int = 3
    se_ratio: float = 0.0
    pool_size: int = 2
    drop_path: float = 0.0
    batch_norm: Mapping[str, Any] = dataclasses.field(default_factory=lambda: KERAS)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, C] to [B, ceil(Y / stride), ceil(X / stride), D]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels, inner = x.shape[-1], int(self.expansion * self.features)

        def norm(name: str, y: jax.Array) -> jax.Array:
            layer = BatchNorm(**self.batch_norm, param_dtype=self.param_dtype, name=name)
            return layer(y, deterministic=deterministic)

        shortcut = average_pool(x, self.pool_size, self.stride) if self.stride > 1 else x
        if channels != self.features:
            shortcut = Projection((channels, self.features), ("embed", None), use_bias=True, name="shortcut", **types)(shortcut)
        y = norm("pre_norm", x)
        y = Projection((channels, inner), ("embed", "mlp"), name="expand", **types)(y)
        y = nn.gelu(norm("expand_norm", y), approximate=False)
        kernel = (self.kernel, self.kernel)
        y = Conv(inner, kernel, self.stride, "SAME", True, use_bias=False, name="depthwise", **_INIT, **types)(y)
        y = nn.gelu(norm("depthwise_norm", y), approximate=False)
        y = constrain(y, "act_batch", None, None, "act_mlp")
        if self.se_ratio:
            squeezed = max(1, int(self.se_ratio * self.features))
            z = y.mean((1, 2), dtype=jnp.float32).astype(y.dtype)
            z = nn.silu(Projection((inner, squeezed), ("mlp", None), use_bias=True, name="squeeze", **types)(z))
            z = Projection((squeezed, inner), (None, "mlp"), use_bias=True, name="excite", **types)(z)
            y = y * nn.sigmoid(z)[:, None, None]
        y = Projection((inner, self.features), ("mlp", "embed"), use_bias=True, name="shrink", **types)(y)
        y = shortcut + DropPath(self.drop_path, name="drop")(y, deterministic=deterministic)
        return constrain(y, "act_batch", None, None, "act_embed")


class MOATBlock(nn.Module):
    """u = MBConv(x), then u + attend(layer norm(u)) (figure 1 of the paper); the next block's MBConv is this one's MLP.

    Parameters: `mbconv`, `attention_norm`, `attention` (a `WindowAttention`); `mlp_norm`, `mlp` where it is a part.

    Attributes:
        features: D.
        parts: what follows what, one of `PARTS`: the parts in the other order, or attention and MLP, a Transformer's block,
            which keeps size and channels of the map.
        head_dim: H, divides D.
        window: of the attention; None = the whole map.
        position_size: of the relative bias' table, None = no bias.
        pad_windows: fill up maps that windows do not divide, the padding hidden; else they are refused, as published.
        stride, expansion, kernel, pool_size, drop_path, batch_norm: of `MBConv`; drop path also acts on the other parts, and
            the expansion is that of the MLP too.
        norm_epsilon: of the layer norm.
        capture_attention: of the attention.
    """

    features: int
    parts: tuple[str, str] = PARTS["moat"]
    head_dim: int = 32
    window: tuple[int, int] | None = None
    position_size: int | tuple[int, int] | None = 7
    pad_windows: bool = False
    stride: int = 1
    expansion: float = 4
    kernel: int = 3
    pool_size: int = 2
    drop_path: float = 0.0
    batch_norm: Mapping[str, Any] = dataclasses.field(default_factory=lambda: KERAS)
    norm_epsilon: float = 1e-5
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, C] to [B, ceil(Y / stride), ceil(X / stride), D].

        Raises:
            ConfigError: a head width that does not divide D, windows that do not divide the map, or a Transformer's block that
                has to change it.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if "mbconv" not in self.parts and (self.stride > 1 or x.shape[-1] != self.features):
            change = f"{x.shape[-1]} channels to {self.features} at stride {self.stride}"
            raise ConfigError(f"a block of {self.parts} cannot map {change}. Change the map in a stage of another kind before.")
        for part in self.parts:
            if part == "mbconv":
                x = MBConv(
                    self.features, self.stride, self.expansion, self.kernel, pool_size=self.pool_size, drop_path=self.drop_path,
                    batch_norm=self.batch_norm, name="mbconv", **types,
                )(x, deterministic)  # fmt: skip
                continue
            y = LayerNorm(self.norm_epsilon, self.param_dtype, name=f"{part}_norm")(x)
            y = self._attend(y, types) if part == "attention" else MLP(int(self.expansion * self.features), name="mlp", **types)(y)
            x = x + DropPath(self.drop_path, name=f"{part}_drop")(y, deterministic=deterministic)
        return constrain(x, "act_batch", None, None, "act_embed")

    def _attend(self, x: jax.Array, types: dict[str, Any]) -> jax.Array:
        dim = x.shape[-1]  # before a strided MBConv not yet that of the block
        if dim % self.head_dim:
            raise ConfigError(f"head_dim = {self.head_dim}: does not divide a stage of width {dim}. Choose a divisor.")
        return WindowAttention(
            dim, dim // self.head_dim, self.window, self.position_size,
            padding="masked" if self.pad_windows else "refuse", capture_attention=self.capture_attention, name="attention", **types,
        )(x)  # fmt: skip


class MOAT(ImageModel):
    """Stem, stages of MBConv and MOAT blocks, mean, layer norm, linear classifier.

    `MOAT.sized("moat_0")` (to "moat_4", "tiny_moat_0" to "tiny_moat_3") is a published model. Parameters: `stem`,
    `stage_{i}_{j}` (block j of stage i), `norm`, `head`; running statistics in `batch_stats`, mutable in training; drop
    path draws from the random stream `dropout`.

    Attributes:
        num_classes: 0 = no classifier: the result is the normalised mean of the last map.
        stem: channels of its two 3x3 convolutions, the first of stride 2.
        kinds: of the blocks of each stage, "mbconv" or "moat"; to compare also "attention_mbconv" (a MOAT block in the other
            order) and "transformer" (attention and MLP).
        depths: blocks by stage.
        dims: channels by stage.
        strides: of the first block of each stage.
        expansion: inner channels of a block over its own.
        kernel: of the depthwise convolutions; 1 = no position sees another through them.
        se_ratio: of squeeze-and-excitation in "mbconv" stages.
        pool_size: of the shortcuts; 2 for classification, 3 in the published dense backbones.
        head_dim: of the attention.
        windows: by stage, (rows, columns); None = global. Large images want (14, 14) in the third stage.
        global_last: the last block of every "moat" stage is global all the same.
        pad_windows: see `MOATBlock`.
        position_sizes: of the table of each stage, the map's side at 224 pixels; parameters keep their shape at others.
        relative_positions: False = no bias anywhere, as in the published models that take images of any size.
        drop_path: block i of L has the rate drop_path * i / L.
        batch_norm: keyword arguments of `BatchNorm`.
        norm_epsilon: of the layer norms.
        remat: what the backward pass keeps of a block, a name of `models.lm.REMAT_POLICIES`.
        capture_attention: every attention sows its weights.
    """

    sizes = SIZES

    num_classes: int = 1000
    stem: tuple[int, ...] = (64, 64)
    kinds: tuple[str, ...] = ("mbconv", "mbconv", "moat", "moat")
    depths: tuple[int, ...] = (2, 3, 7, 2)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    strides: tuple[int, ...] = (2, 2, 2, 2)
    expansion: float = 4
    kernel: int = 3
    se_ratio: float = 0.25
    pool_size: int = 2
    head_dim: int = 32
    windows: tuple[tuple[int, int] | None, ...] = (None, None, None, None)
    global_last: bool = False
    pad_windows: bool = False
    position_sizes: tuple[int | tuple[int, int] | None, ...] = (None, None, 14, 7)
    relative_positions: bool = True
    drop_path: float = 0.0
    batch_norm: Mapping[str, Any] = dataclasses.field(default_factory=lambda: KERAS)
    norm_epsilon: float = 1e-5
    remat: str = "none"
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        self._check()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        strides = (2, *(1,) * (len(self.stem) - 1))
        self.stem_convs = ConvStem(
            self.stem, strides, last_norm=False, padding="SAME", norm=self.batch_norm, name="stem", **_INIT, **types
        )
        blocks = sum(self.depths)
        # The published rates stop one step short of the maximum.
        rates = drop_path_rates(self.drop_path * (blocks - 1) / blocks, self.depths)
        self.stages = [
            [self._block(i, j, rate) for j, rate in enumerate(rates[i])] for i in range(len(self.dims))
        ]
        self.last_norm = LayerNorm(self.norm_epsilon, self.param_dtype, name="norm")
        if self.num_classes:
            self.head = Projection((self.dims[-1], self.num_classes), ("embed", "vocab"), use_bias=True, **types)

    def __call__(self, image: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, Y, X, 3] to logits [B, num_classes] float32 (or to [B, D]).

        Raises:
            ConfigError: fields that do not fit each other or the image.
        """
        x = self.features(image, deterministic=deterministic)[-1]
        x = self.last_norm(x.mean((1, 2), dtype=jnp.float32).astype(x.dtype))
        return (self.head(x) if self.num_classes else x).astype(jnp.float32)

    def features(self, image: jax.Array, *, deterministic: bool = True, activate: bool = False) -> tuple[jax.Array, ...]:
        """The feature pyramid: the stem's map and that of each stage, of strides 2, 4, 8, 16 and 32.

        Args:
            image: [B, Y, X, C].
            deterministic: evaluation.
            activate: apply a GELU to every map, as the published backbones do for dense tasks ("res1" to "res5").
        """
        if image.ndim != 4:
            raise ConfigError(f"images have shape {image.shape}: they need [B, height, width, channels].")
        x = constrain(
            self.stem_convs(image.astype(self.dtype), deterministic=deterministic), "act_batch", None, None, "act_embed"
        )
        maps = [x]
        for stage in self.stages:
            for block in stage:
                x = block(x, deterministic)
            maps.append(x)
        return tuple(nn.gelu(x, approximate=False) if activate else x for x in maps)

    def _block(self, i: int, j: int, rate: float) -> nn.Module:
        """Returns block j of stage i."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shared = {
            "features": self.dims[i],
            "stride": self.strides[i] if j == 0 else 1,
            "expansion": self.expansion,
            "kernel": self.kernel,
            "pool_size": self.pool_size,
            "drop_path": rate,
            "batch_norm": self.batch_norm,
            "name": f"stage_{i}_{j}",
        }
        kind = MBConv if self.kinds[i] == "mbconv" else MOATBlock
        if REMAT_POLICIES[self.remat] is not None:
            kind = nn.remat(kind, policy=REMAT_POLICIES[self.remat], static_argnums=(2,))  # 0 is self, 2 is `deterministic`
        if self.kinds[i] == "mbconv":
            return kind(se_ratio=self.se_ratio, **shared, **types)
        last = self.global_last and j == self.depths[i] - 1
        return kind(
            parts=PARTS[self.kinds[i]],
            head_dim=self.head_dim,
            window=None if last else self.windows[i],
            position_size=self.position_sizes[i] if self.relative_positions else None,
            pad_windows=self.pad_windows,
            norm_epsilon=self.norm_epsilon,
            capture_attention=self.capture_attention,
            **shared,
            **types,
        )

    def _check(self) -> None:
        """Refuses fields that do not fit each other."""
        stages = len(self.dims)
        for name in ("depths", "kinds", "strides", "windows", "position_sizes"):
            if len(getattr(self, name)) != stages:
                raise ConfigError(f"{name} = {getattr(self, name)}: dims = {self.dims} has {stages} stages. Give one entry each.")
        for kind in self.kinds:
            if kind not in ("mbconv", *PARTS):
                raise ConfigError(f"kinds = {self.kinds}: {kind!r} is unknown, {nearest(kind, ('mbconv', *PARTS))}")
        if self.remat not in REMAT_POLICIES:
            raise ConfigError(f"remat = {self.remat!r}: unknown, {nearest(self.remat, REMAT_POLICIES)}")

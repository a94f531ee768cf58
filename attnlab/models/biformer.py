"""BiFormer: a four-stage image backbone on bi-level routing attention (Zhu et al., 2023, arXiv 2303.08810)."""

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
from attnlab.nn.bilevel_routing import BiLevelRoutingAttention
from attnlab.nn.norm import LayerScale
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import Projection
from attnlab.nn.vision import MLP, BatchNorm, Conv, ConvStem, Downsample, DropPath, GlobalAttention, MapNorm, drop_path_rates

# Fields of the published models; T, S and B are those of table 1, STL is the ablation with Swin-T's layout (table 5).
_STL = {"variant": "nchw", "stem": "patch", "norm": "batchnorm", "before_attn_dwconv": 0, "topks": (1, 4, 16, -1)}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 8, 2), "dims": (64, 128, 256, 512), "drop_path": 0.1},
    "small": {"depths": (4, 4, 18, 4), "dims": (64, 128, 256, 512), "drop_path": 0.15},
    "base": {"depths": (4, 4, 18, 4), "dims": (96, 192, 384, 768), "drop_path": 0.4},
    "stl": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "mlp_ratios": (4, 4, 4, 4), "drop_path": 0.1, **_STL},
}


class BiFormerBlock(nn.Module):
    """Depthwise convolution, attention, MLP, each a residual branch (figure 3 of the paper).

    Attributes:
        dim: D.
        num_heads: of bi-level routing attention.
        topk: regions per region; 0 = convolutions (1x1, depthwise 5x5, 1x1) instead of attention, -1 = dense attention
            (with "LePE" of the values in variant "nchw"), -2 = dense attention with "LePE" of its input.
        hidden: width inside the MLP.
        dense_heads: of dense attention.
        side_dwconv: kernel of "LePE".
        before_attn_dwconv: kernel of the first branch; 0 = there is none.
        variant: of `BiLevelRoutingAttention`.
        attention: its other keyword arguments.
        capture_attention: of both kinds of attention.
        norm: "layernorm" or "batchnorm".
        pre_norm: norms stand before attention and MLP, not after their residual sums.
        layer_scale: initial value of LayerScale on both; 0 = none.
    """

    dim: int
    num_heads: int
    topk: int
    hidden: int
    dense_heads: int = 8
    side_dwconv: int = 5
    before_attn_dwconv: int = 3
    variant: str = "legacy"
    attention: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    capture_attention: bool = False
    norm: str = "layernorm"
    pre_norm: bool = True
    layer_scale: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None, deterministic: bool) -> tuple[jax.Array, None]:
        """Maps [B, Y, X, D] to (the same, None); `rate` is that of drop path. The form is that of nn.scan."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def branch(x: jax.Array, number: int, layer: Any) -> jax.Array:
            norm = MapNorm(self.norm, param_dtype=self.param_dtype, name=f"norm{number}")
            y = layer(norm(x, deterministic=deterministic) if self.pre_norm else x)
            if self.layer_scale:
                y = LayerScale(self.layer_scale, self.param_dtype, name=f"scale{number}")(y)
            x = x + DropPath(name=f"drop_path{number}")(y, deterministic=deterministic, rate=rate)
            return x if self.pre_norm else norm(x, deterministic=deterministic)

        if self.before_attn_dwconv:
            kernel = (self.before_attn_dwconv,) * 2
            x = x + Conv(self.dim, kernel, depthwise=True, name="pos_embed", **types)(x)
        x = branch(x, 1, self._mix)
        x = branch(x, 2, MLP(self.hidden, name="mlp", **types))
        return constrain(x, "act_batch", None, None, "act_embed"), None

    def _mix(self, x: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.topk == 0:
            x = Conv(self.dim, (1, 1), name="conv_in", **types)(x)
            x = Conv(self.dim, (5, 5), depthwise=True, name="conv_mix", **types)(x)
            return Conv(self.dim, (1, 1), name="conv_out", **types)(x)
        if self.topk < 0:
            lepe = "input" if self.topk == -2 else "value" if self.variant == "nchw" else None
            return GlobalAttention(
                self.dim, self.dense_heads, lepe=lepe, side_dwconv=self.side_dwconv,
                capture_attention=self.capture_attention, name="attention", **types,
            )(x)  # fmt: skip
        return BiLevelRoutingAttention(
            self.dim, self.num_heads, topk=self.topk, side_dwconv=self.side_dwconv, variant=self.variant,
            capture_attention=self.capture_attention, name="attention", **types, **self.attention,
        )(x)[0]  # fmt: skip


class BiFormer(ImageModel):
    """Stem, four stages of blocks with a downsampling before each but the first, batch norm, mean, linear classifier.

    `BiFormer.sized("tiny")` (or "small", "base", "stl") is a published model. Parameters:

        downsample_{i}                       the stem (i = 0) and what stands before stage i
        stage_{i}/{pos_embed, norm1, attention, norm2, mlp}    every leaf stacked [depth, ...]
        norm, head

    Without `scan_layers` "stage_{i}" becomes "stage_{i}_{j}", one for each block, with leaves as they are. Batch norms
    have their statistics in `batch_stats`, mutable in training; drop path draws from the random stream `dropout`.

    Attributes:
        num_classes: 0 = no classifier: the result is the mean of the last map.
        depths: blocks by stage.
        dims: channels by stage.
        topks: regions per region by stage, and other kinds of blocks; see `BiFormerBlock`.
        mlp_ratios: width inside the MLP over D, by stage.
        head_dim: of bi-level routing attention.
        dense_heads: heads of dense attention, whatever its width.
        n_win: regions per side; 7 for images of 224, 8 for 512 (segmentation), 16 for detection.
        side_dwconv: kernel of "LePE".
        before_attn_dwconv: kernel of the convolution that begins a block; 0 = none.
        variant: "legacy" (regions divide the map, or `auto_pad` in `attention`) or "nchw" (any map).
        attention: other keyword arguments of `BiLevelRoutingAttention`, for all stages.
        stem: "conv" (two 3x3 of stride 2; 3x3 between stages) or "patch" (4x4; norm and 2x2 between stages).
        norm: of the blocks.
        pre_norm: of the blocks.
        layer_scale: of the blocks, 0 = none.
        drop_path: rate at the last block; it grows linearly from 0.
        scan_layers: one compiled block per stage, scanned; else one after another. The same numbers.
        remat: what the backward pass keeps of a block, a name of `models.lm.REMAT_POLICIES`; the choice of regions is
            always kept.
        capture_attention: every attention sows its weights and routes to `intermediates`.
    """

    sizes = SIZES

    num_classes: int = 1000
    depths: tuple[int, ...] = (2, 2, 8, 2)
    dims: tuple[int, ...] = (64, 128, 256, 512)
    topks: tuple[int, ...] = (1, 4, 16, -2)
    mlp_ratios: tuple[float, ...] = (3, 3, 3, 3)
    head_dim: int = 32
    dense_heads: int = 8
    n_win: int = 7
    side_dwconv: int = 5
    before_attn_dwconv: int = 3
    variant: str = "legacy"
    attention: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stem: str = "conv"
    norm: str = "layernorm"
    pre_norm: bool = True
    layer_scale: float = 0.0
    drop_path: float = 0.0
    scan_layers: bool = True
    remat: str = "none"
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        self._check()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rates = drop_path_rates(self.drop_path, self.depths)
        downsample, stages = [], []
        for i, dim in enumerate(self.dims):
            if self.stem == "patch":
                size = 4 if i == 0 else 2
                downsample.append(Downsample(dim, size, size, norm_first=i > 0, name=f"downsample_{i}", **types))
            elif i == 0:
                downsample.append(ConvStem((dim // 2, dim), (2, 2), name="downsample_0", **types))
            else:
                downsample.append(Downsample(dim, name=f"downsample_{i}", **types))
            stages.append(self._stage(i, len(rates[i])))
        self.downsample, self.stages = downsample, stages
        self.rates = rates
        self.last_norm = BatchNorm(param_dtype=self.param_dtype, name="norm")
        if self.num_classes:
            self.head = Projection((self.dims[-1], self.num_classes), ("embed", None), use_bias=True, **types)

    def __call__(self, image: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, Y, X, 3] to logits [B, num_classes] float32 (or the mean of the last map [B, D]).

        Raises:
            ConfigError: fields that do not fit each other, or an image whose maps the regions do not divide.
        """
        x = self.features(image, deterministic=deterministic)[-1]
        x = self.last_norm(x, deterministic=deterministic).mean((1, 2))
        return (self.head(x) if self.num_classes else x).astype(jnp.float32)

    def features(self, image: jax.Array, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The feature pyramid: the map after each stage, of strides 4, 8, 16 and 32, without a norm."""
        x = image.astype(self.dtype)
        maps = []
        for downsample, blocks, rates in zip(self.downsample, self.stages, self.rates, strict=True):
            x = constrain(downsample(x, deterministic=deterministic), "act_batch", None, None, "act_embed")
            drop = self.drop_path > 0.0 and not deterministic
            if self.scan_layers:
                x, _ = blocks(x, jnp.asarray(rates, jnp.float32) if drop else None, deterministic)
            else:
                for block, rate in zip(blocks, rates, strict=True):
                    x, _ = block(x, rate if drop else None, deterministic)
            maps.append(x)
        return tuple(maps)

    def _stage(self, i: int, depth: int) -> Any:
        """Returns the blocks of a stage: one scanned module, or a list."""
        block = BiFormerBlock
        if REMAT_POLICIES[self.remat] is not None:
            keep = jax.checkpoint_policies.save_only_these_names("routing")
            policy = jax.checkpoint_policies.save_from_both_policies(REMAT_POLICIES[self.remat], keep)
            # 0 is self, 3 is `deterministic`
            block = nn.remat(block, policy=policy, prevent_cse=not self.scan_layers, static_argnums=(3,))
        attention = dict(self.attention)
        if self.topks[i] > 0:
            attention.setdefault("n_win", self.n_win)
        fields = {
            "dim": self.dims[i],
            "num_heads": self.dims[i] // self.head_dim,
            "topk": self.topks[i],
            "hidden": int(self.mlp_ratios[i] * self.dims[i]),
            "attention": attention,
            **{name: getattr(self, name) for name in (
                "dense_heads", "side_dwconv", "before_attn_dwconv", "variant", "norm", "pre_norm", "layer_scale", "dtype",
                "param_dtype", "capture_attention",
            )},
        }  # fmt: skip
        if not self.scan_layers:
            return [block(name=f"stage_{i}_{j}", **fields) for j in range(depth)]
        scanned = nn.scan(
            block,
            variable_axes={True: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(name=f"stage_{i}", **fields)

    def _check(self) -> None:
        """Refuses fields that do not fit each other."""
        stages = len(self.dims)
        for name in ("depths", "topks", "mlp_ratios"):
            if len(getattr(self, name)) != stages:
                raise ConfigError(f"{name} = {getattr(self, name)}: dims = {self.dims} has {stages} stages. Give one number each.")
        for dim, topk in zip(self.dims, self.topks, strict=True):
            if topk > 0 and dim % self.head_dim:
                raise ConfigError(f"head_dim = {self.head_dim}: does not divide a stage of width {dim}. Choose a divisor.")
            if topk < -2:
                raise ConfigError(f"topks = {self.topks}: {topk} has no meaning. Use a number of regions, 0, -1 or -2.")
        for name, values in (("stem", ("conv", "patch")), ("remat", tuple(REMAT_POLICIES))):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: unknown, {nearest(getattr(self, name), values)}")

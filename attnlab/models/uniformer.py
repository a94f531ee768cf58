"""UniFormer: convolution and self-attention in one block format, for images and video.

"UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (Li et al., 2022, arXiv 2201.09450; video: arXiv
2201.04676). Every block is x + position(x), x + aggregate(norm(x)), x + MLP(norm(x)); the relation aggregator is local in
two stages, where maps are large (a learned affinity of near positions, the same everywhere: a depthwise convolution), and
global in the two last (softmax attention of all positions, in video of all frames):

    embed -> [Local] * n1 -> embed -> [Local] * n2 -> embed -> [Global] * n3 -> embed -> [Global] * n4 -> norm -> mean -> logits

    model = UniFormer.sized("small")
    variables = model.init(jax.random.key(0), images)             # images [B, Y, X, 3], video [B, F, Y, X, 3]
    logits = model.apply(variables, images)

The light family, which prunes tokens, is `attnlab.models.uniformer_light`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.models.lm import REMAT_POLICIES
from attnlab.models.options import ImageModel
from attnlab.nn.norm import LayerNorm
from attnlab.nn.projection import Projection
from attnlab.nn.uniformer import GlobalBlock, LocalBlock
from attnlab.nn.vision import BatchNorm, ConvStem, Downsample, drop_path_rates
from attnlab.ops.mix_token import swap_box

_SMALL = {"depths": (3, 4, 8, 3), "dims": (64, 128, 320, 512), "drop_path": 0.1}
_PLUS = {**_SMALL, "depths": (3, 5, 9, 3), "conv_stem": True}
_BASE = {"depths": (5, 8, 20, 7), "dims": (64, 128, 320, 512), "drop_path": 0.3}
# Published with token labels only; its drop path is not in the paper, that of "base" stands in.
_LARGE = {"depths": (5, 10, 24, 7), "dims": (128, 192, 448, 640), "drop_path": 0.3, "layer_scale": 1e-6}
# Checkpoints trained with token labels ("_tl") have heads of 32, but for the large one: the shapes do not tell.
_TOKEN_LABELS = {"head_dim": 32, "token_labels": True}
_VIDEO = {"video": True, "num_classes": 400, "drop_path": 0.1}
SIZES: dict[str, dict[str, Any]] = {
    "small": _SMALL,
    "small_plus": {**_PLUS, "head_dim": 32},
    "small_plus_dim64": _PLUS,
    "base": _BASE,
    "base_ls": {**_BASE, "layer_scale": 1e-6},
    "small_tl": {**_SMALL, **_TOKEN_LABELS},
    "small_plus_tl": {**_PLUS, **_TOKEN_LABELS},
    "base_tl": {**_BASE, **_TOKEN_LABELS},
    "large_tl": {**_LARGE, "token_labels": True},
    "video_small": {**_SMALL, **_VIDEO},
    "video_base": {**_BASE, **_VIDEO},
}


class UniFormer(ImageModel):
    """Four stages of local and global blocks with a patch embedding before each, batch norm, mean, linear classifier.

    `UniFormer.sized("small")` is a published model, see `SIZES`. Parameters: `embed_{i}`, `stage_{i}_{j}` (block j of stage
    i), `norm`, `head`; `token_head` with token labels; `map_norm_{i}` with `norm_maps`. Running statistics in `batch_stats`,
    mutable in training; drop path draws from the random stream `dropout`.

    Attributes:
        num_classes: 0 = no classifier: the result is the mean of the last map.
        depths: blocks by stage.
        dims: channels by stage.
        kinds: of the blocks of each stage, "L" local or "G" global.
        head_dim: H of the attention; N = channels // H has to divide the channels.
        mlp_ratio: width inside the MLP over the channels.
        video: maps have frames, [B, F, Y, X, C]; F is halved by the first embedding, rounded up.
        conv_stem: overlapping 3x3 convolutions with batch norm as embeddings (the "plus" models); images only.
        temporal_embed: video: the later embeddings see three frames ("std" in the published code).
        split: video: attention over time, then over space, instead of joint attention; no published model.
        attention: of the third stage: "global", "window", or "hybrid" (of four blocks, three have windows): dense tasks.
        window: side of the windows.
        dpe_kernel: of the depthwise convolution for position that begins a block; 0 = none.
        layer_scale: its initial value in global blocks; 0 = none.
        drop_path: rate at the last block; it grows linearly from 0.
        token_labels: a second classifier, of every position of the last map.
        norm_maps: `features` has a layer norm for every map (dense tasks).
        norm_epsilon: of the layer norms in blocks and of `norm_maps`.
        remat: what the backward pass keeps of a block, a name of `models.lm.REMAT_POLICIES`.
        implementation: of `ops.softmax_attention`.
        capture_attention: every attention sows its weights.
    """

    sizes = SIZES

    num_classes: int = 1000
    depths: tuple[int, ...] = (3, 4, 8, 3)
    dims: tuple[int, ...] = (64, 128, 320, 512)
    kinds: str = "LLGG"
    head_dim: int = 64
    mlp_ratio: float = 4.0
    video: bool = False
    conv_stem: bool = False
    temporal_embed: bool = False
    split: bool = False
    attention: str = "global"
    window: int = 14
    dpe_kernel: int = 3
    layer_scale: float = 0.0
    drop_path: float = 0.0
    token_labels: bool = False
    norm_maps: bool = False
    norm_epsilon: float = 1e-6
    remat: str = "none"
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model: Any, num_classes: int, image_shape: tuple[int, ...]) -> UniFormer:
        """Builds the module from `config.model`; the images are [Y, X, C], those of a video model [F, Y, X, C].

        Raises:
            ConfigError: one for the other.
        """
        if len(image_shape) != (4 if model.video else 3):
            raise ConfigError(f"config.model.video = {model.video}: the data have the shape {tuple(image_shape)}. Set the other.")
        return super().from_config(model, num_classes, image_shape)

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        self._check()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embeds = [self._embed(i, dim) for i, dim in enumerate(self.dims)]
        rates = drop_path_rates(self.drop_path, self.depths)
        self.stages = [[self._block(i, j, rate) for j, rate in enumerate(rates[i])] for i in range(len(self.dims))]
        if self.norm_maps:
            names = [f"map_norm_{i}" for i in range(len(self.dims))]
            self.map_norms = [LayerNorm(self.norm_epsilon, self.param_dtype, name=name) for name in names]
        self.last_norm = BatchNorm(param_dtype=self.param_dtype, name="norm")
        if self.num_classes:
            self.head = Projection((self.dims[-1], self.num_classes), ("embed", "vocab"), use_bias=True, **types)
        if self.token_labels:
            self.token_head = Projection((self.dims[-1], self.num_classes), ("embed", "vocab"), use_bias=True, **types)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, Y, X, 3], or video [B, F, Y, X, 3], to logits [B, num_classes] float32 (or to [B, D]).

        With token labels the result is the logits plus half the largest of all positions, as published for evaluation.

        Raises:
            ConfigError: fields that do not fit each other, or an input of other dimensions.
        """
        logits, tokens = self.token_outputs(images, deterministic=deterministic)
        if tokens is None:
            return logits
        return logits + 0.5 * tokens.max(tuple(range(1, tokens.ndim - 1)))

    def features(self, images: jax.Array, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The feature pyramid: the map after each stage, of strides 4, 8, 16 and 32 (and 2 in time)."""
        maps = self._maps(images, None, deterministic)
        return tuple(norm(x) for norm, x in zip(self.map_norms, maps, strict=True)) if self.norm_maps else maps

    def classify(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Maps the last map, after `last_norm`, to its logits [B, num_classes] and those of its positions, or None; float32."""
        mean = x.mean(tuple(range(1, x.ndim - 1)), dtype=jnp.float32).astype(x.dtype)
        logits = (self.head(mean) if self.num_classes else mean).astype(jnp.float32)
        return logits, self.token_head(x).astype(jnp.float32) if self.token_labels else None

    def token_outputs(
        self, images: jax.Array, *, box: jax.Array | None = None, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array | None]:
        """What training with token labels looks at: (logits [B, num_classes], those of the last map's positions or None).

        Args:
            images: [B, Y, X, 3].
            box: int32 (top, left, bottom, right) of the first stage's map, where the batch is mixed with its reverse (see
                `ops.mix_token`); in the result every position's logits belong to their own image again.
            deterministic: evaluation.
        """
        last = self.last_norm(self._maps(images, box, deterministic)[-1], deterministic=deterministic)
        logits, tokens = self.classify(last)
        if box is None or tokens is None:
            return logits, tokens
        return logits, swap_box(tokens, box // 2 ** (len(self.dims) - 1))

    def _maps(self, images: jax.Array, box: jax.Array | None, deterministic: bool) -> tuple[jax.Array, ...]:
        shape = "[B, frames, height, width, channels]" if self.video else "[B, height, width, channels]"
        if images.ndim != (5 if self.video else 4):
            raise ConfigError(f"images have shape {images.shape}: they need {shape}.")
        x, maps = images.astype(self.dtype), []
        for i, (embed, stage) in enumerate(zip(self.embeds, self.stages, strict=True)):
            x = embed(x, deterministic=deterministic)
            if i == 0 and box is not None:
                x = swap_box(x, box)
            for block in stage:
                x = block(x, deterministic)
            maps.append(x)
        return tuple(maps)

    def _embed(self, i: int, dim: int) -> nn.Module:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": f"embed_{i}"}
        if self.video:
            size = (2, 4, 4) if i == 0 else (1, 2, 2)  # the stride, and the kernel where frames are not mixed
            if i == 0 or self.temporal_embed:
                return Downsample(dim, (3, *size[1:]), size, "layernorm", epsilon=1e-5, padding=((1, 1), (0, 0), (0, 0)), **types)
            return Downsample(dim, size, size, "layernorm", epsilon=1e-5, **types)
        return patch_embed(i, dim, self.conv_stem, types)

    def _block(self, i: int, j: int, rate: float) -> nn.Module:
        """Returns block j of stage i."""
        dim = self.dims[i]
        shared = {
            "hidden": int(self.mlp_ratio * dim),
            "dpe_kernel": self.dpe_kernel,
            "drop_path": rate,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "name": f"stage_{i}_{j}",
        }
        kind = LocalBlock if self.kinds[i] == "L" else GlobalBlock
        if REMAT_POLICIES[self.remat] is not None:
            kind = nn.remat(kind, policy=REMAT_POLICIES[self.remat], static_argnums=(2,))  # 0 is self, 2 is `deterministic`
        if self.kinds[i] == "L":
            return kind(**shared)
        windowed = i == 2 and (self.attention == "window" or (self.attention == "hybrid" and (j + 1) % 4 != 0))
        return kind(
            num_heads=dim // self.head_dim,
            window=self.window if windowed else None,
            split=self.split,
            layer_scale=self.layer_scale,
            norm_epsilon=self.norm_epsilon,
            implementation=self.implementation,
            capture_attention=self.capture_attention,
            **shared,
        )

    def _check(self) -> None:
        """Refuses fields that do not fit each other."""
        stages = len(self.dims)
        for name in ("depths", "kinds"):
            if len(getattr(self, name)) != stages:
                raise ConfigError(f"{name} = {getattr(self, name)}: dims = {self.dims} has {stages} stages. Give one entry each.")
        if set(self.kinds) - {"L", "G"}:
            raise ConfigError(f"kinds = {self.kinds!r}: every stage is L (local) or G (global).")
        for dim, kind in zip(self.dims, self.kinds, strict=True):
            # Heads are channels // head_dim, the remainder dropped, as published: they have to divide the channels.
            if kind == "G" and (dim < self.head_dim or dim % (dim // self.head_dim)):
                raise ConfigError(f"head_dim = {self.head_dim}: does not divide a stage of width {dim}. Choose a divisor.")
        modes = ("global", "window", "hybrid")
        for name, known in (("attention", modes), ("remat", tuple(REMAT_POLICIES))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: unknown, {nearest(getattr(self, name), known)}")
        wrong = [name for name in ("temporal_embed", "split") if getattr(self, name)] if not self.video else []
        wrong += ["conv_stem"] if self.video and self.conv_stem else []
        wrong += ["attention"] if self.video and self.attention != "global" else []
        if wrong:
            inputs = "video" if self.video else "images"
            raise ConfigError(f"{wrong[0]} = {getattr(self, wrong[0])!r}: has no meaning for {inputs}. Leave it at its default.")
        if self.token_labels and not self.num_classes:
            raise ConfigError("token_labels = True: needs num_classes.")


def patch_embed(i: int, dim: int, conv_stem: bool, types: dict[str, Any]) -> nn.Module:
    """Returns what stands before stage i of an image model: a strided convolution and a norm.

    Args:
        i: the stage; the first one's stride is 4, the others' 2.
        dim: channels of its result.
        conv_stem: overlapping 3x3 convolutions and batch norm; else kernel = stride and layer norm.
        types: `dtype`, `param_dtype` and `name` of the module.
    """
    if not conv_stem:
        size = 4 if i == 0 else 2
        return Downsample(dim, size, size, "layernorm", epsilon=1e-5, **types)
    return ConvStem((dim // 2, dim), (2, 2), **types) if i == 0 else Downsample(dim, **types)

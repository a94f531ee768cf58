"""Vision Transformer with any token mixer: patches, positions, blocks, a class token or the mean, a linear classifier.

"An Image is Worth 16x16 Words" (Dosovitskiy et al., 2020, arXiv 2010.11929), with the tiny and small sizes, drop path and
LayerScale of "Training data-efficient image transformers" (Touvron et al., 2020, arXiv 2012.12877).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attnlab import registry
from attnlab.errors import ConfigError, nearest
from attnlab.models.lm import REMAT_POLICIES
from attnlab.models.options import ImageModel
from attnlab.nn.norm import LayerNorm, LayerScale
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.nn.vision import MLP, Conv, DropPath, drop_path_rates

SIZES: dict[str, dict[str, Any]] = {
    "ti16": {"dim": 192, "num_layers": 12, "num_heads": 3},
    "s16": {"dim": 384, "num_layers": 12, "num_heads": 6},
    "b16": {"dim": 768, "num_layers": 12, "num_heads": 12},
    "l16": {"dim": 1024, "num_layers": 24, "num_heads": 16},
}
# What the mixers of language models do otherwise by default: the future is hidden, positions are rotations, no biases.
_IMAGE_DEFAULTS = {"causal": False, "rope": False, "proj_bias": True}


def image_mixer_options(options: Any) -> Any:
    """Returns a table of mixer options (name -> fields) with the defaults of images: not causal, no rotation, with biases."""
    for fields in options.values():
        for name, value in _IMAGE_DEFAULTS.items():
            if name in fields:
                fields[name] = value
    return options


class VisionBlock(nn.Module):
    """x = x + drop(LS(mixer(norm(x)))); x = x + drop(LS(mlp(norm(x)))).

    Attributes:
        mixer: a module of the mixer contract (`attnlab.nn.mixer`).
        hidden: width inside the MLP.
        layer_scale: initial value of LayerScale on both branches; 0 = none.
    """

    mixer: nn.Module
    hidden: int
    layer_scale: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None, deterministic: bool) -> jax.Array:
        """Maps [B, T, D] to the same; `rate` is that of drop path."""

        def branch(x: jax.Array, name: str, layer: Any) -> jax.Array:
            y = layer(LayerNorm(1e-6, self.param_dtype, name=f"{name}_norm")(x))
            if self.layer_scale:
                y = LayerScale(self.layer_scale, self.param_dtype, name=f"{name}_scale")(y)
            return x + DropPath(name=f"{name}_drop")(y, deterministic=deterministic, rate=rate)

        x = branch(x, "mixer", lambda y: self.mixer(y, deterministic=deterministic)[0])
        x = branch(x, "mlp", MLP(self.hidden, self.dtype, self.param_dtype, name="mlp"))
        return constrain(x, "act_batch", "act_seq", "act_embed")


class Group(nn.Module):
    """The blocks of one turn of the pattern, `blocks_0`, `blocks_1`, ...; what is scanned and rematerialised."""

    blocks: tuple[VisionBlock, ...]

    @nn.compact
    def __call__(self, x: jax.Array, rates: jax.Array | None, deterministic: bool) -> tuple[jax.Array, None]:
        """Maps [B, T, D] to (the same, None); `rates` [blocks] or None. The form is that of nn.scan."""
        for i, block in enumerate(self.blocks):
            x = block(x, None if rates is None else rates[i], deterministic)
        return x, None


class ViT(ImageModel):
    """The model; layer l has the mixer `pattern[l % P]`. Parameters:

        patches                              a convolution whose kernel is its stride
        class_token [1, 1, D], positions [1, T, D]
        layers/blocks_{p}/{mixer_norm, mixer, mlp_norm, mlp}    every leaf stacked [num_layers / P, ...]
        norm, head

    Without `scan_layers`, or where P does not divide `num_layers`, "layers" becomes "layers_0", "layers_1", ... The tokens are
    the class token, if there is one, and the patches row by row. A mixer with a field `grid` gets that of the patches, one with
    `train_length` the number of tokens, and one with `causal` is not causal; a recurrence, which can only look back, needs
    `causal=True` in its `mixer_options`, scans the tokens in this order, and goes best with pool "mean".

    Attributes:
        num_classes: 0 = no classifier: the result is the pooled features.
        image_shape: (H, W, C) of the images.
        patch_size: pixels per side of a patch; divides H and W.
        mixer: name of the mixer of every layer.
        pattern: names of mixers that repeat over the layers; wins over `mixer`.
        mixer_options: pattern entry -> keyword arguments of its mixer; an entry that is no mixer's name is an alias whose
            options say which one by `mixer`.
        mlp_ratio: width inside the MLP over D.
        pool: "token" (a class token) or "mean" (of the patches).
        positions: "learned", "sincos" (two-dimensional, fixed) or "none".
        layer_scale: initial value, 0 = none.
        drop_path: rate of the last layer; it grows linearly from 0.
        scan_layers: one compiled turn of the pattern, scanned; else one after another. The same numbers.
        remat: what the backward pass keeps, a name of `models.lm.REMAT_POLICIES`.
        capture_attention: attention mixers sow their weights to `intermediates`.
    """

    sizes = SIZES

    num_classes: int = 1000
    image_shape: tuple[int, int, int] = (224, 224, 3)
    patch_size: int = 16
    dim: int = 192
    num_layers: int = 12
    num_heads: int = 3
    mixer: str = "softmax"
    pattern: tuple[str, ...] = ()
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mlp_ratio: float = 4.0
    pool: str = "token"
    positions: str = "learned"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    scan_layers: bool = True
    remat: str = "none"
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model: Any, num_classes: int, image_shape: tuple[int, int, int]) -> ViT:
        """Builds the module from `config.model`; only the options of mixers in use are read."""
        vit = super().from_config(model, num_classes, image_shape)
        return vit.clone(mixer_options={entry: vit.mixer_options[entry] for entry in vit.entries() if entry in vit.mixer_options})

    @nn.nowrap
    def entries(self) -> tuple[str, ...]:
        """The pattern: mixers that repeat over the layers."""
        return tuple(self.pattern) or (self.mixer,)

    @nn.nowrap
    def grid(self) -> tuple[int, int]:
        """Patches (down, across).

        Raises:
            ConfigError: patches that do not fill the image.
        """
        height, width, _ = self.image_shape
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"patch_size = {self.patch_size}: does not divide images of {height} x {width}. Choose a divisor of both, or "
                "another config.data.image_size."
            )
        return height // self.patch_size, width // self.patch_size

    @nn.nowrap
    def num_tokens(self) -> int:
        """T: patches, and the class token."""
        return math.prod(self.grid()) + (self.pool == "token")

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        for name, known in (("pool", ("token", "mean")), ("positions", ("learned", "sincos", "none")), ("remat", REMAT_POLICIES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: unknown, {nearest(getattr(self, name), known)}")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patches = Conv(self.dim, (self.patch_size,) * 2, self.patch_size, padding=0, **types)
        normal = nn.initializers.normal(INIT_STD)
        if self.pool == "token":
            self.class_token = self.param("class_token", named(normal, None, None, "embed"), (1, 1, self.dim), self.param_dtype)
        if self.positions == "learned":
            shape = (1, self.num_tokens(), self.dim)
            self.position = self.param("positions", named(normal, None, None, "embed"), shape, self.param_dtype)
        entries = self.entries()
        turns, rest = divmod(self.num_layers, len(entries))
        self.scanned = self.scan_layers and not rest
        group = Group
        if REMAT_POLICIES[self.remat] is not None:
            # 0 is self, 3 is `deterministic`
            group = nn.remat(group, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scanned, static_argnums=(3,))
        if self.scanned:
            scanned = nn.scan(
                group,
                variable_axes={True: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=turns,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers = scanned(tuple(map(self._block, entries)))
        else:
            self.layers = [group((self._block(entries[i % len(entries)]),)) for i in range(self.num_layers)]
        self.norm = LayerNorm(1e-6, self.param_dtype)
        if self.num_classes:
            self.head = Projection((self.dim, self.num_classes), ("embed", None), use_bias=True, **types)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, H, W, C] to logits [B, num_classes] float32 (or pooled features [B, D])."""
        x = self.norm(self.features(images, deterministic=deterministic))
        x = x[:, 0] if self.pool == "token" else x.mean(1)
        return (self.head(x) if self.num_classes else x).astype(jnp.float32)

    def features(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Returns the tokens after the last layer, before the norm: [B, T, D].

        Raises:
            ConfigError: images of another shape than `image_shape`.
        """
        if images.shape[1:] != tuple(self.image_shape):
            raise ConfigError(f"images of shape {images.shape[1:]}: the model was made for {tuple(self.image_shape)}.")
        x = self.patches(images.astype(self.dtype)).reshape(images.shape[0], -1, self.dim)
        if self.positions == "sincos":  # the class token, which stands nowhere, has none
            x = x + jnp.asarray(sincos_positions(self.grid(), self.dim), x.dtype)
        if self.pool == "token":
            token = jnp.broadcast_to(self.class_token.astype(x.dtype), (x.shape[0], 1, self.dim))
            x = jnp.concatenate([token, x], axis=1)
        if self.positions == "learned":
            x = x + self.position.astype(x.dtype)
        x = constrain(x, "act_batch", "act_seq", "act_embed")
        rates = jnp.asarray(np.concatenate(drop_path_rates(self.drop_path, (self.num_layers,))), jnp.float32)
        rates = rates if self.drop_path and not deterministic else None
        if self.scanned:
            per_turn = None if rates is None else rates.reshape(-1, len(self.entries()))
            return self.layers(x, per_turn, deterministic)[0]
        for i, layer in enumerate(self.layers):
            x, _ = layer(x, None if rates is None else rates[i : i + 1], deterministic)
        return x

    @nn.nowrap
    def _block(self, entry: str) -> VisionBlock:
        options = dict(self.mixer_options.get(entry, {}))
        module = registry.get("mixer", options.pop("mixer", entry))
        known = {field.name for field in dataclasses.fields(module)}
        fields = {name: value for name, value in _IMAGE_DEFAULTS.items() if name in known}
        if "capture_attention" in known:
            fields["capture_attention"] = self.capture_attention
        fields |= options
        if "train_length" in known and fields.get("train_length") is None:
            fields["train_length"] = self.num_tokens()
        if "grid" in known and fields.get("grid") is None:
            if self.pool == "token":
                raise ConfigError(f"mixer = {entry!r}: works on the map of patches, which has no class token. Set pool='mean'.")
            fields["grid"] = self.grid()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mixer = module(dim=self.dim, num_heads=self.num_heads, **fields, **types)
        return VisionBlock(mixer, int(self.mlp_ratio * self.dim), self.layer_scale, **types)


def sincos_positions(grid: tuple[int, int], dim: int) -> np.ndarray:
    """Fixed positions of a grid: [1, rows * columns, dim] float32, sines and cosines of the row in one half, of the column in
    the other, of wavelengths 2 pi to 20000 pi (Chen et al., 2021, arXiv 2104.02057).

    Raises:
        ConfigError: dim is no multiple of 4.
    """  # fmt: skip
    if dim % 4:
        raise ConfigError(f"dim = {dim}: sine and cosine of rows and columns need a multiple of 4.")
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)[None].astype(np.float32)


def resize_positions(positions: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int]) -> jax.Array:
    """Interpolates learned positions [1, T, D] to another grid of patches, for images of another size; a class token keeps its own.

    Raises:
        ConfigError: positions of another grid.
    """
    first = positions.shape[1] - grid[0] * grid[1]
    if first not in (0, 1):
        raise ConfigError(f"positions of {positions.shape[1]} tokens are not those of a grid of {grid[0]} x {grid[1]}.")
    table = positions[:, first:].reshape(1, *grid, -1)
    table = jax.image.resize(table, (1, *new_grid, table.shape[-1]), "bicubic")
    return jnp.concatenate([positions[:, :first], table.reshape(1, -1, table.shape[-1])], axis=1)

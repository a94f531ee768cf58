"""MoH-ViT: the hierarchy of TransNeXt, whose attention is a mixture of heads.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (2024, arXiv 2410.11842) on "TransNeXt: Robust Foveal Visual Perception
for Vision Transformers" (Shi, 2023, arXiv 2311.17132). The mixture without routers (`shared_heads=()`) is TransNeXt itself.

    model = MoHViT.sized("small_80", num_classes=1000)
    logits = model.apply(model.init(jax.random.key(0), images), images)      # images [B, Y, X, 3]
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.models.lm import REMAT_POLICIES
from attnlab.models.options import ImageModel
from attnlab.nn.aggregated_attention import MixtureOfHeadsAggregatedAttention
from attnlab.nn.mixture_of_heads_map import MixtureOfHeadsMapAttention
from attnlab.nn.norm import LayerNorm
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.nn.vision import Conv, Downsample, DropPath, drop_path_rates

_SMALL = {"dims": (72, 144, 288, 576), "depths": (5, 5, 22, 5), "heads": (3, 6, 12, 24)}
_BASE = {"dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5), "heads": (4, 8, 16, 32)}
# Per cent of the heads that are on; "small" and "base" are TransNeXt.
SIZES: dict[str, dict[str, Any]] = {
    "small": _SMALL,
    "small_80": {**_SMALL, "shared_heads": (3, 6, 3, 8), "top_ks": (0, 0, 6, 12)},
    "small_75": {**_SMALL, "shared_heads": (3, 6, 3, 4), "top_ks": (0, 0, 6, 12)},
    "base": _BASE,
    "base_75": {**_BASE, "shared_heads": (4, 8, 4, 5), "top_ks": (0, 0, 8, 16)},
    "base_50": {**_BASE, "shared_heads": (2, 2, 2, 4), "top_ks": (2, 4, 6, 8)},
}
_EPSILON = 1e-6


class ConvolutionalGLU(nn.Module):
    """fc2(gelu(dwconv(a)) * b), a and b = fc1(x): a gate that sees its neighbours.

    Parameters: `fc1` [D, 2 hidden] and `fc2` [hidden, D] with biases, `conv` (3 x 3, depthwise).
    """

    hidden: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, Y, X, D] to the same."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        both = Projection((x.shape[-1], 2 * self.hidden), ("embed", "mlp"), use_bias=True, name="fc1", **types)(x)
        gate, value = jnp.split(both, 2, axis=-1)
        gate = Conv(self.hidden, (3, 3), depthwise=True, name="conv", **types)(gate)
        inner = nn.gelu(gate, approximate=False) * value
        return Projection((self.hidden, x.shape[-1]), ("mlp", "embed"), use_bias=True, name="fc2", **types)(inner)


class MoHViTBlock(nn.Module):
    """x = x + attention(norm1(x)); x = x + mlp(norm2(x)).

    Attributes:
        attention: of a map.
        hidden: width inside the feed-forward.
        drop_path: rate.
    """

    attention: nn.Module
    hidden: int
    drop_path: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, D] to the same."""
        mlp = ConvolutionalGLU(self.hidden, self.dtype, self.param_dtype, name="mlp")
        for number, part in enumerate((self.attention, mlp), 1):
            y = part(LayerNorm(_EPSILON, self.param_dtype, name=f"norm{number}")(x))
            x = x + DropPath(self.drop_path, name=f"drop{number}")(y, deterministic=deterministic)
        return constrain(x, "act_batch", None, None, "act_embed")


class MoHViT(ImageModel):
    """Overlapping patch embeddings, four stages: aggregated attention in three, attention of all to all in the last; a head.

    Parameters: `embeds_{i}`, `stages_{i}_{j}` (`MoHViTBlock`), `norms_{i}`, `head`. Sows as `MixtureOfHeads`; the balance loss is
    averaged over the layers that have routed heads.

    Attributes:
        num_classes: of the logits; 0 = no head.
        dims: channels of each stage.
        depths: blocks of each stage.
        heads: N of each stage.
        shared_heads: s of each stage; () = plain attention, without routers.
        top_ks: k of each stage, 0 where all heads are shared; as long as `shared_heads`.
        reductions: each stage's map over its pooled map, in each direction; 1 = attention of all to all.
        mlp_ratios: of each stage; the width inside is two thirds of that times the channels.
        drop_path: rate of the last block; it grows linearly from 0.
        balance_coefficient: of the balance loss.
        remat: what the backward pass keeps, a name of `models.lm.REMAT_POLICIES`.
        implementation: of the attention of all to all, as in `MixtureOfHeadsMapAttention`.
        capture_attention: sow what the routers decided, and the weights of the last stage.
    """

    sizes = SIZES

    num_classes: int = 1000
    dims: tuple[int, ...] = _SMALL["dims"]
    depths: tuple[int, ...] = _SMALL["depths"]
    heads: tuple[int, ...] = _SMALL["heads"]
    shared_heads: tuple[int, ...] = ()
    top_ks: tuple[int, ...] = ()
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    drop_path: float = 0.0
    balance_coefficient: float = 0.01
    remat: str = "none"
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        self._check()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"norm": "layernorm", "epsilon": 1e-5, **types}
        self.embeds = [Downsample(dim, *((7, 4) if i == 0 else (3, 2)), **norm) for i, dim in enumerate(self.dims)]
        block = MoHViTBlock
        if REMAT_POLICIES[self.remat] is not None:
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], static_argnums=(2,))  # 0 is self, 2 is `deterministic`
        rates = drop_path_rates(self.drop_path, self.depths)
        self.stages = [
            [
                block(self._attention(i), int(2 * self.mlp_ratios[i] * dim / 3), rate, **types)
                for rate in rates[i]
            ]
            for i, dim in enumerate(self.dims)
        ]
        self.norms = [LayerNorm(_EPSILON, self.param_dtype) for _ in self.dims]
        if self.num_classes:
            init = nn.initializers.truncated_normal(INIT_STD)
            self.head = Projection((self.dims[-1], self.num_classes), ("embed", "vocab"), use_bias=True, kernel_init=init, **types)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, Y, X, 3] to logits [B, num_classes] float32; `deterministic=False` trains (stream `dropout`)."""
        x = self.features(images, deterministic=deterministic)[-1].mean(axis=(1, 2))
        return (self.head(x) if self.num_classes else x).astype(jnp.float32)

    def features(self, images: jax.Array, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The feature pyramid: the normalised map after each stage, of strides 4, 8, 16 and 32.

        Raises:
            ConfigError: something other than [B, Y, X, C].
        """
        if images.ndim != 4:
            raise ConfigError(f"images have shape {images.shape}: they need [B, height, width, channels].")
        x, maps = images.astype(self.dtype), []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms, strict=True):
            x = embed(x, deterministic=deterministic)
            for block in stage:
                x = block(x, deterministic)
            x = norm(x)
            maps.append(x)
        return tuple(maps)

    def _attention(self, stage: int) -> nn.Module:
        shared = self.shared_heads[stage] if self.shared_heads else None
        routed = sum(depth for depth, top_k in zip(self.depths, self.top_ks, strict=False) if top_k)
        fields = {
            "shared_heads": shared,
            "top_k": self.top_ks[stage] if self.shared_heads else 0,
            "balance_coefficient": self.balance_coefficient,
            "balance_layers": max(routed, 1),
            "capture_attention": self.capture_attention,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        kind = functools.partial(MixtureOfHeadsMapAttention, implementation=self.implementation)
        if self.reductions[stage] > 1:
            kind = functools.partial(MixtureOfHeadsAggregatedAttention, reduction=self.reductions[stage])
        return kind(dim=self.dims[stage], num_heads=self.heads[stage], **fields)

    def _check(self) -> None:
        lists = ("dims", "depths", "heads", "reductions", "mlp_ratios", *(("shared_heads", "top_ks") if self.shared_heads else ()))
        counts = {name: len(getattr(self, name)) for name in lists}
        if len(set(counts.values())) != 1:
            raise ConfigError(f"stages = {counts}: these fields need one entry for each stage.")
        if self.remat not in REMAT_POLICIES:
            raise ConfigError(f"remat = {self.remat!r}: unknown, {nearest(self.remat, REMAT_POLICIES)}")

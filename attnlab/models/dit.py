"""DiT: a transformer that removes noise from images, conditioned on time and class; its attention may be a mixture of heads.

"Scalable Diffusion Models with Transformers" (Peebles & Xie, 2022, arXiv 2212.09748) with the mixture-of-head attention of MoH-DiT
(2024, arXiv 2410.11842). `methods/diffusion.py` trains it, `inference/denoising.py` draws samples.

    model = dit("S/2-75", image_shape=(32, 32, 4), num_classes=1000)
    noise = model.apply(variables, images, times, labels)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.models.options import ImageModel
from attnlab.models.vit import sincos_positions
from attnlab.nn.mixture_of_heads import MixtureOfHeads
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.nn.softmax import SoftmaxAttention
from attnlab.nn.vision import MLP
from attnlab.ops.kmeans import plain_layer_norm

_FREQUENCIES, _LONGEST = 256, 10000.0  # of the time embedding
_EPSILON = 1e-6
_XAVIER = nn.initializers.xavier_uniform()


def _sizes() -> dict[str, dict[str, Any]]:
    """The published models: (layers, heads, shared heads, top k) of each run of layers."""
    groups = {
        "XL": (1152, 72, {
            "90": [(9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)], "75": [(9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2)],
        }),
        "L": (1024, 64, {
            "90": [(8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3)], "75": [(8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4)],
        }),
        "B": (768, 64, {
            "90": [(5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0)], "75": [(2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0)],
        }),
        "S": (384, 64, {
            "90": [(8, 6, 3, 2), (4, 6, 6, 0)], "75": [(2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0)],
        }),
    }  # fmt: skip
    sizes = {}
    for name, (dim, head_dim, variants) in groups.items():
        for percent, runs in variants.items():
            heads, shared, top_k = (
                tuple(run[column] for run in runs for _ in range(run[0])) for column in (1, 2, 3)
            )
            fields = {"dim": dim, "head_dim": head_dim, "patch": 2, "heads": heads, "shared_heads": shared, "top_ks": top_k}
            sizes[f"{name}/2-{percent}"] = fields
    return sizes


SIZES = _sizes()


class DiTBlock(nn.Module):
    """x = x + a * attention(modulated norm(x)); x = x + a' * mlp(modulated norm(x)); shifts, scales and a come from c.

    Parameters: `modulation` [D, 6 D] with a bias, zero at the start, so that a block starts as the identity; `attention`; `mlp`.

    Attributes:
        attention: a mixer that is not causal.
        hidden: width inside the MLP (exact GELU).
    """

    attention: nn.Module
    hidden: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Maps tokens [B, T, D] under conditions [B, D] to the same."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        parts = modulation(c, 6, types)
        y, _ = self.attention(modulated(x, *parts[:2]))
        x = x + parts[2] * y
        x = x + parts[5] * MLP(self.hidden, name="mlp", **types)(modulated(x, *parts[3:5]))
        return constrain(x, "act_batch", "act_seq", "act_embed")


class DiT(ImageModel):
    """Patches, fixed sine positions, blocks conditioned on time and class, a modulated linear map back to pixels.

    Parameters: `patches` [P P C, D], `time_1`, `time_2`, `classes` [num_classes + 1, D] (the last one: no class), `blocks_{i}`
    (`DiTBlock`), `modulation`, `pixels` (zero at the start). Mixtures sow their balance loss, averaged over the layers that
    have routed heads.

    Attributes:
        num_classes: of the labels.
        image_shape: (height, width, channels); patches divide it.
        patch: P.
        dim: D.
        head_dim: H; the number of heads may differ between layers, D need not be N H.
        heads: N of each layer; its length is the number of layers.
        shared_heads: s of each layer; () = plain attention in all.
        top_ks: k of each layer, 0 where all heads are shared.
        mlp_ratio: width inside the MLP over D.
        balance_coefficient: of the balance loss.
        qk_norm: as of `DenseAttention`.
        implementation: of the attention op.
        capture_attention: sow the weights.
    """

    num_classes: int = 1000
    image_shape: tuple[int, int, int] = (32, 32, 4)
    patch: int = 2
    dim: int = 384
    head_dim: int = 64
    heads: tuple[int, ...] = (6,) * 12
    shared_heads: tuple[int, ...] = ()
    top_ks: tuple[int, ...] = ()
    mlp_ratio: float = 4.0
    balance_coefficient: float = 0.01
    qk_norm: str | None = None
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, times: jax.Array, labels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps noisy images [B, Y, X, C], times [B] and labels [B] int32 (`num_classes` = none) to the noise, float32.

        Raises:
            ConfigError: images of another size, or fields that do not fit.
        """
        del deterministic
        height, width, channels = self.image_shape
        rows, columns = self._grid(images)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        area = self.patch * self.patch * channels
        x = images.astype(self.dtype).reshape(-1, rows, self.patch, columns, self.patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, area)
        x = Projection((area, self.dim), ("norm", "embed"), use_bias=True, kernel_init=_XAVIER, name="patches", **types)(x)
        x = x + jnp.asarray(sincos_positions((rows, columns), self.dim), x.dtype)

        time = {"use_bias": True, **types}
        c = Projection((_FREQUENCIES, self.dim), ("norm", "embed"), name="time_1", **time)(sine_times(times).astype(self.dtype))
        c = Projection((self.dim, self.dim), ("embed", "embed"), name="time_2", **time)(nn.silu(c))
        table = named(nn.initializers.normal(INIT_STD), "vocab", "embed")
        classes = self.param("classes", table, (self.num_classes + 1, self.dim), self.param_dtype)
        c = c + classes.astype(c.dtype)[labels]

        for i, attention in enumerate(self._mixers()):
            x = DiTBlock(attention, int(self.dim * self.mlp_ratio), name=f"blocks_{i}", **types)(x, c)
        x = modulated(x, *modulation(c, 2, types))
        zeros = nn.initializers.zeros_init()
        x = Projection((self.dim, area), ("embed", "norm"), use_bias=True, kernel_init=zeros, name="pixels", **types)(x)
        x = x.reshape(-1, rows, columns, self.patch, self.patch, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, height, width, channels).astype(jnp.float32)

    def _mixers(self) -> list[nn.Module]:
        """The attention of every layer."""
        common = {"dim": self.dim, "head_dim": self.head_dim, "causal": False, "rope": False, "proj_bias": True, "parent": None}
        common |= {"qk_norm": self.qk_norm, "capture_attention": self.capture_attention, "implementation": self.implementation}
        common |= {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if not self.shared_heads:
            return [SoftmaxAttention(num_heads=heads, **common) for heads in self.heads]
        if not len(self.heads) == len(self.shared_heads) == len(self.top_ks):
            counts = (len(self.heads), len(self.shared_heads), len(self.top_ks))
            raise ConfigError(f"heads, shared_heads, top_ks have {counts} entries: they need one for each layer.")
        common |= {"balance_coefficient": self.balance_coefficient, "router_init": "xavier"}
        common["balance_layers"] = max(sum(top_k > 0 for top_k in self.top_ks), 1)
        layers = zip(self.heads, self.shared_heads, self.top_ks, strict=True)
        return [MixtureOfHeads(num_heads=n, shared_heads=s, top_k=k, **common) for n, s, k in layers]

    def _grid(self, images: jax.Array) -> tuple[int, int]:
        height, width, _ = self.image_shape
        if images.shape[1:] != tuple(self.image_shape):
            raise ConfigError(f"images have shape {images.shape}: the model is for {tuple(self.image_shape)}.")
        if height % self.patch or width % self.patch:
            raise ConfigError(f"patch = {self.patch}: does not divide images of {height} x {width}. Choose a divisor.")
        return height // self.patch, width // self.patch


def dit(size: str, **fields: Any) -> DiT:
    """Returns a published MoH-DiT ("XL/2-90", "XL/2-75", "L/2-90", ... "S/2-75"); `fields` override.

    Raises:
        ConfigError: unknown size.
    """
    if size not in SIZES:
        raise ConfigError(f"size = {size!r}: unknown, {nearest(size, SIZES)}")
    return DiT(**(SIZES[size] | fields))


def modulation(c: jax.Array, parts: int, types: dict[str, Any]) -> list[jax.Array]:
    """Declares `modulation` in the calling module; maps conditions [B, D] to vectors [B, 1, D], zero at the start."""
    dim = c.shape[-1]
    zeros = nn.initializers.zeros_init()
    linear = Projection((dim, parts * dim), ("embed", "mlp"), use_bias=True, kernel_init=zeros, name="modulation", **types)
    return jnp.split(linear(nn.silu(c))[:, None], parts, axis=-1)


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm without parameters, then (1 + scale) x + shift."""
    return plain_layer_norm(x, _EPSILON).astype(x.dtype) * (1.0 + scale) + shift


def sine_times(times: jax.Array) -> jax.Array:
    """Times [B] as [B, 256] cosines and sines of wavelengths from 2 pi to 10000 times that, float32."""
    half = _FREQUENCIES // 2
    frequency = _LONGEST ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = times.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


"""Grassmann mixing: an attention-free mixer that reads pairs of tokens as planes.

"Attention Is Not What You Need" (Zhang, 2025, arXiv 2512.19428).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab.errors import ConfigError, nearest
from attnlab.nn.norm import LayerNorm
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.ops.grassmann import check_offsets, grassmann_projection, pair_projection

FEATURES = ("plucker", "linear")
NORM_STYLES = ("pre", "post")


@struct.dataclass
class GrassmannCache:
    """The reduced tokens that later ones can still reach: a fixed size, whatever the length.

    Attributes:
        z: [B, M, r] float32, M the largest offset.
        valid: [B, M] bool, False before the first token and for padding.
        index: int32 scalar, tokens seen.
    """

    z: jax.Array
    valid: jax.Array
    index: jax.Array


class PairProjection(nn.Module):
    """The mean feature of a token's pairs, projected: `kernel` [F, D] and `bias` [D]; zero for a token without pairs."""

    dim: int
    features: str
    num_heads: int
    options: tuple[tuple[str, Any], ...]
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, offsets: Sequence[int], **structure: Any) -> jax.Array:
        """Maps [B, T, r] to [B, T, D]; `structure` is `mask`, `segment_ids`, `history` of the op."""
        width = z.shape[-1] // self.num_heads
        rows = 2 * z.shape[-1] if self.features == "linear" else self.num_heads * (width * (width - 1) // 2)
        init = nn.initializers.normal(INIT_STD)
        kernel = self.param("kernel", named(init, None, "embed"), (rows, self.dim), self.param_dtype)
        bias = self.param("bias", named(nn.initializers.zeros_init(), "norm"), (self.dim,), self.param_dtype)
        structure |= {"dtype": self.dtype}
        if self.features == "linear":
            direction = dict(self.options)["direction"]
            g, found = pair_projection(z, kernel, offsets, direction=direction, **structure)
        else:
            g, found = grassmann_projection(
                z, kernel, offsets, num_heads=self.num_heads, **dict(self.options), **structure
            )
        return jnp.where(found[:, :, None], g + bias.astype(g.dtype), 0)


class GrassmannMixing(nn.Module):
    """out = LayerNorm(a * h + (1 - a) * g), a = sigmoid([h; g] W_gate + b), g the projected mean feature of h's pairs.

    The gate is the layer's residual. Reduction, pairs and norms are float32 whatever `dtype` is. Padding gives zeros. Where a mesh
    splits the sequence, XLA moves the reduced tokens that offsets reach over a border; the result is that of one device.

    Parameters: `reduce` [D, r], `pairs` [F, D], `gate` [2 D, D] (h first), all with biases, `inner_norm` [D], and with
    `out_proj` `out` [D, D] with a bias.

    Attributes:
        dim: D.
        num_heads: of the contract; without meaning here (see `pair_heads`).
        reduced_dim: r; F = r (r - 1) / 2.
        offsets: distances of the pairs; a duplicate counts twice, one that reaches outside the sequence not at all.
        direction: "past" (the causal one), "future" as the paper's text has it, or "both".
        causal: refuse a direction that looks ahead: in a language model it would show a token its own target.
        pair_heads: groups of reduced features with planes of their own.
        features: "plucker"; or "linear", the control without geometry: [z_t; z_(t-d)] instead of the plane, F = 2 r.
        norm: length of the coordinates: "smooth" (for training) or "max" (as published); see `ops.grassmann`.
        eps: of the "max" norm.
        form: "frame" or "pairs", two orders of the same computation; see `ops.grassmann`.
        out_proj: one more linear map before the inner norm; the paper's parameter counts suggest one.
        dropout: of the result.
        train_length: sequence length trained with; offsets that reach over it are refused. 0 = not known.
    """

    dim: int
    num_heads: int = 1
    reduced_dim: int = 32
    offsets: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    direction: str = "past"
    causal: bool = True
    pair_heads: int = 1
    features: str = "plucker"
    norm: str = "smooth"
    eps: float = 1e-8
    form: str = "frame"
    out_proj: bool = False
    dropout: float = 0.0
    train_length: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> GrassmannCache:
        """Returns an empty cache for `batch` rows; its size does not depend on `max_len`."""
        del max_len
        self._check()
        if self.direction != "past":
            raise ConfigError(f"direction = {self.direction!r}: a cache holds the past only. Set direction='past'.")
        reach = max(self.offsets)
        return GrassmannCache(
            z=jnp.zeros((batch, reach, self.reduced_dim), jnp.float32),
            valid=jnp.zeros((batch, reach), bool),
            index=jnp.zeros((), jnp.int32),
        )

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token beside the parameters': normals of the pairs, one outer product; not of the length."""
        del length
        width = self.reduced_dim // self.pair_heads
        if self.features == "linear":
            return 1.0 * self.reduced_dim * len(self.offsets)
        # The outer product has r^2 entries where the kernel counts r (r - 1) / 2 rows.
        extra = self.pair_heads * (width * width - width * (width - 1) // 2)
        return 10.0 * self.reduced_dim * len(self.offsets) + 2.0 * extra * self.dim + 1.0 * self.reduced_dim * width

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: GrassmannCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, GrassmannCache | None]:
        """The mixer contract (`attnlab.nn.mixer`). Offsets count places of the sequence; `positions` are not used.

        Raises:
            ConfigError: options, cache or segments that do not fit.
        """
        del positions
        self._check()
        dtype = self.dtype or x.dtype
        if cache is not None:
            if segment_ids is not None:
                raise ConfigError("segment_ids with a cache: rows of a cache are single sequences. Pass one of the two.")
            self._check_cache(cache, x.shape[0])
        types = {"use_bias": True, "param_dtype": self.param_dtype}
        with jax.default_matmul_precision("highest"):  # the coordinates are differences of products of z
            z = Projection((self.dim, self.reduced_dim), ("embed", None), dtype=jnp.float32, name="reduce", **types)(x)
        options = {"direction": self.direction, "norm": self.norm, "eps": self.eps, "form": self.form}
        pairs = PairProjection(
            self.dim, self.features, self.pair_heads, tuple(options.items()), dtype, self.param_dtype, name="pairs"
        )
        history = None if cache is None else (cache.z, cache.valid)
        g = pairs(z, tuple(self.offsets), mask=mask, segment_ids=segment_ids, history=history)
        h = x.astype(dtype)
        joined = jnp.concatenate([h, g], axis=-1)
        gate = Projection((2 * self.dim, self.dim), ("embed", None), dtype=dtype, name="gate", **types)(joined)
        gate = jax.nn.sigmoid(gate)
        y = gate * h + (1 - gate) * g
        if self.out_proj:
            y = Projection((self.dim, self.dim), ("embed", None), dtype=dtype, name="out", **types)(y)
        y = LayerNorm(param_dtype=self.param_dtype, name="inner_norm")(y)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        real = mask
        if segment_ids is not None:
            real = segment_ids > 0 if mask is None else mask & (segment_ids > 0)
        if real is not None:
            y = jnp.where(real[:, :, None], y, 0)
        if cache is not None:
            valid = jnp.ones(x.shape[:2], bool) if mask is None else mask
            reach = cache.z.shape[1]
            cache = GrassmannCache(
                z=jnp.concatenate([cache.z, z], axis=1)[:, -reach:],
                valid=jnp.concatenate([cache.valid, valid], axis=1)[:, -reach:],
                index=cache.index + x.shape[1],
            )
        return constrain(y, "act_batch", "act_seq", "act_embed"), cache

    @nn.nowrap
    def _check(self) -> None:
        check_offsets(self.offsets, self.direction, self.train_length)
        if self.causal and self.direction != "past":
            raise ConfigError(
                f"direction = {self.direction!r}: pairs a token with later ones, which hold its target. "
                f"Set direction='past', or causal=False where nothing is predicted from left to right."
            )
        if self.features not in FEATURES:
            raise ConfigError(f"features = {self.features!r}: unknown, {nearest(self.features, FEATURES)}")
        if self.features == "linear" and self.pair_heads != 1:
            raise ConfigError(f"pair_heads = {self.pair_heads}: the linear control has no planes to group. Set 1.")
        if self.reduced_dim % self.pair_heads:
            raise ConfigError(
                f"pair_heads = {self.pair_heads}: does not divide reduced_dim = {self.reduced_dim}. Choose a divisor."
            )

    @nn.nowrap
    def _check_cache(self, cache: GrassmannCache, batch: int) -> None:
        rows, reach, width = cache.z.shape
        if self.direction != "past":
            raise ConfigError(f"direction = {self.direction!r}: a cache holds the past only. Set direction='past'.")
        if rows != batch:
            raise ConfigError(f"cache of batch {rows} used with batch {batch}. Make it with init_cache({batch}, max_len).")
        if (reach, width) != (max(self.offsets), self.reduced_dim) or cache.z.dtype != jnp.float32:
            raise ConfigError(
                f"cache of {reach} x {width} {cache.z.dtype}: this module keeps {max(self.offsets)} tokens of width "
                f"{self.reduced_dim} in float32. Make it with init_cache of this module."
            )


class FeedForward(nn.Module):
    """fc2(dropout(gelu(fc1(x)))) with the exact (erf) GELU and biases."""

    hidden: int
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        dim = x.shape[-1]
        types = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        inner = nn.gelu(Projection((dim, self.hidden), ("embed", "mlp"), name="fc1", **types)(x), approximate=False)
        inner = constrain(inner, "act_batch", "act_seq", "act_mlp")
        inner = nn.Dropout(self.dropout, deterministic=deterministic)(inner)
        y = Projection((self.hidden, dim), ("mlp", "embed"), name="fc2", **types)(inner)
        return nn.Dropout(self.dropout, deterministic=deterministic)(y)


class GrassmannBlock(nn.Module):
    """The block around a Grassmann mixer, in two published forms.

    "pre" (the reproduction): x = x + mixer(norm(x)); x = x + ffn(norm(x)).
    "post" (the paper): h = mixer(x), without a residual since the gate is one; out = norm(h + ffn(h)).

    Attributes:
        mixer: any module of the mixer contract ("post" needs one with its own residual).
        norm_style: "pre" or "post".
        ff_dim: width inside the feed-forward; 0 = 4 D.
        dropout: of the feed-forward.
    """

    mixer: nn.Module
    norm_style: str = "pre"
    ff_dim: int = 0
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: Any = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Any]:
        """Maps [B, T, D] to ([B, T, D], cache); the arguments are the mixer's."""
        if self.norm_style not in NORM_STYLES:
            raise ConfigError(f"norm_style = {self.norm_style!r}: unknown, {nearest(self.norm_style, NORM_STYLES)}")
        pre = self.norm_style == "pre"
        if not pre and not isinstance(self.mixer, GrassmannMixing):
            raise ConfigError(
                f"norm_style = 'post': has no residual around the mixer, and {type(self.mixer).__name__} has none inside. "
                f"Set norm_style='pre'."
            )
        rest = {"positions": positions, "segment_ids": segment_ids, "mask": mask, "cache": cache}
        ffn = FeedForward(self.ff_dim or 4 * x.shape[-1], self.dropout, self.dtype, self.param_dtype, name="mlp_block")
        mlp_norm = LayerNorm(param_dtype=self.param_dtype, name="mlp_norm")
        if pre:
            mixed = LayerNorm(param_dtype=self.param_dtype, name="mixer_norm")(x)
            y, cache = self.mixer(mixed, deterministic=deterministic, **rest)
            x = x + y
            x = x + ffn(mlp_norm(x), deterministic=deterministic)
        else:
            h, cache = self.mixer(x, deterministic=deterministic, **rest)
            x = mlp_norm(h + ffn(h, deterministic=deterministic))
        return constrain(x, "act_batch", "act_seq", "act_embed"), cache

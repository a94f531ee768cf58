"""Magnitude-aware linear attention as a token mixer, and over maps of image features.

"Rectifying Magnitude Neglect in Linear Attention" (Fan et al., 2025, arXiv 2507.00698).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab import ops
from attnlab.errors import ConfigError, nearest
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.nn.vision import Conv
from attnlab.ops.magnitude_aware import (
    MagnitudeAwareState,
    axial_rotation,
    init_state,
    magnitude_aware_attention,
    magnitude_aware_weights,
    rotate_pairs,
    sequence_rotation,
)

KINDS = ("linear", "softmax")


@struct.dataclass
class MagnitudeAwareCache:
    """The sums over the tokens so far: a fixed size, whatever the length.

    Attributes:
        state: of the op.
        index: int32 scalar, tokens seen.
    """

    state: MagnitudeAwareState
    index: jax.Array


class MagnitudeAwareAttention(nn.Module):
    """Magnitude-aware linear attention over a sequence, with the published linear gate: out(y * o).

    Published without order and for images. The causal form, one-dimensional rotary positions and the cache are attnlab's
    extension: the paper reports language models and released nothing of them.

    Parameters: `query`, `key`, `value`, `gate` [D, N, H], `out` [N, H, D], with biases.

    Attributes:
        dim: D.
        num_heads: N.
        head_dim: H; None = D / N.
        causal: a token sees itself and those before it. A cache needs it.
        variant: "official" (the released code), "paper", or "divided" (plain normalised linear attention).
        eps: added to the divisor; the paper's form has none.
        rope: rotary position embedding of the features, by `positions`, or by the place on `grid`.
        rope_base: of its wavelengths.
        grid: (height, width) of the map that the sequence is, row by row: the published two-dimensional rotation.
        gate: multiply with o, a linear map of the input.
        proj_bias: biases of the projections.
        chunk_size: of the causal scan.
        implementation: of the causal scan, see `ops.linear_scan`; None = the best that can run.
        dropout: of the result.
        capture_attention: sow `attention`, the weights, and `attended` [B, T, N, H] of whole sequences.
    """

    dim: int
    num_heads: int
    head_dim: int | None = None
    causal: bool = True
    variant: str = "official"
    eps: float = 1e-6
    rope: bool = True
    rope_base: float = 10000.0
    grid: tuple[int, int] | None = None
    gate: bool = True
    proj_bias: bool = True
    chunk_size: int = 64
    implementation: str | None = None
    dropout: float = 0.0
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def width(self) -> int:
        """Returns H.

        Raises:
            ConfigError: heads that do not divide D.
        """
        if not self.head_dim and self.dim % self.num_heads:
            raise ConfigError(
                f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor, or set head_dim."
            )
        return self.head_dim or self.dim // self.num_heads

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> MagnitudeAwareCache:
        """Returns an empty cache for `batch` rows; its size does not depend on `max_len`."""
        del max_len
        if not self.causal:
            raise ConfigError("causal = False: a cache holds the past only. Set causal=True, or pass whole sequences.")
        return MagnitudeAwareCache(init_state(batch, self.num_heads, self.width()), jnp.zeros((), jnp.int32))

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of the state: written and read; with `causal` also the products within a chunk."""
        width = self.width()
        within = 2.0 * 2.0 * width * (min(self.chunk_size, length) + 1) / 2 if self.causal else 0.0
        return self.num_heads * (4.0 * width * width + within)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: MagnitudeAwareCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, MagnitudeAwareCache | None]:
        """The mixer contract (`attnlab.nn.mixer`).

        Raises:
            ConfigError: heads, grid, cache or segments that do not fit.
        """
        width = self.width()
        dtype = self.dtype or x.dtype
        batch, length, _ = x.shape
        if cache is not None:
            if segment_ids is not None:
                raise ConfigError("segment_ids with a cache: rows of a cache are single sequences. Pass one of the two.")
            rows = cache.state.kv.shape[0]
            if rows != batch:
                raise ConfigError(
                    f"cache of batch {rows} used with batch {batch}. Make it with init_cache({batch}, max_len)."
                )
        if self.grid is not None and (self.causal or self.grid[0] * self.grid[1] != length):
            raise ConfigError(f"grid = {self.grid}: needs causal=False and a sequence of {self.grid[0] * self.grid[1]} tokens.")
        types = {"use_bias": self.proj_bias, "dtype": dtype, "param_dtype": self.param_dtype}
        names = ("embed", "heads", "head_dim")
        q, k, v = (
            constrain(
                Projection((self.dim, self.num_heads, width), names, name=name, **types)(x),
                "act_batch", "act_seq", "act_heads", None,
            )
            for name in ("query", "key", "value")
        )  # fmt: skip
        options: dict[str, Any] = {"causal": self.causal, "variant": self.variant, "eps": self.eps}
        options |= {"segment_ids": segment_ids, "mask": mask, "rotation": None}
        if self.rope and self.grid is not None:
            options["rotation"] = axial_rotation(*self.grid, width, base=self.rope_base)
        elif self.rope:
            if positions is None:
                positions = jnp.arange(length, dtype=jnp.int32)[None] + (0 if cache is None else cache.index)
            options["rotation"] = sequence_rotation(positions, width, base=self.rope_base)
        state = None if cache is None else cache.state
        capture = self.capture_attention and cache is None
        if capture and self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", magnitude_aware_weights(q, k, **options)[0])
        y, state = magnitude_aware_attention(
            q, k, v, initial_state=state, chunk_size=self.chunk_size, implementation=self.implementation, **options
        )
        if capture:
            self.sow("intermediates", "attended", y)
        if self.gate:
            y = y * Projection((self.dim, self.num_heads, width), names, name="gate", **types)(x)
        out = Projection((self.num_heads, width, self.dim), ("heads", "head_dim", "embed"), inputs=2, name="out", **types)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(out(y))
        if cache is not None:
            cache = MagnitudeAwareCache(state, cache.index + length)
        return constrain(y, "act_batch", "act_seq", "act_embed"), cache


class MagnitudeAwareMapAttention(nn.Module):
    """The published module over a map: attention, a depthwise convolution of the values beside it, a linear gate.

    out((attend(q, k, v) + lepe(v)) * o) with the two-dimensional rotation; computed from the map's size at hand.

    Parameters: `query`, `key`, `value`, `gate` [D, N, H] and `out` [N, H, D] with biases, `lepe` (a depthwise `Conv`).

    Attributes:
        dim: D.
        num_heads: N; H = D / N must be a multiple of 4.
        kind: "linear" (magnitude-aware), or "softmax" (of the rotated queries and keys themselves, no feature map).
        variant: of the linear kind.
        eps: added to its divisor.
        rope_base: of the rotation.
        lepe_kernel: side of the depthwise convolution.
        implementation: of `ops.softmax_attention`.
        capture_attention: sow `attention` [B, N, T, T] to `intermediates`, T = positions row by row.
    """

    dim: int
    num_heads: int
    kind: str = "linear"
    variant: str = "official"
    eps: float = 1e-6
    rope_base: float = 10000.0
    lepe_kernel: int = 5
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Maps [B, Y, X, D] to the same.

        Args:
            x: the map.
            mask: [B, Y, X] bool, False = padding: never seen by others, and zero in the depthwise convolution.

        Raises:
            ConfigError: heads that do not divide D, H no multiple of 4, or an unknown kind.
        """
        if self.dim % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor.")
        if self.kind not in KINDS:
            raise ConfigError(f"kind = {self.kind!r}: unknown, {nearest(self.kind, KINDS)}")
        dtype = self.dtype or x.dtype
        batch, height, columns, _ = x.shape
        width = self.dim // self.num_heads
        shape, names = (self.dim, self.num_heads, width), ("embed", "heads", "head_dim")
        types = {"use_bias": True, "dtype": dtype, "param_dtype": self.param_dtype}
        tokens = x.reshape(batch, height * columns, self.dim)
        q, k, v, o = (
            constrain(Projection(shape, names, name=name, **types)(tokens), "act_batch", None, "act_heads", None)
            for name in ("query", "key", "value", "gate")
        )
        rotation = axial_rotation(height, columns, width, base=self.rope_base)
        flat = None if mask is None else mask.reshape(batch, height * columns)
        capture = self.capture_attention and self.is_mutable_collection("intermediates")
        if self.kind == "linear":
            options = {"variant": self.variant, "eps": self.eps, "rotation": rotation, "mask": flat}
            y, _ = magnitude_aware_attention(q, k, v, **options)
            weights = magnitude_aware_weights(q, k, **options)[0] if capture else None
        else:
            q, k = (rotate_pairs(side.astype(jnp.float32), *rotation).astype(dtype) for side in (q, k))
            y = ops.softmax_attention(q, k, v, kv_mask=flat, implementation=self.implementation)
            weights = ops.attention_weights("softmax", q, k, kv_mask=flat) if capture else None
        if capture:
            self.sow("intermediates", "attention", weights)
        beside = v if flat is None else jnp.where(flat[:, :, None, None], v, 0)
        kernel = (self.lepe_kernel, self.lepe_kernel)
        lepe = Conv(
            self.dim, kernel, depthwise=True, kernel_init=nn.initializers.normal(INIT_STD),
            bias_init=nn.initializers.zeros_init(), dtype=dtype, param_dtype=self.param_dtype, name="lepe",
        )  # fmt: skip
        y = (y + lepe(beside.reshape(x.shape)).reshape(y.shape)) * o
        out = Projection((self.num_heads, width, self.dim), ("heads", "head_dim", "embed"), inputs=2, name="out", **types)
        return out(y).reshape(x.shape)

"""Bi-level routing attention as a module, for maps and as a token mixer."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import Projection
from attnlab.nn.vision import Conv
from attnlab.ops import bilevel_routing as op


class BiLevelRoutingAttention(nn.Module):
    """Every region of a map attends to the `topk` regions that suit it best (Zhu et al., 2023, arXiv 2303.08810).

    A depthwise convolution of the values ("LePE") is added to what was attended. The input is a map [B, Y, X, D], or
    tokens [B, T, D] of such a map row by row (then `causal` must be False: a map has no order). Regions are chosen in
    float32 without a gradient; every token of the map takes part, so there is no mask and no cache.

    Parameters: `query`, `key` [D, N, qk_dim / N], `value` [D, N, D / N], `out` [N, D / N, D], all with biases, `lepe`
    (a `Conv`).

    Attributes:
        dim: D.
        num_heads: N, divides D and qk_dim; all heads share the choice of regions.
        n_win: regions per side.
        topk: regions that a region attends to.
        own_region: a region is always one of those that it attends to; with topk = 1 this is attention in windows.
        qk_dim: width of queries and keys over all heads; 0 = D.
        scale: of the products on both levels; None = qk_dim^-1/2 (the full width, not a head's).
        side_dwconv: kernel of the depthwise convolution, odd; 0 = none.
        variant: how maps are treated that n_win does not divide. "legacy" (the T, S and B models): refused, or with
            `auto_pad` filled up with zeros before the projection, so that the padding's keys are the biases. "nchw" (the
            STL model): any map, filled up after the projection; see `ops.bilevel_routing`.
        auto_pad: see `variant`.
        kv_downsample_mode: pooling of keys and values, "legacy" only; this and the next four as in the op.
        kv_per_win: for "ada_avgpool" and "ada_maxpool".
        kv_downsample_ratio: for "avgpool" and "maxpool".
        soft_routing: multiply the keys and values of a chosen region with its weight; "legacy" only.
        diff_routing: let gradients flow into these weights; with `soft_routing` only.
        grid: (Y, X) of the map that tokens [B, T, D] come from; None = it is square.
        causal: must be False for tokens.
        implementation: of the op.
        capture_attention: sow to `intermediates`: `route_index` and `route_weight` [B, P, topk], and, where neither map
            nor keys are padded or pooled, `attention` [B, N, T, T].
    """

    dim: int
    num_heads: int
    n_win: int = 7
    topk: int = 4
    own_region: bool = False
    qk_dim: int = 0
    scale: float | None = None
    side_dwconv: int = 5
    variant: str = "legacy"
    auto_pad: bool = False
    kv_downsample_mode: str = "identity"
    kv_per_win: int = 4
    kv_downsample_ratio: int = 4
    soft_routing: bool = False
    diff_routing: bool = False
    grid: tuple[int, int] | None = None
    causal: bool = True
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> Any:
        """Refuses: there is no order, so there is no past to hold.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("bilevel_routing with a cache: it sees the whole map at once. Use a causal mixer to decode.")

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of a map of `length` tokens: both levels, keys not pooled."""
        regions = self.n_win**2
        seen = min(self.topk, regions) * length / regions
        qk_dim = self.qk_dim or self.dim
        return 2.0 * (qk_dim + self.dim) * seen + 2.0 * regions**2 * qk_dim / length

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
    ) -> tuple[jax.Array, None]:
        """Maps [B, Y, X, D] or [B, T, D] to (the same, None).

        `positions` and `deterministic` change nothing.

        Raises:
            ConfigError: fields that do not fit each other or the map; tokens with `causal`; a mask, segments or a cache.
            NotImplementedError: as of the op.
        """
        del positions, deterministic
        self._check()
        for name, value in (("mask", mask), ("segment_ids", segment_ids), ("cache", cache)):
            if value is not None:
                raise ConfigError(f"{name} with bilevel_routing: every token of a map takes part. Pass whole maps without it.")
        if x.ndim == 3:
            y = self._attend(x.reshape(x.shape[0], *self._grid(x.shape[1]), x.shape[2]))
            return y.reshape(x.shape), None
        return self._attend(x), None

    def _attend(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        if self.variant == "legacy" and self.auto_pad:
            x = jnp.pad(x, ((0, 0), (0, -height % self.n_win), (0, -width % self.n_win), (0, 0)))
        elif self.variant == "legacy" and (height % self.n_win or width % self.n_win):
            raise ConfigError(
                f"n_win = {self.n_win}: does not divide a map of {height} x {width}. Set auto_pad=True, choose a divisor, "
                "or use variant='nchw'."
            )
        dtype = self.dtype or x.dtype
        qk_dim, heads = self.qk_dim or self.dim, self.num_heads
        types = {"use_bias": True, "dtype": dtype, "param_dtype": self.param_dtype}
        q, k, v = (
            constrain(
                Projection((self.dim, heads, size // heads), ("embed", "heads", "head_dim"), name=name, **types)(x),
                "act_batch", None, None, "act_heads", None,
            )
            for name, size in (("query", qk_dim), ("key", qk_dim), ("value", self.dim))
        )  # fmt: skip
        scale = qk_dim**-0.5 if self.scale is None else self.scale
        options = {
            "n_win": self.n_win, "topk": self.topk, "own_region": self.own_region, "scale": scale,
            "implementation": self.implementation,
        }  # fmt: skip
        if self.variant == "nchw":
            y, routing = op.ragged_bilevel_routing_attention(q, k, v, **options)
        else:
            y, routing = op.bilevel_routing_attention(
                q, k, v, kv_downsample_mode=self.kv_downsample_mode, kv_per_win=self.kv_per_win,
                kv_downsample_ratio=self.kv_downsample_ratio, soft_routing=self.soft_routing,
                diff_routing=self.diff_routing, **options,
            )  # fmt: skip
        if self.capture_attention and self.is_mutable_collection("intermediates"):
            self._sow(q, k, routing, scale, padded=x.shape[1:3] != (height, width))
        if self.side_dwconv:
            conv = Conv(self.dim, (self.side_dwconv,) * 2, depthwise=True, dtype=dtype, param_dtype=self.param_dtype, name="lepe")
            y = y + conv(v.reshape(*v.shape[:3], self.dim)).reshape(y.shape)
        out = Projection((heads, self.dim // heads, self.dim), ("heads", "head_dim", "embed"), inputs=2, name="out", **types)
        return constrain(out(y)[:, :height, :width], "act_batch", None, None, "act_embed")

    def _sow(self, q: jax.Array, k: jax.Array, routing: op.Routing, scale: float, padded: bool) -> None:
        self.sow("intermediates", "route_index", routing.index)
        self.sow("intermediates", "route_weight", routing.weight)
        height, width = q.shape[1:3]
        if padded or height % self.n_win or width % self.n_win or self.kv_downsample_mode != "identity":
            return
        size, grid = (height // self.n_win, width // self.n_win), (self.n_win, self.n_win)
        q, k = (op.to_regions(side, size) for side in (q, k))
        weight = routing.weight if self.soft_routing else None
        maps = op.routed_weights(q, k, routing.index, weight, scale=scale)  # [B, P, N, W, P, W]
        maps = op.from_regions(jnp.moveaxis(maps, 2, 3), grid, size)  # [B, Y, X, N, P, W]
        maps = maps.reshape(maps.shape[0], height * width, self.num_heads, *maps.shape[-2:])
        maps = op.from_regions(jnp.moveaxis(maps, (-2, -1), (1, 2)), grid, size)  # [B, Y, X, T, N]
        maps = maps.reshape(maps.shape[0], height * width, height * width, self.num_heads)
        self.sow("intermediates", "attention", jnp.transpose(maps, (0, 3, 2, 1)))

    def _grid(self, length: int) -> tuple[int, int]:
        """Returns (Y, X) of a map of so many tokens."""
        if self.causal:
            raise ConfigError(
                "causal = True: bilevel_routing sees the whole map, later tokens included. Set causal=False for maps in "
                "token form, or use a causal mixer."
            )
        side = math.isqrt(length)
        grid = (side, side) if self.grid is None else tuple(self.grid)
        if grid[0] * grid[1] != length:
            raise ConfigError(f"grid = {self.grid}: {length} tokens are no map of {grid[0]} x {grid[1]}. Set grid=(Y, X).")
        return grid

    def _check(self) -> None:
        """Checks the fields that the op does not see."""
        qk_dim = self.qk_dim or self.dim
        for name, size in (("dim", self.dim), ("qk_dim", qk_dim)):
            if size % self.num_heads:
                raise ConfigError(f"num_heads = {self.num_heads}: does not divide {name} = {size}. Choose a divisor.")
        if self.side_dwconv < 0 or (self.side_dwconv and self.side_dwconv % 2 == 0):
            raise ConfigError(f"side_dwconv = {self.side_dwconv}: not an odd kernel. Choose 3 or 5, or 0 for none.")
        if self.variant not in ("legacy", "nchw"):
            raise ConfigError(f"variant = {self.variant!r}: unknown. Use 'legacy' or 'nchw'.")
        if self.variant == "nchw":
            extras = {
                "kv_downsample_mode": self.kv_downsample_mode != "identity",
                "soft_routing": self.soft_routing,
                "diff_routing": self.diff_routing,
            }
            for name in (name for name, used in extras.items() if used):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: variant 'nchw' has no such option. Use variant='legacy'.")

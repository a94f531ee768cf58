"""Softmax attention inside the windows of a map, with a relative position bias on request."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attnlab import ops
from attnlab.errors import ConfigError, nearest
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.ops.bilevel_routing import from_regions, to_regions
from attnlab.ops.relative_bias import relative_bias

PADDINGS = ("refuse", "masked", "zeros")


class WindowAttention(nn.Module):
    """Every position attends to those of its window; windows do not overlap and start at the map's first corner.

    Parameters: `query`, `key`, `value` [D, N, H] and `out` [N, H, D], each with a bias, and `position_table`
    [N, 2 p - 1, 2 q - 1] where there is a position size.

    Attributes:
        dim: D.
        num_heads: N, divides D.
        window: rows and columns; None = the whole map.
        position_size: (p, q) of the table, or one number for both; it is resized where the window has another size (see
            `ops.relative_bias`). None = no bias.
        qkv_bias: biases of queries, keys and values.
        padding: what happens to a map that windows do not divide. "refuse" raises; "masked" fills it up and hides the
            padding's keys; "zeros" fills it up with zeros before the projections and hides nothing, so that the keys and
            values of the padding are the biases (as UniFormer does).
        implementation: of `ops.softmax_attention`.
        capture_attention: sow `attention` [B windows, N, S, S] to `intermediates`, S = positions of a window.
    """

    dim: int
    num_heads: int
    window: tuple[int, int] | None = None
    position_size: int | tuple[int, int] | None = None
    qkv_bias: bool = True
    padding: str = "refuse"
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, Y, X, D] to the same.

        Raises:
            ConfigError: heads that do not divide D, a window that does not divide the map, or an unknown padding.
        """
        batch, height, width, dim = x.shape
        window = (height, width) if self.window is None else tuple(self.window)
        below, right = (-size % step for size, step in zip((height, width), window, strict=True))
        self._check(height, width, window, bool(below or right))
        padded = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))
        grid = (padded.shape[1] // window[0], padded.shape[2] // window[1])
        tokens = to_regions(padded, window).reshape(-1, window[0] * window[1], dim)

        heads = (self.num_heads, dim // self.num_heads)
        types = {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}
        names = ("embed", "heads", "head_dim")
        q, k, v = (
            constrain(
                Projection((dim, *heads), names, name=name, use_bias=self.qkv_bias, **types)(tokens),
                "act_batch", None, "act_heads", None,
            )
            for name in ("query", "key", "value")
        )  # fmt: skip
        rules: dict[str, Any] = {}
        if self.position_size is not None:
            size = (self.position_size,) * 2 if isinstance(self.position_size, int) else self.position_size
            shape = (self.num_heads, *(2 * n - 1 for n in size))
            init = named(nn.initializers.normal(INIT_STD), "heads", None, None)
            rules["bias"] = relative_bias(self.param("position_table", init, shape, self.param_dtype), window)[None]
        if (below or right) and self.padding == "masked":
            there = np.pad(np.ones((1, height, width), bool), ((0, 0), (0, below), (0, right)))
            rules["kv_mask"] = jnp.asarray(np.tile(to_regions(there, window)[0], (batch, 1)))
        if self.capture_attention and self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", ops.attention_weights("softmax", q, k, **rules))
        y = ops.softmax_attention(q, k, v, implementation=self.implementation, **rules)
        y = Projection((*heads, dim), ("heads", "head_dim", "embed"), inputs=2, use_bias=True, name="out", **types)(y)
        y = from_regions(y.reshape(batch, -1, window[0] * window[1], dim), grid, window)
        return y[:, :height, :width]

    def _check(self, height: int, width: int, window: tuple[int, int], ragged: bool) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor.")
        if self.padding not in PADDINGS:
            raise ConfigError(f"padding = {self.padding!r}: unknown, {nearest(self.padding, PADDINGS)}")
        if ragged and self.padding == "refuse":
            raise ConfigError(
                f"window = {window}: does not divide a map of {height} x {width}. Choose divisors, another image size, or "
                f"padding='masked'."
            )

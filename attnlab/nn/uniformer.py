"""The two blocks of UniFormer (Li et al., 2022, arXiv 2201.09450, figure 3): position, relation aggregator, MLP."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.nn.norm import LayerNorm, LayerScale
from attnlab.nn.partitioning import constrain
from attnlab.nn.vision import MLP, BatchNorm, Conv, DropPath, GlobalAttention
from attnlab.nn.window_attention import WindowAttention


class LocalBlock(nn.Module):
    """x + position(x); x + relate(norm(x)); x + MLP(norm(x)), all of convolutions, with batch norm.

    `relate` is 1x1, depthwise, 1x1 with nothing in between: in the paper's words every channel is a head whose affinity of
    two positions depends on their offset alone.

    Parameters: `pos_embed`, `norm1`, `conv1`, `relation`, `conv2`, `norm2`, `fc1`, `fc2`.

    Attributes:
        hidden: width inside the MLP.
        kernel: side of the neighbourhood.
        dpe_kernel: of the depthwise convolution for position; 0 = none.
        drop_path: rate of both residual branches.
        batch_norm_epsilon: of the batch norms.
        batch_norm_momentum: share of a new batch in the running statistics.
    """

    hidden: int
    kernel: int = 5
    dpe_kernel: int = 3
    drop_path: float = 0.0
    batch_norm_epsilon: float = 1e-5
    batch_norm_momentum: float = 0.1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, D], or [B, F, Y, X, D] with frames, to the same."""
        dims, dim = x.ndim - 2, x.shape[-1]

        def conv(name: str, features: int, size: int, y: jax.Array, depthwise: bool = False) -> jax.Array:
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return Conv(features, (size,) * dims, depthwise=depthwise, name=name, **types)(y)

        def norm(name: str, y: jax.Array) -> jax.Array:
            layer = BatchNorm(self.batch_norm_epsilon, self.batch_norm_momentum, param_dtype=self.param_dtype, name=name)
            return layer(y, deterministic=deterministic)

        if self.dpe_kernel:
            x = x + conv("pos_embed", dim, self.dpe_kernel, x, depthwise=True)
        y = conv("conv1", dim, 1, norm("norm1", x))
        y = conv("conv2", dim, 1, conv("relation", dim, self.kernel, y, depthwise=True))
        x = x + DropPath(self.drop_path, name="drop1")(y, deterministic=deterministic)
        y = nn.gelu(conv("fc1", self.hidden, 1, norm("norm2", x)), approximate=False)
        y = conv("fc2", dim, 1, constrain(y, "act_batch", *(None,) * dims, "act_mlp"))
        x = x + DropPath(self.drop_path, name="drop2")(y, deterministic=deterministic)
        return constrain(x, "act_batch", *(None,) * dims, "act_embed")


class GlobalBlock(nn.Module):
    """x + position(x); x + attend(norm(x)); x + MLP(norm(x)), with layer norm.

    Parameters: `pos_embed`, `norm1`, `attention`, `norm2`, `mlp`; `scale1` and `scale2` with layer scale; `time_norm` and
    `time_attention` with `split`.

    Attributes:
        num_heads: N, divides D.
        hidden: width inside the MLP.
        window: attention stays inside windows of this side. A map that they do not divide is filled up with zeros after the
            norm, and the padding takes part in the attention, as published.
        split: video: attention over the frames of each place, then over the places of each frame. As published the residual
            of the second one starts from the block's input, before the first.
        dpe_kernel: of the depthwise convolution for position; 0 = none.
        qkv_bias: biases of queries, keys and values.
        layer_scale: initial value of the factors of both branches; 0 = none.
        drop_path: rate of the residual branches.
        norm_epsilon: of the layer norms.
        implementation: of `ops.softmax_attention`.
        capture_attention: sow the weights.
    """

    num_heads: int
    hidden: int
    window: int | None = None
    split: bool = False
    dpe_kernel: int = 3
    qkv_bias: bool = True
    layer_scale: float = 0.0
    drop_path: float = 0.0
    norm_epsilon: float = 1e-6
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, D], or [B, F, Y, X, D] with frames, to the same.

        Raises:
            ConfigError: windows of video, or time and space apart without frames.
        """
        dims, dim = x.ndim - 2, x.shape[-1]
        if (self.window and dims != 2) or (self.split and dims != 3):
            raise ConfigError(f"window = {self.window}, split = {self.split}: not for an input of shape {x.shape}.")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shared = {
            "dim": dim, "num_heads": self.num_heads, "qkv_bias": self.qkv_bias, "implementation": self.implementation,
            "capture_attention": self.capture_attention, **types,
        }  # fmt: skip

        def norm(name: str, y: jax.Array) -> jax.Array:
            return LayerNorm(self.norm_epsilon, self.param_dtype, name=name)(y)

        def branch(number: int, y: jax.Array) -> jax.Array:
            if self.layer_scale:
                y = LayerScale(self.layer_scale, self.param_dtype, name=f"scale{number}")(y)
            return DropPath(self.drop_path, name=f"drop{number}")(y, deterministic=deterministic)

        if self.dpe_kernel:
            x = x + Conv(dim, (self.dpe_kernel,) * dims, depthwise=True, name="pos_embed", **types)(x)
        if self.window:
            window = (self.window, self.window)
            y = WindowAttention(window=window, padding="zeros", name="attention", **shared)(norm("norm1", x))
        elif self.split:
            y = self._attend_split(x, norm, shared, deterministic)
        else:
            y = GlobalAttention(name="attention", **shared)(norm("norm1", x))
        x = x + branch(1, y)
        x = x + branch(2, MLP(self.hidden, name="mlp", **types)(norm("norm2", x)))
        return constrain(x, "act_batch", *(None,) * dims, "act_embed")

    def _attend_split(self, x: jax.Array, norm: Any, shared: dict[str, Any], deterministic: bool) -> jax.Array:
        batch, frames, height, width, dim = x.shape
        # Starts as the identity: values of zero, summed by ones.
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        over_time = GlobalAttention(qkv_init=zeros, out_init=ones, name="time_attention", **shared)
        y = norm("time_norm", x).transpose(0, 2, 3, 1, 4).reshape(-1, frames, dim)
        y = over_time(y).reshape(batch, height, width, frames, dim).transpose(0, 3, 1, 2, 4)
        y = x + DropPath(self.drop_path, name="time_drop")(y, deterministic=deterministic)
        y = norm("norm1", y).reshape(-1, height, width, dim)
        return GlobalAttention(name="attention", **shared)(y).reshape(x.shape)

"""Pieces of hierarchical image and video backbones: convolutions, batch norm, stems, downsampling, drop path, dense attention.

Maps have channels last, [B, Y, X, D] (or [B, F, Y, X, D] with frames); convolutions take as many spatial dimensions as their
kernel says. Everything maps a map to a map; `deterministic=True` means evaluation: running statistics, nothing dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.nn.norm import LayerNorm
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import Projection
from attnlab.ops.depthwise_conv import depthwise_conv

Padding = int | Literal["SAME", "VALID"] | Sequence[tuple[int, int]]


class Conv(nn.Module):
    """A convolution; parameters `kernel` [..., in, features] and `bias` [features].

    Attributes:
        features: output channels.
        kernel: its size, one number for each spatial dimension.
        stride: one number for all dimensions, or one for each.
        padding: zeros on every side; "SAME" (as TensorFlow: the odd row at the end), "VALID", or pairs by dimension.
            None = half the kernel, which keeps the size of the map at stride 1 and odd kernels.
        depthwise: every channel on its own; `features` is then also the number of input channels.
        kernel_init: initializer; None = that of PyTorch, uniform within 1 / sqrt(fan-in).
        bias_init: alike.
    """

    features: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: Padding | None = None
    depthwise: bool = False
    use_bias: bool = True
    kernel_init: Any = None
    bias_init: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, ..., C] to [B, ..., features].

        Raises:
            ConfigError: a map of other dimensions, or of other channels than a depthwise kernel has.
        """
        dims, channels = len(self.kernel), x.shape[-1]
        if x.ndim != dims + 2:
            raise ConfigError(f"kernel = {self.kernel}: the input {x.shape} does not have {dims} spatial dimensions.")
        if self.depthwise and channels != self.features:
            raise ConfigError(f"features = {self.features}: a depthwise convolution keeps the {channels} channels of its input.")
        dtype = self.dtype or x.dtype
        inputs = 1 if self.depthwise else channels
        uniform = _uniform(inputs * math.prod(self.kernel))
        # The kernels of depthwise convolutions are small: they are never cut.
        names = (None,) * (dims + 1) + (None if self.depthwise else "embed",)
        kernel = self.param(
            "kernel", named(self.kernel_init or uniform, *names), (*self.kernel, inputs, self.features), self.param_dtype
        )
        stride = (self.stride,) * dims if isinstance(self.stride, int) else tuple(self.stride)
        padding = [(size // 2, size // 2) for size in self.kernel] if self.padding is None else self.padding
        padding = [(padding, padding)] * dims if isinstance(padding, int) else padding
        if self.depthwise:
            y = depthwise_conv(x.astype(dtype), kernel.astype(dtype), stride=stride, padding=padding)
        else:
            layout = "N" + "DHW"[3 - dims :] + "C"
            numbers = (layout, layout[1:-1] + "IO", layout)
            y = jax.lax.conv_general_dilated(x.astype(dtype), kernel.astype(dtype), stride, padding, dimension_numbers=numbers)
        if self.use_bias:
            bias = self.param("bias", named(self.bias_init or uniform, "norm"), (self.features,), self.param_dtype)
            y = y + bias.astype(dtype)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis (Ioffe & Szegedy, 2015, arXiv 1502.03167); statistics in float32.

    Parameters `scale`, `bias` [D]; the running `mean` and `var` [D] are in the collection `batch_stats`, which has to be
    mutable in training. Under `jax.jit` the statistics are those of the whole batch, however a mesh cuts it.

    Attributes:
        epsilon: added to the variance.
        momentum: share of a new batch in the running statistics (PyTorch's convention; Flax's is one minus this).
        unbiased: keep the unbiased variance, as PyTorch; the batch itself is normalised by the biased one.
        axis_name: of `jax.pmap` or `jax.vmap`, to take the statistics over it too.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    unbiased: bool = True
    axis_name: str | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Normalises the last axis; the result has the type of x."""
        size = x.shape[-1]
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), (size,), self.param_dtype)
        bias = self.param("bias", named(nn.initializers.zeros_init(), "norm"), (size,), self.param_dtype)
        kept_mean = self.variable("batch_stats", "mean", jnp.zeros, (size,), jnp.float32)
        kept_var = self.variable("batch_stats", "var", jnp.ones, (size,), jnp.float32)
        wide = x.astype(jnp.float32)
        if deterministic:
            mean, var = kept_mean.value, kept_var.value
        else:
            axes, count = tuple(range(x.ndim - 1)), x.size // size
            mean = wide.mean(axes)
            mean = mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)
            var = jnp.square(wide - mean).mean(axes)
            if self.axis_name is not None:
                var, count = jax.lax.pmean(var, self.axis_name), jax.lax.psum(count, self.axis_name)
            if not self.is_initializing():
                kept = var * (count / max(count - 1, 1)) if self.unbiased else var
                kept_mean.value += self.momentum * (mean - kept_mean.value)
                kept_var.value += self.momentum * (kept - kept_var.value)
        y = (wide - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale.astype(jnp.float32))
        return (y + bias.astype(jnp.float32)).astype(x.dtype)


class MapNorm(nn.Module):
    """Layer norm over the channels of each position, or batch norm, by name; parameters as theirs.

    Attributes:
        kind: "layernorm" or "batchnorm".
        epsilon: None = 1e-6 for layer norm, 1e-5 for batch norm.
    """

    kind: str
    epsilon: float | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Normalises; the result has the type of x.

        Raises:
            ConfigError: unknown kind.
        """
        if self.kind == "layernorm":
            return LayerNorm(self.epsilon or 1e-6, self.param_dtype, name="layernorm")(x)
        if self.kind == "batchnorm":
            norm = BatchNorm(self.epsilon or 1e-5, param_dtype=self.param_dtype, name="batchnorm")
            return norm(x, deterministic=deterministic)
        raise ConfigError(f"norm = {self.kind!r}: unknown. Use 'layernorm' or 'batchnorm'.")


class ConvStem(nn.Module):
    """A stack of 3x3 convolutions, each with batch norm, GELU between them: pixels to the first map.

    Attributes:
        features: of each convolution.
        strides: of each convolution.
        last_norm: batch norm after the last one too.
        padding: as of `Conv`.
        norm: keyword arguments of `BatchNorm`.
        kernel_init: as of `Conv`.
        bias_init: alike.
    """

    features: tuple[int, ...]
    strides: tuple[int, ...]
    last_norm: bool = True
    padding: Padding | None = None
    norm: Any = None
    kernel_init: Any = None
    bias_init: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, C] to [B, y, x, D]."""
        last = len(self.features) - 1
        inits = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for i, (features, stride) in enumerate(zip(self.features, self.strides, strict=True)):
            x = Conv(features, (3, 3), stride, self.padding, name=f"conv_{i}", **inits, **types)(x)
            if i < last or self.last_norm:
                norm = BatchNorm(**dict(self.norm or {}), param_dtype=self.param_dtype, name=f"norm_{i}")
                x = norm(x, deterministic=deterministic)
            if i < last:
                x = nn.gelu(x, approximate=False)
        return x


class Downsample(nn.Module):
    """One strided convolution and a norm: patch embedding (kernel = stride), patch merging, or an overlapping 3x3.

    Attributes:
        features: output channels.
        kernel: of the convolution, one number for both dimensions of a map or one for each of (frames,) rows, columns.
        stride: alike.
        norm: "batchnorm", "layernorm" or None.
        norm_first: the norm comes before the convolution.
        epsilon: of the norm.
        padding: as of `Conv`; None = half the kernel, or nothing where the kernel is the stride.
    """

    features: int
    kernel: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 2
    norm: str | None = "batchnorm"
    norm_first: bool = False
    epsilon: float | None = None
    padding: Padding | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps [B, Y, X, C] to [B, y, x, D] (or [B, F, Y, X, C] to [B, f, y, x, D])."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        padding = 0 if self.padding is None and self.kernel == self.stride else self.padding
        kernel = (self.kernel,) * 2 if isinstance(self.kernel, int) else self.kernel
        conv = Conv(self.features, kernel, self.stride, padding, name="conv", **types)
        if self.norm is None:
            return conv(x)
        norm = MapNorm(self.norm, self.epsilon, self.param_dtype, name="norm")
        if self.norm_first:
            return conv(norm(x, deterministic=deterministic))
        return norm(conv(x), deterministic=deterministic)


def average_pool(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Pools [B, Y, X, D] to [B, ceil(Y / stride), ceil(X / stride), D] in float32; padding does not count in the means."""
    wide = x.astype(jnp.float32)
    return nn.avg_pool(wide, (size, size), (stride, stride), "SAME", count_include_pad=False).astype(x.dtype)


class DropPath(nn.Module):
    """Leaves out whole samples of a residual branch and scales the others up (Huang et al., 2016, arXiv 1603.09382)."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True, rate: jax.Array | None = None) -> jax.Array:
        """Drops samples of [B, ...] with the random stream `dropout`; `rate` overrides the field (scanned layers)."""
        if deterministic or (rate is None and self.rate == 0.0):
            return x
        keep = 1.0 - (self.rate if rate is None else rate)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


def drop_path_rates(maximum: float, depths: Sequence[int]) -> list[tuple[float, ...]]:
    """Returns the rate of every block by stage, from 0 at the first block linearly to `maximum` at the last."""
    rates = iter(np.linspace(0.0, maximum, sum(depths)).tolist())
    return [tuple(next(rates) for _ in range(depth)) for depth in depths]


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) at every position, with biases and the exact GELU.

    Attributes:
        hidden: width inside.
    """

    hidden: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        types = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        inner = Projection((x.shape[-1], self.hidden), ("embed", "mlp"), name="fc1", **types)(x)
        inner = nn.gelu(inner, approximate=False)
        return Projection((self.hidden, x.shape[-1]), ("mlp", "embed"), name="fc2", **types)(inner)


class GlobalAttention(nn.Module):
    """Softmax attention of all positions of a map to all others, with a depthwise convolution beside it on request.

    Parameters: `query`, `key`, `value` [D, N, H], `out` [N, H, D] with a bias, `lepe` (a `Conv`).

    Attributes:
        dim: D.
        num_heads: N, divides D.
        qkv_bias: biases of queries, keys and values.
        qkv_init: initializer of the kernels of queries, keys and values; None = that of `Projection`.
        out_init: the same of `out`.
        lepe: what the depthwise convolution sees whose result is added before `out` (Dong et al., 2021, arXiv
            2107.00652: "locally-enhanced positional encoding"): "value", "input", or None = there is none.
        side_dwconv: its kernel.
        implementation: of `ops.softmax_attention`.
        capture_attention: sow `attention` [B, N, T, T] to `intermediates`, T = positions of the map row by row.
    """

    dim: int
    num_heads: int
    qkv_bias: bool = False
    lepe: str | None = None
    side_dwconv: int = 5
    qkv_init: Any = None
    out_init: Any = None
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, Y, X, D] (any spatial dimensions) to the same.

        Raises:
            ConfigError: heads that do not divide D, or an unknown `lepe`.
        """
        if self.dim % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor.")
        if self.lepe not in (None, "input", "value"):
            raise ConfigError(f"lepe = {self.lepe!r}: unknown. Use 'input', 'value' or None.")
        dtype = self.dtype or x.dtype
        heads = (self.num_heads, self.dim // self.num_heads)
        types = {"dtype": dtype, "param_dtype": self.param_dtype}
        names = ("embed", "heads", "head_dim")
        tokens = x.reshape(x.shape[0], -1, self.dim)
        q, k, v = (
            constrain(
                Projection((self.dim, *heads), names, use_bias=self.qkv_bias, kernel_init=self.qkv_init, name=name, **types)(tokens),
                "act_batch", None, "act_heads", None,
            )
            for name in ("query", "key", "value")
        )  # fmt: skip
        if self.capture_attention and self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", ops.attention_weights("softmax", q, k))
        y = ops.softmax_attention(q, k, v, implementation=self.implementation)
        if self.lepe is not None:
            beside = x if self.lepe == "input" else v.reshape(x.shape)
            kernel = (self.side_dwconv,) * (x.ndim - 2)
            y = y + Conv(self.dim, kernel, depthwise=True, name="lepe", **types)(beside).reshape(y.shape)
        out = Projection(
            (*heads, self.dim), ("heads", "head_dim", "embed"), inputs=2, use_bias=True, kernel_init=self.out_init,
            name="out", **types,
        )  # fmt: skip
        return out(y).reshape(x.shape)


def _uniform(fan_in: int) -> Any:
    """PyTorch's start of convolutions: uniform within 1 / sqrt(fan-in), kernel and bias."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)

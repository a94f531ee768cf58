"""What the Titans mixers share: their fields, the parameters of the neural memory, its projections and its prefix.

"Titans: Learning to Memorize at Test Time" (Behrouz, Zhong & Mirrokni, 2024, arXiv 2501.00663).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab.errors import ConfigError
from attnlab.nn.partitioning import named
from attnlab.nn.projection import INIT_STD
from attnlab.ops.neural_memory import MemoryResult, MemoryState, fresh_memory, neural_memory

_GATE_BIAS = (0.0, 0.5, -2.0)  # theta, eta, alpha at initialisation, before the sigmoid
L2_EPSILON = 1e-6


@struct.dataclass
class TitansCache:
    """What a Titans mixer keeps of the tokens so far; its size does not depend on their number.

    Attributes:
        memory: weights and momentum, float32.
        conv: [B, width - 1, 3 E], the last inputs of the convolution.
        keys: tuple of [B, W, N, H], keys of the attention's window or segment (in the module's type).
        values: the same of the values.
        seen: [B] int32, tokens so far; 0 = the memory is still to start from its parameters.
    """

    memory: MemoryState
    conv: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    seen: jax.Array


class Kernel(nn.Module):
    """A kernel, and maybe a bias, handed out as arrays: for maps inside `jax.lax.scan`, where no module may be called."""

    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    std: float = INIT_STD
    bias: tuple[float, ...] | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Any:
        """Returns the kernel, or (kernel, bias [len(bias), last axis])."""
        kernel = self.param("kernel", named(nn.initializers.normal(self.std), *self.names), self.shape, self.param_dtype)
        if self.bias is None:
            return kernel

        def fill(key, shape, dtype):
            return jnp.broadcast_to(jnp.asarray(self.bias, dtype)[:, None], shape)

        return kernel, self.param("bias", named(fill, "norm", "norm"), (len(self.bias), self.shape[-1]), self.param_dtype)


class Scale(nn.Module):
    """A vector of ones to start with, handed out as an array."""

    size: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns it."""
        return self.param("scale", named(nn.initializers.ones_init(), "norm"), (self.size,), self.param_dtype)


class MemoryParameters(NamedTuple):
    """Arrays of a memory: projections [3, D, N, H], gates [D, 3, N] and [3, N], filters [W, 3, N, H] or None, weights [N, I, O]."""

    project: tuple[jax.Array, jax.Array, jax.Array]
    gate: jax.Array
    gate_bias: jax.Array
    filters: jax.Array | None
    weights: tuple[jax.Array, ...]


class Projected(NamedTuple):
    """Inputs of the memory: q, k, v [B, T, N, H]; theta, eta, alpha [B, T, N] float32; what the convolution read [B, T, 3 N H]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: tuple[jax.Array, jax.Array, jax.Array]
    unfiltered: jax.Array | None


class TitansMixer(nn.Module):
    """Fields and shared parts of the Titans mixers.

    The memory: q, k, v = SiLU(conv(x W)), q and k normalised to length 1; theta = theta_max sigmoid(.), eta and alpha
    sigmoid(.) of a linear map of x with a bias, per token. Its update is `ops.neural_memory`; float32 inside.

    Where a mesh splits the sequence (axis `context`): chunks are written one after the other and their updates do not compose, so
    every device of that axis gets all tokens of its rows and runs all their chunks (in MAC the loop over segments is left to XLA).
    The result is that of one device, and is split again; the memory gains nothing from the axis, only what stands around it does.

    Parameters of the memory: `memory_query`, `memory_key`, `memory_value` [D, M, D/M], `memory_gate` [D, 3, M] with a bias,
    `memory_conv` [W, 3, M, D/M], `memory_w0` .. [M, in, out]; of the prefix: `persistent` [P, D].

    Attributes:
        dim: D.
        num_heads: N, of the attention.
        causal: only True: the memory has no other order.
        memory_heads: M, independent memories of width D / M (the paper has one).
        memory_depth: layers of the memory.
        memory_expansion: its inner width over its outer one.
        chunk_size: tokens per chunk of the memory; gradients are taken at the weights of its start. Part of the rule.
        momentum: False = none (ablation).
        forgetting: False = none (ablation).
        theta_max: largest step size.
        num_persistent: P, learnt tokens in front of every sequence.
        dtype: of the projections and the attention.
        param_dtype: of the parameters.
    """

    dim: int
    num_heads: int = 1
    causal: bool = True
    memory_heads: int = 1
    memory_depth: int = 2
    memory_expansion: float = 4.0
    chunk_size: int = 64
    momentum: bool = True
    forgetting: bool = True
    theta_max: float = 0.2
    num_persistent: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def check(self) -> None:
        """Refuses fields that do not fit.

        Raises:
            ConfigError: the first of them.
        """
        if not self.causal:
            raise ConfigError("causal = False: the neural memory is written in the order of the tokens. Set causal=True.")
        for field in ("memory_heads", "num_heads"):
            heads = getattr(self, field)
            if heads < 1 or self.dim % heads:
                raise ConfigError(f"{field} = {heads}: does not divide dim = {self.dim}. Choose a divisor.")
        for field in ("memory_depth", "chunk_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} = {getattr(self, field)}: must be at least 1. Set a positive number.")
        if self.num_persistent < 0:
            raise ConfigError(f"num_persistent = {self.num_persistent}: must not be negative. Set 0 for none.")

    @nn.nowrap
    def memory_widths(self) -> list[int]:
        """Widths of the memory's layers, input and output included."""
        width = self.dim // self.memory_heads
        return [width, *(int(width * self.memory_expansion),) * (self.memory_depth - 1), width]

    @nn.nowrap
    def memory_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes [M, I, O] of the memory's weights."""
        widths = self.memory_widths()
        return [(self.memory_heads, *pair) for pair in itertools.pairwise(widths)]

    @nn.nowrap
    def empty_memory(self, batch: int) -> MemoryState:
        """Returns a state of zeros, to be replaced at the first token."""
        return fresh_memory([jnp.zeros(shape, jnp.float32) for shape in self.memory_shapes()], batch)

    @nn.nowrap
    def memory_flops(self) -> float:
        """Forward FLOPs per token of reading and writing, beyond twice the parameters."""
        size = sum(heads * i * o for heads, i, o in self.memory_shapes())
        inside = sum(heads * (i + o) for heads, i, o in self.memory_shapes())
        return 8.0 * size + 2.0 * self.chunk_size * inside

    def memory_parameters(self, conv_width: int = 0) -> MemoryParameters:
        """Declares the memory's parameters; to be called once, in a compact method."""
        heads, width = self.memory_heads, self.dim // self.memory_heads
        names = ("embed", "heads", "head_dim")
        shape, types = (self.dim, heads, width), {"param_dtype": self.param_dtype}
        std = self.dim**-0.5
        project = tuple(Kernel(shape, names, std, name=f"memory_{name}", **types)() for name in ("query", "key", "value"))
        gate, bias = Kernel((self.dim, 3, heads), ("embed", None, None), bias=_GATE_BIAS, name="memory_gate", **types)()
        filters = None
        if conv_width:
            filters = Kernel(
                (conv_width, 3, heads, width), (None, None, "heads", "head_dim"), conv_width**-0.5, name="memory_conv", **types
            )()
        weights = tuple(
            Kernel(shape, ("heads", None, None), shape[1] ** -0.5, name=f"memory_w{i}", **types)()
            for i, shape in enumerate(self.memory_shapes())
        )
        return MemoryParameters(project, gate, bias, filters, weights)

    def persistent_tokens(self) -> jax.Array | None:
        """Declares P; [1, P, D], or None without."""
        if not self.num_persistent:
            return None
        init = named(nn.initializers.normal(INIT_STD), None, "embed")
        return self.param("persistent", init, (self.num_persistent, self.dim), self.param_dtype)[None]

    @nn.nowrap
    def project(self, p: MemoryParameters, x: jax.Array, since: jax.Array | None = None, tail: jax.Array | None = None) -> Projected:
        """Queries, keys, values and gates of tokens [B, T, D].

        Args:
            p: the parameters.
            x: tokens.
            since: [B, T] tokens of the same segment before each (for the convolution).
            tail: [1 or B, W - 1, 3 N H], what the convolution reads before a segment's first token; None = zeros.
        """
        dtype = self.dtype or x.dtype
        qkv = jnp.stack([_map("btd,dnh->btnh", x, kernel, dtype) for kernel in p.project], axis=2)
        unfiltered = None
        if p.filters is not None:
            unfiltered = qkv.reshape(*x.shape[:2], -1)
            qkv = causal_conv(unfiltered, p.filters.reshape(len(p.filters), -1).astype(dtype), since, tail).reshape(qkv.shape)
        q, k, v = (nn.silu(qkv[:, :, i]) for i in range(3))
        gates = _map("btd,dgn->btgn", x, p.gate, jnp.float32) + p.gate_bias.astype(jnp.float32)
        theta, eta, alpha = (nn.sigmoid(gates[:, :, i]) for i in range(3))
        if not self.forgetting:
            alpha = jnp.zeros_like(alpha)
        return Projected(unit(q), unit(k), v, (self.theta_max * theta, eta, alpha), unfiltered)

    @nn.nowrap
    def remember(
        self,
        p: MemoryParameters,
        inputs: Projected,
        *,
        begin: MemoryState | None = None,
        begin_count: int = 0,
        state: MemoryState | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> MemoryResult:
        """Writes and reads; heads merged in the result's y [B, T, D]. Other arguments as in `ops.neural_memory`."""
        result = neural_memory(
            inputs.q, inputs.k, inputs.v, *inputs.gates, p.weights, chunk_size=self.chunk_size, momentum=self.momentum,
            begin=begin, begin_count=begin_count, state=state, mask=mask, segment_ids=segment_ids,
        )  # fmt: skip
        return result._replace(y=result.y.reshape(*result.y.shape[:2], self.dim))


class Prefix(NamedTuple):
    """What the persistent tokens leave behind, batch 1.

    Attributes:
        x: [1, P, D] in the module's type, or None without.
        y: [1, P, D], what the memory read for them.
        state: of the memory after them.
        tail: [1, W - 1, 3 N H], the convolution's inputs before the next token, or None.
    """

    x: jax.Array | None
    y: jax.Array | None
    state: MemoryState
    tail: jax.Array | None


def read_prefix(mixer: TitansMixer, p: MemoryParameters, persistent: jax.Array | None, dtype: Any) -> Prefix:
    """Runs the memory over the persistent tokens: every sequence goes on from there."""
    width = 0 if p.filters is None else len(p.filters) - 1
    tail = jnp.zeros((1, width, 3 * mixer.dim), dtype) if width else None
    if persistent is None:
        return Prefix(None, None, fresh_memory(p.weights, 1), tail)
    x = persistent.astype(dtype)
    since = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    inputs = mixer.project(p, x, since)
    result = mixer.remember(p, inputs)
    if width:
        tail = jnp.concatenate([tail, inputs.unfiltered], axis=1)[:, -width:]
    return Prefix(x, result.y, result.state, tail)


def starting(seen: jax.Array, state: MemoryState, begin: MemoryState) -> MemoryState:
    """The state of a cache, or `begin` for rows that have seen nothing yet."""
    return jax.tree.map(lambda a, b: jnp.where(seen.reshape(-1, *(1,) * (a.ndim - 1)) > 0, a, b), state, begin)


def causal_conv(x: jax.Array, filters: jax.Array, since: jax.Array, tail: jax.Array | None) -> jax.Array:
    """Depthwise causal convolution inside segments: y_t = sum_j filters[-1 - j] x_{t - j}.

    Args:
        x: [B, T, E].
        filters: [W, E].
        since: [B, T], tokens of the segment before each.
        tail: [1 or B, W - 1, E], what comes before a segment's first token; None = zeros.
    """
    batch, length, features = x.shape
    width = len(filters)
    tail = jnp.zeros((1, width - 1, features), x.dtype) if tail is None else tail.astype(x.dtype)
    tail = jnp.broadcast_to(tail, (batch, *tail.shape[1:]))
    y = x * filters[-1]
    for lag in range(1, width):
        shifted = jnp.pad(x, ((0, 0), (lag, 0), (0, 0)))[:, :length]
        at = jnp.clip(width - 1 - lag + since, 0, width - 2)
        earlier = jnp.take_along_axis(tail, at[..., None], axis=1)
        y = y + jnp.where((since >= lag)[..., None], shifted, earlier) * filters[-1 - lag]
    return y


def unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-6) over the last axis, in float32; finite gradients at 0."""
    wide = x.astype(jnp.float32)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, L2_EPSILON**2))).astype(x.dtype)


def rms(x: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / rms(x) * scale in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon) * scale.astype(jnp.float32)


def _map(equation: str, x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(equation, x.astype(dtype), kernel.astype(dtype))

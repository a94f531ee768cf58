"""Mixers whose memory is a state of fixed size: what they share, gated linear attention, and the gated delta network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab.errors import ConfigError, nearest
from attnlab.nn.norm import RMSNorm
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import Projection
from attnlab.ops.linear_scan import CHUNK, gated_delta_scan, gated_linear_scan, l2_normalize, valid_tokens
from attnlab.ops.short_convolution import short_convolution


@struct.dataclass
class StateCache:
    """What a linear mixer remembers of the tokens so far; its size does not depend on their number.

    Attributes:
        state: [B, S, N, Hk, Hv] float32, S states per head.
        tails: the last inputs [B, W - 1, C] of each short convolution.
        index: int32 scalar, tokens so far.
    """

    state: jax.Array
    tails: tuple[jax.Array, ...]
    index: jax.Array


class StateMixer(nn.Module):
    """Base of the linear mixers: widths, cache, decays, and the way from the op's result to y.

    Attributes:
        dim: D.
        num_heads: N, of queries and keys.
        head_dim: Hk; None = D / N.
        num_v_heads: of values, a multiple of N: head n of queries, keys and decays serves value heads n g .. n g + g - 1;
            None = N.
        expand_v: Hv / Hk.
        causal: must be True: a state knows the past only.
        use_output_gate: multiply the normalised result by SiLU of a gate.
        use_short_conv: a causal depthwise convolution on projections.
        conv_size: its taps W.
        norm_eps: of the RMSNorm over Hv.
        chunk_size: tokens per chunk of the scan, a power of two.
        implementation: of the op, for whole sequences; None = the best that can run, as always with a cache.
    """

    dim: int
    num_heads: int
    head_dim: int | None = None
    num_v_heads: int | None = None
    expand_v: float = 1.0
    causal: bool = True
    use_output_gate: bool = True
    use_short_conv: bool = False
    conv_size: int = 4
    norm_eps: float = 1e-5
    chunk_size: int = CHUNK
    implementation: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def widths(self) -> tuple[int, int, int]:
        """Returns (Hk, value heads, Hv).

        Raises:
            ConfigError: heads that do not fit, or `causal=False`.
        """
        if not self.causal:
            raise ConfigError("causal = False: a state knows the past only. Set causal=True, or use another mixer.")
        if not self.head_dim and self.dim % self.num_heads:
            raise ConfigError(
                f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor, or set head_dim."
            )
        head_dim = self.head_dim or self.dim // self.num_heads
        v_heads = self.num_v_heads or self.num_heads
        if v_heads % self.num_heads:
            raise ConfigError(
                f"num_v_heads = {v_heads}: is not a multiple of num_heads = {self.num_heads}. Choose a multiple."
            )
        width = head_dim * self.expand_v
        if width != int(width) or width < 1:
            raise ConfigError(f"expand_v = {self.expand_v}: {head_dim} times that is not a width. Choose another.")
        return head_dim, v_heads, int(width)

    @nn.nowrap
    def num_states(self) -> int:
        """Returns S, the states per head."""
        return 1

    @nn.nowrap
    def conv_channels(self) -> tuple[int, ...]:
        """Returns the channels of each short convolution."""
        return ()

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> StateCache:
        """Returns an empty cache; `max_len` does not matter to its size."""
        del max_len
        head_dim, v_heads, width = self.widths()
        return StateCache(
            state=jnp.zeros((batch, self.num_states(), v_heads, head_dim, width), jnp.float32),
            tails=tuple(
                jnp.zeros((batch, self.conv_size - 1, channels), self.dtype or jnp.float32)
                for channels in self.conv_channels()
            ),
            index=jnp.zeros((), jnp.int32),
        )

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of the chunked scan: products within a chunk, reading and writing the state."""
        head_dim, v_heads, width = self.widths()
        chunk = min(self.chunk_size, length)
        return 2.0 * v_heads * (chunk * (head_dim + width) + 2 * head_dim * width)

    @nn.nowrap
    def check(self, x: jax.Array, cache: StateCache | None, segment_ids: jax.Array | None) -> None:
        """Refuses a cache that was not made for this call.

        Raises:
            ConfigError: another batch, type or shape, or segments with a cache.
        """
        if cache is None:
            return
        if segment_ids is not None:
            raise ConfigError("segment_ids with a cache: rows of a cache are single sequences. Pass one of the two.")
        batch, dtype = x.shape[0], jnp.dtype(self.dtype or x.dtype)
        rows = cache.state.shape[0]
        if rows != batch:
            raise ConfigError(f"cache of batch {rows} used with batch {batch}. Make it with init_cache({batch}, max_len).")
        want = jax.eval_shape(lambda: self.init_cache(batch, 1))
        if cache.state.shape != want.state.shape or [t.shape for t in cache.tails] != [t.shape for t in want.tails]:
            raise ConfigError(f"cache of state {cache.state.shape} used with a module of {want.state.shape}. Remake it.")
        for leaf, expected in ((cache.state, jnp.float32), *((tail, dtype) for tail in cache.tails)):
            if leaf.dtype != expected:
                raise ConfigError(f"cache of type {leaf.dtype} used where the module needs {jnp.dtype(expected)}. Remake it.")

    def heads(self, x: jax.Array, name: str, heads: int, width: int) -> jax.Array:
        """Projects to [B, T, heads, width]."""
        return Projection((x.shape[-1], heads, width), ("embed", "heads", "head_dim"), name=name, **self.types(x))(x)

    def low_rank(self, x: jax.Array, name: str, inner: int, heads: int, width: int, use_bias: bool = False) -> jax.Array:
        """Projects to [B, T, heads, width] through `inner` channels: parameters `{name}_down`, `{name}_up`."""
        types = self.types(x)
        x = Projection((x.shape[-1], inner), ("embed", "norm"), name=f"{name}_down", **types)(x)
        names = ("norm", "heads", "head_dim")
        return Projection((inner, heads, width), names, use_bias=use_bias, name=f"{name}_up", **types)(x)

    def convolve(
        self, x: jax.Array, name: str, cache: StateCache | None, place: int, segment_ids: jax.Array | None, valid: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the short convolution number `place` over [B, T, heads, width]; returns it and the new tail."""
        batch, length, heads, width = x.shape
        bound = self.conv_size**-0.5
        init = named(_uniform(-bound, bound), "heads", "head_dim", "norm")
        kernel = self.param(name, init, (heads, width, self.conv_size), self.param_dtype)
        tail = None if cache is None else cache.tails[place]
        y, tail = short_convolution(
            x.reshape(batch, length, -1), kernel.reshape(-1, self.conv_size), tail=tail, segment_ids=segment_ids, valid=valid
        )
        return y.reshape(x.shape), tail

    def delta_gates(self, x: jax.Array, copies: int, v_heads: int, negative: bool) -> tuple[jax.Array, jax.Array]:
        """Log decay -exp(a_log) softplus(a + dt_bias) and beta = sigmoid(b) (twice that), [B, T, copies, heads] float32."""
        shape = (x.shape[-1], copies, v_heads)
        names = ("embed", "norm", "heads")
        a, b = (Projection(shape, names, name=name, **self.types(x))(x).astype(jnp.float32) for name in ("a", "b"))
        a_log = self.param("a_log", named(_log_uniform, "norm", "norm"), shape[1:], jnp.float32)
        dt_bias = self.param("dt_bias", named(_time_step, "norm", "norm"), shape[1:], jnp.float32)
        return -jnp.exp(a_log) * jax.nn.softplus(a + dt_bias), jax.nn.sigmoid(b) * (2.0 if negative else 1.0)

    def finish(self, x: jax.Array, out: jax.Array, gate: jax.Array | None) -> jax.Array:
        """RMSNorm over Hv, the gate, and the output projection: [B, T, heads, Hv] to [B, T, D]."""
        out = RMSNorm(self.norm_eps, self.param_dtype, name="norm")(out)
        if gate is not None:
            out = out * nn.silu(gate)
        shape = (*out.shape[2:], self.dim)
        y = Projection(shape, ("heads", "head_dim", "embed"), inputs=2, name="out", **self.types(x))(out)
        return constrain(y, "act_batch", "act_seq", "act_embed")

    @nn.nowrap
    def types(self, x: jax.Array) -> dict[str, Any]:
        """Returns the types of projections."""
        return {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}

    @nn.nowrap
    def lay_out(self, *arrays: jax.Array) -> list[jax.Array]:
        """Constrains [B, T, heads, width] arrays."""
        return [constrain(x, "act_batch", "act_seq", "act_heads", None) for x in arrays]


class GatedLinearAttention(StateMixer):
    """Gated linear attention (Yang et al., 2023, arXiv 2312.06635): `ops.gated_linear_scan` with a low-rank decay gate.

    Attributes:
        q_activation: of queries: "none", "silu" or "softmax" (over Hk).
        k_activation: of keys.
        v_activation: of values, "none" or "silu".
        gate_low_rank_dim: width inside the decay gate.
        gate_logit_normalizer: log decay = logsigmoid(gate) / this.
    """

    q_activation: str = "none"
    k_activation: str = "none"
    v_activation: str = "none"
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0

    @nn.nowrap
    def conv_channels(self) -> tuple[int, ...]:
        """Queries, keys and values."""
        head_dim, v_heads, width = self.widths()
        return (self.num_heads * head_dim,) * 2 + (v_heads * width,) if self.use_short_conv else ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: StateCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, StateCache | None]:
        """The mixer contract (`attnlab.nn.mixer`); `positions` play no part: the order is that of the tokens."""
        del positions, deterministic
        head_dim, v_heads, width = self.widths()
        self.check(x, cache, segment_ids)
        valid = valid_tokens(x.shape[:2], segment_ids, mask)
        q, k = self.heads(x, "query", self.num_heads, head_dim), self.heads(x, "key", self.num_heads, head_dim)
        v = self.heads(x, "value", v_heads, width)
        tails: tuple[jax.Array, ...] = ()
        if self.use_short_conv:
            sides = [
                self.convolve(side, f"{name}_conv", cache, place, segment_ids, valid)
                for place, (name, side) in enumerate((("query", q), ("key", k), ("value", v)))
            ]
            (q, k, v), tails = zip(*sides, strict=True)
        q, k = activate(q, self.q_activation), activate(k, self.k_activation)
        v = activate(v, self.v_activation)
        gate = self.low_rank(x, "decay", self.gate_low_rank_dim, self.num_heads, head_dim, use_bias=True)
        decay = jax.nn.log_sigmoid(gate.astype(jnp.float32)) / self.gate_logit_normalizer
        times = v_heads // self.num_heads
        q, k, decay, v = self.lay_out(*(jnp.repeat(side, times, axis=2) for side in (q, k, decay)), v)
        out, state = gated_linear_scan(
            q,
            k,
            v,
            decay,
            initial_state=None if cache is None else cache.state[:, 0],
            segment_ids=segment_ids,
            mask=mask,
            chunk_size=self.chunk_size,
            implementation=self.implementation if cache is None else None,
        )
        gate = self.heads(x, "gate", v_heads, width) if self.use_output_gate else None
        y = self.finish(x, out, gate)
        return y, None if cache is None else StateCache(state[:, None], tuple(tails), cache.index + x.shape[1])


class GatedDeltaNet(StateMixer):
    """The gated delta network (Yang et al., 2024, arXiv 2412.06464): `ops.gated_delta_scan` behind short convolutions.

    Queries, keys and values are convolved and pass SiLU; queries and keys are L2-normalised.

    Attributes:
        allow_neg_eigval: beta in [0, 2] instead of [0, 1].
    """

    use_short_conv: bool = True
    expand_v: float = 2.0
    allow_neg_eigval: bool = False

    @nn.nowrap
    def conv_channels(self) -> tuple[int, ...]:
        """Queries, keys and values."""
        head_dim, v_heads, width = self.widths()
        return (self.num_heads * head_dim,) * 2 + (v_heads * width,) if self.use_short_conv else ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: StateCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, StateCache | None]:
        """The mixer contract (`attnlab.nn.mixer`); `positions` play no part: the order is that of the tokens."""
        del positions, deterministic
        head_dim, v_heads, width = self.widths()
        self.check(x, cache, segment_ids)
        valid = valid_tokens(x.shape[:2], segment_ids, mask)
        sides = {name: self.heads(x, name, self.num_heads, head_dim) for name in ("query", "key")}
        sides["value"] = self.heads(x, "value", v_heads, width)
        tails = []
        if self.use_short_conv:
            for place, name in enumerate(sides):
                sides[name], tail = self.convolve(sides[name], f"{name}_conv", cache, place, segment_ids, valid)
                tails.append(tail)
        q, k, v = (nn.silu(side) for side in sides.values())
        decay, beta = self.delta_gates(x, 1, v_heads, self.allow_neg_eigval)
        times = v_heads // self.num_heads
        q, k = (l2_normalize(jnp.repeat(side, times, axis=2)) for side in (q, k))
        q, k, v = self.lay_out(q, k, v)
        out, state = gated_delta_scan(
            q,
            k,
            v,
            decay[:, :, 0],
            beta[:, :, 0],
            initial_state=None if cache is None else cache.state[:, 0],
            segment_ids=segment_ids,
            mask=mask,
            chunk_size=self.chunk_size,
            implementation=self.implementation if cache is None else None,
        )
        gate = self.heads(x, "gate", v_heads, width) if self.use_output_gate else None
        y = self.finish(x, out, gate)
        return y, None if cache is None else StateCache(state[:, None], tuple(tails), cache.index + x.shape[1])


def activate(x: jax.Array, name: str) -> jax.Array:
    """Applies "none", "silu" or "softmax" (over the last axis, in float32).

    Raises:
        ConfigError: another name.
    """
    if name == "none":
        return x
    if name == "silu":
        return nn.silu(x)
    if name == "softmax":
        return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype)
    raise ConfigError(f"activation = {name!r}: unknown, {nearest(name, ('none', 'silu', 'softmax'))}")


def _uniform(low: float, high: float) -> Any:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def _log_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """log U(0, 16)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-6, 16.0))


def _time_step(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The inverse softplus of exp U(log 0.001, log 0.1), at least 1e-4."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(0.1)))
    step = jnp.maximum(step, 1e-4)
    return step + jnp.log(-jnp.expm1(-step))

"""Titans: a neural memory learned at test time, alone (LMM) and beside attention (MAC, MAG, MAL).

"Titans: Learning to Memorize at Test Time" (Behrouz, Zhong & Mirrokni, 2024, arXiv 2501.00663), sections 3 and 4. The paper
leaves parts of the blocks open; the readings here are strictly causal (what MAC reads for a token is seen from that token
on, never before). Every mixer carries a cache of fixed size; the full pass, any chunking and token by token agree. Padding
is as if it were not there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import Projection
from attnlab.nn.ragged import check_cache, last_tokens, past_groups, rows_of
from attnlab.nn.titans_memory import (
    Kernel,
    Scale,
    TitansCache,
    TitansMixer,
    read_prefix,
    rms,
    starting,
)
from attnlab.ops.local_attention import local_attention
from attnlab.ops.neural_memory import MemoryState, enter_chunk, memory_chunk, read_memory
from attnlab.ops.sharding import shard_rows
from attnlab.ops.softmax import softmax_attention
from attnlab.ops.tiles import scan_tiles


class TitansLMM(TitansMixer):
    """The memory as a mixer of its own.

    With `output_gate`: y = (rms(m) * (x W_gate)) W_out, m what the memory reads for x ("a normalisation and a gate with a
    linear layer before the final output projection"); else y = m. `num_heads` is not used.

    Attributes:
        conv_width: of the depthwise causal convolutions of q, k and v; 0 = none. The paper has them, 4 is usual.
        output_gate: norm, gate and projection of the result; parameters `norm`, `gate`, `out`.
    """

    conv_width: int = 0
    output_gate: bool = True

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> TitansCache:
        """Returns an empty cache; its size does not depend on `max_len`."""
        del max_len
        self.check()
        return _empty_cache(self, batch, self.conv_width, 0, 0)

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token beyond the parameters'."""
        del length
        return self.memory_flops()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: TitansCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, TitansCache | None]:
        """The mixer contract (`attnlab.nn.mixer`); `positions` are not used.

        Raises:
            ConfigError: fields, cache or segments that do not fit.
        """
        del positions, deterministic
        self.check()
        dtype = self.dtype or x.dtype
        check_cache(cache, *_about(cache), x.shape[0], segment_ids, dtype)
        rows = rows_of(x, segment_ids, mask)
        p = self.memory_parameters(self.conv_width)
        prefix = read_prefix(self, p, self.persistent_tokens(), dtype)
        y, memory, conv, _ = _memory_over(self, p, rows, prefix, cache)
        if self.output_gate:
            types = {"dtype": dtype, "param_dtype": self.param_dtype}
            gate = Projection((self.dim, self.dim), ("embed", "mlp"), name="gate", **types)(rows.x)
            y = rms(y, Scale(self.dim, self.param_dtype, name="norm")()).astype(dtype) * gate
            y = Projection((self.dim, self.dim), ("mlp", "embed"), name="out", **types)(y)
        y = constrain(rows.restore(y.astype(dtype)), "act_batch", "act_seq", "act_embed")
        if cache is None:
            return y, None
        return y, TitansCache(memory, conv, (), (), cache.seen + rows.count)


class _TitansWindow(TitansMixer):
    """MAG and MAL: the memory over [P; x], and attention in a sliding window.

    Attributes:
        window: tokens that the attention sees, the present one included.
        conv_width: as in `TitansLMM`.
    """

    window: int = 64
    num_persistent: int = 4
    conv_width: int = 0

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> TitansCache:
        """Returns an empty cache; its size does not depend on `max_len`."""
        del max_len
        self.check()
        return _empty_cache(self, batch, self.conv_width, 1, self.window - 1)

    @nn.nowrap
    def check(self) -> None:
        """Refuses fields that do not fit, by ConfigError."""
        super().check()
        if self.window < 1:
            raise ConfigError(f"window = {self.window}: a token sees at least itself. Set 1 or more.")

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token beyond the parameters'."""
        seen = self.num_persistent + min(self.window or length, (length + 1) / 2)
        return self.memory_flops() + 4.0 * self.dim * seen

    def attention_parameters(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Declares `query`, `key`, `value` [D, N, H]."""
        shape = (self.dim, self.num_heads, self.dim // self.num_heads)
        names, std = ("embed", "heads", "head_dim"), self.dim**-0.5
        return tuple(Kernel(shape, names, std, param_dtype=self.param_dtype, name=name)() for name in ("query", "key", "value"))

    def windowed(self, inputs, prefix, rows, cache, prefix_mask) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Sliding-window attention over [prefix; inputs]: (y [B, T, D], keys and values to keep)."""
        dtype = self.dtype or inputs.dtype
        kernels = [kernel.astype(dtype) for kernel in self.attention_parameters()]
        q, k, v = (jnp.einsum("btd,dnh->btnh", inputs.astype(dtype), kernel) for kernel in kernels)
        q = constrain(q, "act_batch", "act_seq", "act_heads", None)
        groups, pasts = rows.group, (None, None)
        if cache is not None:
            pasts = [last_tokens(past, new, rows.count) for past, new in ((cache.keys[0], k), (cache.values[0], v))]
            k, v = (jnp.concatenate([past, new], axis=1) for past, new in ((cache.keys[0], k), (cache.values[0], v)))
            groups = jnp.concatenate([past_groups(cache.seen, self.window - 1), groups], axis=1)
        front = None
        if prefix is not None:
            front = tuple(jnp.einsum("pd,dnh->pnh", prefix[0].astype(dtype), kernel) for kernel in kernels[1:])
        y = local_attention(q, k, v, rows.group, groups, window=self.window, prefix=front, prefix_mask=prefix_mask)
        out = Projection(
            (self.num_heads, self.dim // self.num_heads, self.dim), ("heads", "head_dim", "embed"), inputs=2, dtype=dtype,
            param_dtype=self.param_dtype, name="out",
        )  # fmt: skip
        return out(y), *pasts


class TitansMAG(_TitansWindow):
    """Memory as a gate: sliding-window attention (the prefix always visible) times the gated memory.

    y = rms(attention([P; x])) * sigmoid(rms(memory([P; x]))), norms with learnt scales `mix_attention` and `mix_memory`.
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: TitansCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, TitansCache | None]:
        """The mixer contract (`attnlab.nn.mixer`); `positions` are not used.

        Raises:
            ConfigError: fields, cache or segments that do not fit.
        """
        del positions, deterministic
        self.check()
        dtype = self.dtype or x.dtype
        check_cache(cache, *_about(cache), x.shape[0], segment_ids, dtype)
        rows = rows_of(x, segment_ids, mask)
        p = self.memory_parameters(self.conv_width)
        prefix = read_prefix(self, p, self.persistent_tokens(), dtype)
        m, memory, conv, seen = _memory_over(self, p, rows, prefix, cache)
        y, keys, values = self.windowed(rows.x, prefix.x, rows, cache, None)
        scales = (Scale(self.dim, self.param_dtype, name=name)() for name in ("mix_attention", "mix_memory"))
        y = constrain(rows.restore(_mix(y, m, *scales).astype(dtype)), "act_batch", "act_seq", "act_embed")
        return y, None if cache is None else TitansCache(memory, conv, (keys,), (values,), seen)


class TitansMAL(_TitansWindow):
    """Memory as a layer: y = attention(memory([P; x])), in a plain causal window in which the prefix is not special."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: TitansCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, TitansCache | None]:
        """The mixer contract (`attnlab.nn.mixer`); `positions` are not used.

        Raises:
            ConfigError: fields, cache or segments that do not fit.
        """
        del positions, deterministic
        self.check()
        dtype = self.dtype or x.dtype
        check_cache(cache, *_about(cache), x.shape[0], segment_ids, dtype)
        rows = rows_of(x, segment_ids, mask)
        p = self.memory_parameters(self.conv_width)
        prefix = read_prefix(self, p, self.persistent_tokens(), dtype)
        m, memory, conv, seen = _memory_over(self, p, rows, prefix, cache)
        since = rows.since if cache is None else rows.since + cache.seen[:, None]
        number = self.num_persistent
        near = since[:, :, None] + number - jnp.arange(number) < self.window
        y, keys, values = self.windowed(m.astype(dtype), prefix.y, rows, cache, near)
        y = constrain(rows.restore(y.astype(dtype)), "act_batch", "act_seq", "act_embed")
        return y, None if cache is None else TitansCache(memory, conv, (keys,), (values,), seen)


class TitansMAC(TitansMixer):
    """Memory as a context, in segments of `chunk_size` tokens (also the chunks of the memory).

    Segment s reads h = M_{s-1}(q(x)) with the memory as the segments before left it; its token i attends to P, to h_j and to
    x_j with j <= i: y. The memory learns y, and reads m_i = M_{s,i}(q(y_i)) with the writes up to i. The result is
    rms(y) * sigmoid(rms(m)) with learnt scales `mix_attention` and `mix_memory`.

    Parameters of the attention: `query`, `key`, `value` [D, N, H], `out` [N, H, D].
    """

    num_persistent: int = 4

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> TitansCache:
        """Returns an empty cache; its size does not depend on `max_len`."""
        del max_len
        self.check()
        return _empty_cache(self, batch, 0, 2, self.chunk_size)

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token beyond the parameters'."""
        del length
        size = sum(heads * i * o for heads, i, o in self.memory_shapes())
        # The attention's and the memory's projections are applied to what was read, and to y, too.
        again = 4.0 * self.dim**2 + 2.0 * self.dim**2 + 2.0 * size
        return self.memory_flops() + again + 4.0 * self.dim * (self.num_persistent + self.chunk_size + 1)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: TitansCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, TitansCache | None]:
        """The mixer contract (`attnlab.nn.mixer`); `positions` are not used.

        Raises:
            ConfigError: fields, cache or segments that do not fit.
        """
        del positions, deterministic
        self.check()
        dtype = self.dtype or x.dtype
        batch = x.shape[0]
        check_cache(cache, *_about(cache), batch, segment_ids, dtype)
        rows = rows_of(x, segment_ids, mask)
        p = self.memory_parameters()
        begin = read_prefix(self, p, None, dtype).state
        persistent = self.persistent_tokens()
        shape, names = (self.dim, self.num_heads, self.dim // self.num_heads), ("embed", "heads", "head_dim")
        types = {"param_dtype": self.param_dtype, "std": self.dim**-0.5}
        query, key, value = (Kernel(shape, names, name=name, **types)().astype(dtype) for name in ("query", "key", "value"))
        out = Kernel(shape[1:] + shape[:1], ("heads", "head_dim", "embed"), name="out", **types)().astype(dtype)
        scales = [Scale(self.dim, self.param_dtype, name=name)() for name in ("mix_attention", "mix_memory")]
        front = [] if persistent is None else [jnp.einsum("bpd,dnh->bpnh", persistent.astype(dtype), w) for w in (key, value)]
        if cache is None:
            state = jax.tree.map(lambda w: jnp.broadcast_to(w, (batch, *w.shape[1:])), begin)
            empty = (jnp.zeros((batch, self.chunk_size, *shape[1:]), dtype),) * 2
            keys, values, count = empty, empty, None
        else:
            state, keys, values = starting(cache.seen, cache.memory, begin), cache.keys, cache.values
            count = state.count
        carry = ((state.start, state.weights, state.momentum), keys, values)
        weights = (p, (begin.start, begin.weights, begin.momentum), (query, key, value, out), scales, front)
        carry, (y, loss), count = shard_rows(self.segments, weights, (carry, rows.x.astype(dtype), rows.ragged, count))
        _sow_surprise(self, loss)
        y = constrain(rows.restore(y), "act_batch", "act_seq", "act_embed")
        if cache is None:
            return y, None
        state, keys, values = carry
        return y, TitansCache(MemoryState(*state, count), cache.conv, keys, values, cache.seen + rows.count)

    @nn.nowrap
    def segments(self, weights: Any, rows: Any) -> tuple[Any, tuple[jax.Array, jax.Array], jax.Array]:
        """One segment after the other.

        Args:
            weights: of the memory, its state at a segment's first token, of the attention, the two scales, and the keys and
                values [1, P, N, H] of the prefix or [].
            rows: the carry (state, keys and values of the present segment), tokens [B, T, D], mask and segment ids, and how
                many tokens the present chunk already has, or None.

        Returns:
            The carry, (results [B, T, D], surprise [B, T, M]), and tokens in the last chunk [B].
        """
        p, begin, (query, key, value, out), scales, front = weights
        carry, tokens, ragged, count = rows
        dtype, slots = tokens.dtype, jnp.arange(self.chunk_size)
        visible_front = jnp.ones((1, 1, self.num_persistent), bool)

        def merged(x):
            return x.reshape(*x.shape[:2], self.dim).astype(dtype)

        def store(kept, new, tile):
            """Puts the keys or values of a tile into the places of their tokens in the segment."""
            if new.shape[1] == kept.shape[1]:
                return jnp.where(tile.valid[..., None, None], new, kept)
            here = (tile.place == slots) & tile.valid
            return jnp.where(here[..., None, None], new, kept)

        def segment(carry, tile):
            state, keys, values = carry
            state = enter_chunk(state, begin, tile.reset, tile.fresh)
            context = merged(read_memory(state[0], self.project(p, tile.tokens).q.astype(jnp.float32)))
            sources = (context, tile.tokens)
            keys = tuple(store(kept, jnp.einsum("btd,dnh->btnh", x, key), tile) for kept, x in zip(keys, sources, strict=True))
            values = tuple(store(kept, jnp.einsum("btd,dnh->btnh", x, value), tile) for kept, x in zip(values, sources, strict=True))
            q = jnp.einsum("btd,dnh->btnh", tile.tokens, query)
            past = tile.place[:, :, None] >= slots
            seen = [past, past]
            k, v = list(keys), list(values)
            if front:
                seen.insert(0, jnp.broadcast_to(visible_front, (*past.shape[:2], self.num_persistent)))
                k, v = ([jnp.broadcast_to(f, (len(tokens), *f.shape[1:])), *kept] for f, kept in zip(front, (k, v), strict=True))
            k, v, seen = jnp.concatenate(k, axis=1), jnp.concatenate(v, axis=1), jnp.concatenate(seen, axis=2)
            y = jnp.einsum("btnh,nhd->btd", softmax_attention(q, k, v, mask=seen[:, None]), out)
            written = self.project(p, y)
            qkv = (a.astype(jnp.float32) for a in written[:3])
            theta, eta, alpha = written.gates
            gates = (theta, eta if self.momentum else jnp.zeros_like(eta), alpha)
            state, m, loss = memory_chunk(state, *qkv, gates, tile.valid)
            return (state, keys, values), (_mix(y, merged(m), *scales).astype(dtype), loss)

        return scan_tiles(segment, carry, tokens, self.chunk_size, **ragged, count=count)


def _memory_over(mixer, p, rows, prefix, cache):
    """Runs the memory over rows: (y [B, T, D], its state, the convolution's tail, tokens seen); the last three for the cache."""
    tail, state, since = prefix.tail, None, rows.since
    if cache is not None:
        state = starting(cache.seen, cache.memory, prefix.state)
        if tail is not None:
            tail = jnp.where(cache.seen[:, None, None] > 0, cache.conv, tail)
    inputs = mixer.project(p, rows.x, since, tail)
    count = mixer.num_persistent % mixer.chunk_size
    result = mixer.remember(p, inputs, begin=prefix.state, begin_count=count, state=state, **rows.ragged)
    _sow_surprise(mixer, result.loss)
    if cache is None:
        return result.y, None, None, None
    conv = cache.conv if tail is None else last_tokens(tail, inputs.unfiltered, rows.count)
    return result.y, result.state, conv, cache.seen + rows.count


def _mix(y: jax.Array, m: jax.Array, scale_y: jax.Array, scale_m: jax.Array) -> jax.Array:
    return rms(y, scale_y) * nn.sigmoid(rms(m, scale_m))


def _sow_surprise(mixer: nn.Module, loss: jax.Array) -> None:
    if mixer.is_mutable_collection("metrics"):
        mixer.sow("metrics", "surprise", jnp.mean(loss))


def _about(cache: TitansCache | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns (tokens seen, an array in the module's type) of a cache."""
    return (None, None) if cache is None else (cache.seen, cache.keys[0] if cache.keys else cache.conv)


def _empty_cache(mixer: TitansMixer, batch: int, conv_width: int, buffers: int, width: int) -> TitansCache:
    dtype: Any = mixer.dtype or jnp.float32
    kept = (jnp.zeros((batch, width, mixer.num_heads, mixer.dim // mixer.num_heads), dtype),) * buffers
    return TitansCache(
        memory=mixer.empty_memory(batch),
        conv=jnp.zeros((batch, max(conv_width - 1, 0), 3 * mixer.dim), dtype),
        keys=kept,
        values=kept,
        seen=jnp.zeros((batch,), jnp.int32),
    )

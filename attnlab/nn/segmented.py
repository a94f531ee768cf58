"""Attention inside segments with persistent keys and values, as lucidrains/titans-pytorch has it beside its neural memory.

The cache has a fixed size; padding is as if it were not there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab.errors import ConfigError
from attnlab.nn.norm import RMSNorm
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import INIT_STD, Projection
from attnlab.nn.ragged import check_cache, last_tokens, rows_of
from attnlab.ops.local_attention import local_attention
from attnlab.ops.rotary import rotary

EPSILON = float(jnp.finfo(jnp.float32).eps)  # of the norm: that of the type, as in torch.nn.RMSNorm


@struct.dataclass
class SegmentCache:
    """What `SegmentedAttention` keeps.

    Attributes:
        k: [B, W, N, H], rotated keys of the last tokens.
        v: the same of the values.
        seen: [B] int32, tokens so far.
    """

    k: jax.Array
    v: jax.Array
    seen: jax.Array


class SegmentedAttention(nn.Module):
    """Causal softmax attention inside segments, or in a window of one segment, with persistent keys and values.

    A segment has `segment_len + num_longterm` tokens. Not sliding: a token sees those of its own segment up to itself;
    sliding: those at most one segment's length back. The persistent keys are not rotated and always visible.

    Parameters: `norm` [D], `to_qkv` [D, 3, N, H], `persistent_memory` [2, N, P, H], `to_out` [N, H, D].

    Attributes:
        dim: D.
        num_heads: N.
        head_dim: H; None = D / N.
        causal: only True.
        segment_len: tokens per segment.
        num_longterm: long-term tokens that each segment has room for.
        num_persistent: P.
        sliding: a window instead of segments.
        rope_base: of the rotary embedding (interleaved pairs).
    """

    dim: int
    num_heads: int
    head_dim: int | None = None
    causal: bool = True
    segment_len: int = 32
    num_longterm: int = 0
    num_persistent: int = 0
    sliding: bool = False
    rope_base: float = 10000.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def width(self) -> int:
        """Returns H.

        Raises:
            ConfigError: fields that do not fit.
        """
        if not self.head_dim and self.dim % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor, or set head_dim.")
        width = self.head_dim or self.dim // self.num_heads
        if width % 2:
            raise ConfigError(f"head_dim = {width}: rotary embedding needs an even head width. Change it.")
        if self.segment_len < 1:
            raise ConfigError(f"segment_len = {self.segment_len}: must be at least 1. Set a positive number.")
        return width

    @nn.nowrap
    def check(self) -> None:
        """Refuses fields that do not fit, by ConfigError."""
        if not self.causal:
            raise ConfigError("causal = False: segments are attended in order. Set causal=True.")
        self.width()

    @nn.nowrap
    def span(self) -> int:
        """Tokens that a token can see, itself included."""
        return self.segment_len + self.num_longterm + int(self.sliding)

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> SegmentCache:
        """Returns an empty cache; its size does not depend on `max_len`."""
        del max_len
        self.check()
        kept = jnp.zeros((batch, self.span() - 1, self.num_heads, self.width()), self.dtype or jnp.float32)
        return SegmentCache(kept, kept, jnp.zeros((batch,), jnp.int32))

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of the two products with keys and values."""
        seen = self.span() if self.sliding else (self.span() + 1) / 2
        return 4.0 * self.num_heads * self.width() * (min(seen, (length + 1) / 2) + self.num_persistent)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: SegmentCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, SegmentCache | None]:
        """The mixer contract (`attnlab.nn.mixer`); `positions` feed the rotary embedding.

        Raises:
            ConfigError: fields, cache or segments that do not fit.
        """
        del deterministic
        self.check()
        heads, width, reach = self.num_heads, self.width(), self.span() - 1
        dtype = self.dtype or x.dtype
        seen = None if cache is None else cache.seen
        check_cache(cache, seen, None if cache is None else cache.k, x.shape[0], segment_ids, dtype)
        rows = rows_of(x, segment_ids, mask)
        at = rows.since if cache is None else rows.since + seen[:, None]
        if positions is None:
            positions = at
        elif rows.order is not None:
            positions = jnp.broadcast_to(positions, at.shape)
            positions = jax.vmap(lambda row, order: row[order])(positions, rows.order)
        types = {"dtype": dtype, "param_dtype": self.param_dtype}
        y = RMSNorm(EPSILON, self.param_dtype, name="norm")(rows.x)
        qkv = Projection((self.dim, 3, heads, width), ("embed", None, "heads", "head_dim"), name="to_qkv", **types)(y)
        q, k = (rotary(qkv[:, :, i], positions, base=self.rope_base, interleaved=True) for i in range(2))
        v = qkv[:, :, 2]
        q = constrain(q, "act_batch", "act_seq", "act_heads", None)
        front = None
        if self.num_persistent:
            init = named(nn.initializers.normal(INIT_STD), None, "heads", None, "head_dim")
            kept = self.param("persistent_memory", init, (2, heads, self.num_persistent, width), self.param_dtype)
            front = tuple(jnp.swapaxes(kept.astype(dtype), 1, 2))

        past_at = None if cache is None else seen[:, None] - reach + jnp.arange(reach)[None]
        groups, past = rows.group, None if cache is None else jnp.where(past_at < 0, -1, 0)
        if not self.sliding:
            size = self.segment_len + self.num_longterm
            most = -(-x.shape[1] // size) + 1 if cache is None else 0  # segments that one document of a row can have
            groups = jnp.where(groups < 0, -1, groups * most + at // size)
            past = None if past is None else jnp.where(past_at < 0, -1, past_at // size)
        kv_groups = groups
        if cache is not None:
            kept = [last_tokens(past, new, rows.count) for past, new in ((cache.k, k), (cache.v, v))]
            k, v = jnp.concatenate([cache.k, k], axis=1), jnp.concatenate([cache.v, v], axis=1)
            kv_groups = jnp.concatenate([past, groups], axis=1)
            cache = SegmentCache(*kept, seen + rows.count)
        y = local_attention(q, k, v, groups, kv_groups, window=self.span(), prefix=front)
        out = Projection((heads, width, self.dim), ("heads", "head_dim", "embed"), inputs=2, name="to_out", **types)
        return constrain(rows.restore(out(y)), "act_batch", "act_seq", "act_embed"), cache

"""The neural memory of lucidrains/titans-pytorch, the best-known open version of Titans; it differs from the paper's (`nn.titans`).

Gates per chunk, several heads, optional norms; a cache of fixed size; padding is as if it were not there.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab.errors import ConfigError
from attnlab.nn.norm import RMSNorm
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.projection import Projection
from attnlab.nn.ragged import check_cache, rows_of
from attnlab.nn.titans_memory import Kernel, rms
from attnlab.ops.lucid_memory import ChunkInputs, LucidState, lucid_start, lucid_tile
from attnlab.ops.tiles import scan_tiles

EPSILON = float(jnp.finfo(jnp.float32).eps)  # of the norms: that of the type, as in torch.nn.RMSNorm


@struct.dataclass
class LucidCache:
    """What `LucidMemory` keeps.

    Attributes:
        state: of the memory, float32.
        count: [B] int32, tokens of the present chunk.
        seen: [B] int32, tokens so far; 0 = the memory is still to start from its parameters.
    """

    state: LucidState
    count: jax.Array
    seen: jax.Array


class LucidMemory(nn.Module):
    """The rule of `ops.lucid_memory` between projections.

    Tokens to write and to read with are normalised apart (`store_norm`, `retrieve_norm`). Step sizes are per token and
    head, max_lr sigmoid(.); decay and momentum are the sigmoid of a linear map of the chunk's pooled tokens. With more than
    one head the result is gated per head and combined (`retrieve_gate`, `combine_heads`).

    Attributes:
        dim: D.
        num_heads: N.
        head_dim: H; None = D / N. One head needs H = D.
        causal: only True.
        chunk_size: C, tokens per update.
        batch_size: tokens between refreshes of the weights at which gradients are taken; None = never. A multiple of C.
        memory_depth: layers of the memory.
        memory_expansion: its inner width over its outer one.
        max_lr: largest step size.
        layer_modulation: factors per weight of the memory, from the chunk.
        max_layer_modulation: their largest value.
        momentum: False = none.
        momentum_order: how many momenta follow each other.
        pre_norm: the two norms of the input.
        post_norm: norm of the result, per head.
        qk_norm: norms of queries and keys, per head.
        max_grad_norm: soft limit of each gradient's norm; None = none.
        pool: of a chunk's tokens, "mean" or "attention" (a learnt softmax over the chunk per feature).
    """

    dim: int
    num_heads: int = 1
    head_dim: int | None = None
    causal: bool = True
    chunk_size: int = 64
    batch_size: int | None = None
    memory_depth: int = 2
    memory_expansion: float = 4.0
    max_lr: float = 1.0
    layer_modulation: bool = False
    max_layer_modulation: float = 1.0
    momentum: bool = True
    momentum_order: int = 1
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: bool = False
    max_grad_norm: float | None = None
    pool: str = "mean"
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
        if not self.head_dim and self.dim % self.num_heads:
            raise ConfigError(f"num_heads = {self.num_heads}: does not divide dim = {self.dim}. Choose a divisor, or set head_dim.")
        if self.num_heads == 1 and self.width() != self.dim:
            raise ConfigError(
                f"head_dim = {self.width()}: one head has the width dim = {self.dim}. Leave it out, or add heads."
            )
        for field in ("chunk_size", "memory_depth", "momentum_order"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} = {getattr(self, field)}: must be at least 1. Set a positive number.")
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % self.chunk_size):
            raise ConfigError(f"batch_size = {self.batch_size}: not a multiple of chunk_size = {self.chunk_size}. Set one, or None.")
        if self.pool not in ("mean", "attention"):
            raise ConfigError(f"pool = {self.pool!r}: unknown. Use 'mean' or 'attention'.")
        if self.pool == "attention" and self.chunk_size == 1:
            raise ConfigError(
                "pool = 'attention': a chunk of one token has nothing to pool. Set pool='mean' or larger chunks."
            )

    @nn.nowrap
    def width(self) -> int:
        """Returns H."""
        return self.head_dim or self.dim // self.num_heads

    @nn.nowrap
    def memory_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the memory's parameters: gamma [N, H], then [N, I, O] per layer."""
        width = self.width()
        widths = [width, *(int(width * self.memory_expansion),) * (self.memory_depth - 1), width]
        return [(self.num_heads, width), *((self.num_heads, i, o) for i, o in itertools.pairwise(widths))]

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> LucidCache:
        """Returns an empty cache; its size does not depend on `max_len`."""
        del max_len
        self.check()
        zeros = [jnp.zeros(shape, jnp.float32) for shape in self.memory_shapes()]
        none = jnp.zeros((batch,), jnp.int32)
        return LucidCache(lucid_start(zeros, batch, self.momentum_order, self.chunk_size, self.dim), none, none)

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token beyond the parameters'."""
        del length
        return 4.0 * sum(shape[0] * shape[1] * shape[2] for shape in self.memory_shapes()[1:])

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: LucidCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, LucidCache | None]:
        """The mixer contract (`attnlab.nn.mixer`); `positions` are not used.

        With `mutable=["intermediates"]` sows `surprise` and `step_size` [B, T, N] of the tokens written in this call.

        Raises:
            ConfigError: fields, cache or segments that do not fit.
        """
        del positions, deterministic
        self.check()
        heads, width, chunk = self.num_heads, self.width(), self.chunk_size
        dtype = self.dtype or x.dtype
        batch = x.shape[0]
        check_cache(cache, None if cache is None else cache.seen, None, batch, segment_ids, dtype)
        rows = rows_of(x, segment_ids, mask)
        types = {"param_dtype": self.param_dtype}
        names = ("embed", "heads", "head_dim")
        std = self.dim**-0.5

        initial = self._memory_parameters()
        kernels = {name: Kernel((self.dim, heads, width), names, std, name=name, **types)() for name in ("to_keys", "to_values")}
        small = {"to_adaptive_step": heads, "to_decay_factor": heads}
        if self.momentum:
            small["to_momentum"] = heads * self.momentum_order
        if self.layer_modulation:
            small["to_layer_modulation"] = heads * len(initial)
        if self.pool == "attention":
            small["pool_logits"] = self.dim
        maps = {name: Kernel((self.dim, size), ("embed", None), std, (0.0,), name=name, **types)() for name, size in small.items()}
        scales = {name: self._head_scale(name, width) for name, used in self._norms().items() if used}

        def linear(name, x):
            kernel, bias = maps[name]
            y = jnp.matmul(x, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
            return y + bias[0].astype(jnp.float32)

        def head_norm(name, x):
            return rms(x, scales[name], EPSILON) if name in scales else x.astype(jnp.float32)

        def inputs_of(tokens):
            k, v = (
                jnp.einsum("bcd,dnh->bcnh", tokens.astype(dtype), kernels[name].astype(dtype)) for name in ("to_keys", "to_values")
            )
            if self.pool == "mean":
                pooled = jnp.mean(tokens, axis=1)
            else:
                pooled = jnp.sum(nn.softmax(linear("pool_logits", tokens), axis=1) * tokens, axis=1)
            eta = modulation = None
            if self.momentum:
                eta = nn.sigmoid(linear("to_momentum", pooled)).reshape(batch, heads, -1).swapaxes(1, 2)
            if self.layer_modulation:
                modulation = nn.sigmoid(linear("to_layer_modulation", pooled)).reshape(batch, heads, -1) * self.max_layer_modulation
            return ChunkInputs(
                k=head_norm("k_norm", k),
                v=v.astype(jnp.float32),
                step=nn.sigmoid(linear("to_adaptive_step", tokens)) * self.max_lr,
                decay=nn.sigmoid(linear("to_decay_factor", pooled)),
                momentum=eta,
                modulation=modulation,
            )

        store = retrieve = rows.x
        if self.pre_norm:
            store, retrieve = (RMSNorm(EPSILON, self.param_dtype, name=f"{n}_norm")(rows.x) for n in ("store", "retrieve"))
        queries = Projection((self.dim, heads, width), names, dtype=dtype, name="to_queries", **types)(retrieve)
        queries = head_norm("q_norm", queries)

        start = lucid_start(initial, batch, self.momentum_order, chunk, self.dim)
        state, count = start, None
        if cache is not None:
            first = cache.seen == 0
            state = jax.tree.map(lambda a, b: jnp.where(first.reshape(-1, *(1,) * (a.ndim - 1)), a, b), start, cache.state)
            count = cache.count
        wide = tuple(w[None].astype(jnp.float32) for w in initial)
        batch_chunks = None if self.batch_size is None else self.batch_size // chunk

        def step(state, tile):
            return lucid_tile(state, tile, inputs_of, wide, chunk, batch_chunks, self.max_grad_norm)

        tokens = (queries, store.astype(jnp.float32))
        state, (y, losses, steps), count = scan_tiles(step, state, tokens, chunk, **rows.ragged, count=count)
        self.sow("intermediates", "surprise", rows.restore(losses))
        self.sow("intermediates", "step_size", rows.restore(steps))
        y = head_norm("multihead_rmsnorm", y)
        if heads > 1:
            gate = Projection((self.dim, heads), ("embed", "heads"), dtype=dtype, name="retrieve_gate", **types)(retrieve)
            y = (y * nn.sigmoid(gate.astype(jnp.float32))[..., None]).astype(dtype)
            y = Projection((heads, width, self.dim), ("heads", "head_dim", "embed"), 2, dtype=dtype, name="combine_heads", **types)(
                y
            )
        else:
            y = y.reshape(*x.shape)
        y = constrain(rows.restore(y.astype(dtype)), "act_batch", "act_seq", "act_embed")
        return y, None if cache is None else LucidCache(state, count, cache.seen + rows.count)

    def _memory_parameters(self) -> tuple[jax.Array, ...]:
        """Declares `memory_gamma` [N, H] and `memory_w0` .. [N, I, O]."""
        gamma, *layers = self.memory_shapes()
        zeros = named(nn.initializers.zeros_init(), None, None)
        made = [self.param("memory_gamma", zeros, gamma, self.param_dtype)]
        for i, shape in enumerate(layers):
            init = named(nn.initializers.normal(shape[1] ** -0.5), None, None, None)
            made.append(self.param(f"memory_w{i}", init, shape, self.param_dtype))
        return tuple(made)

    def _norms(self) -> dict[str, bool]:
        return {"multihead_rmsnorm": self.post_norm, "q_norm": self.qk_norm, "k_norm": self.qk_norm}

    def _head_scale(self, name: str, width: int) -> jax.Array:
        """A norm's factor per head, stored less one."""
        zeros = named(nn.initializers.zeros_init(), None, None)
        return 1.0 + self.param(f"{name}_gamma", zeros, (self.num_heads, width), self.param_dtype)

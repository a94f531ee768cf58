"""Sparse state expansion as a token mixer: SSE-GLA and SSE-GDN; with softmax layers in the pattern, SSE-H.

"Scaling Linear Attention with Sparse State Expansion" (arXiv 2507.16577).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.nn.gated_linear import StateCache, StateMixer, activate
from attnlab.nn.projection import Projection
from attnlab.ops import sparse_state
from attnlab.ops.linear_scan import valid_tokens

RULES = ("gla", "gdn")


class SparseStateExpansion(StateMixer):
    """Linear attention over 1 + P states that share their projections; a router picks w to write and r to read.

    Parameters: `query`, `key` [D, N, Hk], `value` [D, Nv, Hv]; low-rank additions to the sparse queries and keys `query_sparse`,
    `key_sparse` ({..}_down [D, Hv], {..}_up [Hv, N, Hk]); `router` [D, P]; decay gates `decay_shared`, `decay_sparse` (gla) or
    `a`, `b` [D, 2, Nv], `a_log`, `dt_bias` [2, Nv], the shared partition first (gdn); `gate` (down, up), `norm`, `out`.

    Sown: `losses/load_balance`, weighted; `metrics/load_balance`, unweighted, and `metrics/router_entropy` in nats, of the load
    of the partitions (log P when balanced).

    Attributes:
        rule: of the state's update: "gla" (gated linear attention) or "gdn" (gated delta rule).
        num_partitions: P, beside the one that is always on.
        num_writers: w < P.
        num_readers: r < P.
        emulq: multiply sparse queries by p.
        emulk: multiply sparse keys by p. (The published mask form multiplies by both whatever these say.)
        use_q_softmax: softmax over Hk for queries, instead of SiLU.
        use_k_softmax: the same for keys; None = True for gla, False for gdn.
        gate_low_rank_dim: width inside the decay gates (gla).
        gate_logit_normalizer: log decay = logsigmoid(gate) / this (gla).
        allow_neg_eigval: beta in [0, 2] instead of [0, 1] (gdn).
        aux_weight: of the load balance loss.
        implementation: "varlen", "mask" or "recurrent" of `ops.sparse_state_attention`.
    """

    rule: str = "gla"
    num_partitions: int = 4
    num_writers: int = 1
    num_readers: int = 1
    emulq: bool = True
    emulk: bool = True
    use_q_softmax: bool = False
    use_k_softmax: bool | None = None
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0
    allow_neg_eigval: bool = False
    aux_weight: float = 0.01

    @nn.nowrap
    def widths(self) -> tuple[int, int, int]:
        """Returns (Hk, value heads, Hv).

        Raises:
            ConfigError: fields that do not fit each other.
        """
        if self.rule not in RULES:
            raise ConfigError(f"rule = {self.rule!r}: unknown, {nearest(self.rule, RULES)}")
        sparse_state.check_choices(self.num_partitions, self.num_writers, self.num_readers)
        if self.implementation == "varlen" and self.num_writers != self.num_readers:
            raise ConfigError(
                f"num_readers = {self.num_readers}: implementation='varlen' needs as many readers as writers, "
                f"{self.num_writers}. Set it, or use implementation='mask'."
            )
        return super().widths()

    @nn.nowrap
    def num_states(self) -> int:
        """1 + P."""
        return 1 + self.num_partitions

    @nn.nowrap
    def conv_channels(self) -> tuple[int, ...]:
        """Shared queries and keys."""
        return (self.num_heads * self.widths()[0],) * 2 if self.use_short_conv else ()

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Those of the shared stream and of the written ones."""
        return super().sequence_flops(length) * (1 + self.num_writers)

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
        """The mixer contract (`attnlab.nn.mixer`); `positions` play no part: the order is that of the tokens.

        Raises:
            ConfigError: fields or a cache that do not fit.
        """
        del positions, deterministic
        head_dim, v_heads, width = self.widths()
        self.check(x, cache, segment_ids)
        valid = valid_tokens(x.shape[:2], segment_ids, mask)
        q, k = self.heads(x, "query", self.num_heads, head_dim), self.heads(x, "key", self.num_heads, head_dim)
        v = nn.silu(self.heads(x, "value", v_heads, width))
        # The sparse side starts from projections that were not convolved.
        q_sparse = q + self.low_rank(x, "query_sparse", width, self.num_heads, head_dim)
        k_sparse = k + self.low_rank(x, "key_sparse", width, self.num_heads, head_dim)
        tails: tuple[jax.Array, ...] = ()
        if self.use_short_conv:
            q, q_tail = self.convolve(q, "query_conv", cache, 0, segment_ids, valid)
            k, k_tail = self.convolve(k, "key_conv", cache, 1, segment_ids, valid)
            tails = (q_tail, k_tail)
        k_softmax = self.rule == "gla" if self.use_k_softmax is None else self.use_k_softmax
        q, q_sparse = (activate(side, "softmax" if self.use_q_softmax else "silu") for side in (q, q_sparse))
        k, k_sparse = (activate(side, "softmax" if k_softmax else "silu") for side in (k, k_sparse))

        times = v_heads // self.num_heads
        betas = {}
        if self.rule == "gla":
            gates = (self._decay(x, name, head_dim) for name in ("decay_shared", "decay_sparse"))
            decays = [jnp.repeat(gate, times, axis=2) for gate in gates]
        else:
            decay, beta = self.delta_gates(x, 2, v_heads, self.allow_neg_eigval)
            decays = [decay[:, :, 0], decay[:, :, 1]]
            betas = {"beta_shared": beta[:, :, 0], "beta_sparse": beta[:, :, 1]}
        sides = self.lay_out(*(jnp.repeat(side, times, axis=2) for side in (q, q_sparse, k, k_sparse)), v)

        # One router for all heads, in float32 from the start: its choices must not depend on the type of the module.
        names = ("embed", "norm")
        router = Projection((self.dim, self.num_partitions), names, dtype=jnp.float32, param_dtype=self.param_dtype, name="router")
        routing = sparse_state.route(router(x), self.num_writers, self.num_readers)
        self._sow(routing, valid)
        out, state = sparse_state.sparse_state_attention(
            *sides,
            *decays,
            routing,
            **betas,
            read_factor=self.emulq,
            write_factor=self.emulk,
            initial_state=None if cache is None else cache.state,
            segment_ids=segment_ids,
            mask=mask,
            chunk_size=self.chunk_size,
            implementation=self.implementation if cache is None else None,
        )
        gate = self.low_rank(x, "gate", width, v_heads, width) if self.use_output_gate else None
        y = self.finish(x, out, gate)
        return y, None if cache is None else StateCache(state, tails, cache.index + x.shape[1])

    def _decay(self, x: jax.Array, name: str, head_dim: int) -> jax.Array:
        gate = self.low_rank(x, name, self.gate_low_rank_dim, self.num_heads, head_dim, use_bias=True)
        return jax.nn.log_sigmoid(gate.astype(jnp.float32)) / self.gate_logit_normalizer

    def _sow(self, routing: sparse_state.Routing, valid: jax.Array | None) -> None:
        if self.is_initializing():
            return
        loss = sparse_state.load_balance_loss(routing, valid)
        self.sow("losses", "load_balance", self.aux_weight * loss)
        self.sow("metrics", "load_balance", loss)
        if self.is_mutable_collection("metrics"):
            written = routing.write_mask().astype(jnp.float32)
            load = jnp.sum(written if valid is None else jnp.where(valid[..., None], written, 0.0), axis=(0, 1))
            load = load / jnp.maximum(jnp.sum(load), 1.0)
            self.sow("metrics", "router_entropy", -jnp.sum(jax.scipy.special.xlogy(load, load)))
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "partition_probability", routing.probability)
            self.sow("intermediates", "write_mask", routing.write_mask())
            self.sow("intermediates", "read_mask", routing.read_mask())

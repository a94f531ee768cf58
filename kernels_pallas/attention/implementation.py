"""The attention kernels as entries of the ops' tables (attnlab/ops/dispatch.py)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from attnlab.ops import dispatch, sharding
from attnlab.ops.attention import AttentionCall
from attnlab.types import Array
from kernels_pallas.attention.vjp import attention, refusal

# A query length below which most rows of a kernel's smallest block would be padding.
_FEW_QUERIES = 128


def attend_pallas(call: AttentionCall, blocks: Any = None) -> Array:
    """Computes a call, over listed key blocks if `blocks` (an `ops.block_index.BlockIndex`) is given."""
    k, v = sharding.repeat_kv_heads(call.k, call.v, call.q.shape[2])
    batch, _, heads, _ = call.q.shape
    arrays = {
        "q_segment_ids": (call.q_segment_ids, "BT"),
        "kv_segment_ids": (call.kv_segment_ids, "BS"),
        "q_positions": (call.q_positions, "BT"),
        "kv_positions": (call.kv_positions, "BS"),
        "kv_mask": (call.kv_mask, "BS"),
        "alibi_slopes": (call.alibi_slopes, "BN"),
    }
    options = {}
    if blocks is not None:
        index = blocks.index
        letter = {1: "1", heads: "N"}.get(index.shape[1], "K")
        if letter == "K":  # one list per key/value head, and these may have been repeated
            index = jnp.repeat(index, k.shape[2] // index.shape[1], axis=1)
        arrays["block_index"] = (index, f"B{letter}QJ")
        options = {"block_q": blocks.block_q, "block_kv": blocks.block_kv}
    arrays = {name: pair for name, pair in arrays.items() if pair[0] is not None}
    layouts = [layout if x.shape[0] == batch else "1" + layout[1:] for x, layout in arrays.values()]

    def local(q, k, v, *rest):
        return attention(
            q,
            k,
            v,
            normalization=call.normalization,
            causal=call.causal,
            window=call.window,
            scale=call.scale,
            bias=call.bias,
            device_kind=dispatch.target_device_kind(),
            interpret=dispatch.interpreting(),
            **options,
            **dict(zip(arrays, rest, strict=True)),
        )

    given = (call.q, k, v, *(x for x, _ in arrays.values()))
    return sharding.shard_over_mesh(local, given, ("BTNH", "BSKH", "BSKH", *layouts), "BTNH")


def refuse(call: AttentionCall, blocks: Any = None) -> str | None:
    """Says why the kernels cannot do a call, or None."""
    unknown = {
        "a dense mask": call.mask is not None,
        "a bias array": call.dense_bias is not None,
        "dropout": call.dropout_rate > 0.0,
        "precision=": call.precision is not None,
    }
    found = [name for name, present in unknown.items() if present]
    if found:
        return f"the kernel does not do {' or '.join(found)}"
    listed = {}
    if blocks is not None:
        listed = {"block_q": blocks.block_q, "block_kv": blocks.block_kv, "table": blocks.index.shape}
    reason = refusal(call.q.shape, call.q.dtype, keys=call.lengths[1], **listed)
    return reason or sharding.sequence_reason()


def defer(call: AttentionCall, blocks: Any = None) -> str | None:
    """Says why another implementation serves better, or None."""
    if call.lengths[0] < _FEW_QUERIES and blocks is None:
        return f"{call.lengths[0]} queries: a block of the kernel has at least {_FEW_QUERIES}"
    return None


IMPLEMENTATION = dispatch.Implementation(attend_pallas, refuse, defer)

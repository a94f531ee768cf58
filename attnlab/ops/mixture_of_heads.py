"""Softmax attention in which a token uses some of the heads only; the others need not be computed.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (2024, arXiv 2410.11842); `ops.head_routing` makes the choice.
"all_heads" computes every head and multiplies with the gates, as the released code does: the reference. "gathered" computes
selected (token, head) pairs only: the tokens of a head are gathered into blocks of queries that belong to that head alone,
and `ops.block_attention` walks them over the head's keys. Nothing is dropped and all shapes are static: k T pairs of R heads
fill at most (k T + R (block - 1)) / block blocks, however they are spread.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops import dispatch, sharding
from attnlab.ops.attention import AttentionCall, make_call
from attnlab.ops.block_attention import block_attention
from attnlab.ops.softmax import softmax_attention  # noqa: F401 (its table)
from attnlab.types import Array, Bool, Float, Int

# Queries and keys per block: what the kernels of block attention need, and what a CPU computes fastest.
_BLOCK = 128
_BLOCK_CPU = 64
# Causal queries per band on a CPU, where listed blocks that the causal order hides are computed all the same.
_BAND = 512
# Measured (benchmarks/mixture_of_heads.py): time of a gathered query over one of plain attention, forward and backward, and
# the length from which on that holds; before it, laying out costs more than it saves.
_QUERY_COST_CPU, _SHORTEST_CPU = 1.6, 1024


class Slots(NamedTuple):
    """Selected (token, head) pairs in blocks of one head each.

    Attributes:
        source: [B, M] int32, t R + r of the pair in each slot; T R = empty.
        owner: [B, M / block] int32, routed head r of each block; R = unused.
        slot: [B, T, R] int32, where each pair lies; M = not selected.
    """

    source: Array
    owner: Array
    slot: Array


def mixture_of_heads_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    gates: Float[Array, "B T N"],
    selected: Bool[Array, "B T R"],
    *,
    top_k: int,
    implementation: str | None = None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Heads of softmax attention times their gates; zeros where a routed head is not selected.

    Gradients flow to q, k, v and to the gates of shared and selected heads.

    Args:
        q: queries; head n attends with key/value head n // (N // K).
        k: keys.
        v: values.
        gates: weight of every head.
        selected: of the last R heads, those that a token uses; the first N - R are on for all.
        top_k: a token selects at most so many; further pairs of a token would be lost in "gathered".
        implementation: "all_heads" or "gathered"; None takes the faster one by a cost model (`ops.explain`).
        **options: masks, scale and the like of `softmax_attention`.

    Raises:
        ConfigError: shapes that do not fit.
        NotImplementedError: "gathered" cannot do this call.
    """
    heads, routed = q.shape[2], selected.shape[-1]
    if gates.shape != q.shape[:3] or selected.shape[:2] != q.shape[:2] or routed > heads:
        raise ConfigError(f"gates {gates.shape} and selected {selected.shape} do not fit q {q.shape}: they need [B,T,N], [B,T,R].")
    if routed and not 1 <= top_k <= routed:
        raise ConfigError(f"top_k = {top_k}: there are {routed} routed heads. Use 1 to {routed}.")
    call = make_call(q, k, v, normalization="softmax", **options)
    return dispatch.call("mixture_of_heads_attention", implementation, call, gates, selected, top_k)


def attend_all(call: AttentionCall, gates: Array, selected: Array, top_k: int) -> Array:
    """The reference: every head, then the gates."""
    del top_k
    out = dispatch.call("softmax_attention", None, call)
    on = jnp.pad(selected, ((0, 0), (0, 0), (out.shape[2] - selected.shape[-1], 0)), constant_values=True)
    return _gated(out, jnp.where(on, gates, 0.0))


def attend_gathered(call: AttentionCall, gates: Array, selected: Array, top_k: int, block: int | None = None) -> Array:
    """Computes shared heads densely and selected pairs of the routed heads by blocks.

    Args:
        call: the call.
        gates: of all heads.
        selected: of the routed heads.
        top_k: pairs per token.
        block: queries and keys per block.
    """
    heads, routed = call.q.shape[2], selected.shape[-1]
    shared = heads - routed
    parts = []
    if shared:
        k, v = _keys_of(call, 0, shared)
        part = dataclasses.replace(call, q=call.q[:, :, :shared], k=k, v=v)
        parts.append(dispatch.call("softmax_attention", None, part))
    if routed:
        parts.append(_routed(call, selected, top_k, block or _default_block()))
    return _gated(jnp.concatenate(parts, axis=2), gates)


def head_slots(selected: Bool[Array, "B T R"], top_k: int, block: int) -> Slots:
    """Lays the selected pairs out head by head, in the order of the tokens, each head from the start of a block."""
    batch, length, routed = selected.shape
    total = block * _block_count(length, routed, top_k, block)
    count = selected.astype(jnp.int32)
    blocks = -(-jnp.sum(count, axis=1) // block)  # [B, R]
    ends = jnp.cumsum(blocks, axis=1)
    slot = ((ends - blocks) * block)[:, None] + jnp.cumsum(count, axis=1) - 1
    slot = jnp.where(selected, slot, total)
    pair = jnp.arange(length * routed, dtype=jnp.int32)
    source = jnp.full((batch, total), length * routed, jnp.int32)
    source = jax.vmap(lambda row, at: row.at[at].set(pair, mode="drop"))(source, slot.reshape(batch, -1))
    owner = jnp.sum(jnp.arange(total // block)[None, :, None] >= ends[:, None], axis=-1)
    return Slots(source, owner.astype(jnp.int32), slot.astype(jnp.int32))


def gathered_share(length: int, routed: int, top_k: int, *, block: int, band: int | None = None) -> float:
    """Query slots that "gathered" computes over those of all routed heads: near k / R for many tokens per block.

    Args:
        length: T.
        routed: R.
        top_k: k.
        block: queries per block.
        band: tokens that are laid out at a time, default all.
    """
    band = min(band or length, length)
    parts = [min(band, length - start) for start in range(0, length, band)]
    return sum(block * _block_count(part, routed, top_k, block) for part in parts) / (length * routed)


def _routed(call: AttentionCall, selected: Array, top_k: int, block: int) -> Array:
    """The routed heads [B, T, R, H], zero where not selected; every device lays out its own batch rows."""
    heads, routed = call.q.shape[2], selected.shape[-1]
    k, v = _keys_of(call, heads - routed, heads)
    arrays = [call.q[:, :, heads - routed :], k, v, selected]
    layouts = ["BTRH", "BSUH", "BSUH", "BTR"]
    names = ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids", "kv_mask")
    for name, letter in zip(names, "TSTSS", strict=True):
        x = getattr(call, name)
        arrays.append(x)
        layouts.append(None if x is None else ("B" if x.shape[0] == call.q.shape[0] else "1") + letter)

    def local(q, k, v, selected, *rest):
        return _banded(dataclasses.replace(call, q=q, k=k, v=v, **dict(zip(names, rest, strict=True))), selected, top_k, block)

    return sharding.shard_over_mesh(local, arrays, layouts, "BTRH")


def _banded(call: AttentionCall, selected: Array, top_k: int, block: int) -> Array:
    """Lays causal queries out band by band on a CPU, so that keys after a band cost nothing."""
    length, keys = call.lengths
    if dispatch.target_platform() != "cpu" or call.window[1] != 0 or call.q_positions is not None or length < 2 * _BAND:
        return _laid_out(call, selected, top_k, block)
    q_positions, kv_positions = call.positions()
    parts = []
    for start in range(0, length, _BAND):
        band, seen = slice(start, min(start + _BAND, length)), min(max(start + _BAND + keys - length, 1), keys)
        part = dataclasses.replace(
            call,
            q=call.q[:, band],
            k=call.k[:, :seen],
            v=call.v[:, :seen],
            q_positions=q_positions[:, band],
            kv_positions=kv_positions[:, :seen],
            q_segment_ids=None if call.q_segment_ids is None else call.q_segment_ids[:, band],
            kv_segment_ids=None if call.kv_segment_ids is None else call.kv_segment_ids[:, :seen],
            kv_mask=None if call.kv_mask is None else call.kv_mask[:, :seen],
        )
        parts.append(_laid_out(part, selected[:, band], top_k, block))
    return jnp.concatenate(parts, axis=1)


def _laid_out(call: AttentionCall, selected: Array, top_k: int, block: int) -> Array:
    """Block attention of the pairs: one head of queries, and the key/value heads one after another along the keys."""
    batch, length, routed, width = call.q.shape
    keys, kv_heads = call.k.shape[1:3]
    slots = head_slots(selected, top_k, block)
    padding = -keys % block
    per_head = (keys + padding) // block

    def pairs(x: Array) -> Array:
        """[b, T] to [B, M], by the token of each slot (an empty slot gets the last token's)."""
        token = jnp.minimum(slots.source // routed, length - 1)
        return jnp.take_along_axis(jnp.broadcast_to(x, (batch, length)), token, axis=1)

    def in_a_row(x: Array) -> Array:
        """[B, S, U, H] to [B, U S', 1, H]."""
        x = jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        return x.reshape(batch, -1, 1, width)

    def repeated(x: Array, empty: int | bool) -> Array:
        """[b, S] to [b, U S']."""
        return jnp.tile(jnp.pad(x, ((0, 0), (0, padding)), constant_values=empty), (1, kv_heads))

    masks: dict[str, Array] = {}
    if call.window != (None, None) or call.q_positions is not None:
        q_positions, kv_positions = call.positions()
        masks |= {"q_positions": pairs(q_positions), "kv_positions": repeated(kv_positions, -1)}
    if call.q_segment_ids is not None:
        masks |= {"q_segment_ids": pairs(call.q_segment_ids), "kv_segment_ids": repeated(call.kv_segment_ids, -1)}
    if call.kv_mask is not None or padding:
        there = jnp.ones((1, keys), bool) if call.kv_mask is None else call.kv_mask
        masks["kv_mask"] = jnp.broadcast_to(repeated(there, False), (batch, kv_heads * (keys + padding)))
    q = call.q.reshape(batch, length * routed, width)
    q = jnp.take_along_axis(q, slots.source[..., None], axis=1, mode="fill", fill_value=0)[:, :, None]
    out = block_attention(
        q,
        in_a_row(call.k),
        in_a_row(call.v),
        _key_blocks(call, slots, routed // kv_heads, per_head, block),
        block_q=block,
        block_kv=block,
        causal=call.causal,
        window=call.window,
        scale=call.scale,
        **masks,
    )
    return jnp.take_along_axis(
        out[:, :, 0], slots.slot.reshape(batch, -1, 1), axis=1, mode="fill", fill_value=0
    ).reshape(batch, length, routed, width)  # fmt: skip


def _key_blocks(call: AttentionCall, slots: Slots, group: int, per_head: int, block: int) -> Int[Array, "B 1 R J"]:
    """The key blocks of each query block: all of its head's, less those that lie after its last token."""
    routed = slots.slot.shape[-1]
    number = jnp.arange(per_head, dtype=jnp.int32)
    index = (slots.owner // group)[..., None] * per_head + number
    used = (slots.owner < routed)[..., None]
    length, keys = call.lengths
    if call.window[1] == 0 and call.q_positions is None:
        token = jnp.where(slots.source < length * routed, slots.source // routed, 0)
        last = jnp.max(token.reshape(*slots.owner.shape, -1), axis=-1) + keys - length
        used = used & (number * block <= last[..., None])
    return jnp.where(used, index, -1)[:, None]


def _keys_of(call: AttentionCall, first: int, last: int) -> tuple[Array, Array]:
    """Keys and values of the query heads first .. last - 1: a slice where their groups are whole, else repeated."""
    group = call.q.shape[2] // call.k.shape[2]
    if first % group == 0 and last % group == 0:
        part = slice(first // group, last // group)
        return call.k[:, :, part], call.v[:, :, part]
    heads = jnp.arange(first, last) // group
    return call.k[:, :, heads], call.v[:, :, heads]


def _block_count(length: int, routed: int, top_k: int, block: int) -> int:
    return (top_k * length + routed * (block - 1)) // block


def _default_block() -> int:
    return _BLOCK_CPU if dispatch.target_platform() == "cpu" else _BLOCK


def _gated(heads: Array, gates: Array) -> Array:
    return (heads.astype(jnp.float32) * gates[..., None]).astype(heads.dtype)


def _refuse_gathered(call: AttentionCall, gates: Array, selected: Array, top_k: int) -> str | None:
    unknown = {
        "a dense mask": call.mask is not None,
        "a bias": call.dense_bias is not None or call.bias != 0.0,
        "ALiBi": call.alibi_slopes is not None,
        "dropout": call.dropout_rate > 0.0,
    }
    found = [name for name, present in unknown.items() if present]
    if found:
        return f"gathered tokens do not know {' or '.join(found)}"
    if sharding.shard_count("heads") > 1:
        return "the mesh splits heads: tokens would move between devices"
    return sharding.sequence_reason()


def _defer_gathered(call: AttentionCall, gates: Array, selected: Array, top_k: int) -> str | None:
    length, routed = call.q.shape[1], selected.shape[-1]
    if not routed:
        return "all heads are shared"
    platform = dispatch.target_platform()
    if platform != "cpu":
        return f"it has not been measured on {platform}; name it to use it"
    if length < _SHORTEST_CPU:
        return f"it pays from {_SHORTEST_CPU} tokens on, and there are {length}"
    causal = call.window[1] == 0 and call.q_positions is None
    share = gathered_share(length, routed, top_k, block=_BLOCK_CPU, band=_BAND if causal and length >= 2 * _BAND else None)
    if share * _QUERY_COST_CPU >= 1.0:
        return f"it would compute {share:.0%} of the routed heads' queries, each {_QUERY_COST_CPU} times as dear"
    return None


_GATHERED = dispatch.Implementation(attend_gathered, _refuse_gathered, _defer_gathered)
dispatch.register("mixture_of_heads_attention", "gathered", _GATHERED)
dispatch.register("mixture_of_heads_attention", "all_heads", dispatch.Implementation(attend_all))

"""Shifted sparse attention (S2) and sink fixed attention (SF): causal groups, some heads with groups half a group off.

Attention inside groups of G tokens. Half of the heads use the groups [0, G), [G, 2G), ..; the others ("offset heads") use
groups that lie G/2 away, so that information passes the borders. SF-Attn gives some offset heads back to the plain groups
and makes the first tokens, the sinks, visible to every later query.

"LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models" (Chen et al., 2023, arXiv 2309.12307);
"SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context LLMs" (Zhang, 2024, arXiv 2406.05678).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import ConfigError, field_error, nearest
from attnlab.ops import dispatch
from attnlab.ops.attention import AttentionCall, attend, make_call
from attnlab.ops.block_attention import block_attention
from attnlab.ops.softmax import softmax_attention
from attnlab.types import Array, Bool, Float, Int, PRNGKey

VARIANTS = ("windows", "roll")
REASSEMBLIES = ("heads", "sequence")
_LARGEST_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class ShiftedPattern:
    """Which keys a query sees; the arguments of `shifted_attention` of the same names."""

    group_size: int
    variant: str = "windows"
    num_sinks: int = 0
    returned_fraction: float = 0.0
    reassembly: str = "heads"

    def check(self, length: int | None = None) -> None:
        """Refuses fields out of range, and a length that the groups do not divide.

        Raises:
            ConfigError: naming the field, the value and the fix.
        """
        for field, known in (("variant", VARIANTS), ("reassembly", REASSEMBLIES)):
            if getattr(self, field) not in known:
                hint = nearest(str(getattr(self, field)), known).capitalize().rstrip("?")
                raise field_error(field, getattr(self, field), "is not known", hint)
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise field_error("group_size", self.group_size, "is not a number of tokens", "Give a positive int")
        if self.num_sinks < 0:
            raise field_error("num_sinks", self.num_sinks, "must not be negative", "Set 0 for none")
        if not 0.0 <= self.returned_fraction <= 1.0:
            raise field_error("returned_fraction", self.returned_fraction, "is not in [0, 1]", "Set 0 for S2-Attn")
        if self.variant == "roll" and self.reassembly == "sequence" and self.returned_fraction:
            raise field_error("reassembly", self.reassembly, "is not defined for variant = 'roll'", "Use variant='windows'")
        if length is not None and length % self.group_size:
            fits = [size for size in range(1, length + 1) if length % size == 0]
            near = min(fits, key=lambda size: abs(size - self.group_size))
            raise field_error("group_size", self.group_size, f"does not divide T = {length}", f"Set {near} or another divisor")

    def plain_heads(self, heads: int) -> int:
        """Number of heads, the first ones, that use the plain groups."""
        offset = heads - heads // 2
        returned = round(self.returned_fraction * offset) if self.reassembly == "heads" else 0
        return heads // 2 + returned

    def bounds(self, length: int, *, offset: bool) -> tuple[int, ...]:
        """Where the groups of a head begin, in order, and T; rolled heads have plain groups of rolled tokens."""
        size, half = self.group_size, self.group_size // 2
        begin = length
        if offset and self.variant == "windows":
            share = self.returned_fraction if self.reassembly == "sequence" else 0.0
            begin = round(share * length / size) * size
        inner = range(begin + size - half, length, size)
        return tuple(sorted({*range(0, begin + 1, size), *inner, length}))

    def groups(self, length: int, *, offset: bool) -> tuple[np.ndarray, np.ndarray]:
        """Returns the group of each token, and its place in the order that is causal inside a group; both int [T]."""
        slots = np.arange(length)
        if offset and self.variant == "roll":
            slots = (slots - self.group_size // 2) % length
        return np.searchsorted(self.bounds(length, offset=offset), slots, side="right") - 1, slots

    def visible(self, length: int, heads: int) -> Bool[Array, "N T T"]:
        """The keys that each query of each head may see."""
        seen = []
        for offset in (False, True):
            group, place = (jnp.asarray(x) for x in self.groups(length, offset=offset))
            seen.append((group[:, None] == group[None]) & (place[None] <= place[:, None]))
        return self._by_head(*seen, jnp.arange(length), jnp.arange(length), heads)

    def visible_slots(
        self, q_slots: Int[Array, " T"], kv_slots: Int[Array, " S"], heads: int
    ) -> Bool[Array, "N T S"]:
        """The same for some queries and keys, by their places in the sequence, whose length need not be known.

        Raises:
            ConfigError: the groups depend on the length (roll, or a share of the sequence).
        """
        if self.variant == "roll" or (self.reassembly == "sequence" and self.returned_fraction):
            raise ConfigError(
                f"variant = {self.variant!r}, reassembly = {self.reassembly!r}: groups that depend on the whole sequence "
                "cannot be decoded token by token. Set train_only=True, or variant='windows' and reassembly='heads'."
            )
        half = self.group_size // 2

        def same(shift: int) -> Array:
            return (q_slots[:, None] + shift) // self.group_size == (kv_slots[None] + shift) // self.group_size

        return self._by_head(same(0), same(half), q_slots, kv_slots, heads) & (kv_slots[None] <= q_slots[:, None])

    def _by_head(self, plain: Array, offset: Array, q_slots: Array, kv_slots: Array, heads: int) -> Array:
        sinks = (kv_slots[None] < self.num_sinks) & (kv_slots[None] <= q_slots[:, None])
        is_plain = (jnp.arange(heads) < self.plain_heads(heads))[:, None, None]
        return jnp.where(is_plain, plain, offset) | sinks

    def keys_per_query(self, length: int, heads: int) -> float:
        """Visible keys, averaged over queries and heads."""
        total, plain = 0.0, self.plain_heads(heads)
        for offset, count in ((False, plain), (True, heads - plain)):
            bounds = self.bounds(length, offset=offset)
            for first, last in itertools.pairwise(bounds):
                total += count * (last - first) * ((last - first + 1) / 2 + min(self.num_sinks, first))
        return total / (length * heads)


def shifted_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    group_size: int,
    variant: Literal["windows", "roll"] = "windows",
    num_sinks: int = 0,
    returned_fraction: float = 0.0,
    reassembly: Literal["heads", "sequence"] = "heads",
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_mask: Bool[Array, "B T"] | None = None,
    scale: float | None = None,
    dropout_rng: PRNGKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention inside causal groups; S2-Attn by default, SF-Attn with sinks and a returned fraction.

    A training-time approximation of full attention: evaluate with `softmax_attention`. Groups and sinks are counted in
    places of the row, so padding belongs on the right, and of packed documents only the first one has sinks; segments and
    padding only take keys away.

    Args:
        q: queries; head n attends with key/value head n // (N // K).
        k: keys.
        v: values.
        group_size: G, divides T.
        variant: of the offset heads. "windows": groups [0, G/2), [G/2, 3G/2), .., [T - G/2, T). "roll": the tokens are
            rolled left by G/2 and cut into groups, causal in rolled order: the first G/2 tokens see the last G/2, which is a
            look into the future; for parity with the published pseudo-code.
        num_sinks: the first so many tokens of the row are visible to all later queries, once each (SF-Attn: 4).
        returned_fraction: share r of the offset heads that goes back to the plain groups (SF-Attn: 1/2): the first
            N/2 + round(r N/2) heads are plain, ties to even.
        reassembly: "heads", as above; "sequence": every offset head uses plain groups in the first share r of the
            sequence (rounded to groups) and offset windows after it, another reading of the paper.
        q_segment_ids: attention stays inside equal segments.
        kv_mask: False = padding key.
        scale: of the products, default H^-1/2.
        dropout_rng: key where weights are dropped.
        dropout_rate: share of weights dropped.
        deterministic: no dropout.
        implementation: "grouped" (dense attention in each group, by the best implementation of `softmax_attention`),
            "block_list" (one call of `block_attention`), "xla_dense" (the reference: a mask); None takes the first that can.

    Returns:
        Attended values in the type of q.

    Raises:
        ConfigError: a field out of range, groups that do not divide T, T != S.
        NotImplementedError: the named implementation cannot do this call.
    """
    pattern = ShiftedPattern(group_size, variant, num_sinks, returned_fraction, reassembly)
    if q.shape[1] != k.shape[1]:
        raise ConfigError(f"T = {q.shape[1]} queries and S = {k.shape[1]} keys: groups need T == S. Pass whole sequences.")
    pattern.check(q.shape[1])
    call = make_call(
        q, k, v, normalization="softmax", q_segment_ids=q_segment_ids, kv_mask=kv_mask, scale=scale,
        dropout_rng=dropout_rng, dropout_rate=dropout_rate, deterministic=deterministic,
    )  # fmt: skip
    return dispatch.call("shifted_attention", implementation, call, pattern)


def interpolation_factor(new_length: int, old_length: int) -> float:
    """Returns what positions are divided by when a model of `old_length` reads `new_length` tokens: ceil(new / old), or 1.

    Linear position interpolation (Chen et al., 2023, arXiv 2306.15595), as LongLoRA rounds it: `rotary(scaling=...)`.
    """
    if new_length < 1 or old_length < 1:
        raise ConfigError(f"lengths {new_length} and {old_length}: not sequence lengths. Give positive numbers of tokens.")
    return float(max(math.ceil(new_length / old_length), 1))


def shifted_block_index(pattern: ShiftedPattern, length: int, heads: int, block: int) -> Int[np.ndarray, "N R J"]:
    """The pattern as lists of key blocks per query block (with `causal=True`), for `block_attention`; numpy.

    Args:
        pattern: without rolling.
        length: T.
        heads: N.
        block: tokens per block; must divide all group borders and the number of sinks.

    Raises:
        ConfigError: the pattern does not consist of such blocks.
    """
    reason = _block_reason(pattern, length, heads, block)
    if reason:
        raise ConfigError(f"block = {block}: {reason}. Use the default implementation.")
    rows, plain = length // block, pattern.plain_heads(heads)
    sinks = np.arange(rows)[None] * block < pattern.num_sinks
    listed = []
    for offset in (False, True):
        bounds = np.array(pattern.bounds(length, offset=offset))
        group = np.searchsorted(bounds, np.arange(rows) * block, side="right")
        seen = (group[:, None] == group[None]) | sinks
        listed.append(seen & np.tri(rows, dtype=bool))
    width = max(seen.sum(1).max() for seen in listed)
    lists = [np.sort(np.where(seen, np.arange(rows), rows), axis=1)[:, :width] for seen in listed]
    lists = [np.where(rows_of < rows, rows_of, -1) for rows_of in lists]
    return np.stack([lists[head >= plain] for head in range(heads)]).astype(np.int32)


class _Run(NamedTuple):
    """Groups of one width that follow each other."""

    start: int
    width: int
    count: int


def _runs(bounds: tuple[int, ...]) -> list[_Run]:
    runs: list[_Run] = []
    for first, last in itertools.pairwise(bounds):
        if runs and runs[-1].width == last - first:
            runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
        else:
            runs.append(_Run(first, last - first, 1))
    return runs


def _grouped(call: AttentionCall, pattern: ShiftedPattern) -> Array:
    """Plain and offset heads apart; groups become batch rows of dense causal attention."""
    length, heads = call.q.shape[1:3]
    plain = pattern.plain_heads(heads)
    shift = pattern.group_size // 2
    parts = []
    for offset, (first, last) in enumerate(((0, plain), (plain, heads))):
        if first == last:
            continue
        part = _heads(call, first, last)
        rolled = bool(offset) and pattern.variant == "roll"
        if rolled:
            part = _map_tokens(lambda x: jnp.roll(x, -shift, axis=1), part)
        if part.dropout_key is not None:
            part = dataclasses.replace(part, dropout_key=jax.random.fold_in(part.dropout_key, offset))
        y = _attend_groups(part, _runs(pattern.bounds(length, offset=bool(offset))), pattern.num_sinks)
        parts.append(jnp.roll(y, shift, axis=1) if rolled else y)
    return jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _attend_groups(call: AttentionCall, runs: list[_Run], num_sinks: int) -> Array:
    outputs = []
    for number, (start, width, count) in enumerate(runs):

        def cut(x: Array, start=start, width=width, count=count) -> Array:
            """[B, T, ..] to [B * count, width, ..]."""
            return x[:, start : start + width * count].reshape(x.shape[0] * count, width, *x.shape[2:])

        part = _map_tokens(cut, call)
        options: dict[str, Any] = {}
        if num_sinks and start + width * (count - 1) > 0:
            batch, sinks = call.q.shape[0], min(num_sinks, call.q.shape[1])

            def prefixed(x: Array | None, whole: Array | None, sinks=sinks, count=count) -> Array | None:
                """Puts the sinks in front of every group's keys."""
                if x is None:
                    return None
                first = jnp.repeat(whole[:, :sinks], count, axis=0)
                return jnp.concatenate([first, x], axis=1)

            tokens = start + np.arange(width * count, dtype=np.int32).reshape(count, width)
            # A sink that lies in the group, or after it, is not also seen as a prefix.
            ahead = np.where(np.arange(sinks) < tokens[:, :1], np.arange(sinks), -1).astype(np.int32)
            options["q_positions"] = jnp.tile(tokens, (batch, 1))
            options["kv_positions"] = jnp.tile(np.concatenate([ahead, tokens], axis=1), (batch, 1))
            options["kv_segment_ids"] = prefixed(part.kv_segment_ids, call.kv_segment_ids)
            part = dataclasses.replace(
                part, k=prefixed(part.k, call.k), v=prefixed(part.v, call.v), kv_mask=prefixed(part.kv_mask, call.kv_mask)
            )
        if call.dropout_key is not None:
            options |= {"dropout_rng": jax.random.fold_in(call.dropout_key, number), "deterministic": False}
            options["dropout_rate"] = call.dropout_rate
        y = softmax_attention(
            part.q, part.k, part.v, causal=True, q_segment_ids=part.q_segment_ids, kv_mask=part.kv_mask,
            scale=call.scale, **options,
        )  # fmt: skip
        outputs.append(y.reshape(call.q.shape[0], width * count, *y.shape[2:]))
    return jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]


def _heads(call: AttentionCall, first: int, last: int) -> AttentionCall:
    """Query heads [first, last) with their key/value heads."""
    share = call.q.shape[2] // call.k.shape[2]
    if first // share == (last - 1) // share or (first % share == 0 and last % share == 0):
        kv = slice(first // share, (last - 1) // share + 1)
        k, v = call.k[:, :, kv], call.v[:, :, kv]
    else:  # the border falls inside a group of query heads
        k, v = (jnp.repeat(x, share, axis=2)[:, :, first:last] for x in (call.k, call.v))
    return dataclasses.replace(call, q=call.q[:, :, first:last], k=k, v=v)


def _map_tokens(function: Any, call: AttentionCall) -> AttentionCall:
    """Applies a function to every array [B, T, ..] of a call."""
    names = ("q", "k", "v", "q_segment_ids", "kv_segment_ids", "kv_mask")
    return dataclasses.replace(
        call, **{name: function(value) for name in names if (value := getattr(call, name)) is not None}
    )


def _refuse_grouped(call: AttentionCall, pattern: ShiftedPattern) -> str | None:
    if pattern.variant == "roll" and pattern.num_sinks:
        return "sinks lie twice in the group that wraps around"
    return None


def _block_list(call: AttentionCall, pattern: ShiftedPattern) -> Array:
    batch, length, heads, _ = call.q.shape
    block = _block_size(pattern, length, heads)
    index = jnp.asarray(shifted_block_index(pattern, length, heads, block))
    index = index[:1] if pattern.plain_heads(heads) == heads else index
    return block_attention(
        call.q, call.k, call.v, jnp.broadcast_to(index[None], (batch, *index.shape)), block_q=block, block_kv=block,
        causal=True, q_segment_ids=call.q_segment_ids, kv_mask=call.kv_mask, scale=call.scale,
    )  # fmt: skip


def _borders(pattern: ShiftedPattern, length: int, heads: int) -> list[int]:
    offset = pattern.plain_heads(heads) < heads
    borders = [*pattern.bounds(length, offset=False), *(pattern.bounds(length, offset=True) if offset else ())]
    return [*borders, min(pattern.num_sinks, length)]


def _block_size(pattern: ShiftedPattern, length: int, heads: int) -> int:
    """The largest block that all borders are multiples of."""
    common = math.gcd(*_borders(pattern, length, heads))
    return max(size for size in range(1, min(common, _LARGEST_BLOCK) + 1) if common % size == 0)


def _block_reason(pattern: ShiftedPattern, length: int, heads: int, block: int) -> str | None:
    if pattern.variant == "roll":
        return "rolled groups are not causal in the order of the tokens"
    if any(border % block for border in _borders(pattern, length, heads)):
        return "does not divide every border of the groups and the number of sinks"
    return None


def _refuse_block_list(call: AttentionCall, pattern: ShiftedPattern) -> str | None:
    if call.dropout_key is not None:
        return "block lists do not drop weights"
    return _block_reason(pattern, call.q.shape[1], call.q.shape[2], 1)


def _dense(call: AttentionCall, pattern: ShiftedPattern) -> Array:
    """The reference: one mask per head."""
    return attend(dataclasses.replace(call, mask=pattern.visible(call.q.shape[1], call.q.shape[2])[None]))


dispatch.register("shifted_attention", "grouped", dispatch.Implementation(_grouped, _refuse_grouped))
dispatch.register("shifted_attention", "xla_dense", dispatch.Implementation(_dense))
dispatch.register("shifted_attention", "block_list", dispatch.Implementation(_block_list, _refuse_block_list))

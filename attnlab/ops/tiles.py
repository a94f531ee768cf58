"""Ragged rows laid out in tiles of one chunk each, for rules whose chunks start anew with every segment.

A row is a sequence of tokens with padding anywhere and several segments (packed documents). Padding is as if it were not
there; a chunk never spans two segments, and begins with its segment (or `start` slots into its first chunk, where a prefix of
that many tokens came before). In a `Tiles` every chunk fills one tile of slots from its own place on, empty slots are marked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.types import Array, Bool, Int

_STATIC = {"static": True}
TOKEN_BLOCK = 32  # tokens between the carried values that a scan by tokens keeps for its backward pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenFlags:
    """What a token is in its row.

    Attributes:
        valid: [B, T] bool, False = padding.
        reset: [B, T] bool, the first token of a segment that starts here (not of one that a carried state continues).
        first: [B, T] bool, the first token of the row.
        since: [B, T] int32, valid tokens of the same segment and call before it.
        place: [B, T] int32, its place in its chunk, 0 .. chunk - 1.
        count: [B] int32, place of the token that would follow the row.
    """

    valid: Array
    reset: Array
    first: Array
    since: Array
    place: Array
    count: Array


def token_flags(
    batch: int,
    length: int,
    chunk: int,
    *,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    start: int = 0,
    count: Int[Array, " B"] | None = None,
) -> TokenFlags:
    """Describes the tokens of ragged rows.

    Args:
        batch: B.
        length: T.
        chunk: tokens per chunk.
        mask: False = padding.
        segment_ids: segments are runs of one id; 0 = padding.
        start: place in its chunk of a segment's first token.
        count: place of the first token of each row, which then continues a segment; None = it starts one.
    """
    order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    valid = jnp.ones((batch, length), bool) if mask is None else mask
    if segment_ids is not None:
        valid = valid & (segment_ids != 0)
    latest = jax.lax.cummax(jnp.where(valid, order, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first = valid & (before < 0)
    new = first
    if segment_ids is not None:
        other = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1) != segment_ids
        new = valid & ((before < 0) | other)
    number = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    since = number - jax.lax.cummax(jnp.where(new, number, 0), axis=1)
    if count is None:
        reset, base = new, jnp.full((batch, 1), start, jnp.int32)
    else:
        reset = new & ~first
        continued = jnp.cumsum(reset, axis=1, dtype=jnp.int32) == 0
        base = jnp.where(continued, count[:, None], start)
    place = (base + since) % chunk
    initial = jnp.full((batch,), start % chunk, jnp.int32) if count is None else count
    last = jnp.maximum(latest[:, -1:], 0)
    following = (jnp.take_along_axis(place, last, axis=1)[:, 0] + 1) % chunk
    return TokenFlags(valid, reset, first, since, place, jnp.where(latest[:, -1] < 0, initial, following))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows in tiles [B, M, C].

    Attributes:
        valid: [B, M, C] bool, slots that hold a token.
        reset: [B, M] bool, a segment starts here.
        fresh: [B, M] bool, a chunk starts here (else a carried one goes on).
        used: int32 scalar, tiles that the fullest row needs; more than M = the rows do not fit.
        count: [B] int32, as in `TokenFlags`.
        index: [B, M, C] int32 of the token in each slot, or None where tokens lie in order, `lead` slots from the front.
        place: [B, T] int32 of the flat slot of each token, or None likewise.
        lead: empty slots in front.
        length: T.
        exact: the rows fit whatever their segments are.
    """

    valid: Array
    reset: Array
    fresh: Array
    used: Array
    count: Array
    index: Array | None
    place: Array | None
    lead: int = dataclasses.field(metadata=_STATIC)
    length: int = dataclasses.field(metadata=_STATIC)
    exact: bool = dataclasses.field(metadata=_STATIC)

    def take(self, x: Array) -> Array:
        """Lays tokens [B, T, ...] out: [B, M, C, ...], zeros in empty slots."""
        batch, number, chunk = self.valid.shape
        rest = x.shape[2:]
        if self.index is None:
            behind = number * chunk - self.lead - self.length
            x = jnp.pad(x, ((0, 0), (self.lead, behind), *((0, 0),) * len(rest)))
        else:
            index = self.index.reshape(batch, -1)
            x = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)
        return x.reshape(batch, number, chunk, *rest)

    def untake(self, x: Array) -> Array:
        """Undoes `take`; padding gets zeros."""
        flat = x.reshape(x.shape[0], -1, *x.shape[3:])
        if self.place is None:
            return flat[:, self.lead : self.lead + self.length]
        return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(flat, self.place)


def make_tiles(
    batch: int,
    length: int,
    chunk: int,
    *,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    start: int = 0,
    count: Int[Array, " B"] | None = None,
) -> Tiles:
    """Lays ragged rows out in chunks; arguments as in `token_flags`.

    Rows of many short segments may need up to T tiles; M is bounded by twice the tiles of a row without segments and one more,
    and `exact` says whether that is always enough.
    """
    if mask is None and segment_ids is None and count is None:
        lead = start % chunk
        number = max(1, -(-(lead + length) // chunk))
        slots = jnp.arange(number * chunk)
        valid = jnp.broadcast_to((slots >= lead) & (slots < lead + length), (batch, number * chunk))
        begins = jnp.broadcast_to(jnp.arange(number) == 0, (batch, number))
        return Tiles(
            valid=valid.reshape(batch, number, chunk),
            reset=begins,
            fresh=jnp.broadcast_to((jnp.arange(number) > 0) | (lead == 0), (batch, number)),
            used=jnp.asarray(number, jnp.int32),
            count=jnp.full((batch,), (start + length) % chunk, jnp.int32),
            index=None,
            place=None,
            lead=lead,
            length=length,
            exact=True,
        )
    flags = token_flags(batch, length, chunk, mask=mask, segment_ids=segment_ids, start=start, count=count)
    plain = -(-length // chunk) if count is None and start % chunk == 0 else -(-(length - 1) // chunk) + 1
    number = max(1, plain if segment_ids is None else min(2 * plain + 1, length))
    begins = flags.valid & ((flags.place == 0) | flags.reset | flags.first)
    tile = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    nowhere = number * chunk
    place = jnp.where(flags.valid & (tile < number), tile * chunk + flags.place, nowhere)

    def rows(values, at, size, fill):
        return jax.vmap(lambda v, i: jnp.full((size,), fill, v.dtype).at[i].set(v, mode="drop"))(values, at)

    order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    index = rows(order, place, nowhere, length).reshape(batch, number, chunk)
    opening = jnp.where(begins, tile, number)
    return Tiles(
        valid=index < length,
        reset=rows(flags.reset, opening, number, False),
        fresh=rows(flags.place == 0, opening, number, False),
        used=jnp.max(jnp.sum(begins, axis=1, dtype=jnp.int32)),
        count=flags.count,
        index=index,
        place=place,
        lead=0,
        length=length,
        exact=segment_ids is None or number >= length,
    )


class Tile(NamedTuple):
    """What the step of `scan_tiles` gets: one chunk per row, or one token per row.

    Attributes:
        tokens: the arrays, [B, R, ...] with R = chunk or 1.
        valid: [B, R] bool.
        place: [B, R] int32, places in the chunk.
        reset: [B] bool, a segment starts here.
        fresh: [B] bool, a chunk starts here.
    """

    tokens: Any
    valid: Array
    place: Array
    reset: Array
    fresh: Array


def scan_tiles(
    step: Callable[[Any, Tile], tuple[Any, Any]],
    carry: Any,
    tokens: Any,
    chunk: int,
    *,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    start: int = 0,
    count: Int[Array, " B"] | None = None,
) -> tuple[Any, Any, Int[Array, " B"]]:
    """Runs a rule over ragged rows chunk by chunk; single tokens alone. The step is computed again in the backward pass.

    Args:
        step: (carry, tile) to (carry, outputs [B, R, ...]); a tile without valid tokens must leave the carry as it is.
        carry: arrays [B, ...].
        tokens: pytree of [B, T, ...].
        chunk: as the other arguments in `token_flags`.

    Returns:
        The last carry, the outputs [B, T, ...] with zeros for padding, and the places [B] that follow.
    """
    batch, length = jax.tree.leaves(tokens)[0].shape[:2]
    ragged = {"mask": mask, "segment_ids": segment_ids, "start": start, "count": count}
    if length == 1:
        flags = token_flags(batch, length, chunk, **ragged)
        carry, outputs = step(
            carry, Tile(tokens, flags.valid, flags.place, flags.reset[:, 0], (flags.valid & (flags.place == 0))[:, 0])
        )
        return carry, jax.tree.map(lambda x: zero_padding(x, flags.valid), outputs), flags.count
    tiles = make_tiles(batch, length, chunk, **ragged)
    step = jax.checkpoint(step)
    if tiles.exact:
        return *_by_tile(step, carry, tokens, tiles, skip=segment_ids is not None), tiles.count

    def by_tile(carry, tokens):
        return _by_tile(step, carry, tokens, tiles, skip=True)

    def by_token(carry, tokens):
        return _by_token(step, carry, tokens, token_flags(batch, length, chunk, **ragged))

    # Where the segments are so many and short that their chunks do not fit the tiles: slower, and exact all the same.
    return *jax.lax.cond(tiles.used <= tiles.valid.shape[1], by_tile, by_token, carry, tokens), tiles.count


def zero_padding(x: Array, valid: Bool[Array, "B T"]) -> Array:
    """Returns x [B, T, ...] with zeros where not valid."""
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0)


def _by_tile(step: Callable, carry: Any, tokens: Any, tiles: Tiles, *, skip: bool) -> tuple[Any, Any]:
    batch, number, chunk = tiles.valid.shape
    place = jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32), (batch, chunk))
    over = (tiles.reset, tiles.fresh, tiles.valid, jax.tree.map(tiles.take, tokens))
    over = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), over)

    def one(carry, inputs):
        at, (reset, fresh, valid, tokens) = inputs
        tile = Tile(tokens, valid, place, reset, fresh)
        if not skip:
            return step(carry, tile)
        shapes = jax.eval_shape(step, carry, tile)[1]
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(at < tiles.used, step, lambda carry, tile: (carry, empty), carry, tile)

    carry, outputs = jax.lax.scan(one, carry, (jnp.arange(number), over))
    return carry, jax.tree.map(lambda x: tiles.untake(jnp.moveaxis(x, 0, 1)), outputs)


def _by_token(step: Callable, carry: Any, tokens: Any, flags: TokenFlags) -> tuple[Any, Any]:
    def one(carry, inputs):
        valid, place, reset, tokens = inputs
        return step(
            carry, Tile(jax.tree.map(lambda x: x[:, None], tokens), valid[:, None], place[:, None], reset, valid & (place == 0))
        )

    carry, outputs = scan_tokens(one, carry, (flags.valid, flags.place, flags.reset, tokens))
    return carry, jax.tree.map(lambda x: zero_padding(x[:, :, 0], flags.valid), outputs)


def scan_tokens(step: Callable, carry: Any, tokens: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over axis 1 of [B, T, ...] that keeps the carry every few tokens only; zeros follow the last token."""
    length = jax.tree.leaves(tokens)[0].shape[1]
    block = min(length, TOKEN_BLOCK)
    blocks = -(-length // block)

    def split(x):
        x = jnp.pad(jnp.moveaxis(x, 1, 0), ((0, blocks * block - length), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(blocks, block, *x.shape[1:])

    def join(x):
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)

    some = jax.checkpoint(lambda carry, inputs: jax.lax.scan(step, carry, inputs))
    carry, outputs = jax.lax.scan(some, carry, jax.tree.map(split, tokens))
    return carry, jax.tree.map(join, outputs)

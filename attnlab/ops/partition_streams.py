"""Tokens sorted by partition into padded streams: static shapes for ragged segments, and gathers in both directions.

Entry e = t k + j is the j-th choice of token t. Entries are sorted by (partition, position), and every partition's stream is
padded to whole chunks, so that a table says which partition a chunk belongs to. The number of chunks is bounded by
(T k + P (C - 1)) / C whatever the routing is. Rows of a batch are laid out one by one: streams never cross rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.ops.chunk_scan import Chains
from attnlab.types import Array, Bool, Int


class Order(NamedTuple):
    """Entries sorted by partition.

    Attributes:
        entry: [B, T k] int32; entries of padding come last.
        sizes: [B, P] int32, entries per partition.
    """

    entry: Array
    sizes: Array


class Streams(NamedTuple):
    """Where entries stand; L slots, n = L / C chunks.

    Attributes:
        entry: [B, L] int32, the entry in each slot, 0 where there is none.
        token: [B, L] int32, its token.
        used: [B, L] bool.
        slot: [B, T, k] int32, the slot of each entry, 0 for padding.
        real: [B, T] bool, False = padding.
        chain: [B, n] int32, the partition of each chunk.
        first: [B, n] bool, the chunk is its partition's first.
        last: [B, P] int32, the partition's last chunk, or -1.
    """

    entry: Array
    token: Array
    used: Array
    slot: Array
    real: Array
    chain: Array
    first: Array
    last: Array

    def of_entries(self, x: Array) -> Array:
        """[B, T, k] values of entries to [B, L], zero in empty slots."""
        flat = x.reshape(x.shape[0], -1)
        return jnp.where(self.used, jnp.take_along_axis(flat, self.entry, axis=1), 0)

    def resets(self, reset: Bool[Array, "B T"]) -> Bool[Array, "B L"]:
        """Resets of tokens as resets of streams: where a reset lies between a stream's neighbours, or before its first token."""
        count = jnp.cumsum(reset.astype(jnp.int32), axis=1)
        count = jnp.take_along_axis(count, self.token, axis=1)
        before = jnp.pad(count, ((0, 0), (1, 0)))[:, :-1]
        opens = jnp.repeat(self.first, self.used.shape[1] // self.first.shape[1], axis=1)
        at = jnp.arange(self.used.shape[1]) % (self.used.shape[1] // self.first.shape[1])
        return self.used & (count != jnp.where(opens & (at == 0), 0, before))

    def cleared(self, reset: Bool[Array, "B T"]) -> Bool[Array, "B P"]:
        """Partitions that a reset clears after their last token, or that have none while the others are reset."""
        count = jnp.cumsum(reset.astype(jnp.int32), axis=1)
        seen = jnp.where(self.used, jnp.take_along_axis(count, self.token, axis=1), 0)
        seen = jnp.max(seen.reshape(*self.chain.shape, -1), axis=-1)  # [B, n], per chunk
        of_partition = self.chain[..., None] == jnp.arange(self.last.shape[1])
        return jnp.max(jnp.where(of_partition, seen[..., None], 0), axis=1) < count[:, -1:]

    def chains(self, leading: int, reset: Bool[Array, "B T"] | None) -> Chains:
        """The chunk table behind `leading` chunks of one more chain, number 0, which holds all tokens."""
        batch = self.chain.shape[0]
        cleared = None if reset is None else jnp.pad(self.cleared(reset), ((0, 0), (1, 0)))
        lead = jnp.arange(leading)[None].repeat(batch, axis=0)
        return Chains(
            chain=jnp.concatenate([jnp.zeros_like(lead), 1 + self.chain], axis=1),
            first=jnp.concatenate([lead == 0, self.first], axis=1),
            last=jnp.concatenate(
                [jnp.full((batch, 1), leading - 1), jnp.where(self.last < 0, -1, leading + self.last)], axis=1
            ),
            cleared=cleared,
        )


def sort_entries(index: Int[Array, "B T k"], partitions: int, valid: Bool[Array, "B T"] | None = None) -> Order:
    """Sorts the chosen partitions of all tokens by (partition, position)."""
    batch = index.shape[0]
    index = index if valid is None else jnp.where(valid[..., None], index, partitions)
    flat = index.reshape(batch, -1)
    sizes = jnp.sum(flat[..., None] == jnp.arange(partitions), axis=1, dtype=jnp.int32)
    return Order(jnp.argsort(flat, axis=1, stable=True).astype(jnp.int32), sizes)


def chunk_count(entries: int, partitions: int, chunk: int) -> int:
    """Returns the number of chunks that hold so many entries however they are spread over the partitions."""
    return max((entries + partitions * (chunk - 1)) // chunk, 1)


def lay_out(
    index: Int[Array, "B T k"], partitions: int, chunk: int, valid: Bool[Array, "B T"] | None = None
) -> Streams:
    """Builds the padded streams of chosen partitions.

    Args:
        index: chosen partitions, different ones per token.
        partitions: P.
        chunk: C.
        valid: False = padding, in no stream; None = all real.
    """
    batch, length, choices = index.shape
    entries = length * choices
    order = sort_entries(index, partitions, valid)
    chunks = -(-order.sizes // chunk)
    end = jnp.cumsum(chunks, axis=1)  # in chunks
    start = end - chunks
    offset = jnp.cumsum(order.sizes, axis=1) - order.sizes  # in sorted entries

    count = chunk_count(entries, partitions, chunk)
    number = jnp.arange(count, dtype=jnp.int32)
    chain = jnp.minimum(jnp.sum(end[:, None, :] <= number[:, None], axis=-1, dtype=jnp.int32), partitions - 1)
    first = (jnp.take_along_axis(start, chain, axis=1) == number) & (jnp.take_along_axis(chunks, chain, axis=1) > 0)
    of_chain = lambda x: jnp.repeat(jnp.take_along_axis(x, chain, axis=1), chunk, axis=1)  # noqa: E731
    rank = jnp.arange(count * chunk, dtype=jnp.int32) - of_chain(start) * chunk
    used = rank < of_chain(order.sizes)
    place = jnp.where(used, of_chain(offset) + rank, 0)
    entry = jnp.where(used, jnp.take_along_axis(order.entry, place, axis=1), 0)

    # The way back: sorted entry i of partition p stands in slot start[p] C + i - offset[p].
    sorted_at = jnp.arange(entries, dtype=jnp.int32)[None]
    own = jnp.minimum(jnp.sum((offset + order.sizes)[:, None, :] <= sorted_at[..., None], -1, dtype=jnp.int32), partitions - 1)
    slot = jnp.take_along_axis(start, own, axis=1) * chunk + sorted_at - jnp.take_along_axis(offset, own, axis=1)
    slot = jnp.where(sorted_at < order.sizes.sum(axis=1, keepdims=True), slot, 0)
    slot = jnp.zeros_like(slot).at[jnp.arange(batch)[:, None], order.entry].set(slot, unique_indices=True)
    return Streams(
        entry=entry,
        token=entry // choices,
        used=used,
        slot=slot.reshape(batch, length, choices),
        real=jnp.ones((batch, length), bool) if valid is None else valid,
        chain=chain,
        first=first,
        last=jnp.where(chunks > 0, end - 1, -1),
    )


@jax.custom_vjp
def expand(x: Array, streams: Streams) -> Array:
    """Tokens [B, T, N, H] to slots [B, L, N, H], zero in empty ones; its transpose is `collapse`, a gather too."""
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.where(streams.used[..., None, None], x[rows, streams.token], 0)


@jax.custom_vjp
def collapse(x: Array, streams: Streams) -> Array:
    """Slots [B, L, N, H] to tokens [B, T, N, H], the sum over a token's entries; its transpose is `expand`."""
    rows = jnp.arange(x.shape[0])[:, None]
    total = sum(x[rows, streams.slot[..., j]] for j in range(streams.slot.shape[-1]))
    return jnp.where(streams.real[..., None, None], total, 0)


expand.defvjp(lambda x, streams: (expand(x, streams), streams), lambda streams, ct: (collapse(ct, streams), None))
collapse.defvjp(lambda x, streams: (collapse(x, streams), streams), lambda streams, ct: (expand(ct, streams), None))

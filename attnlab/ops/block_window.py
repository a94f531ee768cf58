"""Attention of every block of queries to its own and neighbouring blocks of keys, with learned relative positions.

Two families use it: block-local heads (`local_block_attention`), and tokens sorted by cluster (`ops.routing`). Layout inside
is [B, N, T, H]. Without relative positions the neighbours are a block list, and `ops.block_attention` walks it where it has
a kernel; else the neighbours are laid side by side and scored at once.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.ops.block_attention import block_attention
from attnlab.ops.relative import attend_relative
from attnlab.types import Array, Bool, Float, Int

_STATIC = {"static": True}
# Bytes of scores that are held at a time.
CHUNK_BYTES = 64 * 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockWindow:
    """One call in canonical form.

    Attributes:
        q: [B, N, T, H], k the same.
        v: [B, N, T, V].
        kv_mask: [1 or B, 1 or N, T] bool, False = padding key.
        groups: [1 or B, 1 or N, T] int32, attention stays inside equal groups, or None.
        rel_keys: [2m + 1, H], or None.
        rel_values: [2m + 1, V], or None.
        block: positions per block.
        before: how many blocks before its own a block of queries sees.
        after: how many after it.
        causal: hide keys after the query.
        left: keys seen before the query, None = all of the blocks.
        scale: of the products.
    """

    q: Array
    k: Array
    v: Array
    kv_mask: Array
    groups: Array | None
    rel_keys: Array | None
    rel_values: Array | None
    block: int = dataclasses.field(metadata=_STATIC)
    before: int = dataclasses.field(metadata=_STATIC)
    after: int = dataclasses.field(metadata=_STATIC)
    causal: bool = dataclasses.field(metadata=_STATIC)
    left: int | None = dataclasses.field(default=None, metadata=_STATIC)
    scale: float = dataclasses.field(default=1.0, metadata=_STATIC)


def local_block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    *,
    block: int,
    flange: int,
    causal: bool,
    kv_mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    rel_keys: Float[Array, "R H"] | None = None,
    rel_values: Float[Array, "R V"] | None = None,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Block-local heads of the Routing Transformer (Roy et al., 2021, arXiv 2003.05997).

    Causal: a block of queries sees its own block up to the query, and the `flange` positions before the block. Else it sees
    `flange` positions on both sides; relative positions then take the query to sit in the last block of what it sees, as
    the published code does (so they are shifted by the flange). Blocks are counted along the row. Keys whose value vector
    is all zero are padding; a query that sees padding alone attends to all of its blocks alike ("blocks": gets zeros).

    Args:
        q: queries; the published layer scales them by H^-1/2 beforehand (the relative scores too are made of them).
        k: keys.
        v: values.
        block: positions per block.
        flange: further positions seen, a multiple of the block.
        causal: see above.
        kv_mask: False = padding key as well.
        segment_ids: attention stays inside equal segments.
        rel_keys: table [2m + 1, H] added to the keys, or None.
        rel_values: table [2m + 1, V] added to the values, or None.
        scale: of the products with the keys.
        implementation: "xla", "blocks" (through `ops.block_attention`; no relative positions) or None.

    Raises:
        ConfigError: a flange that is no multiple of the block.
    """
    if block < 1 or flange < 0 or flange % block:
        raise ConfigError(f"flange = {flange}: block = {block} does not divide it. Choose a multiple of the block.")
    there = jnp.any(v != 0, axis=-1).swapaxes(1, 2)
    call = BlockWindow(
        *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)),
        kv_mask=there if kv_mask is None else there & kv_mask[:, None],
        groups=None if segment_ids is None else segment_ids[:, None],
        rel_keys=rel_keys,
        rel_values=rel_values,
        block=block,
        before=flange // block,
        after=0 if causal else flange // block,
        causal=causal,
        scale=scale,
    )
    return jnp.swapaxes(dispatch.call("block_window", implementation, call), 1, 2)


def attend_neighbours(call: BlockWindow) -> Array:
    """The reference: [B, N, T, V], some blocks of queries at a time."""
    batch, heads, length, _ = call.q.shape
    block, before, after = call.block, call.before, call.after
    rows = -(-length // block)
    seen = (before + 1 + after) * block

    def cut(x: Array, ahead: int = 0, behind: int = 0) -> Array:
        """[b, n, T, ...] to [b, n, ahead + rows + behind, block, ...], zeros (False) around."""
        rest = [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, [(0, 0), (0, 0), (ahead * block, rows * block - length + behind * block), *rest])
        return x.reshape(*x.shape[:2], -1, block, *x.shape[3:])

    def around(x: Array) -> Array:
        """[b, n, T, ...] to [b, n, rows, seen, ...]: the blocks that each block of queries sees, side by side."""
        x = cut(x, before, after)
        return jnp.concatenate([x[:, :, i : i + rows] for i in range(before + 1 + after)], axis=3)

    at, kv_at = jnp.arange(block)[:, None], jnp.arange(seen)[None] - before * block
    outside = jnp.zeros((block, seen), bool)
    if call.causal:
        outside |= kv_at > at
    if call.left is not None:
        outside |= kv_at < at - call.left
    hidden = outside | ~around(call.kv_mask)[:, :, :, None]
    if call.groups is not None:
        # 0 is what surrounds the row; groups are told apart from it by the mask above
        hidden |= cut(call.groups)[..., None] != around(call.groups)[:, :, :, None]

    def some(inputs: tuple) -> Array:
        q, k, v, hidden = inputs
        first = block - seen  # of the last block seen: right for causal, the published shift otherwise
        return attend_relative(
            q, k, v, hidden=hidden, scale=call.scale, rel_keys=call.rel_keys, rel_values=call.rel_values, first=first
        )

    inputs = (cut(call.q), around(call.k), around(call.v), hidden)
    out = in_chunks(some, inputs, 4 * batch * heads * block * seen)
    return out.reshape(batch, heads, rows * block, -1)[:, :, :length]


def in_chunks(fn, inputs: tuple, item_bytes: int) -> Array:
    """Applies fn along axis 2 of the inputs, as many items at a time as fit `CHUNK_BYTES`; recomputes in the backward."""
    count = inputs[0].shape[2]
    size = max(CHUNK_BYTES // max(item_bytes, 1), 1)
    if size >= count:
        return fn(inputs)
    front = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs)
    one = jax.checkpoint(lambda xs: fn(jax.tree.map(lambda x: x[:, :, None], xs))[:, :, 0], prevent_cse=False)
    return jnp.moveaxis(jax.lax.map(one, front, batch_size=size), 0, 2)


def attend_lists(call: BlockWindow) -> Array:
    """The same through `ops.block_attention`."""
    batch, heads, length, width = call.q.shape
    rows = -(-length // call.block)
    number = jnp.arange(rows, dtype=jnp.int32)[:, None] + jnp.arange(-call.before, call.after + 1, dtype=jnp.int32)
    index = jnp.where((number >= 0) & (number < rows), number, -1)

    def folded(x: Array) -> Array:
        return jnp.broadcast_to(x, (batch, heads, length, *x.shape[3:])).reshape(batch * heads, length, *x.shape[3:])

    groups = None if call.groups is None else folded(call.groups)
    q, k, v = (folded(x)[:, :, None] for x in (call.q, call.k, call.v))
    out = block_attention(
        q,
        k,
        v,
        jnp.broadcast_to(index, (batch * heads, 1, *index.shape)),
        block_q=call.block,
        block_kv=call.block,
        causal=call.causal,
        window=None if call.left is None else (call.left, -1),
        q_segment_ids=groups,
        kv_segment_ids=groups,
        kv_mask=folded(call.kv_mask),
        scale=call.scale,
    )
    return out.reshape(batch, heads, length, width)


def needs_plain_scores(q: Array, v: Array, rel_keys: Array | None, rel_values: Array | None) -> str | None:
    """Why a call cannot go through `ops.block_attention`, or None."""
    if rel_keys is not None or rel_values is not None:
        return "learned relative positions need the scores"
    return "values of another width than the keys" if q.shape[-1] != v.shape[-1] else None


def no_kernel() -> str | None:
    """Why `ops.block_attention` gains nothing on the target platform, or None."""
    platform = dispatch.target_platform()
    fast = [name for name, where in dispatch.implementations("block_attention").items() if platform in where]
    return None if set(fast) - {"xla", "xla_dense"} else f"ops.block_attention has no kernel on {platform}"


dispatch.register(
    "block_window",
    "blocks",
    dispatch.Implementation(
        attend_lists,
        refuse=lambda call: needs_plain_scores(call.q, call.v, call.rel_keys, call.rel_values),
        defer=lambda call: no_kernel(),
    ),
)
dispatch.register("block_window", "xla", dispatch.Implementation(attend_neighbours))

"""The shared middle of the sparse families: score blocks, choose some, hand the choice on as a block list.

Scores are float32 products of pooled queries and keys in full precision. A choice is made once and carries no gradient:
what consumes it (`ops.block_attention`) and its backward pass see the same list, so recomputation cannot flip it. Ties go to
the lower block number. Lists are int32 [B, G, R, J] with -1 = none (see `ops.block_index`); R query blocks, C key blocks.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import ConfigError
from attnlab.ops.masks import canonical_window
from attnlab.types import Array, Bool, Float, Int, Window

Pooling = Literal["mean", "max", "first"]


def pool_blocks(
    x: Float[Array, "B L N H"], block: int, pooling: Pooling = "mean", mask: Bool[Array, "B L"] | None = None
) -> Float[Array, "B C N H"]:
    """Pools tokens by blocks, in float32; a shorter last block is pooled over what it has.

    Args:
        x: queries or keys.
        block: tokens per block.
        pooling: "mean", "max" or "first" (the block's first token).
        mask: False = padding, left out of the mean and the maximum; a block without any token pools to zeros.
    """
    length = x.shape[1]
    there = jnp.ones((1, length), bool) if mask is None else mask
    there = jnp.pad(there, ((0, 0), (0, -length % block))).reshape(there.shape[0], -1, block, 1, 1)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    if pooling == "first":
        return jnp.where(there[:, :, 0], x[:, :, 0], 0.0)
    if pooling == "mean":
        return jnp.where(there, x, 0.0).sum(2) / jnp.maximum(there.sum(2), 1)
    if pooling == "max":
        return jnp.where(there.any(2), jnp.where(there, x, -jnp.inf).max(2), 0.0)
    raise ConfigError(f"pooling = {pooling!r}: unknown. Use 'mean', 'max' or 'first'.")


def block_scores(
    q: Float[Array, "B R N H"],
    k: Float[Array, "B C K H"],
    groups: Literal["all", "kv", "query"] = "query",
    scale: float | None = None,
) -> Float[Array, "B G R C"]:
    """Scores of pooled query blocks against pooled key blocks, float32 in full precision.

    Args:
        q: pooled queries.
        k: pooled keys.
        groups: one score for "all" heads (the mean over query heads), per "kv" head (the mean over its query heads) or per
            "query" head.
        scale: of the products, default H^-1/2.
    """
    batch, rows, heads, width = q.shape
    kv_heads = k.shape[2]
    q = q.astype(jnp.float32).reshape(batch, rows, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("brkgh,bckh->bkgrc", q, k.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    scores = scores * (width**-0.5 if scale is None else scale)
    if groups == "query":
        return scores.reshape(batch, heads, rows, -1)
    if groups == "kv":
        return scores.mean(2)
    if groups == "all":
        return scores.mean((1, 2))[:, None]
    raise ConfigError(f"groups = {groups!r}: unknown. Use 'all', 'kv' or 'query'.")


def visible_blocks(
    length: int, keys: int, block_q: int, block_kv: int, *, causal: bool = False, window: Window = None
) -> Bool[np.ndarray, "R C"]:
    """Tells which key blocks hold at least one key that a query of the block may see; bottom-right aligned, numpy.

    Args:
        length: T.
        keys: S.
        block_q: queries per block.
        block_kv: keys per block.
        causal: keys after the query are hidden.
        window: keys seen (left, right) of the query.
    """
    left, right = canonical_window(window, causal)
    first_q = np.arange(0, length, block_q)[:, None] + keys - length
    last_q = np.minimum(first_q + block_q, keys) - 1
    first_k = np.arange(0, keys, block_kv)[None]
    last_k = np.minimum(first_k + block_kv, keys) - 1
    seen = np.ones((first_q.shape[0], first_k.shape[1]), bool)
    if right is not None:
        seen &= first_k <= last_q + right
    if left is not None:
        seen &= last_k >= first_q - left
    return seen


def forced_blocks(
    length: int, keys: int, block_q: int, block_kv: int, *, own: bool = True, sink: int = 0, local: int = 0
) -> Bool[np.ndarray, "R C"]:
    """Marks key blocks that are always chosen, numpy.

    Args:
        length: T.
        keys: S.
        block_q: queries per block.
        block_kv: keys per block.
        own: the key blocks in which the block's own positions lie (bottom-right aligned).
        sink: the first so many key blocks.
        local: so many key blocks before the block's own.
    """
    first_q = np.arange(0, length, block_q)[:, None] + keys - length
    last_q = np.minimum(first_q + block_q, keys) - 1
    number = np.arange(-(-keys // block_kv))[None]
    marked = np.broadcast_to(number < sink, (first_q.shape[0], number.shape[1])).copy()
    first_own, last_own = np.maximum(first_q, 0) // block_kv, np.maximum(last_q, 0) // block_kv
    if own:
        marked |= (number >= first_own) & (number <= last_own)
    return marked | ((number < first_own) & (number >= first_own - local))


def top_blocks(
    scores: Float[Array, "B G R C"],
    count: int,
    *,
    visible: Array | np.ndarray | None = None,
    forced: Array | np.ndarray | None = None,
    threshold: float | None = None,
) -> Int[Array, "B G R J"]:
    """The best `count` key blocks of every query block, best first; forced blocks come before all others.

    Args:
        scores: of the blocks; no gradient flows back.
        count: J, blocks per list, forced ones included.
        visible: bool, broadcastable to the scores; the others are never chosen, forced or not.
        forced: bool, alike: always chosen.
        threshold: blocks below it are left out (their entries are -1), unless forced.

    Raises:
        ConfigError: more blocks wanted than there are.
    """
    columns = scores.shape[-1]
    if not 1 <= count <= columns:
        raise ConfigError(f"count = {count}: there are {columns} key blocks. Choose between 1 and {columns}.")
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    if threshold is not None:
        scores = jnp.where(scores >= threshold, scores, -jnp.inf)
    if forced is not None:
        scores = jnp.where(forced, jnp.inf, scores)
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    best, index = jax.lax.top_k(scores, count)
    return jnp.where(best == -jnp.inf, -1, index).astype(jnp.int32)


def mass_blocks(
    scores: Float[Array, "B G R C"],
    mass: float,
    limit: int,
    *,
    visible: Array | np.ndarray | None = None,
    forced: Array | np.ndarray | None = None,
) -> Int[Array, "B G R J"]:
    """The fewest blocks whose softmax over the block scores reaches `mass`, at most `limit`, best first.

    Args:
        scores: of the blocks; no gradient flows back.
        mass: between 0 and 1.
        limit: J.
        visible: bool, broadcastable to the scores.
        forced: bool, alike: always chosen; they count in the mass and in the limit.
    """
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    seen = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
    share = jnp.nan_to_num(jax.nn.softmax(seen, axis=-1))
    index = top_blocks(scores, limit, visible=visible, forced=forced)
    shares = jnp.where(index < 0, 0.0, jnp.take_along_axis(share, jnp.maximum(index, 0), axis=-1))
    before = jnp.cumsum(shares, axis=-1) - shares
    keep = before < mass
    if forced is not None:
        keep |= jnp.take_along_axis(jnp.broadcast_to(forced, scores.shape), jnp.maximum(index, 0), axis=-1)
    return jnp.where(keep, index, -1)


def expand_blocks(index: Int[Array, "B G R J"], q_factor: int, kv_factor: int) -> Int[Array, "B G R2 J2"]:
    """Refines a list: blocks become `q_factor` query blocks and `kv_factor` key blocks each, R2 = R q_factor.

    Turns tables of regions (a region = some consecutive blocks) into block lists.

    Args:
        index: lists of the coarse blocks.
        q_factor: fine query blocks per coarse one.
        kv_factor: fine key blocks per coarse one.
    """
    fine = index[..., None] * kv_factor + jnp.arange(kv_factor, dtype=index.dtype)
    fine = jnp.where(index[..., None] < 0, -1, fine).reshape(*index.shape[:-1], -1)
    return jnp.repeat(fine, q_factor, axis=2).astype(jnp.int32)


def cluster_blocks(clusters: int, q_blocks: int, kv_blocks: int) -> Int[np.ndarray, "1 1 R J"]:
    """Lists of gathered clusters: queries and keys are stored cluster after cluster, and see their own cluster only.

    Gather the members of every cluster first and pass their old positions as `q_positions` and `kv_positions`, so that
    causal order means what it did.

    Args:
        clusters: number of clusters.
        q_blocks: query blocks per cluster.
        kv_blocks: key blocks per cluster.
    """
    number = np.arange(clusters, dtype=np.int32)[:, None]
    lists = number * kv_blocks + np.arange(kv_blocks, dtype=np.int32)
    return np.repeat(lists, q_blocks, axis=0)[None, None]

"""H2O on arrays: the two caches of the recent tokens and the heavy hitters, and one forward over each.

"H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (Zhang et al., NeurIPS 2023, arXiv
2306.14048). One call is one forward: all its queries see each other and what the cache held, then scores are added up and
the choice is made. Beyond the published code, rows of a batch have their own scores (there: their sum), and with grouped
queries the evicting cache chooses by the sum over the query heads of a key/value head (there: not possible).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from attnlab.errors import ConfigError, field_error, nearest
from attnlab.nn.mixer import check_kv_cache, extend_kv_cache, init_kv_cache
from attnlab.ops.attention import MASKED

FORMS = ("evict", "mask")
_CHUNK_BYTES = 32 * 2**20  # of probabilities at a time
_LAST = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many tokens stay.

    Attributes:
        heavy: tokens of the highest score.
        recent: newest tokens.
        heavy_ratio: instead of `heavy`, its share of the prompt, rounded down.
        recent_ratio: the same of `recent`; where it rounds down to 0 nothing is masked, as published.
    """

    heavy: int = 0
    recent: int = 0
    heavy_ratio: float = 0.0
    recent_ratio: float = 0.0

    def check(self, form: str) -> None:
        """Refuses budgets that the form does not know.

        Raises:
            ConfigError: naming the field, the value and the fix.
        """
        if form not in FORMS:
            raise field_error("form", form, "is not known", nearest(str(form), FORMS).capitalize().rstrip("?"))
        ratios = bool(self.heavy_ratio or self.recent_ratio)
        if self.heavy < 0 or (self.recent < 1 and not ratios):
            raise field_error("recent, heavy", (self.recent, self.heavy), "is no budget", "Keep recent >= 1 and heavy >= 0 tokens")
        if ratios and (self.heavy or self.recent):
            raise field_error("heavy_ratio", self.heavy_ratio, "beside a budget in tokens", "Give either ratios or tokens")
        if ratios and form == "evict":
            raise field_error("heavy_ratio", self.heavy_ratio, "needs form = 'mask': an evicting cache has a fixed size",
                              "Give heavy and recent in tokens")  # fmt: skip
        if min(self.heavy_ratio, self.recent_ratio) < 0 or max(self.heavy_ratio, self.recent_ratio) > 1:
            raise field_error("heavy_ratio, recent_ratio", (self.heavy_ratio, self.recent_ratio), "is not in [0, 1]",
                              "Give shares of the prompt")  # fmt: skip

    def tables(self, max_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Heavy and recent tokens for a prompt of 0 .. max_len tokens, int32; rounded in double precision."""
        if self.heavy_ratio or self.recent_ratio:
            lengths = np.arange(max_len + 1, dtype=np.float64)
            return tuple((ratio * lengths).astype(np.int32) for ratio in (self.heavy_ratio, self.recent_ratio))
        return tuple(np.full(max_len + 1, tokens, np.int32) for tokens in (self.heavy, self.recent))


@struct.dataclass
class MaskedCache:
    """All tokens, and what the next forward may see of them.

    Attributes:
        k: [B, S, K, H].
        v: [B, S, K, H].
        positions: [B, S] int32; -1 = empty or padding.
        index: int32 scalar, the first free slot.
        keep: [B, N, S] bool: keys that the next forward sees, and the slot of its first token.
        score: [B, N, S] float32, probability that each key drew, added up; 0 once it is out.
        heavy: [B] int32, tokens; of the prompt.
        recent: [B] int32, the same.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    index: jax.Array
    keep: jax.Array
    score: jax.Array
    heavy: jax.Array
    recent: jax.Array


@struct.dataclass
class EvictingCache:
    """The kept tokens of each key/value head, in any order; C = budget, and one slot for the token to come.

    Attributes:
        k: [B, K, C + 1, H].
        v: [B, K, C + 1, H].
        positions: [B, K, C + 1] int32 of the token in each slot; -1 = free.
        score: [B, K, C + 1] float32, added up over forwards; 0 where free.
        index: int32 scalar, tokens given so far, padding included.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    score: jax.Array
    index: jax.Array

    def ordered(self) -> tuple[jax.Array, jax.Array]:
        """Returns positions [B, K, C] in increasing order, then -1, and the scores of those tokens."""
        order = jnp.argsort(jnp.where(self.positions < 0, _LAST, self.positions), axis=-1)[..., :-1]
        return tuple(jnp.take_along_axis(x, order, axis=-1) for x in (self.positions, self.score))


def init_masked_cache(batch: int, max_len: int, heads: int, kv_heads: int, head_dim: int, dtype: Any) -> MaskedCache:
    """Returns an empty cache of `max_len` slots."""
    plain = init_kv_cache(batch, max_len, kv_heads, head_dim, dtype)
    return MaskedCache(
        k=plain.k, v=plain.v, positions=plain.positions, index=plain.index,
        keep=jnp.ones((batch, heads, max_len), bool), score=jnp.zeros((batch, heads, max_len), jnp.float32),
        heavy=jnp.zeros(batch, jnp.int32), recent=jnp.zeros(batch, jnp.int32),
    )  # fmt: skip


def init_evicting_cache(batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: Any) -> EvictingCache:
    """Returns an empty cache of `capacity` tokens (heavy + recent) per key/value head."""
    shape = (batch, kv_heads, capacity + 1)
    return EvictingCache(
        k=jnp.zeros((*shape, head_dim), dtype), v=jnp.zeros((*shape, head_dim), dtype),
        positions=jnp.full(shape, -1, jnp.int32), score=jnp.zeros(shape, jnp.float32), index=jnp.zeros((), jnp.int32),
    )  # fmt: skip


def attend_masked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    mask: jax.Array | None,
    cache: MaskedCache,
    budget: Budget,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, MaskedCache]:
    """One forward over a cache of all tokens.

    After it, if more than heavy + recent tokens are there: the next forward sees the `recent` newest, its own token
    counted, and the `heavy` others of the highest score; scores of all others fall to 0, but for the `recent` newest keys.

    Args:
        q: [B, T, N, H], rotated.
        k: [B, T, K, H], rotated.
        v: [B, T, K, H].
        positions: [1 or B, T] int32.
        mask: [B, T] bool, False = padding, or None.
        cache: with T free slots.
        budget: fixed by the first forward, where it is a share.
        scale: of the products, default H^-1/2.

    Returns:
        ([B, T, N, H], the cache).
    """
    check_kv_cache(cache, q.shape[0], q.shape[1], q.dtype)
    start, slots = cache.index, jnp.arange(cache.k.shape[1])
    batch, _, heads, _ = q.shape
    kv_heads = k.shape[2]
    plain = extend_kv_cache(cache, k, v, positions, mask)
    cache = cache.replace(k=plain.k, v=plain.v, positions=plain.positions, index=plain.index)
    shown = (cache.keep | (slots >= start)).reshape(batch, kv_heads, heads // kv_heads, -1)
    y, sums = _attend_and_sum(
        q, jnp.swapaxes(cache.k, 1, 2), jnp.swapaxes(cache.v, 1, 2), _of_queries(positions, mask, q.shape),
        cache.positions[:, None], shown, scale,
    )  # fmt: skip
    score = cache.score + sums
    there = cache.positions >= 0
    count = there.sum(-1, dtype=jnp.int32)  # [B]
    heavy, recent = (jnp.asarray(table)[count] for table in budget.tables(slots.size))
    heavy, recent = (jnp.where(start == 0, new, old) for new, old in ((heavy, cache.heavy), (recent, cache.recent)))
    order = jnp.cumsum(there, axis=-1) - 1
    from_end = jnp.where(there, count[:, None] - order, _LAST)[:, None]  # [B, 1, S]: 1 = the newest
    candidate = (from_end > recent[:, None, None]) & there[:, None]
    chosen = _top(score, candidate, heavy[:, None, None])
    over = ((count > heavy + recent) & (recent > 0))[:, None, None]
    keep = jnp.where(over, chosen | (from_end < recent[:, None, None]), there[:, None]) | (slots == cache.index)
    score = jnp.where(over & ~(chosen | (from_end <= recent[:, None, None])), 0.0, score)
    y = jnp.where(cache.index > slots.size, jnp.nan, y)  # see `DenseAttention.attend_cached`
    return y, cache.replace(keep=keep, score=score, heavy=heavy, recent=recent)


def attend_evicting(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    mask: jax.Array | None,
    cache: EvictingCache,
    budget: Budget,
    *,
    scale: float | None = None,
) -> tuple[jax.Array, EvictingCache]:
    """One forward over the kept tokens and the new ones, then eviction down to the `recent` newest and `heavy` others.

    The arguments are those of `attend_masked`; there may be any number of forwards.
    """
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    if cache.positions.shape[0] != batch or cache.k.dtype != q.dtype:
        raise ConfigError(
            f"cache of batch {cache.positions.shape[0]} and type {cache.k.dtype} used with batch {batch} and type {q.dtype}. "
            f"Make it with init_cache({batch}, max_len)."
        )
    at = _of_queries(positions, mask, q.shape)
    new = {"k": jnp.swapaxes(k, 1, 2), "v": jnp.swapaxes(v, 1, 2)}
    new["positions"] = jnp.broadcast_to(at[:, None], (batch, kv_heads, length))
    kept = {"k": cache.k, "v": cache.v, "positions": cache.positions, "score": cache.score}
    if length == 1:
        free = jnp.argmax(cache.positions < 0, axis=-1)
        b, head = jnp.ogrid[:batch, :kv_heads]
        kept |= {name: kept[name].at[b, head, free].set(new[name][:, :, 0].astype(kept[name].dtype)) for name in new}
    else:
        new["score"] = jnp.zeros((batch, kv_heads, length), jnp.float32)
        kept = {name: jnp.concatenate([kept[name], new[name].astype(kept[name].dtype)], axis=2) for name in kept}
    y, sums = _attend_and_sum(q, kept["k"], kept["v"], at, kept["positions"], None, scale)
    kept["score"] = kept["score"] + sums.reshape(batch, kv_heads, heads // kv_heads, -1).sum(2)
    capacity = cache.positions.shape[-1] - 1  # less than the budget where the sequence is shorter than that
    evict = _evict_one if length == 1 else _evict_many
    return y, EvictingCache(**evict(kept, min(budget.recent, capacity), capacity), index=cache.index + length)


def _evict_one(kept: dict[str, jax.Array], recent: int, capacity: int) -> dict[str, jax.Array]:
    """Frees the slot of the lowest score among those that are not recent, if no slot is free; nothing is moved."""
    positions, score = kept["positions"], kept["score"]
    full = (positions >= 0).all(-1, keepdims=True)
    oldest_recent = jax.lax.top_k(positions, recent)[0][..., -1:] if recent else _LAST
    score_of = jnp.where(positions < oldest_recent, score, jnp.inf)
    lowest = score_of == score_of.min(-1, keepdims=True)
    victim = jnp.argmax(jnp.where(lowest, positions, -1), axis=-1, keepdims=True)  # of equal scores the newest goes
    gone = (jnp.arange(capacity + 1) == victim) & full
    return kept | {"positions": jnp.where(gone, -1, positions), "score": jnp.where(gone, 0.0, score)}


def _evict_many(kept: dict[str, jax.Array], recent: int, capacity: int) -> dict[str, jax.Array]:
    """Gathers what stays into `capacity` + 1 slots, in the order of positions."""
    order = jnp.argsort(jnp.where(kept["positions"] < 0, _LAST, kept["positions"]), axis=-1)
    positions, score = (jnp.take_along_axis(kept[name], order, axis=-1) for name in ("positions", "score"))
    there = positions >= 0
    count = there.sum(-1, keepdims=True)
    from_end = count - jnp.arange(positions.shape[-1])
    candidate = there & (from_end > recent)
    stays = jnp.where(count > capacity, _top(score, candidate, capacity - recent) | (there & ~candidate), there)
    first = jnp.argsort(~stays, axis=-1, stable=True)[..., : capacity + 1]
    stays, positions, score = (jnp.take_along_axis(x, first, axis=-1) for x in (stays, positions, score))
    slots = jnp.take_along_axis(order, first, axis=-1)
    return {
        "k": jnp.take_along_axis(kept["k"], slots[..., None], axis=2),
        "v": jnp.take_along_axis(kept["v"], slots[..., None], axis=2),
        "positions": jnp.where(stays, positions, -1),
        "score": jnp.where(stays, score, 0.0),
    }


def _top(score: jax.Array, candidate: jax.Array, count: jax.Array | int) -> jax.Array:
    """Marks the `count` candidates of the highest score along the last axis; of equal ones the first."""
    order = jnp.argsort(jnp.where(candidate, -score, jnp.inf), axis=-1, stable=True)
    return (jnp.argsort(order, axis=-1) < count) & candidate


def _of_queries(positions: jax.Array, mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Positions [B, T] int32, -1 for padding."""
    positions = jnp.broadcast_to(positions, shape[:2]).astype(jnp.int32)
    return positions if mask is None else jnp.where(mask, positions, -1)


def _attend_and_sum(
    q: jax.Array, k: jax.Array, v: jax.Array, q_positions: jax.Array, kv_positions: jax.Array, shown: jax.Array | None,
    scale: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Causal softmax attention, some queries at a time, with the probability that each key drew.

    Args:
        q: [B, T, N, H].
        k: [B, K, S, H].
        v: [B, K, S, H].
        q_positions: [B, T]; a negative one sees nothing.
        kv_positions: [B, 1 or K, S]; a negative one is not seen.
        shown: [B, K, N / K, S] bool, or None.
        scale: of the products.

    Returns:
        ([B, T, N, H] in the type of q, sums over queries [B, N, S] float32).
    """  # fmt: skip
    batch, length, heads, width = q.shape
    kv_heads, keys = k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    chunk = max(min(length, _CHUNK_BYTES // (4 * batch * heads * keys)), 1)
    count = -(-length // chunk)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def cut(x: jax.Array, value: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)), constant_values=value)
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def one(total: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, at = piece
        q = q.reshape(batch, chunk, kv_heads, heads // kv_heads, width)
        scores = jnp.einsum("btkgh,bksh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
        seen = (kv_positions[:, :, None, None] >= 0) & (kv_positions[:, :, None, None] <= at[:, None, None, :, None])
        seen = seen if shown is None else seen & shown[:, :, :, None]
        weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1), 0.0)
        y = jnp.einsum(
            "bkgts,bksh->btkgh", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return total + weights.sum(3), y.astype(q.dtype)

    total = jnp.zeros((batch, kv_heads, heads // kv_heads, keys), jnp.float32)
    total, y = jax.lax.scan(one, total, (cut(q, 0), cut(q_positions, -1)))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, count * chunk, heads, width)[:, :length]
    return y, total.reshape(batch, heads, keys)

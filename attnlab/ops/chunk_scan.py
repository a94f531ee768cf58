"""The chunked mathematics behind the linear-attention scans: what a chunk adds to a state, and how states pass on.

A state S [Hk, Hv] of a head follows S_t = diag(a_t) S_{t-1} + k_t^T u_t, o_t = q_t S_t, with u_t = v_t (gated linear
attention) or u_t = beta_t (v_t - k_t diag(a_t) S_{t-1}) (gated delta rule). Over a chunk of C tokens that is

    out   = local + read S_in                 local [C, Hv], read [C, Hk]
    S_out = keep * S_in - mix S_in + add      keep [Hk or 1], mix [Hk, Hk] (delta rule only), add [Hk, Hv]

where `local`, `read`, `keep`, `mix` and `add` do not depend on the state: they are computed for all chunks at once, and only
the second line is sequential. Chunks come with a table that says where a chain of states starts, so that one call holds
several chains per row (the partitions of sparse state expansion).

Decays arrive as factors in [0, 1]. Products over a range of tokens are built by doubling, [1], [2], [4], ... tokens,
and never by dividing two products or subtracting two sums of logarithms: no decay is too strong, a factor of 0 is an exact
reset, and nothing overflows. The delta rule is in its UT form (Yang et al., 2024, arXiv 2406.06484; 2412.06464).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from attnlab.errors import ConfigError
from attnlab.ops import sharding
from attnlab.types import Array

# Below this size a product of blocks is written as multiply and sum: tiny batched matrix products are all overhead.
_TINY = 8


class Contribution(NamedTuple):
    """What chunks add and how they pass a state on; `...` are leading axes (see the module docstring)."""

    local: Array  # [..., C, Hv]
    read: Array  # [..., C, Hk]
    keep: Array  # [..., Hk or 1]
    mix: Array | None  # [..., Hk, Hk]
    add: Array  # [..., Hk, Hv]


class Chains(NamedTuple):
    """Which chain of states each chunk belongs to.

    Attributes:
        chain: [B, n] int32, ascending along n within a row where chunks are in use.
        first: [B, n] bool, the chunk starts its chain.
        last: [B, S] int32, the last chunk of each chain, or -1 for a chain without chunks.
        cleared: [B, S] bool, a reset follows the chain's last token: its last state is zero. None = nowhere.
    """

    chain: Array
    first: Array
    last: Array
    cleared: Array | None = None


def check_chunk(chunk: int) -> None:
    """Refuses a chunk length that is not a power of two.

    Raises:
        ConfigError: as it says.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ConfigError(f"chunk_size = {chunk}: not a power of two. Use 16, 32, 64 or 128.")


def fit_chunk(chunk: int, length: int) -> int:
    """Returns the chunk length to use for a sequence: no longer than the next power of two."""
    check_chunk(chunk)
    return min(chunk, 1 << max(length - 1, 0).bit_length())


def to_chunks(x: Array, chunk: int, fill: float = 0.0) -> Array:
    """[B, T, N, H] to [B, N, n, C, H], the end filled up; at least one chunk."""
    batch, length, heads, width = x.shape
    count = max(-(-length // chunk), 1)
    x = jnp.pad(x, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)), constant_values=fill)
    return x.reshape(batch, count, chunk, heads, width).transpose(0, 3, 1, 2, 4)


def from_chunks(x: Array, length: int) -> Array:
    """[B, N, n, C, H] to [B, T, N, H]."""
    batch, heads, count, chunk, width = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(batch, count * chunk, heads, width)[:, :length]


@functools.partial(jax.checkpoint, static_argnums=(5,))
def contributions(q: Array, k: Array, v: Array, decay: Array, beta: Array | None, precision: Any) -> Contribution:
    """Computes what each chunk contributes; the backward pass computes it again.

    Args:
        q: [..., C, Hk] float32, scaled. Tokens that are padding have zeros in q, k, v and beta, and a decay of 1.
        k: [..., C, Hk].
        v: [..., C, Hv].
        decay: [..., C, Hk] or [..., C, 1], factors in [0, 1].
        beta: [..., C, 1] for the delta rule, else None.
        precision: of the products.
    """
    dot = functools.partial(jnp.einsum, precision=precision)
    if beta is None:
        (scores,), (read,), leave, keep = decayed_scores((q,), k, decay, precision)
        return Contribution(dot("...ij,...jv->...iv", scores, v), read, keep, None, dot("...jk,...jv->...kv", leave, v))
    (scores, gram), (read, write), leave, keep = decayed_scores((q, k), k, decay, precision)
    inverse = unit_lower_inverse(jnp.tril(gram * beta, -1), precision)
    both = dot("...ij,...jh->...ih", inverse, jnp.concatenate([v, write], axis=-1) * beta)
    # u = u0 - w S_in: what the tokens write into an empty state, and what they take back of the present one
    out = dot("...ij,...jh->...ih", scores, both)
    state = dot("...jk,...jh->...kh", leave, both)
    width = v.shape[-1]
    return Contribution(out[..., :width], read - out[..., width:], keep, state[..., width:], state[..., :width])


def decayed_scores(
    queries: tuple[Array, ...], k: Array, decay: Array, precision: Any
) -> tuple[list[Array], list[Array], Array, Array]:
    """Lower triangular products q_i (prod_{j < m <= i} a_m) k_j of a chunk, and the decayed sides.

    Args:
        queries: each [..., C, H].
        k: [..., C, H].
        decay: factors a, [..., C, H] or [..., C, 1].
        precision: of the products.

    Returns:
        scores [..., C, C] per query array, zero above the diagonal; queries times the decay since the chunk's start (their own
        included); keys times the decay up to the chunk's end; the decay of the whole chunk [..., H or 1].
    """
    # One leading axis: the CPU compiler of jax 0.10 crashes on sums of products of seven and more axes.
    lead = k.shape[:-2]
    queries, k, decay = (tuple(_merge(q) for q in queries), _merge(k), _merge(decay))
    results = _decayed_scores(queries, k, decay, precision)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), results)


def _merge(x: Array) -> Array:
    return x.reshape(-1, *x.shape[-2:])


def _decayed_scores(
    queries: tuple[Array, ...], k: Array, decay: Array, precision: Any
) -> tuple[list[Array], list[Array], Array, Array]:
    if decay.shape[-1] == 1:
        ratio, since, until, total = _decay_ratios(decay[..., 0])
        scores = [jnp.einsum("...ih,...jh->...ij", q, k, precision=precision) * ratio for q in queries]
        return scores, [q * since for q in queries], k * until, total
    chunk = k.shape[-2]
    # Blocks of one token; `arrive` and `leave` are decayed from the block's start and to its end.
    scores = [jnp.sum(q * k, axis=-1)[..., None, None] for q in queries]
    arrive = [(q * decay)[..., None, :] for q in queries]
    leave, total = k[..., None, :], decay[..., None, :]
    while leave.shape[-2] < chunk:
        first, _ = _pairs(leave)
        scores = [
            _lower(*_pairs(part), _transposed_product(_pairs(side)[1], first, precision))
            for part, side in zip(scores, arrive, strict=True)
        ]
        total_first, total_second = _pairs(total)
        onward = jnp.ones_like(total_first)
        arrive = [_scale_pairs(side, onward, total_first) for side in arrive]
        leave = _scale_pairs(leave, total_second, onward)
        total = total_first * total_second
    return [part[..., 0, :, :] for part in scores], [side[..., 0, :, :] for side in arrive], leave[..., 0, :, :], total[..., 0, 0, :]


def _decay_ratios(decay: Array) -> tuple[Array, Array, Array, Array]:
    """Products of [..., C] factors: over (j, i] as [..., C, C], from the start, to the end, and over all [..., 1]."""
    ratio = jnp.ones_like(decay)[..., None, None]
    since = total = decay[..., None, None]  # [..., blocks, size, 1]
    until = jnp.ones_like(since)
    while until.shape[-2] < decay.shape[-1]:
        ratio = _lower(*_pairs(ratio), _pairs(since)[1] * _pairs(until)[0].swapaxes(-1, -2))
        total_first, total_second = _pairs(total)
        onward = jnp.ones_like(total_first)
        since, until = _scale_pairs(since, onward, total_first), _scale_pairs(until, total_second, onward)
        total = total_first * total_second
    return ratio[..., 0, :, :], since[..., 0, :, :], until[..., 0, :, :], total[..., 0, 0, :]


def _pairs(x: Array) -> tuple[Array, Array]:
    """Splits the block axis of [..., blocks, s, H] into first and second blocks of each pair."""
    x = x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def _scale_pairs(x: Array, first: Array, second: Array) -> Array:
    """Joins pairs of blocks [..., blocks, s, H] to [..., blocks / 2, 2 s, H], each half times a factor [..., blocks / 2, 1, H]."""
    *lead, blocks, size, width = x.shape
    x = x.reshape(*lead, blocks // 2, 2, size, width) * jnp.stack([first, second], axis=-3)
    return x.reshape(*lead, blocks // 2, 2 * size, width)


def _lower(first: Array, second: Array, below: Array) -> Array:
    """[[first, 0], [below, second]] of square blocks."""
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _transposed_product(a: Array, b: Array, precision: Any) -> Array:
    """a b^T of [..., s, H] blocks."""
    if a.shape[-2] < _TINY:
        return jnp.sum(a[..., :, None, :] * b[..., None, :, :], axis=-1)
    return jnp.einsum("...ih,...jh->...ij", a, b, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_lower_inverse(lower: Array, precision: Any = None) -> Array:
    """(I + lower)^-1 of strictly lower triangular [..., C, C], C a power of two.

    By halves, X = [[X1, 0], [-X2 L21 X1, X2]], as stable as forward substitution. (The shorter product of I + (-L)^(2^i) is not:
    with repeated keys its powers grow beyond float32 before they vanish.)
    """
    return _inverse(_merge(lower), precision).reshape(lower.shape)


def _inverse(lower: Array, precision: Any) -> Array:
    size = lower.shape[-1]
    if size == 1:
        return jnp.ones_like(lower)
    half = size // 2
    both = _inverse(jnp.concatenate([lower[:, :half, :half], lower[:, half:, half:]]), precision)
    first, second = jnp.split(both, 2)
    below = _product(second, _product(lower[:, half:, :half], first, precision), precision)
    return _lower(first, second, -below)


def _product(a: Array, b: Array, precision: Any) -> Array:
    if a.shape[-1] < _TINY:
        return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)
    return jnp.matmul(a, b, precision=precision)


def _inverse_forward(lower: Array, precision: Any) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(lower, precision)
    return inverse, inverse


def _inverse_backward(precision: Any, inverse: Array, cotangent: Array) -> tuple[Array]:
    turned = jnp.swapaxes(inverse, -1, -2)
    product = jnp.matmul(jnp.matmul(turned, cotangent, precision=precision), turned, precision=precision)
    return (-jnp.tril(product, -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def run_chains(
    parts: Contribution, chains: Chains | None, initial: Array | None, axis: Any, precision: Any
) -> tuple[Array, Array]:
    """Passes states along the chunks and reads them.

    Args:
        parts: with leading axes [B, N, n].
        chains: of the chunks, or None: each row is one chain.
        initial: states that the chains start from, [B, S, N, Hk, Hv] float32, or None = zeros.
        axis: name(s) of a manual mesh axis over which the sequence is split; the rows of every device then continue those of
            the device before. None = the sequence is whole.
        precision: of the products.

    Returns:
        outputs [B, N, n, C, Hv], and the states after each chain [B, S, N, Hk, Hv] (of the whole sequence, on every device).
    """
    batch, _, count = parts.add.shape[:3]
    if chains is None:
        index = jnp.arange(count, dtype=jnp.int32)[None].repeat(batch, axis=0)
        chains = Chains(jnp.zeros_like(index), index == 0, jnp.full((batch, 1), count - 1, jnp.int32))
    if axis is not None:
        initial, final = _exchange(parts, chains, initial, axis, precision)
        before, _ = _states(parts, chains, initial, precision)
    else:
        before, final = _states(parts, chains, initial, precision)
    return parts.local + jnp.einsum("bncik,bnckv->bnciv", parts.read, before, precision=precision), final


def _states(parts: Contribution, chains: Chains, initial: Array | None, precision: Any) -> tuple[Array, Array]:
    """Returns the states before each chunk [B, N, n, Hk, Hv] and after each chain [B, S, N, Hk, Hv]."""
    batch = parts.add.shape[0]
    chunks_first = lambda x: None if x is None else jnp.moveaxis(x, 2, 0)  # noqa: E731
    first = chains.first.T[:, :, None, None, None]
    start = None
    if initial is not None:
        rows = jnp.arange(batch)[:, None]
        start = jnp.where(chains.first[..., None, None, None], initial[rows, chains.chain], 0.0).swapaxes(0, 1)

    def step(state, chunk):
        first, start, keep, mix, add = chunk
        state = jnp.where(first, 0.0 if start is None else start, state)
        new = keep[..., None] * state + add
        if mix is not None:
            new = new - jnp.einsum("bnkl,bnlv->bnkv", mix, state, precision=precision)
        return new, (state, new)

    xs = (first, start, *map(chunks_first, (parts.keep, parts.mix, parts.add)))
    _, (before, after) = jax.lax.scan(step, jnp.zeros_like(parts.add[:, :, 0]), xs)
    final = after[jnp.maximum(chains.last, 0), jnp.arange(batch)[:, None]]
    empty = (chains.last < 0)[..., None, None, None]
    final = jnp.where(empty, 0.0 if initial is None else initial, final)
    if chains.cleared is not None:
        final = jnp.where(chains.cleared[..., None, None, None], 0.0, final)
    return jnp.moveaxis(before, 0, 2), final


def _exchange(
    parts: Contribution, chains: Chains, initial: Array | None, axis: Any, precision: Any
) -> tuple[Array, Array]:
    """Returns the states that this device's chains start from, and those after the last device's.

    Every device runs its chunks from empty states; extra value columns carry the identity (delta rule) or ones (a diagonal
    decay) along, and end as the map from a state before the device's part to one after. Maps and states are gathered and folded.
    """
    batch, heads, _, rows, width = parts.add.shape
    chain_count = chains.last.shape[1]
    columns = jnp.ones((rows, 1)) if parts.mix is None else jnp.eye(rows)
    padded = parts._replace(add=jnp.pad(parts.add, [(0, 0)] * 4 + [(0, columns.shape[-1])]))
    probe = jnp.concatenate([jnp.zeros((rows, width)), columns], axis=-1)
    probe = jnp.broadcast_to(probe, (batch, chain_count, heads, rows, width + columns.shape[-1]))
    _, after = _states(padded, chains, probe, precision)
    gathered = jax.lax.all_gather(after, axis)

    state = jnp.zeros_like(after[..., :width]) if initial is None else initial
    starts = []
    for device in range(gathered.shape[0]):
        starts.append(state)
        alone, onward = gathered[device][..., :width], gathered[device][..., width:]
        if parts.mix is None:
            state = alone + onward * state
        else:
            state = alone + jnp.einsum("bsnkl,bsnlv->bsnkv", onward, state, precision=precision)
    return jnp.stack(starts)[jax.lax.axis_index(axis)], state


def over_mesh(fn: Any, args: tuple[Any, ...], layouts: tuple[str, ...], out_layouts: Any) -> Any:
    """Calls `fn(*args, axis=...)` on each device's part of batch, heads and sequence; without a mesh it is just the call.

    Args:
        fn: gets local arrays, and as `axis` the mesh axes that split the sequence, or None.
        args: arrays; None passes through.
        layouts: a letter per dimension: B, N and T are split over the batch, head and sequence axes, others are whole.
        out_layouts: the same for the results, a pytree of strings.
    """
    if not sharding.active_axes():
        return fn(*args, axis=None)
    given = [i for i, arg in enumerate(args) if arg is not None]
    sizes = {letter: size for i in given for letter, size in zip(layouts[i], args[i].shape, strict=True)}
    kinds = {"B": "batch", "N": "heads", "T": "sequence"}
    split = {letter: sharding.axes_for(kind, sizes[letter]) for letter, kind in kinds.items() if letter in sizes}

    def spec(layout: str) -> PartitionSpec:
        return PartitionSpec(*(split.get(letter) for letter in layout))

    def local(*arrays):
        whole = [None] * len(args)
        for i, array in zip(given, arrays, strict=True):
            whole[i] = array
        return fn(*whole, axis=split.get("T"))

    return jax.shard_map(
        local,
        in_specs=tuple(spec(layouts[i]) for i in given),
        out_specs=jax.tree.map(spec, out_layouts),
        check_vma=False,  # states are the same on all devices of a sequence, which the type system cannot tell
    )(*(args[i] for i in given))

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
from attnlab.ops import dispatch, sharding
from attnlab.ops.chunk_products import decayed_scores, unit_lower_inverse
from attnlab.types import Array

# What a group of chunks may hold, about: a CPU's caches; elsewhere only memory counts.
_GROUP_BYTES = {"cpu": 4 * 2**20}
_GROUP_BYTES_ELSEWHERE = 2**30


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


def scan(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    beta: Array | None,
    chains: Chains | None,
    initial: Array | None,
    axis: Any,
    precision: Any,
) -> tuple[Array, Array]:
    """Runs chains of states through chunks [B, N, n, C, H]: `run_chains` of `contributions`, which describe the arguments.

    Long sequences go through in groups of chunks, so that what chunks contribute need not exist for all of them at once.

    What an accelerator's kernel replaces as a whole: `kernels_pallas` has functions of these arguments and results.
    """
    group, count = _group_length(k, v), k.shape[2]
    if axis is not None or count < 2 * group:
        parts = jax.checkpoint(contributions, static_argnums=(5,))(q, k, v, decay, beta, precision)
        return run_chains(parts, chains, initial, axis, precision)
    return _in_groups((q, k, v, decay, beta), chains, initial, precision, group)


def _group_length(k: Array, v: Array) -> int:
    """Chunks of a group: as many as fit, keys, values, states and scores counted with what is made of them on the way."""
    batch, heads, _, chunk, rows = k.shape
    width = v.shape[-1]
    size = 4 * batch * heads * (chunk * (6 * rows + 4 * width + 3 * chunk) + 2 * rows * width)
    return max(_GROUP_BYTES.get(dispatch.target_platform(), _GROUP_BYTES_ELSEWHERE) // size, 1)


def _in_groups(
    arrays: tuple[Array | None, ...], chains: Chains | None, initial: Array | None, precision: Any, group: int
) -> tuple[Array, Array]:
    """A scan over groups of chunks; the backward pass computes each group again from the states before it."""
    _, _, count, _, rows = arrays[1].shape
    width, whole = arrays[2].shape[-1], chains is None
    chains = _one_chain(arrays[1]) if whole else chains
    missing = -count % group  # chunks that neither write nor decay
    fills = (0.0, 0.0, 0.0, 1.0, 0.0)

    def grouped(x: Array | None, axis: int, fill: Any) -> Array | None:
        if x is None:
            return None
        pads = [(0, missing if dim == axis else 0) for dim in range(x.ndim)]
        x = jnp.pad(x, pads, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :]), axis, 0)

    def step(state, xs):
        *arrays, first, chain = xs
        parts = contributions(*arrays, precision)
        state, before, after = _states(parts, chain, first, state, initial, precision)
        return state, (_read(parts, before, precision), None if whole else after)

    xs = (*(grouped(x, 2, fill) for x, fill in zip(arrays, fills, strict=True)), grouped(chains.first, 1, False),
          grouped(chains.chain, 1, 0))  # fmt: skip
    start = jnp.zeros((*arrays[1].shape[:2], rows, width), jnp.float32)
    state, (out, after) = jax.lax.scan(jax.checkpoint(step), start, xs)
    out = jnp.moveaxis(out, 0, 2)
    out = out.reshape(*out.shape[:2], -1, *out.shape[4:])[:, :, :count]
    if whole:
        return out, state[:, None]
    return out, _final(after.reshape(-1, *after.shape[2:]), chains, initial)


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
    chains = _one_chain(parts.add) if chains is None else chains
    if axis is not None:
        initial, final = _exchange(parts, chains, initial, axis, precision)
    start = jnp.zeros_like(parts.add[:, :, 0])
    _, before, after = _states(parts, chains.chain, chains.first, start, initial, precision)
    return _read(parts, before, precision), _final(after, chains, initial) if axis is None else final


def _one_chain(chunks: Array) -> Chains:
    """Each row of chunks [B, N, n, ...] as one chain."""
    batch, _, count = chunks.shape[:3]
    index = jnp.arange(count, dtype=jnp.int32)[None].repeat(batch, axis=0)
    return Chains(jnp.zeros_like(index), index == 0, jnp.full((batch, 1), count - 1, jnp.int32))


def _read(parts: Contribution, before: Array, precision: Any) -> Array:
    return parts.local + jnp.einsum("bncik,bnckv->bnciv", parts.read, before, precision=precision)


def _states(
    parts: Contribution, chain: Array, first: Array, state: Array, initial: Array | None, precision: Any
) -> tuple[Array, Array, Array]:
    """Passes a state [B, N, Hk, Hv] along chunks; chains that start take theirs from `initial`.

    Returns:
        The last state, those before each chunk [B, N, n, Hk, Hv], and those after each chunk [n, B, N, Hk, Hv].
    """
    chunks_first = lambda x: None if x is None else jnp.moveaxis(x, 2, 0)  # noqa: E731
    start = None
    if initial is not None:
        rows = jnp.arange(chain.shape[0])[:, None]
        start = jnp.where(first[..., None, None, None], initial[rows, chain], 0.0).swapaxes(0, 1)

    def step(state, chunk):
        first, start, keep, mix, add = chunk
        state = jnp.where(first, 0.0 if start is None else start, state)
        new = keep[..., None] * state + add
        if mix is not None:
            new = new - jnp.einsum("bnkl,bnlv->bnkv", mix, state, precision=precision)
        return new, (state, new)

    xs = (first.T[:, :, None, None, None], start, *map(chunks_first, (parts.keep, parts.mix, parts.add)))
    state, (before, after) = jax.lax.scan(step, state, xs)
    return state, jnp.moveaxis(before, 0, 2), after


def _final(after: Array, chains: Chains, initial: Array | None) -> Array:
    """States after each chain [B, S, N, Hk, Hv], of those after each chunk [n, B, N, Hk, Hv]."""
    final = after[jnp.maximum(chains.last, 0), jnp.arange(after.shape[1])[:, None]]
    final = jnp.where((chains.last < 0)[..., None, None, None], 0.0 if initial is None else initial, final)
    return final if chains.cleared is None else jnp.where(chains.cleared[..., None, None, None], 0.0, final)


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
    _, _, after = _states(padded, chains.chain, chains.first, jnp.zeros_like(padded.add[:, :, 0]), probe, precision)
    ends = _final(after, chains, probe)
    gathered = jax.lax.all_gather(ends, axis)

    state = jnp.zeros_like(ends[..., :width]) if initial is None else initial
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

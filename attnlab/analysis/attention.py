"""Attention maps of a model, and what they say per head: entropy, distance, where the mass goes.

Maps have rows = queries and columns = keys, `[..., T, S]`; with T < S the queries are the last T positions. Rows need
not sum to one (sigmoid attention): each row is normalised for entropy, distance and the shares, and its sum is reported
as the row mass. A query whose row is all zero (padding) counts nowhere. 0 ln 0 = 0.

Attention is not attribution: a map says where a head looks, not what changed the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import ConfigError, field_error
from attnlab.models.lm import LM, attention_maps
from attnlab.models.static import Static

STATISTICS = (
    "entropy",
    "effective_keys",
    "distance",
    "confidence",
    "self_mass",
    "previous_mass",
    "first_mass",
    "row_mass",
)


class AttentionMaps(NamedTuple):
    """Captured maps.

    maps: [L, B, N, T, T] float32, for the chosen layers and heads; rows = queries.
    layers: the layer numbers of the first axis; heads: the head numbers of the third.
    mixers: the mixer's name of each of these layers.
    """

    maps: np.ndarray
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    mixers: tuple[str, ...]


def normalise(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (rows that sum to one, or to zero where nothing is attended; row mass [..., T])."""
    weights = jnp.asarray(weights, jnp.float32)
    mass = weights.sum(axis=-1)
    return weights / jnp.where(mass > 0, mass, 1.0)[..., None], mass


def entropy(weights: jax.Array) -> jax.Array:
    """Entropy of each row in nats: [..., T, S] -> [..., T]; between 0 (one key) and ln S (all keys alike)."""
    p, _ = normalise(weights)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)


def distance(weights: jax.Array) -> jax.Array:
    """Mean distance |query position - key position| in tokens: [..., T, S] -> [..., T]."""
    p, _ = normalise(weights)
    return jnp.sum(p * jnp.abs(_offsets(p)), axis=-1)


def strength_profile(weights: jax.Array, edges: Sequence[int] | None = None) -> tuple[jax.Array, tuple[int, ...]]:
    """Share of the mass by distance: how strongly a head attends to 0, 1, 2-3, 4-7, ... tokens away.

    Args:
        weights: [..., T, S].
        edges: ascending distances where a bucket begins, the first 0; default 0, 1, 2, 4, 8, ... below S.

    Returns:
        ([..., len(edges)] shares, mean over the queries that attend to anything; sums to one, the edges).
    """
    if edges is None:
        edges = [0, *(2**i for i in range(max(np.shape(weights)[-1] - 1, 1).bit_length()))]
    edges = tuple(int(edge) for edge in edges)
    if not edges or edges[0] != 0 or any(b <= a for a, b in itertools.pairwise(edges)):
        raise ConfigError(f"edges = {edges}: bucket edges must ascend from 0. Use, say, (0, 1, 2, 4, 8).")
    return _profile(weights, edges), edges


def row_statistics(weights: jax.Array) -> dict[str, jax.Array]:
    """Per query, each [..., T]; see `STATISTICS`.

    entropy (nats), effective_keys (exp of the entropy: the number of equally attended keys with that entropy), distance
    (tokens), confidence (largest share), self_mass, previous_mass, first_mass (share on the query's own, the previous,
    the first position; NaN where there is no previous position), row_mass (sum of the raw row).
    """
    p, mass = normalise(weights)
    offsets = _offsets(p)
    nats = entropy(p)
    previous = jnp.sum(jnp.where(offsets == 1, p, 0.0), axis=-1)
    has_previous = jnp.any(offsets == 1, axis=-1)
    return {
        "entropy": nats,
        "effective_keys": jnp.exp(nats),
        "distance": distance(p),
        "confidence": p.max(axis=-1),
        "self_mass": jnp.sum(jnp.where(offsets == 0, p, 0.0), axis=-1),
        "previous_mass": jnp.where(has_previous, previous, jnp.nan),
        "first_mass": p[..., 0],
        "row_mass": mass,
    }


@jax.jit
def head_statistics(weights: jax.Array, query_mask: jax.Array | None = None) -> dict[str, jax.Array]:
    """Per head: means of `row_statistics` over batch and queries, [..., B, N, T, S] -> each [..., N].

    Args:
        weights: [..., B, N, T, S].
        query_mask: [B, T] bool, True = counts. Queries that attend to nothing never count, except in row_mass; the
            first position does not count in previous_mass. effective_keys is the mean of exp(entropy), not exp of the
            mean entropy.
    """
    rows = row_statistics(weights)
    real = jnp.ones(rows["row_mass"].shape, bool)
    if query_mask is not None:
        real = jnp.broadcast_to(jnp.asarray(query_mask, bool)[:, None, :], real.shape)
    attends = real & (rows["row_mass"] > 0)
    out = {}
    for name, values in rows.items():
        counts = (real if name == "row_mass" else attends) & ~jnp.isnan(values)
        values = jnp.moveaxis(jnp.where(counts, values, 0.0), -3, -2)  # [..., N, B, T]
        counts = jnp.moveaxis(counts, -3, -2)
        out[name] = values.sum(axis=(-1, -2)) / jnp.maximum(counts.sum(axis=(-1, -2)), 1)
    return out


def capture(
    model: LM,
    variables: Any,
    tokens: jax.Array | np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> AttentionMaps:
    """Runs the model once and returns its attention maps, recomputed by the reference op from the same q and k.

    Args:
        model: an unbound `models.lm.LM`; the maps are the same whatever its `capture_attention`.
        variables: its variables.
        tokens: [B, T] int32; T of some hundreds at most (the maps hold L * B * N * T * T floats while captured).
        layers: layer numbers, negative ones from the end; None = all that have maps.
        heads: head numbers, the same for all layers; None = all.

    Raises:
        ConfigError: a layer or head that does not exist, or mixers without maps.
    """
    names = layer_mixers(model)
    if layers is not None:
        layers = [_index("layers", layer, len(names)) for layer in layers]
    maps = _layer_maps(model, variables, jnp.asarray(tokens, jnp.int32))
    if layers is None:
        layers = [layer for layer, found in enumerate(maps) if found is not None]
    missing = [layer for layer in layers if maps[layer] is None]
    if missing or not layers:
        raise field_error(
            "layers",
            tuple(missing),
            f"no attention maps: the mixers {sorted({names[i] for i in missing or range(len(names))})} have none",
            "Choose layers whose mixer has attention weights",
        )
    if heads is None:
        heads = range(min(maps[layer].shape[1] for layer in layers))
    heads = [_index("heads", head, min(maps[layer].shape[1] for layer in layers)) for head in heads]
    chosen = np.stack([maps[layer][:, heads] for layer in layers])
    return AttentionMaps(chosen, tuple(layers), tuple(heads), tuple(names[layer] for layer in layers))


def layer_mixers(model: LM) -> tuple[str, ...]:
    """The pattern entry (the mixer's name or alias) of each layer."""
    entries = model.entries()
    return tuple(entries[layer % len(entries)] for layer in range(model.num_layers))


def _layer_maps(model: LM, variables: Any, tokens: jax.Array) -> list[np.ndarray | None]:
    """One [B, N, T, T] per layer, None where the mixer has no attention weights."""
    maps = _sown_maps(Static(model.clone(capture_attention=True)), variables, tokens)
    return [None if found is None else np.asarray(found) for found in maps]


@partial(jax.jit, static_argnums=0)
def _sown_maps(static: Static, variables: Any, tokens: jax.Array) -> list[jax.Array | None]:
    _, updated = static.model.apply(variables, tokens, method="features", mutable=["intermediates"])
    return attention_maps(static.model, updated.get("intermediates", {}))


def _index(field: str, index: int, size: int) -> int:
    if not -size <= index < size:
        raise field_error(field, index, f"there are {size}", f"Use a number from 0 to {size - 1}")
    return int(index) % size


def _offsets(weights: jax.Array) -> jax.Array:
    """Query position minus key position, [T, S]; the last query stands at the last key."""
    queries, keys = weights.shape[-2:]
    return jnp.arange(keys - queries, keys)[:, None] - jnp.arange(keys)[None, :]


@partial(jax.jit, static_argnums=1)
def _profile(weights: jax.Array, edges: tuple[int, ...]) -> jax.Array:
    p, mass = normalise(weights)
    bucket = jnp.searchsorted(jnp.asarray(edges), jnp.abs(_offsets(p)), side="right") - 1
    share = jnp.einsum("...ts,tsk->...k", p, jax.nn.one_hot(bucket, len(edges)), precision="highest")
    return share / jnp.maximum((mass > 0).sum(axis=-1), 1)[..., None]

"""Softmax attention with learned relative positions, written out: for small groups of queries and keys.

Shaw et al., "Self-Attention with Relative Position Representations" (2018, arXiv 1803.02155): two tables [2m + 1, H],
indexed by clip(key position - query position, -m, m) + m; one is added to the keys, one to the values. The scores of all
offsets are one product with the table, brought into place by a shift of the rows; nothing [T, S, H] is held.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.types import Array

# Added to hidden scores, as published: a row of which everything is hidden becomes uniform.
HIDDEN = -1e9


def attend_relative(
    q: Array,
    k: Array,
    v: Array,
    *,
    hidden: Array | None = None,
    scale: float = 1.0,
    rel_keys: Array | None = None,
    rel_values: Array | None = None,
    first: int = 0,
    offsets: Array | None = None,
) -> Array:
    """softmax(scale q k^T + q R^K - 1e9 hidden) (v + R^V), over the last two axes; leading axes are alike or broadcast.

    Scores are float32. The scale does not act on the relative scores: scale the queries where it should.

    Args:
        q: [..., T, H].
        k: [..., S, H].
        v: [..., S, V].
        hidden: bool, broadcastable to [..., T, S]; a row of which all is hidden attends to all S keys alike.
        scale: of the products with the keys.
        rel_keys: [2m + 1, H], or None.
        rel_values: [2m + 1, V], or None.
        first: position of the first key minus that of the first query, both counted in steps of one.
        offsets: int32, broadcastable to [..., T, S]: the positions' differences where they are no such grid.

    Returns:
        [..., T, V] in the type of q.
    """
    precision = precision_of(q)
    scores = jnp.einsum("...th,...sh->...ts", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    if rel_keys is not None:
        scores = scores + relative_scores(q, rel_keys, k.shape[-2], first, offsets)
    if hidden is not None:
        scores = scores + jnp.where(hidden, HIDDEN, 0.0)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum(
        "...ts,...sh->...th", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    if rel_values is not None:
        out = out + relative_values(weights, rel_values, first, offsets)
    return out.astype(q.dtype)


def relative_scores(q: Array, table: Array, keys: int, first: int = 0, offsets: Array | None = None) -> Array:
    """q_i . table[clip(offset_ij)]: [..., T, S] float32; arguments as of `attend_relative`."""
    length = q.shape[-2]
    columns = table if offsets is not None else table[_rows(length, keys, first, table.shape[0] // 2)]
    products = jnp.einsum(
        "...th,rh->...tr", q, columns.astype(q.dtype), precision=precision_of(q), preferred_element_type=jnp.float32
    )
    if offsets is not None:
        index = jnp.broadcast_to(_clipped(offsets, table), (*products.shape[:-1], keys))
        return jnp.take_along_axis(products, index, axis=-1)
    # Row i, place j holds column j - i + T - 1: with one column more, every row of the flat array begins one place earlier.
    wide = length + keys
    flat = jnp.pad(products, [(0, 0)] * (products.ndim - 1) + [(0, 1)]).reshape(*products.shape[:-2], -1)
    flat = flat[..., length - 1 : length - 1 + length * (wide - 1)]
    return flat.reshape(*products.shape[:-2], length, wide - 1)[..., :keys]


def relative_values(weights: Array, table: Array, first: int = 0, offsets: Array | None = None) -> Array:
    """The sum over keys of weights_ij table[clip(offset_ij)]: [..., T, V] float32; arguments as of `attend_relative`."""
    length, keys = weights.shape[-2:]
    lead = weights.shape[:-2]
    if offsets is not None:
        index = jnp.broadcast_to(_clipped(offsets, table), weights.shape)
        empty = jnp.zeros(table.shape[0], weights.dtype)
        flat = jax.vmap(lambda w, i: empty.at[i].add(w))(weights.reshape(-1, keys), index.reshape(-1, keys))
        by_offset, rows = flat.reshape(*lead, length, -1), table
    else:
        # The shift of `relative_scores`, the other way round.
        wide = length + keys
        padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, length - 1)])
        flat = padded.reshape(*lead, length * (wide - 1))
        flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(length - 1, 1)])
        by_offset = flat.reshape(*lead, length, wide)[..., : wide - 1]
        rows = table[_rows(length, keys, first, table.shape[0] // 2)]
    return jnp.einsum("...tr,rh->...th", by_offset, rows.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def precision_of(x: Array) -> jax.lax.Precision | None:
    """Float32 multiplies in full, narrower types as they are."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _rows(length: int, keys: int, first: int, reach: int) -> np.ndarray:
    """Rows of the table for the offsets of columns 0 .. T + S - 2, the smallest first."""
    return np.clip(np.arange(length + keys - 1) - (length - 1) + first, -reach, reach) + reach


def _clipped(offsets: Array, table: Array) -> Array:
    reach = table.shape[0] // 2
    return jnp.clip(offsets, -reach, reach) + reach

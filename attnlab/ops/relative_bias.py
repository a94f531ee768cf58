"""Relative position bias of two-dimensional windows: one learned number for each head and offset, resized to any window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.types import Array, Float


def relative_bias(table: Float[Array, "N P Q"], window: tuple[int, int]) -> Float[Array, "N S S"]:
    """Spreads a table of offsets over all pairs of positions of a window (Yang et al., 2022, arXiv 2210.01820).

    Entry [n, s, t] of the result is table[n, x - i + rows - 1, y - j + columns - 1] for a query s = (i, j) and a key
    t = (x, y), both row by row: the offset is key minus query. A table for another window is resized bilinearly first, with
    half-pixel centres and without antialiasing, inside the derivative.

    Args:
        table: P = 2 p - 1 row offsets, Q = 2 q - 1 column offsets, as of a window p x q.
        window: its rows and columns; S is their product.
    """
    rows, columns = window
    size = (table.shape[0], 2 * rows - 1, 2 * columns - 1)
    if table.shape != size:
        table = jax.image.resize(table.astype(jnp.float32), size, "bilinear", antialias=False)
    down, right = (np.arange(n)[None] - np.arange(n)[:, None] + n - 1 for n in window)  # [query, key]
    spread = table[:, down[:, None, :, None], right[None, :, None, :]]
    return spread.reshape(table.shape[0], rows * columns, rows * columns)

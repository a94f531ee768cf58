"""MixToken: a box of every image's token map comes from another image (Jiang et al., 2021, arXiv 2104.10858).

The partner of image b is image B - 1 - b. The classes are mixed by the share of the box, token labels not at all: each
position's logits go back to the image that it came from (`swap_box` is its own inverse).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.types import Array, Float, Int, PRNGKey


def sample_box(key: PRNGKey, size: tuple[int, int]) -> Int[Array, " 4"]:
    """Draws (top, left, bottom, right), ends exclusive, of a box whose share of the map is uniform before it is cut.

    Its sides are int(side * sqrt(1 - lam)), lam ~ Beta(1, 1); its centre is uniform, and what lies outside is cut off.

    Args:
        key: random key.
        size: rows and columns of the map.
    """
    share_key, *centre_keys = jax.random.split(key, 3)
    ratio = jnp.sqrt(1.0 - jax.random.uniform(share_key))
    ends = []
    for side, centre_key in zip(size, centre_keys, strict=True):
        half = (side * ratio).astype(jnp.int32) // 2
        centre = jax.random.randint(centre_key, (), 0, side)
        ends.append((jnp.clip(centre - half, 0, side), jnp.clip(centre + half, 0, side)))
    return jnp.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]])


def swap_box(x: Float[Array, "B Y X D"], box: Int[Array, " 4"]) -> Float[Array, "B Y X D"]:
    """Exchanges the box of every image with that of its partner."""
    rows, columns = jnp.arange(x.shape[1])[:, None, None], jnp.arange(x.shape[2])[:, None]
    inside = (rows >= box[0]) & (rows < box[2]) & (columns >= box[1]) & (columns < box[3])
    return jnp.where(inside, x[::-1], x)


def box_share(box: Int[Array, " 4"], size: tuple[int, int]) -> Float[Array, ""]:
    """Returns the part of a map that a box covers: 1 - lam, the weight of the partner's class."""
    return (box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1])

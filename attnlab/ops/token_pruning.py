"""Token pruning by a running score: choose the tokens to keep, merge the others into one, put results back in place.

As in the light UniFormer family (Li et al., 2022, arXiv 2201.09450), after Evo-ViT (Xu et al., 2021, arXiv 2108.01390).
Gradients flow through the scores where they weigh tokens, never through the choice. Equal scores: the earlier token is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.types import Array, Float, Int


def choose_tokens(scores: Float[Array, "B T"], count: int) -> Int[Array, "B J"]:
    """Returns the positions of the `count` largest scores, ascending, int32.

    Raises:
        ConfigError: more than there are, or fewer than none.
    """
    if not 0 <= count <= scores.shape[1]:
        raise ConfigError(f"count = {count}: there are {scores.shape[1]} tokens. Keep at most these.")
    return jnp.sort(jax.lax.top_k(jax.lax.stop_gradient(scores), count)[1].astype(jnp.int32), axis=1)


def gather_tokens(x: Float[Array, "B T *D"], kept: Int[Array, "B J"]) -> Float[Array, "B J *D"]:
    """Returns the kept tokens."""
    return jax.vmap(lambda x, kept: x[kept])(x, kept)


def place_tokens(x: Float[Array, "B T *D"], kept: Int[Array, "B J"], values: Float[Array, "B J *D"]) -> Float[Array, "B T *D"]:
    """Returns x with `values` where the kept tokens were."""
    return jax.vmap(lambda x, kept, values: x.at[kept].set(values, unique_indices=True))(x, kept, values)


def merge_dropped(x: Float[Array, "B T D"], scores: Float[Array, "B T"], kept: Int[Array, "B J"]) -> Float[Array, "B 1 D"]:
    """Returns the mean of all tokens that are not kept, weighted by their scores; in float32, then the type of x."""
    weights = place_tokens(scores.astype(jnp.float32), kept, jnp.zeros(kept.shape, jnp.float32))
    weights = weights / weights.sum(axis=1, keepdims=True)
    merged = jnp.einsum("bt,btd->bd", weights, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return merged[:, None].astype(x.dtype)


def pool_scores(scores: Float[Array, "B T"], size: tuple[int, int]) -> Float[Array, "B S"]:
    """Brings the scores of a map to one of half its sides: 2x2 means (an odd last row or column is left out), same sum.

    Args:
        scores: row by row.
        size: (rows, columns) of the map; S = (rows // 2) * (columns // 2).
    """
    rows, columns = (side // 2 for side in size)
    cells = scores.reshape(-1, *size)[:, : 2 * rows, : 2 * columns].reshape(-1, rows, 2, columns, 2)
    pooled = cells.mean((2, 4)).reshape(scores.shape[0], -1)
    return pooled * (scores.sum(1, keepdims=True) / pooled.sum(1, keepdims=True))

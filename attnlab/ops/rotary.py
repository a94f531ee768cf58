"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.types import Array, Float, Int


def rotary(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "#B T"],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    scaling: float = 1.0,
) -> Float[Array, "B T N H"]:
    """Rotates pairs of features by angles position / scaling * base^(-2 i / H), i = 0 .. H/2 - 1, in float32.

    Args:
        x: queries or keys.
        positions: of the tokens; one row serves the whole batch.
        base: the longest wavelength is about 2 pi base.
        interleaved: the pairs are (2i, 2i + 1), as in the paper; else (i, i + H/2), the "half split" of most language
            models. Same model up to a permutation of the projection's columns.
        scaling: linear position interpolation (Chen et al., 2023, arXiv 2306.15595); 2.0 stretches to twice the length.

    Returns:
        The rotated array in the type of `x`.

    Raises:
        ConfigError: H is odd.
    """
    width = x.shape[-1]
    if width % 2:
        raise ConfigError(f"head_dim = {width}: rotary embedding needs pairs. Use an even head width or rope=False.")
    frequency = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[:, :, None, None].astype(jnp.float32) * (frequency / scaling)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    wide = x.astype(jnp.float32)
    if interleaved:
        even, odd = wide[..., 0::2], wide[..., 1::2]
        rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
    else:
        low, high = jnp.split(wide, 2, axis=-1)
        rotated = jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)
    return rotated.astype(x.dtype)

"""Samples from a trained noise predictor (`methods.diffusion`): from noise to images in a given number of steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.errors import ConfigError

# (images [B, Y, X, C], times [B] int32, labels [B] int32) -> noise [B, Y, X, C]
Predict = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def denoise(
    predict: Predict,
    rng: jax.Array,
    labels: jax.Array,
    shape: tuple[int, int, int],
    schedule: np.ndarray,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    no_class: int | None = None,
    eta: float = 0.0,
    limit: float | None = None,
) -> jax.Array:
    """Draws images by the implicit sampler (Song et al., 2020, arXiv 2010.02502).

    Args:
        predict: the noise in images at given times.
        rng: key.
        labels: [B] int32.
        shape: of an image.
        schedule: of training: share of the signal's variance that is left at each time, falling.
        steps: times visited, evenly spaced.
        guidance: noise = none + guidance (class - none), classifier-free (Ho & Salimans, 2022, arXiv 2207.12598); 1 = off.
        no_class: the label that stands for none, for guidance.
        eta: 0 = deterministic from the first noise on, 1 = the variance of the ancestral sampler.
        limit: clean images are kept within -limit .. limit on the way; None = not.

    Returns:
        [B, *shape] float32.

    Raises:
        ConfigError: more steps than times, or guidance without a label for none.
    """
    count = len(schedule)
    if not 1 <= steps <= count:
        raise ConfigError(f"steps = {steps}: the schedule has {count} times. Use 1 to {count}.")
    if guidance != 1.0 and no_class is None:
        raise ConfigError(f"guidance = {guidance}: needs the label of no class. Pass no_class=.")
    times = np.unique(np.linspace(0, count - 1, steps).round().astype(np.int32))[::-1].copy()
    left = schedule[times]
    after = np.append(schedule[times[1:]], 1.0)
    noise = eta * np.sqrt((1 - after) / (1 - left) * (1 - left / after))
    table = tuple(jnp.asarray(x, jnp.float32) for x in (left, after, noise))
    keys = jax.random.split(rng, len(times) + 1)

    def at(x: jax.Array, time: jax.Array, label: jax.Array) -> jax.Array:
        return predict(x, jnp.full(label.shape, time, jnp.int32), label)

    def one(x: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        time, key, left, after, spread = inputs
        found = at(x, time, labels)
        if guidance != 1.0:
            bare = at(x, time, jnp.full_like(labels, no_class))
            found = bare + guidance * (found - bare)
        clean = (x - jnp.sqrt(1.0 - left) * found) / jnp.sqrt(left)
        if limit is not None:
            clean = jnp.clip(clean, -limit, limit)
            found = (x - jnp.sqrt(left) * clean) / jnp.sqrt(1.0 - left)
        direction = jnp.sqrt(jnp.maximum(1.0 - after - jnp.square(spread), 0.0)) * found
        x = jnp.sqrt(after) * clean + direction + spread * jax.random.normal(key, x.shape)
        return x, None

    first = jax.random.normal(keys[0], (labels.shape[0], *shape))
    return jax.lax.scan(one, first, (jnp.asarray(times), keys[1:], *table))[0]


def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Lays pictures [n, Y, X, C] uint8 out in a grid with a pixel between them, white where there are none left."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        sheet[y : y + height, x : x + width] = image
    return sheet

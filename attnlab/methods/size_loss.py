"""Regression of sizes in millimetres, as feature-selection gates were published with (arXiv 2407.04400): loss and scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SMALLEST, LARGEST = 0.5, 20.0  # mm, mapped to -1 and 1
CEILING = 22.0  # mm, of what is mapped back


def weighted_size_loss(
    prediction: jax.Array,
    target: jax.Array,
    *,
    alpha: float = 0.0,
    beta: float = 0.0,
    gamma: float = 1.0,
    thresholds: tuple[float, float] = (5.0, 10.0),
    weights: tuple[float, float] = (3.0, 5.0),
) -> jax.Array:
    """Mean of w (alpha |d| + beta d^2 + gamma smooth_l1(d)), d = prediction - target; heavier for large sizes.

    w is weights[0] for thresholds[0] < target < thresholds[1], weights[1] for target >= thresholds[1], else 1. The released
    trainer compares thresholds in millimetres with targets scaled to -1 .. 1, where they never trigger: pass sizes in
    millimetres for the weights, scaled ones for the released behaviour. (Defaults: the main pass; the gate pass has weights
    5 and 10.)

    Args:
        prediction: [B].
        target: [B].
        alpha: of the absolute error.
        beta: of the squared error.
        gamma: of the Huber loss with threshold 1.
        thresholds: in the unit of the targets.
        weights: above them.
    """
    away = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    size = jnp.abs(away)
    smooth = jnp.where(size < 1.0, 0.5 * jnp.square(away), size - 0.5)
    middle = (target > thresholds[0]) & (target < thresholds[1])
    weight = jnp.where(target >= thresholds[1], weights[1], jnp.where(middle, weights[0], 1.0))
    return jnp.mean(weight * (alpha * size + beta * jnp.square(away) + gamma * smooth))


def scale_size(size: jax.Array) -> jax.Array:
    """Maps 0.5 .. 20 mm to -1 .. 1, linearly and without limits."""
    return 2.0 * (size - SMALLEST) / (LARGEST - SMALLEST) - 1.0


def unscale_size(scaled: jax.Array) -> jax.Array:
    """Undoes `scale_size`, within 0.5 .. 22 mm."""
    return jnp.clip((scaled + 1.0) / 2.0 * (LARGEST - SMALLEST) + SMALLEST, SMALLEST, CEILING)

"""Relative position bias of windows: every pair against a loop, resizing inside the derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.ops.relative_bias import relative_bias


@pytest.mark.parametrize("window", [(2, 3), (3, 1), (1, 1)])
def test_every_pair_reads_its_offset(window):
    rows, columns = window
    table = np.random.default_rng(0).standard_normal((2, 2 * rows - 1, 2 * columns - 1)).astype(np.float32)
    have = np.asarray(relative_bias(jnp.asarray(table), window))
    places = [(i, j) for i in range(rows) for j in range(columns)]
    want = [[table[:, x - i + rows - 1, y - j + columns - 1] for x, y in places] for i, j in places]
    np.testing.assert_array_equal(have, np.moveaxis(np.asarray(want), -1, 0))


def test_resized_table_has_gradients_everywhere():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3)), jnp.float32)
    bias, pullback = jax.vjp(lambda table: relative_bias(table, (4, 6)), table)
    assert bias.shape == (2, 24, 24)
    (gradient,) = pullback(jnp.ones_like(bias))
    assert np.all(np.asarray(gradient) > 0)
    # Bilinear interpolation keeps constants, and half-pixel centres keep the middle: the offset (0, 0).
    np.testing.assert_allclose(relative_bias(jnp.ones((1, 3, 3)), (4, 6)), 1.0, atol=1e-6)
    np.testing.assert_allclose(bias[:, 5, 5], table[:, 1, 1], atol=1e-6)

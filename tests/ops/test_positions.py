"""Rotary embedding and ALiBi slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import ConfigError


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_turns_pairs_as_complex_numbers(interleaved, draw, transcription):
    x = draw(length=50)[0]
    rotated = ops.rotary(x, jnp.arange(50)[None], interleaved=interleaved)
    np.testing.assert_allclose(rotated, transcription.rope(np.asarray(x), interleaved), atol=1e-5)


def test_rotary_products_depend_on_distance_only(draw):
    q, k = draw(length=9, kv_heads=4)[:2]

    def product(shift):
        at = jnp.arange(9)[None] + shift
        return jnp.einsum("btnh,bsnh->bnts", ops.rotary(q, at), ops.rotary(k, at))

    np.testing.assert_allclose(product(0), product(37), atol=2e-5)


def test_rotary_options(draw):
    x = draw(length=9)[0]
    at = jnp.broadcast_to(jnp.arange(9), (2, 9))
    np.testing.assert_allclose(ops.rotary(x, 3 * at, scaling=3.0), ops.rotary(x, at), atol=1e-6)
    assert not np.allclose(ops.rotary(x, at, base=100.0), ops.rotary(x, at), atol=1e-3)
    assert ops.rotary(x.astype(jnp.bfloat16), at).dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match="even head width"):
        ops.rotary(jnp.zeros((1, 2, 1, 3)), at[:1, :2])


def test_alibi_slopes_are_the_published_ones():
    np.testing.assert_allclose(ops.alibi_slopes(8), [2.0**-m for m in range(1, 9)])
    np.testing.assert_allclose(ops.alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    twelve = [2.0**-m for m in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(ops.alibi_slopes(12), twelve, rtol=1e-6)
    np.testing.assert_allclose(ops.alibi_slopes(1), [2.0**-8])


def test_positions_have_no_gradient_trouble(draw):
    x = draw(length=9)[0]
    gradient = jax.grad(lambda x: jnp.sum(ops.rotary(x, jnp.arange(9)[None]) ** 2))(x)
    np.testing.assert_allclose(gradient, 2 * x, atol=1e-4)

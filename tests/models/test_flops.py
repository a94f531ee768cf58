"""FLOPs of traced functions: products, convolutions of any grouping, loops, branches, recomputation."""

import jax
import jax.numpy as jnp
import pytest

from attnlab.models.flops import count_flops
from attnlab.nn.vision import Conv

A, B = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32), jax.ShapeDtypeStruct((2, 5, 7), jnp.float32)
PRODUCT = 2 * 2 * 3 * 5 * 7


def product(a, b):
    return jnp.einsum("bij,bjk->bik", a, b) + 1.0


@pytest.mark.parametrize(("fn", "times"), [
    (product, 1),
    (jax.jit(product), 1),
    (jax.checkpoint(product), 1),
    (lambda a, b: jax.lax.scan(lambda c, _: (c + product(a, b).sum(), None), 0.0, length=4)[0], 4),
    (lambda a, b: jax.lax.cond(a[0, 0, 0] > 0, product, lambda a, b: 0 * product(a, b) + product(a, b), a, b), 2),
    (lambda a, b: jax.grad(lambda a: product(a, b).sum())(a), 2),
])  # fmt: skip
def test_products(fn, times):
    assert count_flops(fn, A, B) == times * PRODUCT


@pytest.mark.parametrize(("features", "depthwise", "inputs"), [(6, False, 4), (4, True, 1)])
def test_convolutions(features, depthwise, inputs):
    module = Conv(features, (3, 5), 2, depthwise=depthwise)
    image = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    assert count_flops(lambda x: module.init_with_output(jax.random.key(0), x)[0], image) == 2 * (2 * 4 * 4 * features) * 15 * inputs

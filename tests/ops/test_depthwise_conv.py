"""The sum over taps against XLA's grouped convolution, in one to three dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.ops.depthwise_conv import depthwise_conv


@pytest.mark.parametrize(
    ("shape", "taps", "options"),
    [
        ((2, 7, 4), (3,), {}),
        ((2, 6, 5, 3), (3, 5), {}),
        ((1, 3, 4, 5, 2), (3, 1, 3), {}),
        ((2, 2, 2, 3), (5, 5), {}),
        ((2, 6, 7, 3), (3, 3), {"stride": (2, 2), "padding": "SAME"}),
        ((1, 8, 7, 2), (3, 2), {"stride": (3, 2), "padding": "VALID"}),
        ((1, 5, 6, 2), (4, 3), {"stride": (1, 2), "padding": [(0, 3), (2, 1)]}),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_taps_equal_the_convolution(shape, taps, options, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = (jax.random.normal(key, size, dtype) for key, size in zip(keys, (shape, (*taps, 1, shape[-1])), strict=False))

    def run(implementation):
        f = lambda x, kernel: depthwise_conv(x, kernel, implementation=implementation, **options)  # noqa: E731
        y, pullback = jax.vjp(f, x, kernel)
        return (y, *pullback(jax.random.normal(keys[2], y.shape, dtype)))

    atol = 1e-5 if dtype == jnp.float32 else 0.2
    for have, want in zip(jax.jit(lambda: run("taps"))(), jax.jit(lambda: run("conv"))(), strict=True):
        assert have.dtype == want.dtype == dtype
        np.testing.assert_allclose(have.astype(jnp.float32), want.astype(jnp.float32), atol=atol)


def test_choice_and_refusals():
    x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 1, 2))

    def chosen(platform):
        with dispatch.record() as found, dispatch.target(platform):
            jax.eval_shape(lambda: depthwise_conv(x, kernel, stride=(2, 2), padding="SAME"))
        return found[0].chosen

    assert [chosen(platform) for platform in ("cpu", "tpu", "gpu")] == ["taps", "conv", "conv"]
    assert depthwise_conv(x, kernel, stride=(2, 2), padding="SAME").shape == (1, 3, 3, 2)
    with pytest.raises(NotImplementedError, match="taps"), dispatch.target("tpu"):
        depthwise_conv(x, kernel, implementation="taps")
    for wrong in (jnp.ones((3, 1, 2)), jnp.ones((3, 3, 2, 2)), jnp.ones((3, 3, 1, 3))):
        with pytest.raises(ConfigError, match="kernel has shape"):
            depthwise_conv(x, wrong)

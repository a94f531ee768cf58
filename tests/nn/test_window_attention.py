"""Attention in windows: each window alone, both kinds of padding, the bias, weights on request, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.nn.vision import GlobalAttention
from attnlab.nn.window_attention import WindowAttention


def start(module, x):
    rng = np.random.default_rng(0)
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    return jax.tree.map(lambda leaf: (0.4 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def image(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_every_window_alone_and_the_whole_map():
    x = image(2, 4, 6, 8)
    module = WindowAttention(8, 2, window=(2, 3), position_size=3)
    variables = start(module, x)
    plain = {name: leaf for name, leaf in variables["params"].items() if name != "position_table"}

    @jax.jit
    def run(x):
        parts = [module.apply(variables, x[:, i : i + 2, j : j + 3]) for i in (0, 2) for j in (0, 3)]
        whole = WindowAttention(8, 2).apply({"params": plain}, x), GlobalAttention(8, 2, qkv_bias=True).apply({"params": plain}, x)
        return module.apply(variables, x), parts, whole

    y, parts, whole = run(x)
    rows = [jnp.concatenate(parts[i : i + 2], axis=2) for i in (0, 2)]
    np.testing.assert_allclose(y, jnp.concatenate(rows, axis=1), atol=1e-5)
    np.testing.assert_allclose(*whole, atol=1e-5)


def test_masked_padding_is_as_if_it_were_not_there():
    x = image(2, 3, 5, 4)
    module = WindowAttention(4, 2, window=(2, 4), position_size=(2, 4), padding="masked")
    variables = start(module, x)

    run = jax.jit(lambda x: module.apply(variables, x))
    y = run(x)
    corner = x[:, 2:, 4:]  # one position: its only offset is the middle of the table
    small = {**variables["params"], "position_table": variables["params"]["position_table"][:, 1:2, 3:4]}
    want = WindowAttention(4, 2, position_size=1).apply({"params": small}, corner)
    np.testing.assert_allclose(y[:, 2:, 4:], want, atol=1e-5)
    np.testing.assert_allclose(run(x[:, :2, :4]), y[:, :2, :4], atol=1e-5)


def test_padding_of_zeros_takes_part():
    x = image(1, 3, 3, 4)
    module = WindowAttention(4, 2, window=(4, 4), padding="zeros", capture_attention=True)
    variables = start(module, x)
    run = jax.jit(lambda x: module.apply(variables, x, mutable=["intermediates"]))
    y, sown = run(x)
    full, _ = run(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))
    np.testing.assert_allclose(y, full[:, :3, :3], atol=1e-6)
    weights = np.asarray(sown["intermediates"]["attention"][0])
    assert weights.shape == (1, 2, 16, 16) and weights[..., -1].min() > 0
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(("fields", "message"), [
    ({"window": (2, 2)}, r"window = \(2, 2\): does not divide a map of 3 x 4.*padding='masked'"),
    ({"num_heads": 3}, "num_heads = 3: does not divide dim = 4"),
    ({"padding": "mask"}, "did you mean 'masked'"),
])  # fmt: skip
def test_bad_input(fields, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(WindowAttention(**{"dim": 4, "num_heads": 2} | fields).init, jax.random.key(0), jnp.zeros((1, 3, 4, 4)))

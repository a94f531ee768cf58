"""Maps captured from a model: every layer, in order, the weights that the layer used."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from attnlab import registry
from attnlab.analysis import attention
from attnlab.errors import ConfigError
from attnlab.models.lm import LM

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 10)).astype(np.int32)


def model(**fields):
    return LM(**{"vocab_size": 32, "num_layers": 5, "dim": 16, "num_heads": 2, "train_length": 10} | fields)


def random_variables(lm, scale=0.3):
    """Parameters from numpy: nothing to compile."""
    random = np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(lm.init, jax.random.key(0), TOKENS))["params"]
    return {"params": jax.tree.map(lambda leaf: (scale * random.normal(size=leaf.shape)).astype(np.float32), shapes)}


@pytest.fixture(scope="module")
def mixed():
    lm = model(pattern=("sigmoid", "near"), mixer_options={"near": {"mixer": "softmax", "window": (2, 0)}})
    return lm, random_variables(lm)


def test_all_layers_in_order(mixed):
    got = attention.capture(*mixed, TOKENS)
    assert got.maps.shape == (5, 2, 2, 10, 10) and got.maps.dtype == np.float32
    assert got.layers == (0, 1, 2, 3, 4) and got.heads == (0, 1)
    assert got.mixers == ("sigmoid", "near", "sigmoid", "near", "sigmoid")
    assert (got.maps[..., np.triu(np.ones((10, 10), bool), 1)] == 0).all()
    mass = got.maps.sum(-1)
    np.testing.assert_allclose(mass[1::2], 1.0, atol=1e-5)
    assert (np.abs(mass[::2] - 1.0) > 0.05).any()
    far = np.tril(np.ones((10, 10), bool), -3)
    assert (got.maps[1::2][..., far] == 0).all() and (got.maps[::2][..., far] > 0).all()


def test_choice_of_layers_and_heads(mixed):
    everything = attention.capture(*mixed, TOKENS).maps
    got = attention.capture(*mixed, TOKENS, layers=(-1, 1), heads=(1,))
    assert got.layers == (4, 1) and got.heads == (1,)
    np.testing.assert_array_equal(got.maps, everything[[4, 1]][:, :, [1]])


def test_maps_do_not_depend_on_scanning(mixed):
    lm, variables = mixed
    unrolled = lm.clone(scan_layers=False)
    layers = variables["params"]["layers"]
    params = {name: tree for name, tree in variables["params"].items() if name != "layers"}
    params |= {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(2)}
    np.testing.assert_allclose(
        attention.capture(unrolled, {"params": params}, TOKENS).maps,
        attention.capture(lm, variables, TOKENS).maps,
        atol=1e-6,
    )


class NoMaps(registry.get("mixer", "softmax")):
    """A mixer of an outside package that sows nothing."""

    def sow(self, *_, **__):
        return False


def test_mixers_without_maps_are_left_out_or_named():
    if "no_maps" not in registry.names("mixer"):
        registry.register("mixer", "no_maps", NoMaps)
    lm = model(pattern=("no_maps", "softmax"), num_layers=4)
    variables = random_variables(lm)
    assert attention.capture(lm, variables, TOKENS).layers == (1, 3)
    with pytest.raises(ConfigError, match=r"layers.*no_maps"):
        attention.capture(lm, variables, TOKENS, layers=(0, 1))
    for bad in ({"layers": (4,)}, {"heads": (2,)}, {"heads": (-3,)}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            attention.capture(lm, variables, TOKENS, **bad)


def test_uniform_queries_give_uniform_maps():
    lm = model(num_layers=1)
    variables = random_variables(lm, scale=0.0)
    maps = attention.capture(lm, variables, TOKENS).maps
    statistics = attention.head_statistics(maps)
    lengths = np.arange(1, 11)
    np.testing.assert_allclose(statistics["entropy"], np.full((1, 2), np.log(lengths).mean()), rtol=1e-5)
    np.testing.assert_allclose(statistics["distance"], np.full((1, 2), ((lengths - 1) / 2).mean()), rtol=1e-5)

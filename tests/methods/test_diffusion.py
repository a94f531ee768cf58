"""The diffusion task: its loss, its evaluation, and its fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.methods.diffusion import Diffusion
from attnlab.models.options import options
from attnlab.training.config import base, validate


def small(**changes):
    config = base("diffusion")
    config.model = options("dit", dim=16, head_dim=8, patch=4, heads=(2, 3), shared_heads=(2, 1), top_ks=(0, 1))
    config.data.image_size, config.data.channels, config.batch_size = 8, 1, 4
    for name, value in changes.items():
        config[name] = value
    return config


def batch_of(mask=(True,) * 4):
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    return {"images": images, "labels": jnp.array([0, 1, 2, 0]), "mask": jnp.array(mask)}


def started(task):
    from flax.core import meta

    params = meta.unbox(jax.jit(task.init)(jax.random.key(0)))["params"]
    return params | {"pixels": jax.tree.map(lambda leaf: leaf + 0.3, params["pixels"])}


def test_loss_is_the_error_of_the_noise():
    task = Diffusion(small(), 3)
    params = started(task)
    loss, aux = jax.jit(task.loss)(params, {}, batch_of(), jax.random.key(3))
    assert aux.weight == 4 and aux.collections == {}
    np.testing.assert_allclose(loss, aux.metrics["loss"] + aux.metrics["auxiliary_loss"], rtol=1e-6)
    assert 0 < aux.metrics["blocks_1/attention/balance"] < 2

    keys = jax.random.split(jax.random.key(3), 4)
    times = jax.random.randint(keys[0], (4,), 0, 1000)
    noise = jax.random.normal(keys[1], (4, 8, 8, 1))
    labels = jnp.where(jax.random.bernoulli(keys[2], 0.1, (4,)), 3, batch_of()["labels"])
    left = task.schedule[np.asarray(times)].reshape(-1, 1, 1, 1).astype(np.float32)
    noisy = np.sqrt(left) * batch_of()["images"] + np.sqrt(1 - left) * noise
    found = task.predict_noise(params, {}, noisy, times, labels)
    np.testing.assert_allclose(aux.metrics["loss"], np.mean((found - noise) ** 2), rtol=1e-4)


def test_evaluation_repeats_and_leaves_padding_out():
    task = Diffusion(small(), 3)
    params = started(task)
    evaluate = jax.jit(task.eval)
    first, again = (evaluate(params, {}, batch_of()) for _ in range(2))
    assert first["loss"] == again["loss"] and first["weight"] == 4
    padded = batch_of((True, True, True, False))
    padded["images"] = padded["images"].at[3].set(1e3)
    assert evaluate(params, {}, padded)["weight"] == 3
    assert task.figures({"loss": 8.0, "weight": 4.0}) == {"loss": 2.0, "images": 4}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_dropout", 1.5, "label_dropout = 1.5"),
        ("sample_steps", 2000, "more than the 1000 times"),
        ("times", 0, "times = 0"),
    ],
)
def test_fields_that_do_not_fit(field, value, message):
    config = small()
    config.diffusion[field] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)
    with pytest.raises(ConfigError, match=r"label_smoothing = 0.1: labels are conditions"):
        validate(small(label_smoothing=0.1))

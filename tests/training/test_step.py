"""The one train step: accumulation, averaging of parameters, groups, schedules."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import linen as nn

from attnlab.errors import ConfigError
from attnlab.methods.task import LossAux
from attnlab.training.config import base
from attnlab.training.optim import make_optimizer, make_schedule, parameter_labels
from attnlab.training.step import init_state, make_train_step


class WeightedRegression:
    """Least squares over the rows with mask 1; counts its calls in a collection."""

    model = nn.Dense(1)

    def init(self, rng):
        return {**self.model.init(rng, jnp.zeros((1, 3))), "statistics": {"seen": jnp.zeros(())}}

    def loss(self, params, collections, batch, rng):
        error = (self.model.apply({"params": params}, batch["x"])[:, 0] - batch["y"]) ** 2
        weight = jnp.sum(batch["mask"])
        loss = jnp.sum(error * batch["mask"]) / jnp.maximum(weight, 1.0)
        seen = {"statistics": {"seen": collections["statistics"]["seen"] + weight}}
        return loss, LossAux(weight=weight, metrics={"loss": loss}, collections=seen)


def make_batch(rows=12):
    rng = np.random.default_rng(0)
    mask = (np.arange(rows) % 3 != 0).astype(np.float32)
    mask[1] = 0.0  # micro-batches of unequal mass
    return {"x": rng.normal(size=(rows, 3)).astype(np.float32), "y": rng.normal(size=rows).astype(np.float32), "mask": mask}


@pytest.mark.parametrize("grad_accum", [2, 3, 6])
def test_accumulated_step_equals_the_whole_batch(grad_accum):
    task, tx = WeightedRegression(), optax.adam(1e-1)
    state = init_state(task, tx, jax.random.key(0), ema=True)
    steps = [make_train_step(task, tx, lambda _: 1e-1, seed=0, grad_accum=a, ema_decay=0.9) for a in (1, grad_accum)]
    whole, accumulated = (jax.jit(step)(state, make_batch()) for step in steps)
    for expected, found in zip(jax.tree.leaves(whole), jax.tree.leaves(accumulated), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
    assert accumulated[0].collections["statistics"]["seen"] == make_batch()["mask"].sum()


def test_moving_average_follows_its_formula():
    task, tx = WeightedRegression(), optax.sgd(0.1)
    state = init_state(task, tx, jax.random.key(0), ema=True)
    step = jax.jit(make_train_step(task, tx, lambda _: 0.1, seed=0, ema_decay=0.75))
    expected = np.asarray(state.params["kernel"])
    for _ in range(3):
        state, _ = step(state, make_batch())
        expected = 0.75 * expected + 0.25 * np.asarray(state.params["kernel"])
    np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-6)


def optimizer_config(**changes):
    config = base().optimizer
    config.clip_norm = 0.0
    config.update(changes)
    return config


PARAMS = {"layer": {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 2))}}


def test_vectors_do_not_decay_and_matrices_do():
    config = optimizer_config(weight_decay=0.5, schedule="constant", warmup_steps=0, learning_rate=0.1)
    tx, _ = make_optimizer(config, PARAMS, 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["layer"]["scale"], 0.0)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.05, rtol=1e-6)


def test_groups_freeze_and_rescale():
    config = optimizer_config(name="sgd", schedule="constant", warmup_steps=0, learning_rate=1.0, b1=0.0)
    config.groups = ml_collections.ConfigDict(
        {
            "slow": {"match": "^head/", "weight_decay": 0.0, "learning_rate_scale": 0.25, "frozen": False},
            "fixed": {"match": "scale$", "weight_decay": 0.0, "learning_rate_scale": 1.0, "frozen": True},
        }
    )
    tx, _ = make_optimizer(config, PARAMS, 10)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.25)
    np.testing.assert_allclose(updates["layer"]["kernel"], -1.0)
    np.testing.assert_array_equal(updates["layer"]["scale"], 0.0)


def test_a_parameter_in_two_groups_is_refused():
    config = optimizer_config()
    config.groups = ml_collections.ConfigDict({"a": {"match": "head"}, "b": {"match": "kernel"}})
    with pytest.raises(ConfigError, match="head/kernel"):
        parameter_labels(config, PARAMS)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "lamb", "muon"])
def test_optimizers_by_name_lower_the_loss(name):
    config = optimizer_config(name=name, learning_rate=0.02, warmup_steps=0, weight_decay=0.0)
    task = WeightedRegression()
    params = jax.eval_shape(task.init, jax.random.key(0))["params"]
    tx, schedule = make_optimizer(config, params, 30)
    state = init_state(task, tx, jax.random.key(0), ema=False)
    step = jax.jit(make_train_step(task, tx, schedule, seed=0))
    losses = []
    for _ in range(30):
        state, metrics = step(state, make_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0), ("wsd", 0.1)])
def test_schedules_warm_up_and_end_where_they_say(name, end):
    config = optimizer_config(schedule=name, warmup_steps=10, learning_rate=2.0, final_fraction=0.1)
    schedule = make_schedule(config, 110)
    assert 0 < schedule(0) < 0.5
    np.testing.assert_allclose(schedule(10), 2.0, rtol=1e-6)
    np.testing.assert_allclose(schedule(110), 2.0 * end, rtol=1e-5)


def test_rsqrt_halves_at_four_times_the_warm_up():
    schedule = make_schedule(optimizer_config(schedule="rsqrt", warmup_steps=10, learning_rate=1.0), 1000)
    np.testing.assert_allclose(schedule(10 + 30), 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamx"}, "adam"),
        ({"schedule": "cosin"}, "cosine"),
        ({"warmup_steps": 10}, "num_train_steps"),
        ({"name": "global_norm"}, "not an optimizer"),
    ],
)
def test_bad_names_get_a_hint(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(optimizer_config(**{"warmup_steps": 2} | changes), PARAMS, 10)

"""Gradient routing against a transcription of the two passes, and what surrounds it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.errors import ConfigError
from attnlab.methods.gradient_routing import Routing, clip_by_norm, cosine_restarts
from attnlab.methods.size_loss import scale_size, unscale_size, weighted_size_loss
from attnlab.nn.feature_gates import GATE

PARAMS = {"gate_1": {GATE: jnp.array([0.2, -0.4, 1.0])}, "out": {"kernel": jnp.array([[1.0, 0.5], [-0.3, 0.8], [0.6, -1.2]])}}
BATCH = {"x": jax.random.normal(jax.random.key(0), (6, 3)), "y": jax.random.normal(jax.random.key(1), (6, 2))}


def loss_of(params, batch):
    gated = batch["x"] * jax.nn.sigmoid(params["gate_1"][GATE])
    return jnp.mean(jnp.square(gated @ params["out"]["kernel"] - batch["y"]))


def compute(params, collections, batch, rng):
    value, grads = jax.value_and_grad(loss_of)(params, batch)
    return grads, {"loss": value}, {"passes": collections["passes"] + 1}


def adam(state, gradient, rate):
    """PyTorch's Adam, one step of one array in float64."""
    count, m, v = state
    count, m, v = count + 1, 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    return (count, m, v), -rate * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)


def transcription(mode, steps, routing, rate):
    """The released loop in numpy, gradients by jax."""
    gate, kernel = np.asarray(PARAMS["gate_1"][GATE], np.float64), np.asarray(PARAMS["out"]["kernel"], np.float64)
    gate_state, kernel_state = (0, 0.0, 0.0), (0, 0.0, 0.0)

    def gradients(gate, kernel):
        params = {"gate_1": {GATE: jnp.asarray(gate, jnp.float32)}, "out": {"kernel": jnp.asarray(kernel, jnp.float32)}}
        grads = jax.grad(loss_of)(params, BATCH)
        return np.asarray(grads["gate_1"][GATE], np.float64), np.asarray(grads["out"]["kernel"], np.float64)

    def factor(limit, *arrays):
        return min(1.0, limit / (np.sqrt(sum(np.sum(a**2) for a in arrays)) + 1e-6))

    for _ in range(steps):
        g1, k1 = gradients(gate, kernel)
        scale = factor(routing.clip_gates, *((g1, k1) if mode == "accumulate" else (g1,)))
        g1, k1 = g1 * scale, k1 * scale
        gate_state, update = adam(gate_state, g1, routing.gate_learning_rate)
        gate = gate + update
        g2, k2 = gradients(gate, kernel)
        if mode == "accumulate":
            g2, k2 = g1 + g2, k1 + k2
        scale = factor(routing.clip_main, *((g2, k2) if mode == "accumulate" else (k2,)))
        kernel_state, update = adam(kernel_state, k2 * scale + routing.l2 * kernel, rate)
        kernel = kernel + update
    return gate, kernel


@pytest.mark.parametrize("mode", ["clean", "accumulate"])
def test_two_passes_against_a_transcription(mode):
    routing = Routing(mode, gate_learning_rate=0.05, clip_gates=0.3, clip_main=0.4, l2=0.01)
    tx = routing.optimizer(optax.adam(0.02), PARAMS)
    step = jax.jit(lambda p, s, c, r: routing.update(compute, tx, p, s, c, BATCH, r)._replace(grads=None))
    params, state, collections = PARAMS, tx.init(PARAMS), {"passes": jnp.int32(0)}
    for i in range(4):
        params, state, collections, metrics, _ = step(params, state, collections, jax.random.key(i))
    gate, kernel = transcription(mode, 4, routing, 0.02)
    np.testing.assert_allclose(params["gate_1"][GATE], gate, atol=1e-5)  # the bias correction in float32
    np.testing.assert_allclose(params["out"]["kernel"], kernel, atol=1e-5)
    assert int(collections["passes"]) == 8  # statistics move in both passes
    assert metrics["gate_pass/loss"] != metrics["loss"] and 0 < metrics["gates/mean"] < 1


def test_joint_mode_is_one_pass_of_both_optimizers():
    routing = Routing("joint", gate_learning_rate=0.05, clip_main=0.0)
    tx = routing.optimizer(optax.adam(0.02), PARAMS)
    grads = jax.grad(loss_of)(PARAMS, BATCH)
    step = routing.update(compute, tx, PARAMS, tx.init(PARAMS), {"passes": 0}, BATCH, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), step.params, PARAMS)
    assert moved["gate_1"][GATE] == pytest.approx(0.05, rel=1e-3) and moved["out"]["kernel"] == pytest.approx(0.02, rel=1e-3)
    jax.tree.map(np.testing.assert_allclose, step.grads, grads)
    assert step.collections["passes"] == 1


def test_the_plain_step_is_refused_where_there_are_two_passes():
    tx = Routing("clean").optimizer(optax.adam(0.1), PARAMS)
    with pytest.raises(NotImplementedError, match="'clean' has two passes"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_gradients_that_are_not_finite_count_as_zero():
    def broken(params, collections, batch, rng):
        grads, metrics, collections = compute(params, collections, batch, rng)
        grads["out"]["kernel"] = grads["out"]["kernel"].at[0, 0].set(jnp.nan)
        return grads, metrics, collections

    routing = Routing("accumulate")
    tx = routing.optimizer(optax.sgd(0.1), PARAMS)
    step = routing.update(broken, tx, PARAMS, tx.init(PARAMS), {"passes": 0}, BATCH, jax.random.key(0))
    kernel = step.params["out"]["kernel"]
    assert np.all(np.isfinite(kernel)) and kernel[0, 0] == PARAMS["out"]["kernel"][0, 0] and kernel[1, 1] != 0.8


def test_decoupled_decay_never_reaches_gates():
    routing = Routing("clean", gate_learning_rate=0.0)
    tx = routing.optimizer(optax.adamw(0.1, weight_decay=0.5), PARAMS)
    step = routing.update(compute, tx, PARAMS, tx.init(PARAMS), {"passes": 0}, BATCH, jax.random.key(0))
    np.testing.assert_array_equal(step.params["gate_1"][GATE], PARAMS["gate_1"][GATE])
    assert len(jax.tree.leaves(tx.init(PARAMS)["main"])) == 3 and len(jax.tree.leaves(tx.init(PARAMS)["gates"])) == 3


def test_clip_has_a_floor():
    clipped, norm = clip_by_norm({"a": jnp.array([3.0, 4.0])}, 1.0)
    np.testing.assert_allclose(clipped["a"], np.array([3.0, 4.0]) / (5.0 + 1e-6), rtol=1e-6)
    assert norm == 5.0 and clip_by_norm({"a": jnp.array([3.0])}, 0.0)[0]["a"] == 3.0


@pytest.mark.parametrize(("period", "multiplier"), [(40, 1), (10, 1), (5, 2), (3, 3)])
def test_warm_restarts_against_their_definition(period, multiplier):
    epochs = np.array([0.0, 0.5, 2.9, 3.0, 5.0, 9.99, 10.0, 14.9, 15.0, 35.0, 39.0, 40.0, 77.25])

    def one(epoch):
        into, length = epoch, float(period)
        while into >= length:
            into, length = into - length, length * multiplier
        return 1e-6 + (2e-4 - 1e-6) * (1 + np.cos(np.pi * into / length)) / 2

    np.testing.assert_allclose(cosine_restarts(2e-4, 1e-6, period, multiplier)(epochs), [one(e) for e in epochs], rtol=1e-4)


def test_size_loss_weighs_large_sizes():
    prediction, target = jnp.array([1.0, 6.5, 12.0, 4.0, 9.0]), jnp.array([1.5, 5.0, 10.0, 7.0, 9.0])
    away = np.array([-0.5, 1.5, 2.0, -3.0, 0.0])
    weight = np.array([1, 1, 5, 3, 3])
    smooth = np.where(np.abs(away) < 1, away**2 / 2, np.abs(away) - 0.5)
    have = weighted_size_loss(prediction, target, alpha=0.3, beta=0.2, gamma=0.7)
    np.testing.assert_allclose(have, np.mean(weight * (0.3 * np.abs(away) + 0.2 * away**2 + 0.7 * smooth)), rtol=1e-6)
    np.testing.assert_allclose(scale_size(jnp.array([0.5, 20.0])), [-1.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(unscale_size(scale_size(jnp.array([0.1, 3.0, 21.0, 40.0]))), [0.5, 3.0, 21.0, 22.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"mode": "cleen"}, "mode.*cleen"), ({"clip_main": -1.0}, "clip_main = -1.0"), ({"gate_schedule": "step"}, "step")],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        Routing(**fields)

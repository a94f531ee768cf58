"""Attention statistics against plain numpy, and their edge cases."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.analysis import attention
from attnlab.errors import ConfigError


def causal_weights(batch=2, heads=3, length=9, *, row_mass=1.0, seed=0):
    logits = np.random.default_rng(seed).normal(size=(batch, heads, length, length)) * 2
    weights = np.where(np.tril(np.ones((length, length), bool)), np.exp(logits), 0.0)
    return (row_mass * weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def test_head_statistics_equal_loops():
    weights = causal_weights(row_mass=0.4)
    got = attention.head_statistics(weights)
    assert set(got) == set(attention.STATISTICS)
    batch, heads, length, _ = weights.shape
    for n in range(heads):
        want = {name: [] for name in attention.STATISTICS}
        for b in range(batch):
            for t in range(length):
                mass = float(weights[b, n, t].sum())
                p = weights[b, n, t].astype(np.float64) / mass
                nats = -sum(x * np.log(x) for x in p if x > 0)
                want["entropy"].append(nats)
                want["effective_keys"].append(np.exp(nats))
                want["distance"].append(sum(p[s] * abs(t - s) for s in range(length)))
                want["confidence"].append(p.max())
                want["self_mass"].append(p[t])
                if t:
                    want["previous_mass"].append(p[t - 1])
                want["first_mass"].append(p[0])
                want["row_mass"].append(mass)
        for name, values in want.items():
            np.testing.assert_allclose(got[name][n], np.mean(values), rtol=2e-5, err_msg=name)


def test_entropy_bounds_and_zero_rows():
    uniform = jnp.full((1, 4, 8), 1 / 8)
    np.testing.assert_allclose(attention.entropy(uniform), np.full((1, 4), np.log(8)), rtol=1e-6)
    np.testing.assert_array_equal(attention.entropy(jnp.eye(5)[None]), np.zeros((1, 5)))
    np.testing.assert_array_equal(attention.entropy(jnp.zeros((1, 2, 5))), np.zeros((1, 2)))


def test_scaling_the_rows_changes_only_the_row_mass():
    one, other = (attention.head_statistics(causal_weights(row_mass=mass)) for mass in (1.0, 3.5))
    for name in attention.STATISTICS:
        factor = 3.5 if name == "row_mass" else 1.0
        np.testing.assert_allclose(other[name], factor * one[name], rtol=1e-5, err_msg=name)


def test_padding_and_empty_rows_do_not_count():
    weights = causal_weights()
    short = weights[:, :, :6, :6]
    padded = np.zeros_like(weights)
    padded[:, :, :6, :6] = short
    mask = np.arange(9)[None].repeat(2, 0) < 6
    want = attention.head_statistics(short)
    got = attention.head_statistics(padded, mask)
    for name in attention.STATISTICS:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)
    without_mask = attention.head_statistics(padded)
    np.testing.assert_allclose(without_mask["entropy"], want["entropy"], rtol=1e-6)
    np.testing.assert_allclose(without_mask["row_mass"], want["row_mass"] * 6 / 9, rtol=1e-6)


def test_queries_are_the_last_positions_when_keys_are_longer():
    weights = causal_weights()
    rows = attention.row_statistics(weights)
    tail = attention.row_statistics(weights[:, :, 4:])
    for name in attention.STATISTICS:
        np.testing.assert_allclose(tail[name], rows[name][:, :, 4:], rtol=1e-6, err_msg=name)


def test_strength_profile_sums_to_one_and_finds_the_distance():
    length = 12
    previous = np.eye(length, k=-3)
    share, edges = attention.strength_profile(previous[None])
    assert edges == (0, 1, 2, 4, 8)
    np.testing.assert_allclose(share, [[0, 0, 1, 0, 0]], atol=1e-6)  # the first three queries attend to nothing
    share, _ = attention.strength_profile(causal_weights())
    np.testing.assert_allclose(share.sum(-1), np.ones((2, 3)), rtol=1e-5)
    share, edges = attention.strength_profile(np.ones((1, 1, 1)))
    assert share.shape == (1, len(edges))
    with pytest.raises(ConfigError, match="edges"):
        attention.strength_profile(previous[None], edges=(1, 2))

"""Sampling rules against a plain numpy reading of them, on the level of the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.inference import sampling


def reference(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities of one row, by the text of the module's docstring."""
    scaled = np.asarray(logits, np.float32) / np.float32(temperature)
    order = sorted(range(len(scaled)), key=lambda v: (-scaled[v], v))
    if top_k:
        order = order[:top_k]
    weight = np.exp(scaled[order].astype(np.float64) - scaled[order[0]])
    weight /= weight.sum()
    kept, mass = [], 0.0
    for position, v in enumerate(order):
        if position and mass >= top_p:
            break
        kept.append(v)
        mass += weight[position]
    out = np.zeros(len(scaled))
    out[kept] = weight[: len(kept)] / weight[: len(kept)].sum()
    return out


LOGITS = np.random.default_rng(0).normal(size=(5, 23)).astype(np.float32) * 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 100},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"top_p": 1.0, "top_k": 0},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.8},
    ],
)
def test_distribution_equals_numpy(settings):
    kept = jax.jit(lambda x: sampling.filter_logits(x, **settings))(LOGITS)
    got = np.asarray(jax.nn.softmax(kept, axis=-1))
    want = np.stack([reference(row, **settings) for row in LOGITS])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_ties_keep_exactly_k_and_prefer_lower_ids():
    logits = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = np.isfinite(sampling.filter_logits(logits, top_k=2))
    np.testing.assert_array_equal(kept, [[False, True, True, False, False]])
    assert sampling.sample(logits, None, temperature=0).tolist() == [1]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
    for top_p, count in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.9, 4)):
        assert int(np.isfinite(sampling.filter_logits(logits, top_p=top_p)).sum()) == count


def test_samples_follow_the_distribution_and_stay_in_the_support():
    settings = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}
    row = jnp.broadcast_to(LOGITS[0] / 3, (20000, LOGITS.shape[1]))
    tokens = np.asarray(sampling.sample(row, jax.random.key(3), **settings))
    want = reference(LOGITS[0] / 3, **settings)
    counts = np.bincount(tokens, minlength=len(want)) / len(tokens)
    assert set(np.unique(tokens)) == set(np.flatnonzero(want))
    np.testing.assert_allclose(counts, want, atol=0.02)  # five standard errors of the largest


def test_greedy_ignores_the_other_settings_and_dropped_tokens_never_appear():
    greedy = sampling.sample(LOGITS, None, temperature=0, top_k=3, top_p=0.2)
    np.testing.assert_array_equal(greedy, LOGITS.argmax(-1))
    assert greedy.dtype == jnp.int32
    masked = jnp.array(LOGITS).at[:, 10:].set(-jnp.inf)
    tokens = sampling.sample(jnp.tile(masked, (200, 1)), jax.random.key(0), temperature=5.0, top_p=0.99)
    assert int(tokens.max()) < 10


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_handled_in_float32(dtype):
    low = jnp.asarray(LOGITS, dtype)
    assert sampling.filter_logits(low, top_k=3).dtype == jnp.float32
    np.testing.assert_array_equal(
        sampling.sample(low, jax.random.key(1), top_p=0.9),
        sampling.sample(low.astype(jnp.float32), jax.random.key(1), top_p=0.9),
    )


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_bad_settings_name_the_field(settings, field):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        sampling.sample(LOGITS, jax.random.key(0), **settings)


def test_random_sampling_needs_a_key_and_filtering_a_temperature():
    with pytest.raises(ConfigError, match=r"^rng = None"):
        sampling.sample(LOGITS, None)
    with pytest.raises(ConfigError, match=r"^temperature = 0"):
        sampling.filter_logits(LOGITS, temperature=0)

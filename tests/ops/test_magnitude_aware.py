"""Magnitude-aware linear attention: all forms against the weights, gradients, structure, rotations, the paper's claim."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops.magnitude_aware import (
    VARIANTS,
    axial_frequencies,
    axial_rotation,
    feature_map,
    init_state,
    magnitude_aware_attention,
    magnitude_aware_weights,
    rotate_pairs,
    sequence_rotation,
)

LENGTH = 21


def data(seed=0, length=LENGTH, heads=2, width=8, batch=2, dtype=jnp.float32):
    drawn = np.random.default_rng(seed).standard_normal((3, batch, length, heads, width)).astype(np.float32)
    return tuple(drawn.astype(dtype))


def structure(segments, padding, length=LENGTH):
    at, options = np.arange(length), {}
    if segments:
        options["segment_ids"] = np.stack([np.where(at < 8, 1, np.where(at < 17, 2, 0)), np.where(at < 3, 4, 9)])
    if padding:
        options["mask"] = np.ones((2, length), bool)
        options["mask"][0, 5] = options["mask"][0, :2] = options["mask"][1, 9] = False
    return options


@pytest.mark.parametrize(("causal", "segments", "padding", "variant", "rotated"), [
    (True, False, False, "paper", False), (True, True, True, "official", True), (True, True, True, "divided", True),
    (False, False, True, "official", True), (False, True, True, "paper", False), (False, False, True, "divided", True),
])  # fmt: skip
def test_linear_time_forms_are_the_weights_times_the_values(causal, segments, padding, variant, rotated):
    arrays, cotangent = data(), data(1)[0]
    rotation = sequence_rotation(np.arange(LENGTH)[None], 8) if rotated else None
    options = {"causal": causal, "variant": variant, "rotation": rotation, "eps": 0.0 if variant == "paper" else 1e-6}
    options |= structure(segments, padding)

    def weighted(q, k, v):
        return jnp.einsum("bnts,bsnh->btnh", magnitude_aware_weights(q, k, **options)[0], v, precision="highest")

    def linear(q, k, v, implementation):
        return magnitude_aware_attention(q, k, v, chunk_size=8, implementation=implementation, **options)[0]

    @jax.jit
    def run(*arrays):
        every_form = causal and segments and variant == "official"
        names = ("chunked", "recurrent", "parallel") if every_form else (None,)
        results = []
        for attend in (weighted, *(functools.partial(linear, implementation=name) for name in names)):
            y, pull = jax.vjp(attend, *arrays)
            results.append((y, *pull(cotangent)))
        return results

    want, *found = run(*arrays)
    for got in found:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_by_their_formula(variant):
    q, k, _ = data(2, length=5, batch=1, heads=1)
    phi = lambda x: np.where(x > 0, np.float64(x) + 1, np.exp(np.minimum(np.float64(x), 0)))  # noqa: E731
    fq, fk = phi(q[0, :, 0]), phi(k[0, :, 0])
    scale = 8**-0.5 / 5 if variant == "official" else 1.0
    scores = scale * fq @ fk.T
    s = scores.sum(axis=1, keepdims=True)
    eps = 1e-6
    want = scores / (s + eps) if variant == "divided" else (1 + 1 / (s + eps)) * scores - s / 5
    weights, beta, gamma = jax.jit(functools.partial(magnitude_aware_weights, variant=variant))(q, k)
    np.testing.assert_allclose(weights[0, 0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=2e-4)
    if variant != "divided":
        np.testing.assert_allclose(beta[0, 0], 1 + 1 / (s + eps), rtol=1e-4)
        np.testing.assert_allclose(gamma[0, 0], s / 5, rtol=1e-4)


def test_longer_queries_sharpen_rows_but_not_those_of_divided_attention():
    """The paper's claim (its small experiment, without training): max A - 1/T grows linearly with the length of phi(q)."""
    q, k, _ = data(3, length=16)
    factors = np.array([1.0, 2.0, 4.0, 8.0], np.float32)

    def sharpness(variant, factor):
        longer = factor * feature_map(q) - 1.0  # phi(longer) = factor phi(q) wherever that is at least one
        longer = jnp.where(longer > 0, longer, jnp.log(jnp.maximum(factor * feature_map(q), 1e-30)))
        weights, *_ = magnitude_aware_weights(longer, k, variant=variant, eps=0.0)
        return jnp.max(weights, axis=-1) - 1 / 16

    variants = ("paper", "official", "divided")
    each = jax.jit(lambda factors: [jax.vmap(functools.partial(sharpness, name))(factors) for name in variants])
    *sharper, divided = each(factors)
    for rows in sharper:
        assert np.all(np.diff(rows, axis=0) > 0)
        slopes = np.diff(rows, axis=0) / np.diff(factors)[:, None, None, None]
        np.testing.assert_allclose(slopes[1:], slopes[:-1], rtol=2e-2, atol=2e-4)
    np.testing.assert_allclose(divided, np.broadcast_to(divided[:1], divided.shape), atol=1e-6)


def test_states_continue_a_sequence():
    q, k, v = data(4, length=33)
    mask = np.arange(33)[None] >= np.array([[0], [5]])
    sin, cos = sequence_rotation(np.arange(33)[None], 8)
    run = jax.jit(
        lambda q, k, v, mask, sin, cos, state: magnitude_aware_attention(
            q, k, v, causal=True, mask=mask, rotation=(sin, cos), initial_state=state
        )
    )
    want, final = run(q, k, v, mask, sin, cos, init_state(2, 2, 8))
    state, parts = init_state(2, 2, 8), []
    for piece in zip(*(np.split(np.asarray(x), (1, 17), axis=1) for x in (q, k, v, mask, sin, cos)), strict=True):
        part, state = run(*piece, state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), state, final)


@pytest.mark.parametrize("segments", [False, True])
def test_padded_rows_and_dirty_padding(segments):
    q, k, v = data(5)
    options = structure(segments, True)
    options["mask"][1] = False
    dirty = [np.where(options["mask"][:, :, None, None], x, np.nan) for x in (q, k, v)]
    for causal in (False, True):

        @jax.jit
        def run(q, k, v, causal=causal):
            y, pull = jax.vjp(lambda v: magnitude_aware_attention(q, k, v, causal=causal, **options)[0], v)
            return y, pull(2 * y)[0]

        (y, _), (want, gradient) = run(*dirty), run(q, k, v)
        assert not np.any(y[1]) and not np.any(y[0, 5])
        np.testing.assert_allclose(y, want, atol=1e-6)
        assert np.all(np.isfinite(gradient)) and not np.any(gradient[1]) and not np.any(gradient[0, 5])


def test_order_by_gradients():
    q, k, v = data(6, length=12)
    run = jax.jit(jax.grad(lambda *x: jnp.sum(magnitude_aware_attention(*x, causal=True)[0][:, 7]), argnums=(0, 1, 2)))
    for gradient in run(q, k, v):
        assert not np.any(gradient[:, 8:]) and np.any(gradient[:, 7])
    both = jax.jit(jax.grad(lambda k: jnp.sum(magnitude_aware_attention(q, k, v)[0][:, 7])))(k)
    assert np.all(np.any(both, axis=(0, 2, 3)))


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_queries_far_below_zero_stay_finite(variant):
    q, k, v = data(7)

    @jax.jit
    def run(q, v):
        attend = lambda q: magnitude_aware_attention(q, k, v, variant=variant, eps=0.0)[0]  # noqa: E731
        return attend(q), jax.grad(lambda q: jnp.sum(attend(q)))(q)

    for shift in (30.0, 200.0):
        assert all(np.all(np.isfinite(x)) for x in run(q - shift, v))
    np.testing.assert_allclose(run(q - 30.0, np.ones_like(v))[0], 1.0, atol=1e-4)  # rows still sum to one


def test_half_precision_keeps_its_divisions_in_float32():
    q, k, v = data(8, dtype=jnp.bfloat16)
    for causal in (False, True):
        run = jax.jit(lambda *x, causal=causal: magnitude_aware_attention(*x, causal=causal)[0])
        y = run(q - 4, k, v)
        assert y.dtype == jnp.bfloat16
        want = run(*(x.astype(np.float32) for x in (q - 4, k, v)))
        np.testing.assert_allclose(y.astype(np.float32), want, atol=0.06)


def test_rotation_of_a_map():
    angle = axial_frequencies(16)
    np.testing.assert_allclose(angle, np.repeat(1 / 10000 ** np.linspace(0, 1, 4), 2), rtol=1e-6)
    np.testing.assert_array_equal(axial_frequencies(4), [1.0, 1.0])  # one frequency
    sin, cos = axial_rotation(3, 5, 16)
    assert sin.shape == cos.shape == (15, 16)
    row, column = 2, 4
    x = np.random.default_rng(0).standard_normal((1, 15, 1, 16)).astype(np.float32)
    turned = np.asarray(jax.jit(rotate_pairs)(x, sin, cos))[0, row * 5 + column, 0]
    plain = np.asarray(x)[0, row * 5 + column, 0]
    numbers = (plain[0::2] + 1j * plain[1::2]) * np.exp(1j * np.repeat([row, column], 4) * np.tile(np.asarray(angle)[::2], 2))
    np.testing.assert_allclose(turned, np.stack([numbers.real, numbers.imag], -1).reshape(-1), atol=1e-5)


def test_rotation_of_a_sequence_is_the_usual_one():
    from attnlab.ops import rotary

    q, _, _ = data(9)
    positions = np.arange(LENGTH)[None] + 3
    both = jax.jit(
        lambda q: (rotate_pairs(q, *sequence_rotation(positions, 8, base=500.0)), rotary(q, positions, base=500.0, interleaved=True))
    )
    np.testing.assert_allclose(*both(q), atol=1e-5)


def test_bad_input():
    q, k, v = data()
    with pytest.raises(ConfigError, match="did you mean 'official'"):
        magnitude_aware_attention(q, k, v, variant="offical")
    with pytest.raises(ConfigError, match="all three"):
        magnitude_aware_attention(q, k[:, :5], v)
    with pytest.raises(ConfigError, match="initial_state without causal=True"):
        magnitude_aware_attention(q, k, v, initial_state=init_state(2, 2, 8))
    with pytest.raises(ConfigError, match=r"needs float32\[2, 2, 8, 8\]"):
        magnitude_aware_attention(q, k, v, causal=True, initial_state=init_state(3, 2, 8))
    with pytest.raises(ConfigError, match="multiple of 4"):
        axial_rotation(2, 2, 6)
    with pytest.raises(ConfigError, match="even head width"):
        sequence_rotation(jnp.zeros((1, 4), jnp.int32), 5)
    with pytest.raises(ConfigError, match="rotation of shape"):
        magnitude_aware_attention(q, k, v, rotation=axial_rotation(2, 2, 8))
    with pytest.raises(ConfigError, match="mask has shape"):
        magnitude_aware_attention(q, k, v, mask=jnp.ones((2, 3), bool))

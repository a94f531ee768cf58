"""Pluecker features against loops in float64: values, gradients, structure, degenerate pairs, bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops.grassmann import (
    grassmann_features,
    grassmann_projection,
    pair_projection,
    plucker,
    plucker_pairs,
    plucker_unit,
)

CASES = {
    "past": {"offsets": (1, 2, 4), "direction": "past"},
    "future": {"offsets": (1, 3), "direction": "future"},
    "both": {"offsets": (2, 1), "direction": "both"},
    "duplicates": {"offsets": (1, 3, 3, 3), "direction": "past"},
    "too long": {"offsets": (2, 9, 40), "direction": "past"},
    "heads": {"offsets": (1, 2), "direction": "past", "num_heads": 2},
    "structure": {"offsets": (1, 2), "direction": "both", "mask": True, "segment_ids": True},
}


def data(seed=0, batch=2, length=9, width=6):
    return np.random.default_rng(seed).standard_normal((batch, length, width)).astype(np.float32)


def structure(case, batch=2, length=9):
    options = dict(case)
    if options.pop("mask", None):
        options["mask"] = jnp.ones((batch, length), bool).at[0, 3].set(False).at[1, :2].set(False)
    if options.pop("segment_ids", None):
        options["segment_ids"] = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 2, 2, 2, 3, 3]])
    return options


def by_loops(z, offsets, direction="past", num_heads=1, mask=None, segment_ids=None, eps=1e-8):
    z = np.asarray(z, np.float64)
    batch, length, width = z.shape
    width //= num_heads
    size = width * (width - 1) // 2
    out = np.zeros((batch, length, num_heads * size))
    found = np.zeros((batch, length), bool)
    signs = {"past": (-1,), "future": (1,), "both": (-1, 1)}[direction]

    def real(b, t):
        padding = (mask is not None and not mask[b, t]) or (segment_ids is not None and segment_ids[b, t] == 0)
        return 0 <= t < length and not padding

    for b, t in itertools.product(range(batch), range(length)):
        terms = []
        for offset, sign in itertools.product(offsets, signs):
            s = t + sign * offset
            if not (0 <= s < length and real(b, t) and real(b, s)):
                continue
            if segment_ids is not None and segment_ids[b, s] != segment_ids[b, t]:
                continue
            parts = []
            for head in range(num_heads):
                first, second = z[b, t].reshape(num_heads, -1)[head], z[b, s].reshape(num_heads, -1)[head]
                pairs = itertools.combinations(range(width), 2)
                p = np.array([first[i] * second[j] - first[j] * second[i] for i, j in pairs])
                parts.append(p / max(np.linalg.norm(p), eps))
            terms.append(np.concatenate(parts))
        if terms:
            out[b, t], found[b, t] = np.mean(terms, axis=0), True
    return out, found


@pytest.mark.parametrize("name", CASES)
def test_features_against_loops(name):
    options = structure(CASES[name])
    z = data()
    want, has = by_loops(z, **{key: np.asarray(value) if hasattr(value, "shape") else value for key, value in options.items()})
    offsets = options.pop("offsets")
    run = jax.jit(lambda z: [grassmann_features(z, offsets, form=form, **options) for form in ("pairs", "frame")])
    for got, found in run(z):
        np.testing.assert_allclose(got, want, atol=3e-6)
        np.testing.assert_array_equal(found, has)
        assert got.dtype == jnp.float32


@pytest.mark.parametrize(("name", "norm"), [("duplicates", "max"), ("both", "smooth"), ("heads", "smooth"), ("structure", "max")])
def test_the_one_matmul_order_has_the_same_values_and_gradients(name, norm):
    options = structure(CASES[name]) | {"norm": norm}
    offsets, heads = options.pop("offsets"), options.get("num_heads", 1)
    z, width = data(), 6 // heads
    rng = np.random.default_rng(1)
    weight, cotangent = (rng.standard_normal(x).astype(np.float32) for x in ((heads * width * (width - 1) // 2, 5), (2, 9, 5)))

    @jax.jit
    def run(z, weight):
        def project(z, weight, form):
            if form is None:  # the features of every pair, then the matmul
                return grassmann_features(z, offsets, form="pairs", **options)[0] @ weight
            return grassmann_projection(z, weight, offsets, form=form, **options)[0]

        results = []
        for form in (None, "pairs", "frame"):
            y, pull = jax.vjp(lambda z, weight, form=form: project(z, weight, form), z, weight)
            results.append((y, *pull(cotangent)))
        return results

    want, *others = run(z, weight)
    for got in others:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4)


def test_order_and_exactness_of_coordinates():
    a, b = data(1)[0, 0], data(2)[0, 0]
    want = [a[i] * b[j] - a[j] * b[i] for i, j in itertools.combinations(range(6), 2)]
    two = jax.jit(lambda a, b: (plucker(a, b), plucker(b, a), plucker_unit(a, b), plucker_unit(a, 1e-3 * b)))
    forth, back, unit, shorter = two(a, b)
    np.testing.assert_allclose(forth, want, atol=2e-6)
    np.testing.assert_allclose(back, -forth, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(unit), 1.0, rtol=1e-6)
    assert unit.shape == (15,)
    np.testing.assert_allclose(shorter, unit, atol=2e-6)  # no area
    np.testing.assert_allclose(np.abs(jax.jit(plucker_unit)(a[:2], b[:2])), [1.0], rtol=1e-6)  # r = 2: a sign


@pytest.mark.parametrize("direction", ["past", "future"])
def test_pairs_of_one_offset(direction):
    z = data()
    first, second = (z[0, 5], z[0, 2]) if direction == "past" else (z[0, 2], z[0, 5])
    run = jax.jit(lambda z: (plucker_pairs(z, 3, direction=direction), plucker(first, second)))
    (raw, unit), want = run(z)
    assert raw.shape == unit.shape == (2, 6, 15)
    np.testing.assert_allclose(raw[0, 2], want, atol=1e-6)
    assert jax.eval_shape(lambda z: plucker_pairs(z, 9, direction=direction)[0], z).shape == (2, 0, 15)


@pytest.mark.parametrize(("norm", "form"), [("max", "frame"), ("smooth", "pairs")])
def test_identical_tokens_have_no_plane(norm, form):
    """Also through a matmul and a jit, where fused products and other row orders leave the last bit behind."""
    rng = np.random.default_rng(0)
    words, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 12), (12, 8)))
    ids = np.asarray([[0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0]])

    def run(words):
        z = jnp.matmul(words[ids], weight, precision="highest")
        return grassmann_features(z, (1,), norm=norm, form=form)[0]

    features = jax.jit(run)(words)[0]
    repeated = np.asarray(ids[0, 1:] == ids[0, :-1])
    assert not np.any(features[1:][repeated])
    np.testing.assert_allclose(np.linalg.norm(features[1:][~repeated], axis=-1), 1.0, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda words: jnp.sum(run(words) ** 2)))(words)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("direction", ["past", "future", "both"])
def test_order_by_gradients(direction):
    z = data(length=12)
    # one coordinate: all of them together have length one, whatever the tokens are
    gradient = jax.jit(jax.grad(lambda z: grassmann_features(z, (1, 3), direction=direction)[0][0, 6, 2]))(z)[0]
    moved = set(np.flatnonzero(np.any(gradient, axis=-1)))
    partners = {"past": {5, 3}, "future": {7, 9}, "both": {5, 3, 7, 9}}[direction]
    assert moved == partners | {6}


def test_padding_and_empty_rows():
    z = data(length=8)
    mask = np.ones((2, 8), bool)
    mask[0] = mask[1, 4] = False

    @jax.jit
    def run(z):
        y, pull, found = jax.vjp(lambda z: grassmann_features(z, (1, 2), mask=mask), z, has_aux=True)
        return y, found, pull(3 * y**2)[0]

    features, found, gradient = run(np.where(mask[..., None], z, np.nan))
    assert not np.any(features[0]) and not np.any(found[0])
    np.testing.assert_allclose(features, run(z)[0], atol=1e-6)
    assert not np.any(gradient[0]) and not np.any(gradient[1, 4])
    assert np.all(np.isfinite(gradient)) and np.any(gradient[1, 5])


def test_history_continues_a_sequence():
    z = data(length=20)

    @jax.jit
    def run(z):
        history = z[:, 3:11], jnp.ones((2, 8), bool)
        return grassmann_features(z, (1, 2, 7)), grassmann_features(z[:, 11:], (1, 2, 7), history=history)

    (want, has), (got, found) = run(z)
    np.testing.assert_allclose(got, want[:, 11:], atol=1e-6)
    np.testing.assert_array_equal(found, has[:, 11:])


def test_linear_control_by_hand():
    z = data(length=5, width=3)
    weight = np.random.default_rng(3).standard_normal((6, 4)).astype(np.float32)
    got, found = jax.jit(lambda z: pair_projection(z, weight, (1, 2)))(z)
    partner = (z[0, 3] + z[0, 2]) / 2
    np.testing.assert_allclose(got[0, 4], np.concatenate([z[0, 4], partner]) @ weight, atol=1e-5)
    assert not np.any(got[:, 0]) and not np.any(found[:, 0])


def test_half_precision_input_is_computed_in_float32():
    z = data().astype(jnp.bfloat16)

    @jax.jit
    def run(z):
        projected, _ = grassmann_projection(z, jnp.ones((15, 4)), (1, 2), dtype=jnp.bfloat16)
        return projected, grassmann_features(z, (1, 2))[0], grassmann_features(z.astype(jnp.float32), (1, 2))[0]

    projected, got, want = run(z)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert projected.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": ()}, "offsets = .*nothing to mix"),
        ({"offsets": (1, 0)}, "0 is no distance"),
        ({"offsets": (1.5,)}, "1.5 is no distance"),
        ({"direction": "backward"}, "direction = 'backward': unknown"),
        ({"form": "frames"}, "did you mean 'frame'"),
        ({"norm": "l2"}, "norm = 'l2': unknown"),
        ({"num_heads": 4}, "num_heads = 4: does not divide"),
        ({"num_heads": 6}, "at least 2 features"),
        ({"history": (jnp.zeros((2, 1, 6)), jnp.ones((2, 1), bool))}, "history of 1 tokens"),
        ({"history": (jnp.zeros((2, 9, 6)), jnp.ones((2, 9), bool)), "direction": "both"}, "holds the past only"),
    ],
)
def test_bad_input(change, message):
    options = {"offsets": (1, 2)} | change
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda z: grassmann_features(z, **options), data())

"""Softmax and sigmoid attention by XLA: values and gradients against the float64 transcription."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.ops.attention import make_call
from attnlab.ops.chunked import attend_chunked

OPS = {"softmax": ops.softmax_attention, "sigmoid": ops.sigmoid_attention}
CHUNK = 32


def chunked(kind, q, k, v, chunk=CHUNK, **options):
    return attend_chunked(make_call(q, k, v, normalization=kind, **options), chunk)


def gradients(fn, q, k, v, cotangent):
    out, pullback = jax.vjp(fn, q, k, v)
    return out, *pullback(cotangent)


def both(kind, *arrays, **options):
    """Values and gradients by the reference and in chunks."""
    whole = gradients(lambda *x: OPS[kind](*x, implementation="xla", **options), *arrays)
    return whole, gradients(lambda *x: chunked(kind, *x, **options), *arrays)


def segments(batch, length):
    return jnp.minimum(jnp.arange(length)[None] // 9, jnp.arange(batch)[:, None] + 1).astype(jnp.int32)


def padding(batch, keys):
    """Row 0 has no key at all, the next ones lose some at both ends."""
    at, row = jnp.arange(keys)[None], jnp.arange(batch)[:, None]
    return (at >= row) & (at < keys - 2 * row) & (row > 0)


CASES = {
    "plain": ({}, {}, {}),
    "one": ({"length": 1}, {"causal": True}, {}),
    "causal": ({"length": 63}, {"causal": True}, {}),
    "fewer queries": ({"length": 20, "keys": 37, "kv_heads": 1}, {"causal": True}, {}),
    "more queries": ({"length": 37, "keys": 20, "kv_heads": 4}, {"causal": True}, {}),
    "window": ({"length": 100}, {"causal": True, "window": (9, -1)}, {}),
    "both sides": ({"length": 50, "keys": 70}, {"window": (5, 3)}, {}),
    "right side": ({"length": 50}, {"window": (-1, 3)}, {}),
    "padding": ({"length": 40, "batch": 3}, {"causal": True, "kv_mask": padding(3, 40)}, {}),
    "segments": ({"length": 40}, {"causal": True, "segments": segments(2, 40)}, {}),
    "alibi": ({"length": 33}, {"slopes": [0.5, 0.3, 0.1, 0.7]}, {}),
    "causal alibi": ({"length": 33, "batch": 1}, {"slopes": [0.5, 0.3, 0.1, 0.7], "causal": True}, {}),
    "temperature": ({"length": 20}, {"slopes": [0.5, 0.3, 0.1, 0.7]}, {"temperature": 0.3, "bias": -2.5}),
    "rows": ({"length": 20}, {"causal": True}, {"rows": "row", "bias": -1.0}),
    "roots of rows": ({"length": 20}, {}, {"rows": "sqrt_row"}),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, draw, transcription):
    shapes, options, sigmoid_only = CASES[name]
    arrays = draw(**shapes)
    for kind in ("sigmoid",) if sigmoid_only else ("softmax", "sigmoid"):
        given_to = {**options, **sigmoid_only} if kind == "sigmoid" else dict(options)
        want = transcription.attention(kind, *arrays, **given_to)
        renamed = {"segments": "q_segment_ids", "slopes": "alibi_slopes", "rows": "row_normalization"}
        call = {renamed.get(key, key): value for key, value in given_to.items()}
        if "alibi_slopes" in call:
            call["alibi_slopes"] = jnp.asarray(call["alibi_slopes"], jnp.float32)
        if kind == "softmax":  # chunks do not know of the kind: one of the two shows them
            results = jax.jit(lambda *x, call=call: both("softmax", *x, **call))(*arrays)
        else:
            op = functools.partial(ops.sigmoid_attention, **call)
            results = [jax.jit(functools.partial(gradients, op))(*arrays)]
        for result in results:
            for have, expected in zip(result, want, strict=True):
                np.testing.assert_allclose(have, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", OPS)
def test_weights_are_those_of_the_op(kind, draw, transcription):
    q, k, v, _ = draw(length=20)
    weights = ops.attention_weights(kind, q, k, causal=True, window=7)
    assert weights.shape == (2, 4, 20, 20)
    assert weights.dtype == jnp.float32
    with jax.enable_x64(True):
        want = np.asarray(transcription.weights(kind, *(np.asarray(x, np.float64) for x in (q, k)), causal=True, window=(7, 0)))
    np.testing.assert_allclose(weights, want, atol=1e-6)
    out = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(OPS[kind](q, k, v, causal=True, window=7), out, atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(
    length=st.integers(1, 40), keys=st.integers(1, 40), kv_heads=st.sampled_from([1, 2, 4]), causal=st.booleans(),
    window=st.one_of(st.none(), st.tuples(st.integers(-1, 9), st.integers(-1, 9))),
)  # fmt: skip
def test_chunks_equal_the_reference_at_any_shape(length, keys, kv_heads, causal, window):
    key = jax.random.key(length * 41 + keys)
    q = jax.random.normal(key, (1, length, 4, 4))
    k, v = jax.random.normal(key, (2, 1, keys, kv_heads, 4))
    options = {"causal": causal, "window": window}

    @jax.jit
    def results(q, k, v):
        whole = [op(q, k, v, implementation="xla", **options) for op in OPS.values()]
        return whole, [chunked(kind, q, k, v, **options) for kind in OPS]

    for want, have in zip(*results(q, k, v), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


@pytest.mark.parametrize("kind", OPS)
def test_explicit_positions_replace_the_order(kind, draw):
    """Shuffled keys with their positions, and empty slots among them, give what the ordered ones give."""
    q, k, v, _ = draw(length=10, keys=12)
    options = {"causal": True, "window": 6, "alibi_slopes": ops.alibi_slopes(4)}
    want = OPS[kind](q, k, v, **options)
    order = np.random.default_rng(0).permutation(15)
    k, v = (jnp.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=9.0)[:, order] for x in (k, v))
    kv_positions = jnp.where(order < 12, order, -1)[None].astype(jnp.int32)
    q_positions = jnp.broadcast_to(jnp.arange(2, 12, dtype=jnp.int32), (2, 10))
    positions = {"q_positions": q_positions, "kv_positions": kv_positions}
    np.testing.assert_allclose(OPS[kind](q, k, v, **positions, **options), want, atol=1e-5)
    np.testing.assert_allclose(chunked(kind, q, k, v, **positions, **options), want, atol=1e-5)


@pytest.mark.parametrize("kind", OPS)
def test_dense_mask_and_bias(kind, draw):
    q, k, v, _ = draw(length=20)
    mask = jnp.tril(jnp.ones((20, 20), bool))
    np.testing.assert_allclose(OPS[kind](q, k, v, mask=mask), OPS[kind](q, k, v, causal=True), atol=1e-6)
    np.testing.assert_allclose(chunked(kind, q, k, v, mask=mask), OPS[kind](q, k, v, causal=True), atol=1e-5)
    distance = jnp.abs(jnp.arange(20)[:, None] - jnp.arange(20))
    slopes = ops.alibi_slopes(4)
    bias = -slopes[:, None, None] * distance
    want = OPS[kind](q, k, v, alibi_slopes=slopes)
    np.testing.assert_allclose(OPS[kind](q, k, v, bias=bias), want, atol=1e-5)
    np.testing.assert_allclose(chunked(kind, q, k, v, bias=bias), want, atol=1e-5)


@pytest.mark.parametrize("kind", OPS)
def test_rows_without_a_key_are_zero_with_zero_gradients(kind, draw):
    q, k, v, cotangent = draw(length=20)
    mask = jnp.zeros((2, 20), bool).at[1, 5:].set(True)
    for result in jax.jit(lambda *x: both(kind, *x, causal=True, kv_mask=mask))(q, k, v, cotangent):
        out, dq, dk, dv = result
        assert not np.any(out[0]) and not np.any(out[1, :5]) and np.all(np.any(out[1, 5:] != 0, axis=(1, 2)))
        for gradient in (dq, dk, dv):
            assert np.all(np.isfinite(gradient)) and not np.any(gradient[0])
            assert not np.any(gradient[1, :5])


@pytest.mark.parametrize("kind", OPS)
def test_causal_order_by_gradients(kind, draw):
    q, k, v, _ = draw(length=20)
    for fn in (OPS[kind], lambda *x, **o: chunked(kind, *x, **o)):
        _, dk, dv = jax.grad(lambda *x, fn=fn: fn(*x, causal=True)[:, 11].sum(), (0, 1, 2))(q, k, v)
        for gradient in (dk, dv):
            assert np.all(np.any(gradient[:, :12] != 0, axis=(2, 3))) and not np.any(gradient[:, 12:])


@pytest.mark.parametrize("kind", OPS)
def test_bfloat16_stays_near_float32_and_repeats_bit_by_bit(kind, draw):
    arrays = draw(length=63, width=16)
    narrow = [x.astype(jnp.bfloat16) for x in arrays]
    run = jax.jit(lambda *x: both(kind, *x, causal=True))
    want, _ = run(*(x.astype(jnp.float32) for x in narrow))
    for result in run(*narrow):
        for have, expected in zip(result, want, strict=True):
            assert have.dtype == jnp.bfloat16
            scale = float(jnp.max(jnp.abs(expected)))
            np.testing.assert_allclose(have.astype(jnp.float32), expected, atol=0.02 * scale)
    for first, second in zip(jax.tree.leaves(run(*narrow)), jax.tree.leaves(run(*narrow)), strict=True):
        np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


def test_a_thousand_tokens_in_chunks_hold_no_score_matrix(draw):
    """Longer than a chunk and no multiple of it; temporary memory stays far below the full matrix."""
    arrays = draw(batch=1, length=1000, heads=2, kv_heads=2)

    whole = functools.partial(ops.softmax_attention, causal=True, implementation="xla")
    parts = functools.partial(chunked, "softmax", causal=True, chunk=128)
    results = [jax.jit(functools.partial(gradients, fn))(*arrays) for fn in (parts, whole)]
    for have, want in zip(*results, strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5)
    length = 4096
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 4
    temporaries = jax.jit(functools.partial(gradients, parts)).lower(*shapes).compile().memory_analysis()
    assert temporaries.temp_size_in_bytes < 4 * 2 * length**2 / 4


def test_dropout_keeps_the_mean_and_follows_its_key(draw):
    q, k, v, _ = draw(batch=1, length=64, width=4)
    options = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.25, "deterministic": False}
    plain = ops.softmax_attention(q, k, v)
    one = ops.softmax_attention(q, k, v, **options)
    np.testing.assert_array_equal(one, ops.softmax_attention(q, k, v, **options))
    assert not np.allclose(one, plain, atol=1e-3)
    keys = jax.random.split(jax.random.key(2), 400)
    drawn = jax.vmap(lambda key: ops.softmax_attention(q, k, v, **(options | {"dropout_rng": key})))(keys)
    np.testing.assert_allclose(drawn.mean(0), plain, atol=0.06)
    assert not np.allclose(chunked("softmax", q, k, v, **options), plain, atol=1e-3)
    np.testing.assert_array_equal(ops.softmax_attention(q, k, v, **(options | {"deterministic": True})), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 24, 3, 8), "v": (2, 24, 3, 8)}, "3 key/value heads do not divide 4"),
        ({"k": (2, 24, 2, 6)}, "shapes"),
        ({"mask": jnp.ones((3, 24, 24), bool)}, "does not broadcast"),
        ({"alibi_slopes": jnp.ones(3)}, r"it needs \[N\]"),
        ({"window": (1, 2, 3)}, "not a width"),
        ({"window": -2}, "negative width"),
        ({"kv_segment_ids": jnp.zeros((2, 24), jnp.int32)}, "Pass both"),
        ({"dropout_rate": 0.5, "deterministic": False}, "needs dropout_rng"),
    ],
)
def test_arguments_that_do_not_fit(change, message, draw):
    q, k, v, _ = draw()
    arrays = {"q": q, "k": k, "v": v} | {
        name: jnp.zeros(shape) for name, shape in change.items() if isinstance(shape, tuple) and name in "kv"
    }
    options = {name: value for name, value in change.items() if name not in ("k", "v")}
    with pytest.raises(ConfigError, match=message):
        ops.softmax_attention(arrays["q"], arrays["k"], arrays["v"], **options)
    with pytest.raises(ConfigError, match="types"):
        ops.sigmoid_attention(q, k, v.astype(jnp.bfloat16))

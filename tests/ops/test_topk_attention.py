"""Top-k attention: the streamed form against the dense reference, and the reference against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.ops.attention import make_call
from attnlab.ops.topk_attention import Chunks, attend_topk, topk_attention


def streamed(q, k, v, top_k, **options):
    return attend_topk(make_call(q, k, v, normalization="softmax", **options), top_k, Chunks(16, 24))


def pulled(fn, arrays):
    out, pullback = jax.vjp(fn, *arrays[:3])
    return out, *pullback(arrays[3])


def dense(top_k, **options):
    return functools.partial(topk_attention, top_k=top_k, implementation="xla_dense", **options)


def segments(batch, length):
    return jnp.minimum(jnp.arange(length)[None] // 9, jnp.arange(batch)[:, None] + 1).astype(jnp.int32)


SCATTERED = jax.random.randint(jax.random.key(4), (2, 40), -20, 60)
CASES = {
    "one": ({"length": 1}, 1, {"causal": True}),
    "plain": ({"length": 33}, 5, {}),
    "causal": ({"length": 63}, 8, {"causal": True}),
    "all keys": ({"length": 40, "keys": 30}, 30, {}),
    "more than a chunk of keys": ({"length": 50}, 40, {"causal": True}),
    "fewer queries": ({"length": 20, "keys": 37, "kv_heads": 1}, 4, {"causal": True}),
    "more queries": ({"length": 37, "keys": 20, "kv_heads": 4}, 4, {"causal": True}),
    "window": ({"length": 100}, 6, {"causal": True, "window": (30, -1), "scale": 0.7}),
    "both sides": ({"length": 50, "keys": 70}, 6, {"window": (5, 3)}),
    "padding": (
        {"length": 40, "batch": 3},
        6,
        {"kv_mask": jnp.arange(40)[None] < jnp.array([[40], [3], [0]]), "causal": True},
    ),
    "segments": ({"length": 40}, 6, {"q_segment_ids": segments(2, 40)}),
    "positions": (
        {"length": 40},
        6,
        {"causal": True, "q_positions": jnp.abs(SCATTERED[:1]), "kv_positions": SCATTERED},
    ),
    "alibi": ({"length": 40}, 6, {"causal": True, "alibi_slopes": jnp.array([0.5, 0.1, 0.3, 0.0])}),
}


@pytest.mark.parametrize("name", CASES)
def test_streamed_equals_dense(name, draw):
    shapes, top_k, options = CASES[name]
    arrays = draw(**shapes)
    run = jax.jit(functools.partial(pulled, functools.partial(streamed, top_k=top_k, **options)))
    have, again = run(arrays), run(arrays)
    want = jax.jit(functools.partial(pulled, dense(top_k, **options)))(arrays)
    for one, other, second in zip(have, want, again, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
        np.testing.assert_array_equal(one, second)
    if name == "padding":
        assert not np.any(have[0][2]) and not np.any(have[1][2])


def test_a_thousand_tokens_and_bfloat16(draw):
    arrays = draw(batch=1, length=1000, heads=2, kv_heads=1, width=4)
    have = jax.jit(functools.partial(pulled, functools.partial(topk_attention, top_k=9, causal=True)))(arrays)
    want = jax.jit(functools.partial(pulled, dense(9, causal=True)))(arrays)
    for one, other in zip(have, want, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
    narrow = [x[:, :100].astype(jnp.bfloat16) for x in arrays]
    have = jax.jit(functools.partial(pulled, functools.partial(topk_attention, top_k=9)))(narrow)
    want = jax.jit(functools.partial(pulled, dense(9)))([x.astype(jnp.float32) for x in narrow])
    for one, other in zip(have, want, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("implementation", ["xla", "xla_dense"])
def test_against_numpy(implementation, draw):
    q, k, v, _ = draw(batch=1, length=20, heads=2, kv_heads=2)
    out = topk_attention(q, k, v, top_k=3, causal=True, implementation=implementation)
    scores = np.einsum("btnh,bsnh->bnts", *(np.asarray(x, np.float64) for x in (q, k)))[0] / 8**0.5
    for n in range(2):
        for t in range(20):
            order = np.argsort(-scores[n, t, : t + 1], kind="stable")[:3]
            weights = np.exp(scores[n, t, order] - scores[n, t, order[0]])
            want = (weights / weights.sum()) @ np.asarray(v[0, order, n], np.float64)
            np.testing.assert_allclose(out[0, t, n], want, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "xla_dense"])
def test_ties_go_to_the_lower_key(implementation):
    q = jnp.ones((1, 3, 1, 4))
    k = jnp.zeros((1, 50, 1, 4)).at[:, 40].set(1.0)
    v = jnp.broadcast_to(jnp.arange(50.0)[None, :, None, None], (1, 50, 1, 4))
    run = functools.partial(topk_attention, top_k=3, scale=0.0, implementation=implementation)
    out, pullback = jax.vjp(lambda v: run(q, k, v), v)  # scale 0: all scores are equal
    np.testing.assert_allclose(out, 1.0, atol=1e-6)
    (dv,) = pullback(jnp.ones_like(out))
    assert np.all(dv[:, :3] > 0) and not np.any(dv[:, 3:])
    out = run(q, k, v, scale=1.0)  # key 40 wins, then 0 and 1
    np.testing.assert_allclose(out, (40 * np.exp(4.0) + 1) / (np.exp(4.0) + 2), rtol=1e-5)


def test_gradients_reach_kept_keys_only_and_follow_the_causal_order(draw):
    q, k, v, _ = draw(length=30)

    def row(k, v):
        return topk_attention(q, k, v, top_k=4, causal=True)[:, 17].sum()

    for gradient in jax.grad(row, (0, 1))(k, v):
        touched = np.any(gradient != 0, axis=-1)  # [B, S, K]; two query heads share a key head
        assert not np.any(touched[:, 18:]) and np.all(touched.sum(1) <= 8) and np.all(touched.sum(1) >= 4)


def test_memory_is_linear():
    """At T = 16k a step of values and gradients holds less than a tenth of what the reference holds."""
    shapes = [jax.ShapeDtypeStruct((1, 16384, 2, 64), jnp.float32)] * 4
    sizes = []
    for implementation in ("xla", "xla_dense"):
        fn = functools.partial(topk_attention, top_k=64, causal=True, implementation=implementation)
        compiled = jax.jit(functools.partial(pulled, fn)).lower(shapes).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] < sizes[1] / 10
    assert sizes[1] > 2 * 4 * 16384**2  # the reference does hold the scores


def test_bad_input(draw):
    q, k, v, _ = draw()
    for top_k in (0, 25, True, 2.0):
        with pytest.raises(ConfigError, match=r"top_k = .*S = 24 keys. Give an int between 1 and 24"):
            topk_attention(q, k, v, top_k=top_k)
    with pytest.raises(ConfigError, match="shapes"):
        topk_attention(q, k[:, :10], v, top_k=2)
    with pytest.raises(ConfigError, match="unknown implementation"):
        topk_attention(q, k, v, top_k=2, implementation="triton")


def test_under_jit_vmap_and_a_batch_of_positions(draw):
    arrays = draw(batch=3, length=20)[:3]
    one = functools.partial(topk_attention, top_k=4, causal=True)
    want = one(*arrays)
    have = jax.vmap(lambda *x: one(*(y[None] for y in x))[0])(*arrays)
    np.testing.assert_allclose(have, want, atol=1e-6)
    assert list(dispatch.implementations("topk_attention")) == ["xla", "xla_dense"]

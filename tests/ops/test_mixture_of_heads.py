"""Attention over selected heads: the gathered form against all heads, values and gradients, and its layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.ops import mixture_of_heads as moh
from attnlab.ops.head_routing import select_heads

NUMBER = jnp.arange(40)
CASES = {
    "plain": ({"length": 37, "heads": 6, "kv_heads": 6}, 4, 2, {}),
    "one token": ({"length": 1, "keys": 20, "heads": 4, "kv_heads": 2}, 2, 1, {"causal": True}),
    "no shared heads": ({"length": 30, "heads": 4, "kv_heads": 4}, 4, 1, {"causal": True}),
    "groups cut by the shared heads": ({"length": 40, "heads": 8, "kv_heads": 2}, 5, 2, {"causal": True}),
    "all selected": ({"length": 40, "heads": 4, "kv_heads": 1}, 2, 2, {"causal": True}),
    "window": ({"length": 100, "heads": 4, "kv_heads": 2}, 2, 1, {"causal": True, "window": (9, 0), "scale": 0.7}),
    "padding": ({"length": 40, "heads": 4, "kv_heads": 4}, 2, 1, {"kv_mask": jnp.arange(40)[None] < jnp.array([[40], [3]])}),
    "segments": (
        {"length": 40, "heads": 4, "kv_heads": 4}, 2, 1,
        {"causal": True, "q_segment_ids": jnp.arange(40)[None].repeat(2, 0) // 9},
    ),
    "positions": (
        {"length": 9, "keys": 40, "heads": 4, "kv_heads": 2}, 2, 1,
        {"causal": True, "q_positions": 20 + jnp.arange(9)[None], "kv_positions": jnp.where(NUMBER < 31, NUMBER, -1)[None]},
    ),
}  # fmt: skip


def drawn(draw, shapes, routed, top_k, dtype=jnp.float32):
    q, k, v, cotangent = draw(**shapes, dtype=dtype)
    keys = jax.random.split(jax.random.key(9))
    selected = select_heads(jax.random.normal(keys[0], (*q.shape[:2], routed)), top_k)
    return (q, k, v, 0.5 + jax.random.uniform(keys[1], q.shape[:3])), selected, cotangent


def pulled(arrays, selected, cotangent, **options):
    def both(*arrays):
        out, pullback = jax.vjp(lambda *a: moh.mixture_of_heads_attention(*a, selected, **options), *arrays)
        return out, *pullback(cotangent)

    return jax.jit(both)(*arrays)


@pytest.mark.parametrize("name", CASES)
def test_gathered_equals_all_heads(name, draw):
    shapes, routed, top_k, options = CASES[name]
    arrays, selected, cotangent = drawn(draw, shapes, routed, top_k)
    have, want = (
        pulled(arrays, selected, cotangent, top_k=top_k, implementation=form, **options) for form in ("gathered", "all_heads")
    )
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    off = ~np.asarray(selected)
    assert not np.any(have[0][:, :, -routed:][off]) and not np.any(have[4][:, :, -routed:][off])


def test_bands_equal_one_layout(draw, monkeypatch):
    monkeypatch.setattr(moh, "_BAND", 24)
    arrays, selected, cotangent = drawn(draw, {"length": 61, "keys": 70, "heads": 4, "kv_heads": 2}, 3, 1)
    have = pulled(arrays, selected, cotangent, top_k=1, causal=True, implementation="gathered")
    want = pulled(arrays, selected, cotangent, top_k=1, causal=True, implementation="all_heads")
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16(draw):
    arrays, selected, cotangent = drawn(draw, {"length": 40, "heads": 4, "kv_heads": 2}, 2, 1, jnp.bfloat16)
    have, want = (
        pulled(arrays, selected, cotangent, top_k=1, causal=True, implementation=form) for form in ("gathered", "all_heads")
    )
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=4e-2)


@pytest.mark.parametrize("spread", ["random", "one head", "last head only"])
def test_every_pair_has_a_slot_of_its_own(spread):
    length, routed, block = 50, 4, 8
    scores = jax.random.uniform(jax.random.key(0), (2, length, routed))
    scores = scores.at[..., 0].add(9.0) if spread == "one head" else scores
    selected = select_heads(scores, 2)
    if spread == "last head only":
        selected = selected & (jnp.arange(routed) == routed - 1)
    slots = jax.jit(moh.head_slots, static_argnums=(1, 2))(selected, 2, block)
    total = slots.source.shape[1]
    assert total == block * ((2 * length + routed * (block - 1)) // block) and total % block == 0
    for b in range(2):
        pairs = np.flatnonzero(np.asarray(selected[b]).reshape(-1))
        taken = np.asarray(slots.source[b])
        np.testing.assert_array_equal(np.sort(taken[taken < length * routed]), pairs)
        np.testing.assert_array_equal(taken[np.asarray(slots.slot[b]).reshape(-1)[pairs]], pairs)
        owners = np.repeat(np.asarray(slots.owner[b]), block)
        used = taken < length * routed
        np.testing.assert_array_equal(owners[used], taken[used] % routed)
    assert np.all(np.asarray(slots.slot)[~np.asarray(selected)] == total)


def test_the_choice_of_the_form_is_explained():
    def decision(length, heads, routed, top_k, **options):
        shape = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
        gates = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)
        selected = jax.ShapeDtypeStruct((1, length, routed), jnp.bool_)
        return ops.explain(moh.mixture_of_heads_attention, shape, shape, shape, gates, selected, top_k=top_k, **options)

    assert decision(2048, 8, 6, 2, causal=True).chosen == "gathered"  # half of the heads
    many = decision(2048, 8, 6, 5)
    assert many.chosen == "all_heads" and "of the routed heads' queries" in many.reasons["gathered"]
    assert "pays from" in decision(128, 8, 6, 2).reasons["gathered"]
    biased = decision(2048, 8, 6, 2, bias=jax.ShapeDtypeStruct((1, 8, 1, 2048), jnp.float32))
    assert biased.reasons["gathered"] == "gathered tokens do not know a bias"
    assert moh.gathered_share(10**6, 6, 2, block=128) == pytest.approx(1 / 3, rel=1e-3)


def test_calls_that_do_not_fit(draw):
    arrays, selected, _ = drawn(draw, {"length": 8, "heads": 4, "kv_heads": 4}, 2, 1)
    with pytest.raises(ConfigError, match="do not fit q"):
        moh.mixture_of_heads_attention(*arrays[:3], arrays[3][:, :4], selected, top_k=1)
    with pytest.raises(ConfigError, match="top_k = 3: there are 2 routed heads"):
        moh.mixture_of_heads_attention(*arrays, selected, top_k=3)
    with pytest.raises(NotImplementedError, match="do not know ALiBi"):
        moh.mixture_of_heads_attention(*arrays, selected, top_k=1, alibi_slopes=jnp.ones(4), implementation="gathered")

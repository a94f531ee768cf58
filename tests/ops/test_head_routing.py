"""Routers and the balance loss against their formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops import head_routing

KEYS = jax.random.split(jax.random.key(0), 4)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(("shared", "routed", "top_k"), [(2, 4, 2), (1, 5, 3), (0, 4, 1), (0, 3, 3), (3, 0, 0)])
def test_learned_router_against_its_formula(shared, routed, top_k):
    widths = {"routed": routed, "shared": shared if shared > 1 else 0, "group": 2 if shared and routed else 0}
    logits = {
        f"{name}_logits": 2 * jax.random.normal(key, (2, 7, width)) if width else None
        for key, (name, width) in zip(KEYS, widths.items(), strict=False)
    }
    route = jax.jit(lambda logits: head_routing.route_heads(**logits, shared_heads=shared, top_k=top_k))(logits)
    parts, weights = [], softmax(np.asarray(logits["group_logits"])) * 2 if widths["group"] else np.ones((2, 7, 2))
    if shared:
        gate = shared * softmax(np.asarray(logits["shared_logits"])) if shared > 1 else np.ones((2, 7, 1))
        parts.append(weights[..., :1] * gate)
    if routed:
        p = softmax(np.asarray(logits["routed_logits"]))
        chosen = np.argsort(-p, axis=-1, kind="stable")[..., :top_k]
        m = np.zeros(p.shape, bool)
        np.put_along_axis(m, chosen, True, axis=-1)
        np.testing.assert_array_equal(route.selected, m)
        np.testing.assert_allclose(route.scores, p, atol=1e-6)
        parts.append(weights[..., 1:] * top_k * p * m / (p * m).sum(-1, keepdims=True))
    np.testing.assert_allclose(route.gates, np.concatenate(parts, -1), atol=1e-5)
    assert route.gates.dtype == jnp.float32


def test_ties_go_to_the_lower_head_in_bfloat16_too():
    logits = jnp.zeros((1, 1, 5), jnp.bfloat16)
    selected = head_routing.route_heads(logits, None, None, shared_heads=0, top_k=2).selected
    np.testing.assert_array_equal(selected[0, 0], [True, True, False, False, False])


def test_one_selected_head_gives_the_router_no_gradient():
    logits = jax.random.normal(KEYS[0], (1, 6, 4))
    gates = lambda logits, k: head_routing.route_heads(logits, None, None, shared_heads=0, top_k=k).gates  # noqa: E731
    cotangent = jax.random.normal(KEYS[1], (1, 6, 4))
    gradient = jax.jit(jax.grad(lambda logits, k: jnp.sum(gates(logits, k) * cotangent)), static_argnums=1)
    np.testing.assert_allclose(gradient(logits, 1), 0.0, atol=1e-6)
    assert np.abs(gradient(logits, 2)).max() > 1e-2


@pytest.mark.parametrize("ste", ["none", "all_routed"])
def test_router_by_norm(ste):
    q = jax.random.normal(KEYS[2], (2, 5, 8, 4))

    def gates(q):
        return head_routing.route_by_norm(q, shared_heads=4, top_k=2, ste=ste)

    route = jax.jit(gates)(q)
    length = np.linalg.norm(np.asarray(q)[:, :, 4:], axis=-1)
    p = softmax(length / length.std(-1, ddof=1, keepdims=True))
    np.testing.assert_allclose(route.scores, p, atol=1e-5)
    assert set(np.unique(route.gates)) == {0.0, 1.0} and np.all(route.gates.sum(-1) == 6)
    np.testing.assert_array_equal(route.gates[..., 4:] == 1, route.selected)
    cotangent = jax.random.normal(KEYS[3], (2, 5, 8))
    have = jax.jit(jax.grad(lambda q: jnp.sum(gates(q).gates * cotangent)))(q)
    want = jax.grad(lambda q: jnp.sum(head_routing.route_by_norm(q, shared_heads=4, top_k=2).scores * cotangent[..., 4:]))(q)
    np.testing.assert_allclose(have, want if ste == "all_routed" else 0.0, atol=1e-6)


def test_equal_lengths_and_zero_queries_are_finite():
    for q in (jnp.ones((1, 3, 6, 4)), jnp.zeros((1, 3, 6, 4)), jnp.ones((1, 3, 3, 4))):
        shared = q.shape[2] - (1 if q.shape[2] == 3 else 4)
        loss = lambda q: head_routing.route_by_norm(q, shared_heads=shared, top_k=1, ste="all_routed").gates[..., -1].sum()  # noqa: B023, E731
        value, gradient = jax.value_and_grad(loss)(q)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_balance_loss_and_its_gradient():
    scores = jax.nn.softmax(jax.random.normal(KEYS[0], (2, 6, 4)))
    selected = head_routing.select_heads(scores, 2)
    mask = jnp.arange(6)[None] < jnp.array([[6], [2]])
    p, m = (np.asarray(x, np.float64)[np.asarray(mask)] for x in (scores, selected))
    for form, factor in (("code", 4), ("paper", 1)):
        have = head_routing.balance_loss(scores, selected, mask=mask, form=form)
        np.testing.assert_allclose(have, factor * np.sum(p.mean(0) * m.mean(0)), rtol=1e-5)
    gradient = jax.grad(lambda scores: head_routing.balance_loss(scores, selected, mask=mask))(scores)
    np.testing.assert_allclose(gradient, np.where(mask[..., None], 4 * m.mean(0) / 8, 0.0), atol=1e-6)
    even = jnp.tile(jnp.eye(4), (1, 3, 1))
    assert head_routing.balance_loss(jnp.full((1, 12, 4), 0.25), even > 0) == pytest.approx(1.0)


def test_means_over_a_mapped_axis_are_global():
    scores = jax.nn.softmax(jax.random.normal(KEYS[1], (4, 6, 3)))
    selected = head_routing.select_heads(scores, 1)
    want = head_routing.balance_loss(scores, selected)
    split = lambda x: x.reshape(2, 2, *x.shape[1:])  # noqa: E731
    have = jax.vmap(lambda p, m: head_routing.balance_loss(p, m, axis_name="i"), axis_name="i")(split(scores), split(selected))
    np.testing.assert_allclose(have, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((4, 5, 1), "shared_heads = 5"),
        ((4, 2, 3), "top_k = 3: there are 2 routed heads"),
        ((4, 2, 0), "top_k = 0"),
        ((4, 4, 1), "all 4 heads are shared"),
    ],
)
def test_numbers_of_heads_that_do_not_fit(counts, message):
    with pytest.raises(ConfigError, match=message):
        head_routing.check_heads(*counts)


def test_calls_that_do_not_fit():
    x = jnp.zeros((1, 2, 4))
    with pytest.raises(ConfigError, match="shared_logits has 0 columns: these heads need 2"):
        head_routing.route_heads(x, None, None, shared_heads=2, top_k=1)
    with pytest.raises(ConfigError, match="nothing to route"):
        head_routing.route_heads(None, None, None, shared_heads=1, top_k=0)
    with pytest.raises(ConfigError, match="ste = 'soft'"):
        head_routing.route_by_norm(jnp.zeros((1, 2, 4, 2)), shared_heads=2, top_k=1, ste="soft")
    with pytest.raises(ConfigError, match="form = 'sum'"):
        head_routing.balance_loss(x, x > 0, form="sum")

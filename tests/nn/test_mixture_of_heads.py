"""Mixture-of-head attention as a mixer, and over maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab import nn
from attnlab.errors import ConfigError
from attnlab.nn.mixture_of_heads import MixtureOfHeads
from attnlab.nn.mixture_of_heads_map import MixtureOfHeadsMapAttention, relative_coordinates

LENGTH, DIM = 29, 16
MIXERS = {
    "learned": MixtureOfHeads(dim=DIM, num_heads=4, num_kv_heads=2, shared_heads=1, top_k=2, qk_norm="rmsnorm"),
    "gathered": MixtureOfHeads(dim=DIM, num_heads=4, shared_heads=2, top_k=1, implementation="gathered", window=9),
    "norm": MixtureOfHeads(dim=DIM, num_heads=8, num_kv_heads=4, router="norm", proj_bias=True),
    "straight through": MixtureOfHeads(dim=DIM, num_heads=4, router="norm", ste="all_routed", alibi=True, rope=False),
}


def start(mixer, length=LENGTH, seed=0):
    x = jax.random.normal(jax.random.key(seed), (2, length, DIM))
    variables = {"params": meta.unbox(mixer.init(jax.random.key(seed + 1), x))["params"]}
    return x, jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 else leaf + 0.1, variables)


@pytest.mark.parametrize("name", MIXERS)
def test_full_pass_equals_chunks_and_token_by_token(name):
    mixer = MIXERS[name]
    x, variables = start(mixer)
    mask = jnp.arange(LENGTH)[None] >= jnp.array([[0], [5]])
    call = jax.jit(lambda x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))
    want, none = call(x, mask, None)
    assert none is None
    cache, parts = mixer.init_cache(2, LENGTH + 3), []
    for chunk in zip(*(jnp.split(y, (19, *range(20, LENGTH)), axis=1) for y in (x, mask)), strict=True):
        part, cache = call(*chunk, cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=3e-5)


@pytest.mark.parametrize("name", ["learned"])
def test_causal_and_apart_by_gradients(name):
    mixer = MIXERS[name]
    x, variables = start(mixer, length=12)
    segments = jnp.where(jnp.arange(12) < 4, 1, 2)[None].repeat(2, axis=0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(mixer.apply(variables, x, segment_ids=segments)[0][:, 8])))(x)
    assert np.any(gradient[:, 8]) and np.any(gradient[:, 5])
    assert not np.any(gradient[:, 9:]) and not np.any(gradient[:, :4])


@pytest.mark.parametrize("implementation", ["all_heads", "gathered"])
def test_all_heads_routed_without_weights_is_plain_attention(implementation):
    plain = nn.SoftmaxAttention(dim=DIM, num_heads=4, num_kv_heads=2)
    x, variables = start(plain)
    mixed = MixtureOfHeads(
        dim=DIM, num_heads=4, num_kv_heads=2, shared_heads=1, top_k=3, router="norm", implementation=implementation
    )
    want, have = (jax.jit(lambda v, m=m: m.apply(v, x)[0])(variables) for m in (plain, mixed))  # the same parameters
    np.testing.assert_allclose(have, want, atol=2e-6)
    again = MixtureOfHeads(dim=DIM, num_heads=4, num_kv_heads=2, shared_heads=4, top_k=0, router="norm")
    np.testing.assert_allclose(again.apply(variables, x)[0], want, atol=2e-6)


def test_both_forms_have_the_same_gradients():
    x, variables = start(MIXERS["learned"])

    def gradient(form):
        mixer = MIXERS["learned"].clone(implementation=form)
        return jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(mixer.apply(v, x)[0]))))(variables)

    have, want = gradient("gathered"), gradient("all_heads")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), have, want)
    router = want["params"]["router"]
    assert set(router) == {"routed", "group"} and all(np.any(leaf) for leaf in router.values())


def test_balance_loss_is_sown_without_padding():
    mixer = MIXERS["learned"].clone(balance_coefficient=0.5, balance_layers=2)
    x, variables = start(mixer, length=12)
    mask = jnp.arange(12)[None] < jnp.array([[12], [7]])
    sown = lambda x, **options: mixer.apply(variables, x, mutable=["losses", "metrics"], **options)[1]  # noqa: E731
    with_mask = sown(x, mask=mask)
    np.testing.assert_allclose(with_mask["losses"]["balance"][0], 0.25 * with_mask["metrics"]["balance"][0], rtol=1e-6)
    same = sown(jnp.where(mask[..., None], x, 7.0), mask=mask)
    np.testing.assert_allclose(with_mask["losses"]["balance"][0], same["losses"]["balance"][0], rtol=1e-6)
    by_segment = sown(x, segment_ids=mask.astype(jnp.int32))
    np.testing.assert_allclose(with_mask["losses"]["balance"][0], by_segment["losses"]["balance"][0], rtol=1e-6)
    assert 0 <= with_mask["metrics"]["head_load_min"][0] <= with_mask["metrics"]["head_load_max"][0] <= 1
    all_shared = MixtureOfHeads(dim=DIM, num_heads=4, shared_heads=4, top_k=0)
    assert "losses" not in all_shared.apply({"params": start(all_shared)[1]["params"]}, x, mutable=["losses"])[1]


def test_gates_and_maps_are_sown_on_request():
    mixer = MIXERS["learned"].clone(capture_attention=True)
    x, variables = start(mixer, length=10)
    (y, _), sown = mixer.apply(variables, x, mutable=["intermediates"])
    seen = {name: value[0] for name, value in sown["intermediates"].items()}
    assert seen["attention"].shape == (2, 4, 10, 10) and seen["gates"].shape == (2, 10, 4)
    assert seen["head_selected"].shape == seen["head_scores"].shape == (2, 10, 3)
    np.testing.assert_array_equal(seen["head_selected"].sum(-1), 2)
    np.testing.assert_allclose(jnp.einsum("btnh,nhd->btd", seen["attended"], variables["params"]["out"]["kernel"]), y, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_heads": 5}, "shared_heads = 5: there are 4 heads"),
        ({"shared_heads": 2, "top_k": 3}, "top_k = 3: there are 2 routed heads"),
        ({"router": "norms"}, "router = 'norms': unknown, did you mean 'norm'"),
        ({"ste": "all_routed"}, "the learned router has gradients of its own"),
        ({"router_init": "he"}, "router_init = 'he'"),
        ({"num_heads": 3}, "num_heads = 3: does not divide dim = 16"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        MixtureOfHeads(**{"dim": 16, "num_heads": 4} | fields).init(jax.random.key(0), jnp.zeros((1, 4, 16)))


def test_map_attention_equals_its_formula():
    module = MixtureOfHeadsMapAttention(DIM, 4, 1, 2, balance_coefficient=1.0)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, DIM))
    params = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 else leaf, meta.unbox(module.init(jax.random.key(1), x))["params"])
    have = jax.jit(lambda params: module.apply({"params": params}, x))(params)
    tokens = x.reshape(2, 12, DIM)
    layers = (params[name] for name in ("query", "key", "value"))
    q, k, v = (jnp.einsum("btd,dnh->btnh", tokens, layer["kernel"]) + layer["bias"] for layer in layers)
    q, k = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
    scale = jax.nn.softplus(params["temperature"]) * np.log(12)
    np.testing.assert_allclose(jax.nn.softplus(params["temperature"]), 1 / 0.24, rtol=1e-5)
    places = np.stack(np.divmod(np.arange(12), 4), -1)
    offset = (places[:, None] - places[None]) / np.array([2, 3]) * 8
    spaced = np.sign(offset) * np.log2(np.abs(offset) + 1) / 3
    layers = params["position_bias"]
    hidden = jax.nn.relu(spaced @ layers["fc1"]["kernel"] + layers["fc1"]["bias"])
    bias = jnp.moveaxis(hidden @ layers["fc2"]["kernel"] + layers["fc2"]["bias"], -1, 0)
    scores = jnp.einsum("btnh,bsnh->bnts", (q + params["query_embedding"]) * scale[:, None], k) + bias
    heads = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
    _, sown = module.clone(capture_attention=True).apply({"params": params}, x, mutable=["intermediates"])
    gates = sown["intermediates"]["gates"][0]
    want = jnp.einsum("btnh,nhd->btd", heads * gates[..., None], params["out"]["kernel"]) + params["out"]["bias"]
    np.testing.assert_allclose(have, want.reshape(x.shape), atol=2e-4)


def test_relative_coordinates_are_listed_once():
    table, index = relative_coordinates((3, 5))
    assert table.shape == (5 * 9, 2) and index.shape == (15, 15)
    np.testing.assert_allclose(table[index[0, 0]], 0.0)
    np.testing.assert_allclose(table[index[14, 0]], np.log2(9) / 3, rtol=1e-6)  # a whole side away on both axes
    np.testing.assert_array_equal(table[index], -table[index.T])
    assert relative_coordinates((1, 1))[0].shape == (1, 2)


def test_maps_that_do_not_fit():
    with pytest.raises(ConfigError, match="needs to be a map"):
        MixtureOfHeadsMapAttention(DIM, 4, 1, 2).init(jax.random.key(0), jnp.zeros((1, 4, DIM)))

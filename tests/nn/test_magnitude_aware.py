"""Magnitude-aware attention as a mixer, and over maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models.lm import LM
from attnlab.nn.magnitude_aware import MagnitudeAwareAttention, MagnitudeAwareMapAttention

LENGTH, DIM = 33, 16
MIXERS = {
    "official": MagnitudeAwareAttention(dim=DIM, num_heads=2),
    "paper": MagnitudeAwareAttention(dim=DIM, num_heads=4, head_dim=6, variant="paper", eps=0.0, gate=False, proj_bias=False),
    "divided": MagnitudeAwareAttention(dim=DIM, num_heads=2, variant="divided", rope=False, chunk_size=16),
}


def filled(module, *inputs, scale=0.3):
    """Parameters larger than at initialisation, so that every part tells."""
    rng = np.random.default_rng(1)
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]
    return {"params": jax.tree.map(lambda leaf: (scale * rng.standard_normal(leaf.shape) + 0.1).astype(np.float32), shapes)}


def start(module, seed=0, length=LENGTH, batch=2):
    x = np.random.default_rng(seed).standard_normal((batch, length, DIM)).astype(np.float32)
    return x, filled(module, x)


@pytest.mark.parametrize("name", MIXERS)
def test_full_pass_equals_any_chunking(name):
    mixer = MIXERS[name]
    x, variables = start(mixer)
    mask = np.arange(LENGTH)[None] >= np.array([[0], [5]])  # row 1 is padded on the left
    step = jax.jit(lambda x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))
    want, none = jax.jit(lambda x: mixer.apply(variables, x, mask=mask))(x)
    assert none is None
    for splits in ((1, 17), range(1, LENGTH)):
        cache, parts = mixer.init_cache(2, 10**9), []
        for chunk in zip(np.split(x, splits, axis=1), np.split(mask, splits, axis=1), strict=True):
            part, cache = step(*chunk, cache)
            parts.append(part)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=3e-5 + 1e-6 * np.abs(want).max())
        assert int(cache.index) == LENGTH


@pytest.mark.parametrize(("name", "causal"), [("official", True), ("official", False), ("paper", False), ("divided", True)])
def test_packing_order_and_padding(name, causal):
    mixer = MIXERS[name].clone(causal=causal)
    x, variables = start(mixer, length=30)
    at = np.arange(30)
    segments, positions = (np.tile(row, (2, 1)) for row in (np.where(at < 11, 1, 2), np.where(at < 11, at, at - 11)))
    mask = np.ones((2, 30), bool)
    mask[0, 7] = False

    @jax.jit
    def run(x):
        packed, _ = mixer.apply(variables, x, segment_ids=segments, positions=positions)
        gradient = jax.grad(lambda x: jnp.sum(mixer.apply(variables, x, mask=mask)[0][:, 12]))(x)
        return packed, mixer.apply(variables, x[:, :11])[0], mixer.apply(variables, x[:, 11:])[0], gradient

    packed, first, second, gradient = run(x)
    np.testing.assert_allclose(packed, np.concatenate([first, second], axis=1), rtol=5e-5, atol=3e-5)
    assert np.any(gradient[:, 12]) and np.any(gradient[:, 13:]) == (not causal)
    assert not np.any(gradient[0, 7]) and np.any(gradient[1, 7])


def test_weights_are_sown_on_request():
    for name, mixer in MIXERS.items():
        mixer = mixer.clone(capture_attention=True)
        x, variables = start(mixer, length=12)
        (y, _), sown = jax.jit(lambda x, m=mixer, v=variables: m.apply(v, x, mutable=["intermediates"]))(x)
        weights, attended = (sown["intermediates"][key][0] for key in ("attention", "attended"))
        assert weights.shape == (2, mixer.num_heads, 12, 12) and not np.any(np.triu(weights, 1))
        if name == "divided":
            np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-4)
        gate = 1.0
        if mixer.gate:
            gate = np.einsum("btd,dnh->btnh", x, variables["params"]["gate"]["kernel"]) + variables["params"]["gate"]["bias"]
        out = variables["params"]["out"]
        rebuilt = np.einsum("btnh,nhd->btd", attended * gate, out["kernel"]) + out.get("bias", 0.0)
        np.testing.assert_allclose(rebuilt, y, atol=2e-4)


def test_a_sequence_on_a_grid_is_the_map_without_its_convolution():
    mixer = MagnitudeAwareAttention(dim=DIM, num_heads=2, causal=False, grid=(3, 4))
    x, variables = start(mixer, length=12)
    beside = {"kernel": np.zeros((5, 5, 1, DIM), np.float32), "bias": np.zeros(DIM, np.float32)}
    over_map = MagnitudeAwareMapAttention(dim=DIM, num_heads=2)

    @jax.jit
    def run(variables, x):
        got = over_map.apply({"params": variables["params"] | {"lepe": beside}}, x.reshape(2, 3, 4, DIM))
        return got.reshape(x.shape), mixer.apply(variables, x)[0]

    got, want = run(variables, x)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_padded_maps(kind):
    """A map with padded columns gives what the map without them gives, and the map of a batch row alone."""
    module = MagnitudeAwareMapAttention(dim=DIM, num_heads=2, kind=kind, capture_attention=True)
    x = np.random.default_rng(0).standard_normal((2, 3, 6, DIM)).astype(np.float32)
    variables = filled(module, x)
    mask = np.broadcast_to(np.arange(6) < 4, (2, 3, 6)) & (np.arange(2) == 0)[:, None, None]

    @jax.jit
    def run(variables, x):
        return module.apply(variables, x, mask=mask, mutable=["intermediates"]), module.apply(variables, x[:1, :, :4])

    (y, sown), alone = run(variables, x)
    np.testing.assert_allclose(y[0, :, :4], alone[0], atol=3e-5)
    assert np.all(np.isfinite(y))
    weights = sown["intermediates"]["attention"][0]
    assert weights.shape == (2, 2, 18, 18) and not np.any(weights[1])
    assert jax.eval_shape(module.apply, variables, x[:, :1, :5]).shape == (2, 1, 5, DIM)  # any resolution


def test_it_serves_in_the_house_model():
    tokens = np.random.default_rng(0).integers(0, 31, (2, 12))
    model = LM(vocab_size=31, num_layers=2, dim=16, num_heads=2, mixer="magnitude_aware")
    variables = filled(model, tokens)

    @jax.jit
    def run(variables, tokens):
        first, cache = model.apply(variables, tokens[:, :7], cache=model.init_cache(2, 12))
        second, _ = model.apply(variables, tokens[:, 7:], cache=cache)
        return model.apply(variables, tokens)[0], jnp.concatenate([first, second], axis=1)

    full, chunked = run(variables, tokens)
    np.testing.assert_allclose(chunked, full, atol=3e-5)


def test_fields_and_caches_that_do_not_fit():
    x = np.zeros((2, 12, DIM), np.float32)
    mixer = MIXERS["official"]
    variables = filled(mixer, x)

    def apply(cache, **arguments):
        jax.eval_shape(lambda x: mixer.apply(variables, x, cache=cache, **arguments), x)

    for fields, message in (
        ({"num_heads": 3}, "num_heads = 3: does not divide dim = 16"),
        ({"variant": "paper form"}, "did you mean 'paper'"),
        ({"num_heads": 16}, "even head width"),
        ({"grid": (3, 4)}, "needs causal=False"),
        ({"grid": (3, 5), "causal": False}, "a sequence of 15 tokens"),
        ({"chunk_size": 48}, "not a power of two"),
    ):
        with pytest.raises(ConfigError, match=message):
            filled(mixer.clone(**fields), x)
    with pytest.raises(ConfigError, match="cache of batch 3 used with batch 2"):
        apply(mixer.init_cache(3, 9))
    with pytest.raises(ConfigError, match="segment_ids with a cache"):
        apply(mixer.init_cache(2, 9), segment_ids=np.ones((2, 12), np.int32))
    with pytest.raises(ConfigError, match="state is bfloat16"):
        apply(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mixer.init_cache(2, 9)))
    with pytest.raises(ConfigError, match="causal = False"):
        mixer.clone(causal=False).init_cache(2, 9)
    over_map = MagnitudeAwareMapAttention(dim=DIM, num_heads=2)
    for fields, message in (
        ({"kind": "sofmax"}, "did you mean 'softmax'"),
        ({"num_heads": 5}, "num_heads = 5: does not divide"),
        ({"num_heads": 8}, "multiple of 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            filled(over_map.clone(**fields), x.reshape(2, 3, 4, DIM))

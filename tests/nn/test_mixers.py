"""The mixer contract, for both dense mixers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.core import meta

from attnlab import nn, ops
from attnlab.errors import ConfigError

LENGTH, DIM = 101, 16
MIXERS = {
    "softmax": nn.SoftmaxAttention(dim=DIM, num_heads=4, num_kv_heads=2, qk_norm="rmsnorm"),
    "softmax window": nn.SoftmaxAttention(dim=DIM, num_heads=2, window=9, alibi=True, rope=False),
    "sigmoid": nn.SigmoidAttention(dim=DIM, num_heads=4, train_length=100, qk_norm="layernorm", window=(70, 0)),
    "sigmoid rows": nn.SigmoidAttention(
        dim=DIM, num_heads=4, num_kv_heads=1, bias=0.0, alibi=True, temperature=0.2, proj_bias=True,
        activation="sqrt_seq_len_normalized_sigmoid",
    ),
    "sigmoid softmax": nn.SigmoidAttention(dim=DIM, num_heads=2, activation="softmax", temperature=0.4, alibi=True),
}  # fmt: skip


def start(mixer, seed=0, length=LENGTH, batch=2):
    x = jax.random.normal(jax.random.key(seed), (batch, length, DIM))
    variables = meta.unbox(mixer.init(jax.random.key(seed + 1), x))
    # larger kernels than at initialisation, so that attention is far from uniform
    return x, jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 else leaf + 0.1, variables)


@pytest.mark.parametrize("name", MIXERS)
def test_full_pass_equals_any_chunking(name):
    mixer = MIXERS[name]
    x, variables = start(mixer)
    mask = jnp.arange(LENGTH)[None] >= jnp.array([[0], [5]])  # row 1 is padded on the left
    step = jax.jit(lambda x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))
    want, none = mixer.apply(variables, x, mask=mask)
    assert none is None
    for splits in ((1, 63, 64, 100), (100,)):
        cache = mixer.init_cache(2, LENGTH + 3)
        parts = []
        for chunk in zip(jnp.split(x, splits, axis=1), jnp.split(mask, splits, axis=1), strict=True):
            part, cache = step(*chunk, cache)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=3e-5)
        assert int(cache.index) == LENGTH

    def one(cache, token):
        y, cache = mixer.apply(variables, token[0][:, None], mask=token[1][:, None], cache=cache)
        return cache, y[:, 0]

    _, by_token = jax.lax.scan(one, mixer.init_cache(2, LENGTH), (x.swapaxes(0, 1), mask.T))
    np.testing.assert_allclose(by_token.swapaxes(0, 1), want, atol=3e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_do_not_see_each_other(name):
    mixer = MIXERS[name]
    x, variables = start(mixer, length=40)
    segments = jnp.where(jnp.arange(40) < 15, 1, 2)[None].repeat(2, axis=0)
    positions = jnp.where(jnp.arange(40) < 15, jnp.arange(40), jnp.arange(40) - 15)[None].repeat(2, axis=0)
    packed, _ = mixer.apply(variables, x, segment_ids=segments, positions=positions)
    for part in (slice(0, 15), slice(15, 40)):
        np.testing.assert_allclose(packed[:, part], mixer.apply(variables, x[:, part])[0], atol=2e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_order_and_padding_by_gradients(name):
    mixer = MIXERS[name]
    x, variables = start(mixer, length=24)
    mask = jnp.ones((2, 24), bool).at[0, 7].set(False)
    gradient = jax.grad(lambda x: jnp.sum(mixer.apply(variables, x, mask=mask)[0][:, 12]))(x)
    assert np.any(gradient[:, 12]) and not np.any(gradient[:, 13:])
    assert not np.any(gradient[0, 7]) and np.any(gradient[0, 6])
    if "window" not in name:
        assert np.any(gradient[1, 0])


@pytest.mark.parametrize("name", MIXERS)
def test_maps_are_sown_on_request(name):
    mixer = MIXERS[name].clone(capture_attention=True)
    x, variables = start(mixer, length=12)
    (y, _), sown = mixer.apply(variables, x, mutable=["intermediates"])
    weights, attended = (sown["intermediates"][key][0] for key in ("attention", "attended"))
    assert weights.shape == (2, mixer.num_heads, 12, 12) and weights.dtype == jnp.float32
    assert not np.any(np.triu(weights, 1))
    if name in ("softmax", "softmax window", "sigmoid softmax"):
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    out = variables["params"]["out"]
    rebuilt = jnp.einsum("btnh,nhd->btd", attended, out["kernel"]) + out.get("bias", 0.0)
    np.testing.assert_allclose(rebuilt, y, atol=1e-5)
    assert set(mixer.apply(variables, x, mutable=["metrics"])[1]) == set()


def test_sigmoid_layer_against_its_formula():
    """A second look at the order of steps: norm, rotation, scores, ALiBi, mask, temperature, bias."""
    mixer = MIXERS["sigmoid"].clone(capture_attention=True, temperature=0.3, alibi=True, window=None)
    x, variables = start(mixer, length=20)
    params = variables["params"]
    _, sown = mixer.apply(variables, x, mutable=["intermediates"])

    def side(name):
        y = jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"])
        norm = params[f"{name}_norm"]
        y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
        return ops.rotary(y, jnp.arange(20)[None], interleaved=True)

    scores = jnp.einsum("btnh,bsnh->bnts", side("query"), side("key")) / 2.0
    distance = jnp.arange(20)[None, :] - jnp.arange(20)[:, None]
    scores = (scores + ops.alibi_slopes(4)[:, None, None] * distance) * np.exp(0.3) - np.log(100.0)
    want = jnp.where(distance <= 0, jax.nn.sigmoid(scores), 0.0)
    np.testing.assert_allclose(sown["intermediates"]["attention"][0], want, atol=2e-5)


def test_dropout_needs_a_key_and_is_off_when_deterministic():
    mixer = nn.SoftmaxAttention(dim=DIM, num_heads=2, dropout=0.5)
    x, variables = start(mixer, length=12)
    plain, _ = mixer.apply(variables, x)
    first, second = (
        mixer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})[0] for seed in (1, 2)
    )
    assert not np.allclose(first, plain) and not np.allclose(first, second)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3: does not divide dim = 16"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads = 3: does not divide num_heads = 4"),
        ({"num_heads": 4, "head_dim": 3}, "head_dim = 3"),
        ({"num_heads": 2, "qk_norm": "rms"}, "norm = 'rms': unknown, did you mean 'rmsnorm'"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    for cls in (nn.SoftmaxAttention, nn.SigmoidAttention):
        with pytest.raises(ConfigError, match=message):
            cls(dim=16, **fields).init(jax.random.key(0), jnp.zeros((1, 4, 16)))


def test_sigmoid_fields_that_do_not_fit():
    x = jnp.zeros((1, 4, 16))
    with pytest.raises(ConfigError, match="Set train_length"):
        nn.SigmoidAttention(dim=16, num_heads=2).init(jax.random.key(0), x)
    with pytest.raises(ConfigError, match="'sigmod': unknown, did you mean 'sigmoid'"):
        nn.SigmoidAttention(dim=16, num_heads=2, bias=0.0, activation="sigmod").init(jax.random.key(0), x)
    assert nn.SigmoidAttention(dim=16, num_heads=2, train_length=64).constant_bias() == pytest.approx(-np.log(64))


def test_caches_that_do_not_fit():
    mixer = MIXERS["softmax"]
    x, variables = start(mixer, length=12)
    with pytest.raises(ConfigError, match="batch 3"):
        mixer.apply(variables, x, cache=mixer.init_cache(3, 20))
    with pytest.raises(ConfigError, match=r"longer than the cache: 0 \+ 12 tokens, 11 slots"):
        mixer.apply(variables, x, cache=mixer.init_cache(2, 11))
    _, cache = mixer.apply(variables, x, cache=mixer.init_cache(2, 20))
    with pytest.raises(ConfigError, match=r"longer than the cache: 12 \+ 12 tokens, 20 slots"):
        mixer.apply(variables, x, cache=cache)
    full, _ = jax.jit(lambda cache: mixer.apply(variables, x, cache=cache))(cache)
    assert np.all(np.isnan(full))  # traced: loud instead of wrong
    with pytest.raises(ConfigError, match="type bfloat16"):
        mixer.apply(variables, x, cache=mixer.clone(dtype=jnp.bfloat16).init_cache(2, 20))
    with pytest.raises(ConfigError, match="segment_ids with a cache"):
        mixer.apply(variables, x, cache=mixer.init_cache(2, 20), segment_ids=jnp.ones((2, 12), jnp.int32))
    with pytest.raises(ConfigError, match="causal = False"):
        mixer.clone(causal=False).init_cache(2, 20)


def test_parameters_carry_logical_names():
    x = jnp.zeros((1, 4, DIM))
    params = MIXERS["sigmoid rows"].init(jax.random.key(0), x)["params"]
    assert params["query"]["kernel"].names == ("embed", "heads", "head_dim")
    assert params["key"]["kernel"].names == params["value"]["kernel"].names == ("embed", "kv_heads", "head_dim")
    assert params["out"]["kernel"].names == ("heads", "head_dim", "embed")
    assert all(isinstance(leaf, linen.LogicallyPartitioned) for leaf in _boxes(params))


def _boxes(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))

"""The S2 and SF mixers: grouped in training, full attention otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab import nn, registry
from attnlab.errors import ConfigError
from attnlab.models.lm import LM
from attnlab.nn.shifted import S2Attention, SFAttention

LENGTH, DIM = 24, 16
MIXERS = {
    "s2": S2Attention(dim=DIM, num_heads=4, num_kv_heads=2, group_size=8),
    "s2 roll": S2Attention(dim=DIM, num_heads=4, group_size=6, variant="roll", rope_scaling=2.0),
    "sf": SFAttention(dim=DIM, num_heads=4, num_kv_heads=1, group_size=4, rope_scaling=4.0),
    "sf by ratio": SFAttention(dim=DIM, num_heads=4, reassembly="sequence"),
}


@functools.lru_cache
def start(name, length=LENGTH):
    mixer = MIXERS[name]
    x = jax.random.normal(jax.random.key(0), (2, length, DIM))
    variables = meta.unbox(jax.jit(mixer.init)(jax.random.key(1), x))
    return x, jax.tree.map(lambda leaf: 8 * leaf, variables)  # attention far from uniform


def apply(mixer, deterministic):
    return jax.jit(lambda variables, x, **kwargs: mixer.apply(variables, x, deterministic=deterministic, **kwargs)[0])


@pytest.mark.parametrize("name", MIXERS)
def test_training_attends_inside_groups(name):
    mixer = MIXERS[name].clone(capture_attention=True)
    x, variables = start(name)
    run = jax.jit(lambda variables, x: mixer.apply(variables, x, deterministic=False, mutable=["intermediates"]))
    (y, cache), sown = run(variables, x)
    weights, attended = (sown["intermediates"][key][0] for key in ("attention", "attended"))
    seen = mixer.pattern(LENGTH).visible(LENGTH, 4)
    assert cache is None and mixer.pattern(LENGTH).group_size in (4, 6, 8)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(seen, weights.shape))
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    params = variables["params"]
    v = jnp.einsum("btd,dkh->btkh", x, params["value"]["kernel"])
    want = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 4 // v.shape[2], axis=2))
    np.testing.assert_allclose(attended, want, atol=3e-5)  # by groups, against by mask
    np.testing.assert_allclose(y, jnp.einsum("btnh,nhd->btd", attended, params["out"]["kernel"]), atol=2e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_evaluation_and_cache_are_full_attention(name):
    mixer = MIXERS[name]
    x, variables = start(name, length=23)  # which groups need not divide
    fields = {key: getattr(mixer, key) for key in ("dim", "num_heads", "num_kv_heads", "rope_scaling")}
    mask = jnp.arange(23)[None] >= jnp.array([[0], [5]])
    want = apply(nn.SoftmaxAttention(**fields), True)(variables, x, mask=mask)
    np.testing.assert_allclose(apply(mixer, True)(variables, x, mask=mask), want, atol=1e-6)
    step = jax.jit(lambda x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))
    cache, parts = mixer.init_cache(2, 30), []
    for chunk in zip(jnp.split(x, (1, 2, 12), axis=1), jnp.split(mask, (1, 2, 12), axis=1), strict=True):
        part, cache = step(*chunk, cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=3e-5)


@pytest.mark.parametrize("name", ["s2", "sf"])
def test_groups_everywhere_can_be_decoded(name):
    mixer = MIXERS[name].clone(train_only=False)
    x, variables = start(name)
    mask = jnp.arange(LENGTH)[None] >= jnp.array([[0], [2]])
    want = apply(mixer, True)(variables, x, mask=mask)
    np.testing.assert_allclose(want, apply(MIXERS[name], False)(variables, x, mask=mask), atol=1e-6)
    assert not np.allclose(want, apply(MIXERS[name], True)(variables, x, mask=mask), atol=1e-2)
    step = jax.jit(lambda x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))
    for splits in ((5, 6, 17), tuple(range(1, LENGTH))):
        cache, parts = mixer.init_cache(2, 30), []
        for chunk in zip(jnp.split(x, splits, axis=1), jnp.split(mask, splits, axis=1), strict=True):
            part, cache = step(*chunk, cache)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=3e-5)
    looking = mixer.clone(capture_attention=True)
    _, sown = jax.jit(lambda cache: looking.apply(variables, x, cache=cache, mutable=["intermediates"]))(mixer.init_cache(2, 30))
    np.testing.assert_array_equal(sown["intermediates"]["attention"][0][0, ..., :LENGTH] > 0, mixer.pattern(24).visible(24, 4))


@pytest.mark.parametrize("name", MIXERS)
def test_order_padding_and_segments_by_gradients(name):
    mixer = MIXERS[name]
    x, variables = start(name)
    mask = jnp.ones((2, LENGTH), bool).at[0, 9].set(False)
    segments = jnp.where(jnp.arange(LENGTH) < 13, 1, 2)[None].repeat(2, axis=0)

    everything = {"mask": jnp.ones((2, LENGTH), bool), "segment_ids": jnp.ones((2, LENGTH), jnp.int32)}

    @jax.jit
    def gradient(at, mask, segment_ids):
        def outcome(x):
            return mixer.apply(variables, x, deterministic=False, mask=mask, segment_ids=segment_ids)[0][:, at].sum()

        return jax.grad(outcome)(x)

    seen = np.abs(gradient(11, **everything | {"mask": mask})).sum(-1) > 0
    want = np.array(mixer.pattern(LENGTH).visible(LENGTH, 4)[:, 11].any(0))
    np.testing.assert_array_equal(seen[1], want)
    assert not seen[0, 9] and seen[0, 11] and not seen[:, 12:].any()
    seen = np.abs(gradient(14, **everything | {"segment_ids": segments})).sum(-1) > 0
    assert not seen[:, :13].any() and seen[:, 14].all()
    leak = np.abs(gradient(0, **everything)).sum(-1) > 0
    assert leak[:, -3:].all() if name == "s2 roll" else not leak[:, 1:].any()


def test_language_model_trains_grouped_and_evaluates_full():
    tokens = np.random.default_rng(0).integers(0, 19, (2, LENGTH)).astype(np.int32)
    options = {"vocab_size": 19, "num_layers": 2, "dim": DIM, "num_heads": 4}
    model, full = LM(mixer="sf", **options), LM(mixer="softmax", **options)
    assert registry.get("mixer", "s2") is S2Attention and registry.get("mixer", "sf") is SFAttention
    variables = meta.unbox(jax.jit(full.init)(jax.random.key(0), tokens))
    run = jax.jit(lambda model, **kwargs: model.apply(variables, tokens, **kwargs)[0], static_argnames=("model", "deterministic"))
    np.testing.assert_allclose(run(model=Fixed(model)), run(model=Fixed(full)), atol=1e-5)
    assert not np.allclose(run(model=Fixed(model), deterministic=False), run(model=Fixed(full)), atol=1e-5)
    mixer = model.make_mixer("sf")
    seen = mixer.pattern(LENGTH).visible(LENGTH, 4).sum() / 4
    assert mixer.sequence_flops(LENGTH) / mixer.clone(causal=False).sequence_flops(LENGTH) == pytest.approx(seen / LENGTH**2)
    assert mixer.sequence_flops(LENGTH) < full.make_mixer("softmax").sequence_flops(LENGTH)


class Fixed:
    """A model as a static argument."""

    def __init__(self, model):
        self.model = model

    def apply(self, *args, **kwargs):
        return self.model.apply(*args, **kwargs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 7}, "group_size = 7: does not divide T = 24"),
        ({"group_ratio": 0.3}, "group_ratio = 0.3: does not cut T = 24 into equal groups"),
        ({"group_ratio": 2.0}, "group_ratio = 2.0"),
        ({"group_size": 8, "variant": "windws"}, "variant = 'windws'.*'windows'"),
        ({"group_size": 8, "causal": False}, "causal = False: does not fit groups, which are causal"),
        ({"group_size": 8, "window": 4}, "window = 4"),
        ({"group_size": 8, "alibi": True}, "alibi = True"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    x = jnp.zeros((1, LENGTH, DIM))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: S2Attention(dim=DIM, num_heads=4, **fields).init(jax.random.key(0), x, deterministic=False))


def test_caches_of_groups_that_need_the_whole_sequence():
    for fields, message in (
        ({}, "group_size = None"),
        ({"group_size": 8, "variant": "roll"}, "cannot be decoded"),
        ({"group_size": 8, "reassembly": "sequence", "returned_fraction": 0.5}, "cannot be decoded"),
    ):
        with pytest.raises(ConfigError, match=message):
            S2Attention(dim=DIM, num_heads=4, train_only=False, **fields).init_cache(1, 8)

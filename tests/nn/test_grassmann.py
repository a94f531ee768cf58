"""Grassmann mixing as a mixer, its blocks, its language model and its sentence-pair head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models.grassmann_lm import GrassmannLM
from attnlab.models.grassmann_nli import GrassmannNLI
from attnlab.models.lm import LM
from attnlab.nn.grassmann import GrassmannBlock, GrassmannMixing

LENGTH, DIM = 33, 16
MIXERS = {
    "plucker": GrassmannMixing(dim=DIM, reduced_dim=6, offsets=(1, 2, 4, 30)),
    "heads": GrassmannMixing(dim=DIM, reduced_dim=6, pair_heads=2, offsets=(1, 1, 3), norm="max", form="pairs", out_proj=True),
    "linear": GrassmannMixing(dim=DIM, reduced_dim=5, offsets=(1, 5), features="linear"),
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
    assert none is None and not np.any(want[1, :5])
    for splits in ((1, 17), range(1, LENGTH)):
        cache, parts = mixer.init_cache(2, 10**9), []
        for chunk in zip(np.split(x, splits, axis=1), np.split(mask, splits, axis=1), strict=True):
            part, cache = step(*chunk, cache)
            parts.append(part)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=3e-5)
        assert int(cache.index) == LENGTH and cache.z.shape == (2, max(mixer.offsets), mixer.reduced_dim)


@pytest.mark.parametrize(("name", "style"), [("plucker", "pre"), ("heads", "post"), ("linear", "pre")])
def test_blocks_by_gradients_and_packing(name, style):
    block = GrassmannBlock(mixer=MIXERS[name].clone(parent=None), norm_style=style, ff_dim=24)
    x, variables = start(block, length=24)
    mask = jnp.ones((2, 24), bool).at[0, 11].set(False)
    segments = jnp.where(jnp.arange(24) < 9, 1, jnp.where(jnp.arange(24) < 22, 2, 0))[None].repeat(2, axis=0)

    @jax.jit
    def run(x):
        gradient = jax.grad(lambda x: jnp.sum(block.apply(variables, x, mask=mask)[0][:, 12] ** 2))(x)
        packed, _ = block.apply(variables, x, segment_ids=segments)
        return gradient, packed, block.apply(variables, x[:, :9])[0], block.apply(variables, x[:, 9:22])[0]

    gradient, packed, first, second = run(x)
    assert np.any(gradient[:, 12]) and not np.any(gradient[:, 13:])
    assert not np.any(gradient[0, 11]) and np.any(gradient[1, 11])
    np.testing.assert_allclose(packed[:, :9], first, atol=2e-5)
    np.testing.assert_allclose(packed[:, 9:22], second, atol=2e-5)
    assert np.all(np.isfinite(packed))


def test_layer_against_its_formula():
    mixer = MIXERS["plucker"].clone(offsets=(1, 3), norm="max")
    x, variables = start(mixer, length=6)
    params = jax.tree.map(np.float64, variables["params"])
    h = np.float64(x[0])
    z = h @ params["reduce"]["kernel"] + params["reduce"]["bias"]
    i, j = np.triu_indices(6, 1)
    want = []
    for t in range(6):
        units = []
        for s in (t - 1, t - 3):
            if s >= 0:
                p = z[t, i] * z[s, j] - z[t, j] * z[s, i]
                units.append(p / max(np.linalg.norm(p), 1e-8))
        g = np.mean(units, axis=0) @ params["pairs"]["kernel"] + params["pairs"]["bias"] if units else np.zeros(DIM)
        a = 1 / (1 + np.exp(-np.concatenate([h[t], g]) @ params["gate"]["kernel"] - params["gate"]["bias"]))
        m = a * h[t] + (1 - a) * g
        m = (m - m.mean()) / np.sqrt(m.var() + 1e-5)
        want.append(m * params["inner_norm"]["scale"] + params["inner_norm"]["bias"])
    np.testing.assert_allclose(jax.jit(mixer.apply)(variables, x)[0][0], want, atol=3e-5)


def test_padding_gives_zeros_and_half_precision_stays_close():
    mixer = MIXERS["plucker"]
    x, variables = start(mixer, length=10)
    empty = np.arange(2)[:, None] > np.zeros((2, 10))

    @jax.jit
    def run(x, dirty):
        half, _ = mixer.clone(dtype=jnp.bfloat16).apply(variables, x)
        return mixer.apply(variables, dirty, mask=empty)[0], half, mixer.apply(variables, x)[0]

    y, half, want = run(x, np.where(empty[..., None], x, np.nan))
    assert not np.any(y[0]) and np.all(np.isfinite(y[1]))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), want, atol=0.15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offsets": (1, 64), "train_length": 64}, "64 is not shorter than the sequence of 64"),
        ({"offsets": (1, 0)}, "0 is no distance"),
        ({"direction": "future"}, "pairs a token with later ones"),
        ({"reduced_dim": 1}, "at least 2 features"),
        ({"pair_heads": 5}, "pair_heads = 5: does not divide"),
        ({"features": "pluecker"}, "did you mean 'plucker'"),
        ({"features": "linear", "pair_heads": 2}, "no planes to group"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        filled(GrassmannMixing(dim=16, **({"reduced_dim": 6} | fields)), np.zeros((1, 4, 16), np.float32))


def test_caches_that_do_not_fit():
    mixer = MIXERS["plucker"]
    x, variables = start(mixer, length=4)

    def apply(cache, **arguments):
        jax.eval_shape(lambda x: mixer.apply(variables, x, cache=cache, **arguments), x)

    with pytest.raises(ConfigError, match="cache of batch 3 used with batch 2"):
        apply(mixer.init_cache(3, 9))
    with pytest.raises(ConfigError, match="cache of 5 x 5 float32"):
        apply(MIXERS["linear"].init_cache(2, 9))
    with pytest.raises(ConfigError, match="float16"):
        apply(jax.tree.map(lambda leaf: leaf.astype(jnp.float16), mixer.init_cache(2, 9)))
    with pytest.raises(ConfigError, match="segment_ids with a cache"):
        apply(mixer.init_cache(2, 9), segment_ids=np.ones((2, 4), np.int32))
    with pytest.raises(ConfigError, match="holds the past only"):
        mixer.clone(direction="both", causal=False).init_cache(2, 9)
    with pytest.raises(ConfigError, match="SoftmaxAttention has none inside"):
        filled(lm(mixer="softmax", norm_style="post", mixer_options={}), TOKENS)


TOKENS = np.random.default_rng(5).integers(0, 31, (2, 12))


def lm(**fields):
    options = {"grassmann": {"reduced_dim": 4, "offsets": (1, 2, 5)}}
    return GrassmannLM(
        **({"vocab_size": 31, "num_layers": 3, "dim": 12, "num_heads": 2, "max_len": 14, "mixer_options": options} | fields)
    )


@pytest.mark.parametrize("schedule", ["all", "per_layer"])
def test_language_model_decodes_and_hides_the_future(schedule):
    model = lm(offset_schedule=schedule, norm_style="pre" if schedule == "all" else "post")
    variables = filled(model, TOKENS)

    @jax.jit
    def run(tokens):
        full, _ = model.apply(variables, tokens)
        cache, parts = model.init_cache(2, 14), []
        for piece in jnp.split(tokens, (7,), axis=1):
            part, cache = model.apply(variables, piece, cache=cache)
            parts.append(part)
        return full, jnp.concatenate(parts, axis=1)

    full, chunked = run(TOKENS)
    np.testing.assert_allclose(chunked, full, atol=5e-5)
    other, _ = run(np.where(np.arange(12) == 7, (TOKENS + 1) % 31, TOKENS))
    np.testing.assert_array_equal(other[:, :7], full[:, :7])
    assert np.any(other[:, 7] != full[:, 7])
    reach = [model.make_mixer(entry).offsets for entry in model.entries()]
    assert reach == ([(1,), (2,), (5,)] if schedule == "per_layer" else [(1, 2, 5)])


def test_language_model_refuses():
    with pytest.raises(ConfigError, match="direction = 'future': a language model would read its own targets"):
        filled(lm(mixer_options={"grassmann": {"direction": "future", "causal": False}}), TOKENS)
    for fields, message in (
        ({"num_layers": 2, "offset_schedule": "per_layer"}, "for 2 layers"),
        ({"max_len": 8}, "sequence of 12 tokens: the model has max_len = 8"),
        ({"max_len": 0}, "max_len = 0"),
        ({"offset_schedule": "per_layers"}, "did you mean 'per_layer'"),
    ):
        with pytest.raises(ConfigError, match=message):
            filled(lm(**fields), TOKENS)


@pytest.mark.parametrize(
    ("layers", "length", "mixer", "millions"),
    [(6, 128, "grassmann", 12.61), (12, 256, "grassmann", 17.41), (6, 128, "softmax", 12.59), (12, 256, "softmax", 17.36)],
)
def test_published_sizes(layers, length, mixer, millions):
    options = {"softmax": {"rope": False, "proj_bias": True}}
    model = lm(
        vocab_size=30522, num_layers=layers, dim=256, num_heads=4, max_len=length, mixer=mixer, mixer_options=options, mlp_dim=1024
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32), jnp.int32))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == millions


def test_the_mixer_serves_in_the_house_model():
    model = LM(vocab_size=31, num_layers=2, dim=12, num_heads=2, pattern=("grassmann", "softmax"), train_length=20)
    shapes = jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0), TOKENS), TOKENS)[0])
    assert shapes.shape == (2, 12, 31)
    assert model.make_mixer("grassmann").train_length == 20


def test_sentence_pair_head_sees_neither_padding_nor_empty_slots():
    model = GrassmannNLI(dim=8, num_layers=2, reduced_dim=6, pair_heads=2, offsets=(1, 2), ff_dim=12, window=4, stride=4)
    tokens = np.random.default_rng(0).standard_normal((3, 18, 5)).astype(np.float32)
    mask = np.ones((3, 18), bool)
    mask[0, 10:] = mask[1] = mask[2, 4:8] = False
    variables = filled(model, tokens, mask)
    run = jax.jit(lambda tokens, mask: (model.apply(variables, tokens, mask), *model.apply(variables, tokens, mask, method="slots")))
    logits, slots, valid = run(tokens, mask)
    assert logits.shape == (3, 3) and slots.shape == (3, 5, 8)
    np.testing.assert_array_equal(valid, [[1, 1, 1, 0, 0], [0] * 5, [1, 0, 1, 1, 1]])
    assert not np.any(slots[1]) and np.all(np.isfinite(logits))
    other, *_ = run(np.where(mask[..., None], tokens, np.float32(100.0)), mask)
    np.testing.assert_allclose(other, logits, atol=1e-6)
    short, *_ = run(tokens[:1, :10], mask[:1, :10])
    np.testing.assert_allclose(short, logits[:1], atol=1e-6)
    overlapping = model.clone(stride=2)
    _, real = jax.eval_shape(lambda x: overlapping.apply(variables, x, mask, method="slots"), tokens)
    assert real.shape == (3, 8)
    training = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}
    dropped = jax.jit(lambda x: model.apply(variables, x, mask, **training))(tokens)
    assert not np.allclose(dropped, logits)
    with pytest.raises(ConfigError, match="slots need tokens"):
        jax.eval_shape(lambda x: model.clone(stride=0).apply(variables, x, mask), tokens)

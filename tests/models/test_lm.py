"""The language model: scan and loop, patterns, remat, cache, collections, maps."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen
from flax.core import meta

from attnlab import registry
from attnlab.errors import ConfigError
from attnlab.models.lm import LM, attention_maps

TOKENS = jax.random.randint(jax.random.key(0), (2, 20), 0, 64)
FIELDS = {
    "vocab_size": 64,
    "num_layers": 5,
    "dim": 16,
    "num_heads": 2,
    "pattern": ("sigmoid", "local"),
    "mixer_options": {"local": {"mixer": "softmax", "window": 8}},
    "train_length": 20,
}


class Noisy(linen.Module):
    """A mixer that sows a loss and a metric and keeps a statistic."""

    dim: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @linen.compact
    def __call__(self, x, *, positions=None, segment_ids=None, mask=None, cache=None, deterministic=True):
        gain = self.param("gain", linen.initializers.ones, (self.dim,), self.param_dtype)
        seen = self.variable("statistics", "seen", lambda: jnp.zeros((), jnp.int32))
        if self.is_mutable_collection("statistics"):
            seen.value = seen.value + x.shape[0]
        self.sow("losses", "size", jnp.mean(x**2))
        self.sow("metrics", "mean", jnp.mean(x))
        return x * gain, cache

    @linen.nowrap
    def init_cache(self, batch, max_len):
        return ()


registry.register("mixer", "noisy", Noisy)


_started = {}


def start(**fields):
    """Returns a model and its variables; models that differ in nothing that has parameters share them."""
    model = LM(**(FIELDS | fields))
    same = {"remat", "capture_attention", "dropout", "dtype"}
    key = repr(sorted((name, value) for name, value in fields.items() if name not in same))
    if key not in _started:
        _started[key] = meta.unbox(jax.jit(model.init)(jax.random.key(1), TOKENS))
    return model, _started[key]


def unrolled(params, repeats):
    """The parameters of `scan_layers=False` out of the stacked ones."""
    params = dict(params)
    stacked = params.pop("layers")
    return params | {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(repeats)}


def test_scan_and_loop_are_the_same_model():
    model, variables = start()
    loop = model.clone(scan_layers=False)
    flat = {"params": unrolled(variables["params"], 2)}
    shapes = jax.eval_shape(loop.init, jax.random.key(1), TOKENS)
    assert jax.tree.structure(meta.unbox(shapes)) == jax.tree.structure(flat)
    logits, cache = model.apply(variables, TOKENS)
    assert logits.shape == (2, 20, 64) and logits.dtype == jnp.float32 and cache is None
    np.testing.assert_allclose(loop.apply(flat, TOKENS)[0], logits, atol=1e-5)
    gradient = jax.grad(lambda v: jnp.mean(model.apply(v, TOKENS)[0] ** 2))(variables)
    other = jax.grad(lambda v: jnp.mean(loop.apply(v, TOKENS)[0] ** 2))(flat)
    pairs = (unrolled(gradient["params"], 2), other["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *pairs)


@pytest.mark.parametrize("scan", [True, False])
def test_cache_in_chunks_and_token_by_token(scan):
    model, variables = start(scan_layers=scan)
    want, _ = model.apply(variables, TOKENS)
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache=cache))
    cache, parts = model.init_cache(2, 24), []
    for chunk in jnp.split(TOKENS, (7, 8, 9, 19), axis=1):
        logits, cache = step(chunk, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-5)
    with pytest.raises(ConfigError, match="longer than the cache"):
        model.apply(variables, TOKENS, cache=model.init_cache(2, 19))


@pytest.mark.parametrize("remat", ["full", "dots", "dots_saveable", "nothing_saveable"])
def test_remat_changes_no_number(remat):
    model, variables = start()

    def gradient(model):
        return jax.jit(jax.grad(lambda v: jnp.mean(model.apply(v, TOKENS)[0] ** 2)))(variables)

    pairs = gradient(model), gradient(model.clone(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *pairs)


def test_remat_saves_memory():
    def temporaries(remat):
        model, variables = start(num_layers=8, pattern=("softmax",), remat=remat)
        gradient = jax.jit(jax.grad(lambda v: jnp.mean(model.apply(v, TOKENS)[0] ** 2)))
        return gradient.lower(variables).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.6 * temporaries("none")


def test_no_token_sees_the_future():
    model, variables = start()
    embed = variables["params"]["embed"]["embedding"]
    tokens = jnp.arange(20)[None]  # each id once: its row of the table is that position's input

    def score(table):
        params = variables["params"] | {"embed": {"embedding": table}, "output": {"kernel": embed.T}}
        return model.clone(tie_embeddings=False).apply({"params": params}, tokens)[0][0, 11].sum()

    gradient = jax.grad(score)(embed)
    assert np.all(np.any(gradient[:12] != 0, axis=1)) and not np.any(gradient[12:])


@pytest.mark.parametrize("scan", [True, False])
def test_maps_of_every_layer_in_order(scan):
    model, variables = start(scan_layers=scan, capture_attention=True)
    (want, _), state = model.apply(variables, TOKENS, mutable=["intermediates"])
    maps = attention_maps(model, state["intermediates"])
    assert [one.shape for one in maps] == [(2, 2, 20, 20)] * 5
    reach = [int(np.max(np.where(np.any(one > 0, (0, 1)), np.subtract.outer(range(20), range(20)), 0))) for one in maps]
    assert reach == [19, 8, 19, 8, 19]  # sigmoid, window of 8, ...
    np.testing.assert_allclose(model.clone(capture_attention=False).apply(variables, TOKENS)[0], want, atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_sown_collections_and_statistics_survive_the_layers(scan):
    model = LM(**(FIELDS | {"pattern": ("noisy", "softmax"), "scan_layers": scan}))
    variables = meta.unbox(model.init(jax.random.key(1), TOKENS))
    kept = {name: tree for name, tree in variables.items() if name in ("params", "statistics")}
    _, state = model.apply(kept, TOKENS, mutable=["losses", "metrics", "statistics"])
    for name in ("losses", "metrics"):
        leaves = jax.tree.leaves(state[name])
        assert sum(leaf.size for leaf in leaves) == 3  # layers 0, 2 and 4
    assert {int(count) for leaf in jax.tree.leaves(state["statistics"]) for count in np.ravel(leaf)} == {4}


def test_packed_documents_and_padding():
    model, variables = start()
    segments = jnp.where(jnp.arange(20) < 8, 1, 2)[None].repeat(2, axis=0)
    positions = jnp.where(jnp.arange(20) < 8, jnp.arange(20), jnp.arange(20) - 8)[None].repeat(2, axis=0)
    logits, _ = model.apply(variables, TOKENS, segment_ids=segments, positions=positions)
    np.testing.assert_allclose(logits[:, 8:], model.apply(variables, TOKENS[:, 8:])[0], atol=1e-5)
    padded = jnp.pad(TOKENS, ((0, 0), (4, 0)))
    mask = jnp.arange(24)[None].repeat(2, axis=0) >= 4
    logits, _ = model.apply(
        variables, padded, mask=mask, positions=jnp.maximum(jnp.arange(24) - 4, 0)[None].repeat(2, 0)
    )
    np.testing.assert_allclose(logits[:, 4:], model.apply(variables, TOKENS)[0], atol=1e-5)


def test_features_and_head_are_the_model():
    for tied in (True, False):
        model, variables = start(tie_embeddings=tied, dtype=jnp.bfloat16)
        assert ("output" in variables["params"]) != tied
        features, _ = model.apply(variables, TOKENS, method="features")
        assert features.dtype == jnp.bfloat16
        logits = model.apply(variables, features, method="head")
        assert logits.dtype == jnp.float32
        np.testing.assert_array_equal(logits, model.apply(variables, TOKENS)[0])


def test_dropout_draws_per_layer():
    model, variables = start(dropout=0.5)
    once, again, other = (
        model.apply(variables, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(seed)})[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, other)


def test_names_of_stacked_parameters():
    params = jax.eval_shape(LM(**FIELDS).init, jax.random.key(1), TOKENS)["params"]
    assert params["embed"]["embedding"].names == ("vocab", "embed")
    query = params["layers"]["blocks_0"]["mixer"]["query"]["kernel"]
    assert query.names == ("layers", "embed", "heads", "head_dim") and query.value.shape == (2, 16, 2, 8)
    assert params["tail"]["blocks_0"]["mlp_block"]["gate"]["kernel"].names == ("embed", "mlp")


def test_from_a_configuration():
    from attnlab.training.config import base

    config = base()
    config.model.num_layers = 2
    config.model.dim = 32
    config.model.pattern = ("softmax", "sigmoid")
    model = LM.from_config(config.model, vocab_size=128, train_length=config.seq_len)
    assert (model.num_layers, model.dim, model.dtype) == (2, 32, jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert shapes["params"]["embed"]["embedding"].value.shape == (128, 32)
    assert isinstance(config.model, ml_collections.ConfigDict)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3: does not divide dim = 16"),
        ({"pattern": ("sigmod",)}, "unknown mixer 'sigmod'.*'sigmoid'"),
        ({"mixer_options": {"local": {"mixer": "softmax", "windw": 8}}}, "mixer_options.local = \\['windw'\\]"),
        ({"remat": "dot"}, "remat = 'dot': unknown, did you mean 'dots'"),
        ({"norm": "rms"}, "norm = 'rms'"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(LM(**(FIELDS | fields)).init, jax.random.key(0), TOKENS)

"""The Vision Transformer: published sizes, any mixer, scanned and unrolled, pools and positions, training mode, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.methods import fields
from attnlab.models.flops import count_flops
from attnlab.models.options import options
from attnlab.models.vit import SIZES, ViT, image_mixer_options, resize_positions, sincos_positions

# Parameters at 224 pixels and 1000 classes, and multiply-adds of an image (DeiT's table 1, timm).
PUBLISHED = {"ti16": (5_717_416, 1.26e9), "s16": (22_050_664, 4.61e9), "b16": (86_567_656, 17.58e9), "l16": (304_326_632, 61.6e9)}
TINY = {"num_classes": 5, "image_shape": (8, 12, 3), "patch_size": 4, "dim": 16, "num_layers": 2, "num_heads": 2}
IMAGES = np.random.default_rng(0).standard_normal((2, 8, 12, 3)).astype(np.float32)


def start(model, images=IMAGES):
    """Variables larger than at initialisation."""
    rng = np.random.default_rng(1)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    model, image = ViT.sized(size), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    parameters, products = PUBLISHED[size]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    assert count_flops(model.apply, variables, image) == pytest.approx(2 * products, rel=0.01)


@pytest.mark.parametrize("pattern", [(), ("softmax", "sigmoid")], ids=["one", "two"])
def test_scanned_equals_unrolled(pattern):
    unrolled = ViT(**TINY, pattern=pattern, scan_layers=False, layer_scale=0.5)
    variables = start(unrolled)
    params = dict(variables["params"])
    layers = [params.pop(f"layers_{i}")["blocks_0"] for i in range(2)]
    turns = [layers[i : i + len(pattern or "1")] for i in range(0, 2, len(pattern or "1"))]
    stacked = {
        f"blocks_{p}": jax.tree.map(lambda *leaves: np.stack(leaves), *(turn[p] for turn in turns)) for p in range(len(turns[0]))
    }
    scanned = ViT(**TINY, pattern=pattern, layer_scale=0.5, remat="full")
    want = jax.jit(unrolled.apply)(variables, IMAGES)
    have = jax.jit(scanned.apply)({"params": params | {"layers": stacked}}, IMAGES)
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("positions", ["learned", "sincos", "none"])
def test_pools_and_positions(pool, positions):
    model = ViT(**TINY, pool=pool, positions=positions, scan_layers=False)
    variables = start(model)
    assert ("class_token" in variables["params"]) == (pool == "token")
    assert ("positions" in variables["params"]) == (positions == "learned")
    logits = jax.jit(model.apply)(variables, IMAGES)
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    patches = IMAGES.reshape(2, 2, 4, 3, 4, 3)[:, ::-1].reshape(IMAGES.shape)  # the two rows of patches, exchanged
    moved = jax.jit(model.apply)(variables, patches)
    assert np.allclose(moved, logits, atol=1e-5) == (positions == "none")


@pytest.mark.parametrize("mixer", ["softmax", "sigmoid", "magnitude_aware", "bilevel_routing", "gla"])
def test_any_mixer(mixer):
    table = image_mixer_options(fields.mixer_options())
    table.bilevel_routing.n_win, table.bilevel_routing.topk = 2, 2
    if mixer == "gla":
        table.gla.causal = True  # a state knows the past only
    changes = {name: value for name, value in TINY.items() if name not in ("num_classes", "image_shape")}
    config = options("vit", **changes | {"num_layers": 1}, mixer=mixer, mixer_options=table, pool="mean", scan_layers=False)
    model = ViT.from_config(config, 5, (8, 16, 3))
    images = np.random.default_rng(0).standard_normal((2, 8, 16, 3)).astype(np.float32)
    variables = start(model, images)
    first = jax.jit(jax.grad(lambda x: model.apply(variables, x)[0, 0]))(images)
    reached = np.abs(first[0]).reshape(2, 4, 4, 4, 3).max((1, 3, 4)) > 0
    assert reached.all() and not np.any(first[1])


def test_capture_and_training_mode():
    model = ViT(**TINY, drop_path=0.5, capture_attention=True)
    variables = start(model)

    @jax.jit
    def both(variables, key):
        train = model.apply(variables, IMAGES, deterministic=False, rngs={"dropout": key})
        return train, model.apply(variables, IMAGES, mutable=["intermediates"])

    results = [both(variables, jax.random.key(i)) for i in range(8)]
    logits, sown = results[0][1]
    assert len({np.asarray(train).tobytes() for train, _ in results}) >= 3
    assert not any(np.allclose(train, logits) for train, _ in results)
    (maps,) = sown["intermediates"]["layers"]["blocks_0"]["mixer"]["attention"]
    assert maps.shape == (2, 2, 2, 7, 7)  # layers, batch, heads, class token and 6 patches
    np.testing.assert_allclose(maps.sum(-1), 1.0, rtol=1e-5)


def test_positions_are_resized():
    table = np.random.default_rng(0).standard_normal((1, 7, 8)).astype(np.float32)
    same = resize_positions(table, (2, 3), (2, 3))
    np.testing.assert_allclose(same, table, atol=1e-6)
    larger = resize_positions(table, (2, 3), (4, 6))
    assert larger.shape == (1, 25, 8)
    np.testing.assert_array_equal(larger[:, 0], table[:, 0])
    np.testing.assert_allclose(larger[:, 1:].mean(1), table[:, 1:].mean(1), atol=0.15)
    with pytest.raises(ConfigError, match="not those of a grid of 3 x 3"):
        resize_positions(table, (3, 3), (4, 4))


def test_sincos_positions():
    table = sincos_positions((2, 3), 8)[0].reshape(2, 3, 8)
    np.testing.assert_array_equal(table[0, :, 4:], table[0, :1, 4:].repeat(3, 0))  # one row, one half
    np.testing.assert_allclose(table[1, 2, :4], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], rtol=1e-6)
    with pytest.raises(ConfigError, match="dim = 6"):
        sincos_positions((2, 2), 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size = 5: does not divide images of 8 x 12"),
        ({"pool": "tokens"}, "pool = 'tokens': unknown, did you mean 'token'"),
        ({"positions": "learnt"}, "positions = 'learnt': unknown"),
        ({"mixer": "bilevel_routing"}, "no class token. Set pool='mean'"),
        ({"mixer": "softmaxx"}, "unknown mixer 'softmaxx'"),
        ({"image_shape": (16, 16, 3)}, r"images of shape \(8, 12, 3\)"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(ViT(**TINY | changes).init, jax.random.key(0), IMAGES)


def test_unknown_size():
    with pytest.raises(ConfigError, match="size = 's61'"):
        ViT.sized("s61")

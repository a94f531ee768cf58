"""MOAT: published sizes, pyramids, training mode, windows, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models.flops import count_flops
from attnlab.models.moat import MOAT, SIZES, MBConv, MOATBlock
from attnlab.models.options import options

# Parameters with and without tables, image size, published multiply-adds in billions (those of elementwise work included).
PUBLISHED = {
    "moat_0": (27846892, 27777544, 224, 5.7),
    "moat_1": (41598448, 41467864, 224, 9.1),
    "moat_2": (73422408, 73248296, 384, 54.3),
    "moat_3": (189958040, 189536280, 512, 271.0),
    "moat_4": (483214184, 482539368, 512, 648.5),
    "tiny_moat_0": (3355348, 3332232, 256, 1.1),
    "tiny_moat_1": (5122895, 5094000, 256, 1.6),
    "tiny_moat_2": (9772741, 9732288, 256, 3.0),
    "tiny_moat_3": (19534390, 19476600, 256, 6.0),
}
TINY = {
    "num_classes": 5, "stem": (4, 4), "depths": (1, 1, 2, 1), "dims": (4, 8, 8, 16), "head_dim": 4,
    "position_sizes": (None, None, 2, 1),
}  # fmt: skip


def start(model, *shape):
    """Images and variables: kernels larger than at initialisation, statistics as there."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal(shape).astype(np.float32)

    def fill(path, leaf):
        middle = {"scale": 1.0, "var": 1.0}.get(path[-1].key, 0.0)
        noise = 0.0 if path[0].key == "batch_stats" else 0.2 * rng.standard_normal(leaf.shape)
        return np.asarray(middle + noise + np.zeros(leaf.shape), np.float32)

    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(1), images))
    return images, jax.tree_util.tree_map_with_path(fill, {name: shapes[name] for name in ("params", "batch_stats")})


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    params, without_tables, side, billions = PUBLISHED[size]
    counts = {}

    def init(image):
        for path, leaf in jax.tree_util.tree_leaves_with_path(meta.unbox(MOAT.sized(size).init(jax.random.key(0), image))["params"]):
            table = path[-1].key == "position_table"
            counts[table] = counts.get(table, 0) + leaf.size

    flops = count_flops(init, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    assert (counts[False] + counts[True], counts[False]) == (params, without_tables)
    assert flops / 2e9 == pytest.approx(billions, rel=0.03, abs=0.06)


def test_training_drop_path_and_remat():
    two = {"kinds": ("mbconv", "moat"), "depths": (1, 1), "dims": (4, 8), "strides": (2, 2), "windows": (None, None)}
    model = MOAT(**TINY | two | {"position_sizes": (None, 2)})
    images, variables = start(model, 4, 16, 16, 3)
    rest = {"batch_stats": variables["batch_stats"]}

    def loss(params, model):
        options = {"deterministic": False, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
        logits, updated = model.apply({"params": params, **rest}, images, **options)
        return jnp.square(logits).sum(), (logits, updated["batch_stats"])

    @jax.jit
    def run(params):
        once = jax.value_and_grad(loss, has_aux=True)(params, model)
        again = jax.value_and_grad(loss, has_aux=True)(params, model.clone(remat="full"))
        return model.apply(variables, images), once, again, loss(params, model.clone(drop_path=0.9))[1][0]

    plain, once, again, dropped = run(variables["params"])
    assert plain.shape == (4, 5) and plain.dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), once, again)
    (_, (logits, stats)), gradients = once
    assert not np.allclose(plain, logits) and not np.allclose(dropped, logits)
    assert np.any(gradients["stage_1_0"]["attention"]["position_table"])
    assert np.any(stats["stage_1_0"]["mbconv"]["pre_norm"]["mean"])


def test_the_same_parts_in_other_orders():
    def built(kind, **changes):
        fields = {"kinds": ("mbconv", kind), "depths": (1, 2), "dims": (8, 8), "strides": (2, 1), "windows": (None,) * 2}
        model = MOAT(**TINY | {"position_sizes": (None, 2), "num_classes": 0, **fields, **changes})
        images, variables = start(model, 1, 16, 16, 3)
        assert jax.eval_shape(model.apply, variables, images).shape == (1, 8)
        return variables["params"], lambda: model.apply(variables, images)

    published, run = built("moat")
    swapped, other = built("attention_mbconv")
    jax.tree.map(np.testing.assert_array_equal, published, swapped)
    one, another = jax.jit(lambda: (run(), other()))()
    assert np.abs(one - another).max() > 1e-3
    transformer, _ = built("transformer")
    assert set(transformer["stage_1_0"]) == {"attention_norm", "attention", "mlp_norm", "mlp"}
    assert built("moat", kernel=1)[0]["stage_1_0"]["mbconv"]["depthwise"]["kernel"].shape[:2] == (1, 1)
    # Attention before a strided convolution is that of the larger and narrower map.
    strided, _ = built("attention_mbconv", strides=(2, 2), dims=(4, 8))
    assert strided["stage_1_0"]["attention"]["query"]["kernel"].shape == (4, 1, 4)
    with pytest.raises(ConfigError, match="cannot map 8 channels to 8 at stride 2"):
        built("transformer", strides=(2, 2))


def test_feature_pyramid():
    model = MOAT(**TINY)
    images, variables = start(model, 1, 64, 64, 3)
    maps = jax.eval_shape(lambda images: model.apply(variables, images, method="features"), images)
    assert [x.shape for x in maps] == [(1, 32 >> i, 32 >> i, dim) for i, dim in enumerate((4, 4, 8, 8, 16))]
    stem = jax.jit(lambda images: [model.apply(variables, images, method="features", activate=on)[0] for on in (False, True)])
    plain, activated = stem(images)
    np.testing.assert_allclose(activated, jax.nn.gelu(plain, approximate=False), atol=1e-5)


def test_rates_of_drop_path_stop_one_step_short():
    bound = MOAT(**TINY, drop_path=0.5).bind({})
    rates = [block.drop_path for stage in bound.stages for block in stage]
    np.testing.assert_allclose(rates, 0.5 * np.arange(5) / 5)


def test_other_sizes_of_images_and_windows():
    model = MOAT(**TINY | {"windows": (None, None, (2, 2), None), "global_last": True})
    _, variables = start(model, 1, 64, 64, 3)
    larger = jax.ShapeDtypeStruct((1, 96, 128, 3), jnp.float32)
    with pytest.raises(ConfigError, match=r"window = \(2, 2\): does not divide a map of 3 x 4"):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 48, 64, 3)))
    for changes in ({"windows": (None,) * 4}, {"pad_windows": True}, {"windows": (None, None, (6, 8), (3, 4)), "pool_size": 3}):
        assert jax.eval_shape(model.clone(**changes).apply, variables, larger).shape == (1, 5)
    plain = MOAT(**TINY, relative_positions=False)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros((1, 37, 50, 3)))
    assert not any(path[-1].key == "position_table" for path, _ in jax.tree_util.tree_leaves_with_path(meta.unbox(shapes["params"])))


def test_block_of_a_strided_map():
    x = jnp.zeros((1, 5, 7, 8))
    block = MBConv(8, stride=2, se_ratio=0.1)
    params = meta.unbox(jax.eval_shape(block.init, jax.random.key(0), x))["params"]
    assert "shortcut" not in params and params["squeeze"]["kernel"].shape == (32, 1)
    y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    assert y.shape == (1, 3, 4, 8)


def test_from_config():
    model = MOAT.from_config(options("moat", **SIZES["tiny_moat_0"], dtype="bfloat16"), 10, (32, 32, 3))
    assert model == MOAT.sized("tiny_moat_0", num_classes=10, dtype=jnp.dtype("bfloat16"), param_dtype=jnp.dtype("float32"))


@pytest.mark.parametrize(("fields", "message"), [
    ({"depths": (1,)}, "depths = .*: dims = .* has 4 stages"),
    ({"kinds": ("mbconv", "mbconv", "moat", "mota")}, "did you mean 'moat'"),
    ({"head_dim": 3}, "head_dim = 3: does not divide a stage of width 8"),
    ({"remat": "ful"}, "did you mean 'full'"),
])  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(MOAT(**TINY | fields).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_bad_sizes():
    with pytest.raises(ConfigError, match="size = 'moat0': unknown, did you mean 'moat_0'"):
        MOAT.sized("moat0")
    with pytest.raises(ConfigError, match=r"need \[B, height, width, channels\]"):
        jax.eval_shape(MOAT(**TINY).init, jax.random.key(0), jnp.zeros((32, 32, 3)))
    with pytest.raises(ConfigError, match="head_dim = 32"):
        jax.eval_shape(MOATBlock(8).init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))

"""MAViT: published sizes, shapes at odd resolutions, training mode, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models.mavit import MAViT

TINY = {
    "num_classes": 5,
    "dims": (4, 8, 8, 8),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 1),
    "mlp_ratios": (2.5, 2, 2, 2),
    "flags": (("l",), ("l",), ("l", "v"), ("v",)),
    "layer_scales": (1.0, None, 1e-6, None),
    "projection": 12,
}


@pytest.mark.parametrize(("size", "millions"), [("tiny", 16.45), ("small", 27.14), ("base", 49.79), ("large", 97.77)])
def test_published_sizes(size, millions):
    model = MAViT.sized(size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) / 1e6, 2) == millions
    widths = {dim // heads for dim, heads in zip(model.dims, model.num_heads, strict=True)}
    assert widths == ({64} if size in ("tiny", "small") else {64, 96})


def test_maps_at_odd_sizes_training_and_remat():
    model = MAViT(**TINY, drop_path=0.5)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 37, 50, 3)).astype(np.float32)

    def fill(path, leaf):
        middle = {"scale": 1.0, "var": 1.0}.get(path[-1].key, 0.0)
        noise = 0.0 if path[0].key == "batch_stats" else 0.2 * rng.standard_normal(leaf.shape)
        return np.asarray(middle + noise + np.zeros(leaf.shape), np.float32)

    variables = jax.tree_util.tree_map_with_path(fill, meta.unbox(jax.eval_shape(model.init, jax.random.key(1), images)))
    kept = model.clone(remat=True)

    @jax.jit
    def run(variables, images):
        pyramid = model.apply(variables, images, method="features")
        training = {"deterministic": False, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
        logits = model.apply(variables, pyramid.stages[-1], method="classify")
        return pyramid, logits, model.apply(variables, images, **training), kept.apply(variables, images)

    pyramid, logits, (noisy, updated), again = run(variables, images)
    assert pyramid.stem.shape == (2, 10, 13, 4)
    assert [x.shape for x in pyramid.stages] == [(2, 10, 13, 4), (2, 5, 7, 8), (2, 3, 4, 8), (2, 2, 2, 8)]
    assert [x.shape[1:3] for x in pyramid.merged] == [(5, 7), (3, 4), (2, 2)]
    assert logits.shape == noisy.shape == (2, 5) and logits.dtype == jnp.float32
    before, after = variables["batch_stats"]["stem_norms_0"], updated["batch_stats"]["stem_norms_0"]
    assert np.any(before["mean"] != after["mean"]) and not np.allclose(noisy, logits)
    params = variables["params"]
    assert "attention_scale" in params["stages_0_0"] and "attention_scale" not in params["stages_1_0"]
    assert params["stages_0_0"]["ffn"]["fc1"]["kernel"].shape == (4, 10)  # int(2.5 * 4)

    assert jax.tree.structure(meta.unbox(jax.eval_shape(kept.init, jax.random.key(1), images))) == jax.tree.structure(variables)
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-5)


def test_kinds_by_flags_and_maps_on_request():
    model = MAViT(**TINY, capture_attention=True)
    assert model.kinds() == [("linear",), ("linear",), ("linear", "softmax"), ("softmax",)]
    assert MAViT(**(TINY | {"flags": (("l",),) * 4})).kinds()[2] == ("linear", "linear")
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(1), images)
    # 0.1 in every parameter will do: rows sum to one whatever the scores are
    shapes = {name: shapes[name] for name in ("params", "batch_stats")}
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)
    _, sown = jax.jit(lambda images: model.apply(variables, images, mutable=["intermediates"]))(images)
    weights = sown["intermediates"]["stages_2_1"]["attention"]["attention"][0]
    assert weights.shape == (1, 2, 4, 4)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flags": (("l",), ("l",), ("l", "l", "v"), ("v",))}, r"flags\[2\] = .*stage 2 has 2 blocks"),
        ({"flags": (("x",), ("l",), ("v",), ("v",))}, r"flags\[0\]"),
        ({"depths": (1, 1, 1)}, "one entry for each stage"),
        ({"num_heads": (1, 2, 4, 1)}, "multiple of 4"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(MAViT(**(TINY | fields)).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_bad_sizes():
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        MAViT.sized("smal")
    with pytest.raises(ConfigError, match=r"need \[B, height, width, channels\]"):
        jax.eval_shape(MAViT(**TINY).init, jax.random.key(0), jnp.zeros((32, 32, 3)))

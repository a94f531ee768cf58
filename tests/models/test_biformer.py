"""The BiFormer backbone: published sizes, pyramids, both layouts, scanned and unrolled, training mode, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models.biformer import SIZES, BiFormer

# Millions of parameters in the published table.
PUBLISHED = {"tiny": 13.1, "small": 25.5, "base": 56.8, "stl": 28.4}
TINY = {
    "num_classes": 5, "depths": (2, 1), "dims": (8, 16), "topks": (3, -2), "mlp_ratios": (2, 2), "head_dim": 8, "n_win": 2,
    "side_dwconv": 3,
}  # fmt: skip
# The other kinds of blocks, in the layout of the STL model.
MIXED = TINY | {
    "depths": (2, 1, 1), "dims": (8, 8, 16), "topks": (3, 0, -1), "mlp_ratios": (2, 2, 2), "variant": "nchw", "stem": "patch",
    "norm": "batchnorm", "before_attn_dwconv": 0,
}  # fmt: skip


def start(model, size=32, batch=2):
    """An image and variables: kernels larger than at initialisation, statistics as there."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch, size, size, 3)).astype(np.float32)

    def fill(path, leaf):
        name, middle = path[-1].key, {"scale": 1.0, "var": 1.0}
        noise = 0.0 if path[0].key == "batch_stats" else 0.2 * rng.standard_normal(leaf.shape)
        return np.asarray(middle.get(name, 0.0) + noise + np.zeros(leaf.shape), np.float32)

    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(1), image))
    return image, jax.tree_util.tree_map_with_path(fill, {name: shapes[name] for name in ("params", "batch_stats")})


def stacked(variables, depths):
    """Parameters of the unrolled form as those of the scanned one."""
    out = {}
    for kind, tree in variables.items():
        tree = dict(tree)
        for i, depth in enumerate(depths):
            blocks = [tree.pop(f"stage_{i}_{j}") for j in range(depth) if f"stage_{i}_{j}" in tree]
            if blocks:
                tree[f"stage_{i}"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
        out[kind] = tree
    return out


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = BiFormer.sized(size)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert round(count / 1e6, 1) == PUBLISHED[size]
    if size != "tiny":
        return
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, image)
    assert [x.shape for x in maps] == [(1, 56 >> i, 56 >> i, dim) for i, dim in enumerate(model.dims)]
    assert jax.eval_shape(model.apply, variables, image).shape == (1, 1000)


def test_names_of_parameters_and_their_axes():
    model = BiFormer(**TINY)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert set(variables["params"]) == {"downsample_0", "downsample_1", "stage_0", "stage_1", "norm", "head"}
    assert set(variables["params"]["stage_0"]) == {"pos_embed", "norm1", "attention", "norm2", "mlp"}
    query = variables["params"]["stage_0"]["attention"]["query"]["kernel"]
    assert query.names == ("layers", "embed", "heads", "head_dim") and query.value.shape == (2, 8, 1, 8)


@pytest.mark.parametrize("fields", [TINY, MIXED], ids=["legacy", "stl"])
def test_scanned_equals_unrolled(fields):
    unrolled = BiFormer(**fields, scan_layers=False)
    image, variables = start(unrolled)
    both = jax.jit(lambda one, two, image: (unrolled.apply(one, image), BiFormer(**fields).apply(two, image)))
    want, have = both(variables, stacked(variables, fields["depths"]), image)
    assert want.shape == (2, 5) and want.dtype == jnp.float32 and np.ptp(want) > 1e-2
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


def test_training_rematerialised_or_not():
    one_stage = {"depths": (2,), "dims": (8,), "topks": (3,), "mlp_ratios": (2,)}
    model = BiFormer(**TINY | one_stage, layer_scale=0.5, pre_norm=False)
    image, variables = start(model)

    def run(model):
        def loss(variables):
            logits, kept = model.apply(variables, image, deterministic=False, mutable=["batch_stats"])
            return jnp.mean(jnp.square(logits - 1.0)), kept["batch_stats"]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)

    plain = run(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), run(model.clone(remat="full")), plain)
    (_, kept), gradients = plain
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    assert np.any(gradients["params"]["downsample_0"]["conv_0"]["kernel"])
    assert np.any(kept["norm"]["mean"]) and jax.tree.structure(kept) == jax.tree.structure(variables["batch_stats"])


def test_drop_path():
    model = BiFormer(**TINY, drop_path=0.9)
    image, variables = start(model, batch=4)
    apply = jax.jit(
        lambda key: model.apply(variables, image, deterministic=False, mutable=["batch_stats"], rngs={"dropout": key})[0]
    )
    first, second = (apply(jax.random.key(seed)) for seed in (0, 1))
    assert not np.allclose(first, second) and np.all(np.isfinite(first))


def test_features_without_a_classifier_and_ragged_images():
    """Maps of 19 positions a side and less: regions do not divide them."""
    image = np.ones((1, 76, 76, 3), np.float32)
    for fields, sizes in ((TINY | {"attention": {"auto_pad": True}}, (19, 10)), (MIXED, (19, 9, 4))):
        model = BiFormer(**fields | {"num_classes": 0})
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        maps = jax.eval_shape(lambda v, x, m=model: m.apply(v, x, method="features"), variables, image)
        assert [x.shape[1] for x in maps] == list(sizes)
        assert jax.eval_shape(model.apply, variables, image).shape == (1, 16)
    with pytest.raises(ConfigError, match=r"n_win = 2: does not divide a map of 19 x 19\. Set auto_pad=True"):
        jax.eval_shape(BiFormer(**TINY).init, jax.random.key(0), image)


@pytest.mark.parametrize(("fields", "message"), [
    ({"depths": (1,)}, "depths = .*: dims = .* has 2 stages"),
    ({"topks": (3, -3)}, "-3 has no meaning"),
    ({"topks": (5, -2)}, "topk = 5: the map has 4 regions"),
    ({"head_dim": 3}, "head_dim = 3: does not divide a stage of width 8"),
    ({"stem": "conf"}, "did you mean 'conv'"),
    ({"remat": "ful"}, "did you mean 'full'"),
    ({"norm": "batch"}, "norm = 'batch'"),
])  # fmt: skip
def test_bad_input(fields, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(BiFormer(**TINY | fields).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_unknown_size():
    with pytest.raises(ConfigError, match="size = 'smal': unknown, did you mean 'small'"):
        BiFormer.sized("smal")

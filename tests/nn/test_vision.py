"""Pieces of hierarchical backbones: convolutions, batch norm, stems, drop path, dense attention on maps."""

import functools

import jax
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.nn import vision


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def start(module, x, **options):
    return meta.unbox(jax.jit(functools.partial(module.init, **options))(jax.random.key(1), x))


def filled(module, x):
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(1), x))
    return jax.tree.map(lambda leaf: 0.4 * normal(leaf.size, *leaf.shape), shapes)


def shape_of(module, x):
    """The shape of the result, and the variables'."""
    variables = meta.unbox(jax.eval_shape(module.init, jax.random.key(1), x))
    return jax.eval_shape(module.apply, variables, x).shape, variables


@pytest.mark.parametrize(("shape", "kernel", "options", "out"), [
    ((2, 7, 6, 3), (3, 3), {"stride": 2}, (2, 4, 3, 5)),
    ((2, 7, 6, 3), (4, 4), {"stride": 4, "padding": 0}, (2, 1, 1, 5)),
    ((2, 6, 6, 3), (3, 3), {"stride": 2, "padding": "SAME"}, (2, 3, 3, 5)),
    ((1, 4, 8, 8, 3), (3, 4, 4), {"stride": (2, 4, 4), "padding": ((1, 1), (0, 0), (0, 0))}, (1, 2, 2, 2, 5)),
])  # fmt: skip
def test_convolution_shapes_and_start(shape, kernel, options, out):
    x = normal(0, *shape)
    conv = vision.Conv(5, kernel, **options)
    variables = start(conv, x)
    assert jax.eval_shape(conv.apply, variables, x).shape == out
    bound = (3 * np.prod(kernel)) ** -0.5
    for leaf in variables["params"].values():
        assert np.abs(leaf).max() <= bound and np.ptp(leaf) > 0
    assert np.abs(variables["params"]["kernel"]).max() > 0.9 * bound


def test_convolution_against_its_formula():
    x = normal(0, 2, 7, 5, 4)
    for depthwise in (False, True):
        conv = vision.Conv(4, (3, 3), stride=2, depthwise=depthwise)
        variables = filled(conv, x)
        kernel, bias = (variables["params"][name] for name in ("kernel", "bias"))
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        want = np.zeros((2, 4, 3, 4)) + bias
        for y, i in np.ndindex(4, 3):
            part = padded[:, 2 * y : 2 * y + 3, 2 * i : 2 * i + 3]
            want[:, y, i] += np.einsum("byxc,yxc->bc", part, kernel[:, :, 0]) if depthwise else np.tensordot(part, kernel, 3)
        np.testing.assert_allclose(jax.jit(conv.apply)(variables, x), want, atol=1e-5)
    with pytest.raises(ConfigError, match="does not have 3 spatial dimensions"):
        shape_of(vision.Conv(4, (3, 3, 3)), x)
    with pytest.raises(ConfigError, match="features = 5: a depthwise convolution keeps the 4"):
        shape_of(vision.Conv(5, (3, 3), depthwise=True), x)


def test_batch_norm_in_training_and_evaluation():
    x = 3 + 2 * normal(0, 4, 3, 5, 2)
    for unbiased, momentum in ((True, 0.1), (False, 0.01)):
        norm = vision.BatchNorm(momentum=momentum, unbiased=unbiased, epsilon=1e-3)
        variables = start(norm, x, deterministic=False)
        np.testing.assert_array_equal(variables["batch_stats"]["var"], 1.0)  # the start does not count as a batch
        params = {"scale": np.array([2.0, 0.5], np.float32), "bias": np.array([1.0, -1.0], np.float32)}
        variables = {"params": params, "batch_stats": variables["batch_stats"]}
        train = jax.jit(lambda v, x, norm=norm: norm.apply(v, x, deterministic=False, mutable=["batch_stats"]))
        y, kept = train(variables, x)
        flat = np.asarray(x, np.float64).reshape(-1, 2)
        mean, var = flat.mean(0), flat.var(0)
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3) * params["scale"] + params["bias"], atol=1e-4)
        kept = jax.tree.map(np.asarray, kept["batch_stats"])
        np.testing.assert_allclose(kept["mean"], momentum * mean, rtol=1e-4)
        np.testing.assert_allclose(kept["var"], 1 - momentum + momentum * flat.var(0, ddof=int(unbiased)), rtol=1e-4)
        y = jax.jit(norm.apply)({"params": params, "batch_stats": kept}, x)
        np.testing.assert_allclose(y, (x - kept["mean"]) / np.sqrt(kept["var"] + 1e-3) * params["scale"] + params["bias"], atol=1e-4)


def test_batch_norm_over_a_named_axis():
    x = normal(0, 2, 3, 4, 4, 2)
    whole, split = vision.BatchNorm(), vision.BatchNorm(axis_name="parts")
    variables = start(whole, x[0])
    train = {"deterministic": False, "mutable": ["batch_stats"]}

    @jax.jit
    def run(x):
        parts = jax.vmap(lambda x: split.apply(variables, x, **train), axis_name="parts")(x)
        return whole.apply(variables, x.reshape(6, 4, 4, 2), **train), parts

    (want, kept), (have, also) = run(x)
    np.testing.assert_allclose(have.reshape(want.shape), want, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5), also, kept)


SYNCHRONISED = """
import jax, jax.numpy as jnp, numpy as np
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from attnlab.nn.vision import BatchNorm
x = jax.random.normal(jax.random.key(0), (8, 3, 3, 2)) + jnp.arange(8.0)[:, None, None, None]
variables = meta.unbox(BatchNorm().init(jax.random.key(1), x))
step = jax.jit(lambda x: BatchNorm().apply(variables, x, deterministic=False, mutable=["batch_stats"]))
want = step(x)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
with jax.set_mesh(mesh):
    have = step(jax.device_put(x, NamedSharding(mesh, P("data"))))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), have, want)
print("equal")
"""


def test_batch_norm_is_synchronised_over_a_mesh(run_python):
    assert run_python(["-c", SYNCHRONISED], devices=4).stdout.strip() == "equal"


def test_stems_and_downsampling():
    x = np.zeros((2, 17, 16, 3), np.float32)
    shape, variables = shape_of(vision.ConvStem((4, 8), (2, 2)), x)
    assert set(variables["params"]) == {"conv_0", "norm_0", "conv_1", "norm_1"} and shape == (2, 5, 4, 8)
    bare = vision.ConvStem((4, 8), (2, 1), last_norm=False, padding="SAME", norm={"epsilon": 1e-3, "momentum": 0.01})
    shape, variables = shape_of(bare, x)
    assert set(variables["params"]) == {"conv_0", "norm_0", "conv_1"} and shape == (2, 9, 8, 8)
    for fields, shape, norm_size in (
        ({}, (2, 9, 8, 6), 6), ({"kernel": 4, "stride": 4}, (2, 4, 4, 6), 6),
        ({"kernel": 2, "norm": "layernorm", "norm_first": True}, (2, 8, 8, 6), 3), ({"norm": None}, (2, 9, 8, 6), None),
    ):  # fmt: skip
        found, variables = shape_of(vision.Downsample(6, **fields), x)
        sizes = [leaf.shape for leaf in jax.tree.leaves(variables["params"].get("norm", {}))]
        assert found == shape and sizes == ([] if norm_size is None else [(norm_size,)] * 2)
    with pytest.raises(ConfigError, match="norm = 'groupnorm'"):
        shape_of(vision.Downsample(6, norm="groupnorm"), x)


def test_drop_path():
    x = np.ones((4000, 2, 1), np.float32)
    drop = vision.DropPath(0.25)
    np.testing.assert_array_equal(drop.apply({}, x), x)

    @jax.jit
    def run(key, rate):
        options = {"deterministic": False, "rngs": {"dropout": key}}
        return drop.apply({}, x, **options), vision.DropPath().apply({}, x, rate=rate, **options)

    for y in run(jax.random.key(0), np.float32(0.25)):
        y = np.asarray(y)
        assert np.all((y == 0) | np.isclose(y, 1 / 0.75)) and np.all(y[:, :1] == y)
        assert abs(np.mean(y == 0) - 0.25) < 0.03
    np.testing.assert_array_equal(vision.DropPath().apply({}, x, deterministic=False), x)
    rates = vision.drop_path_rates(0.3, (1, 2, 1))
    assert [len(stage) for stage in rates] == [1, 2, 1]
    np.testing.assert_allclose(np.concatenate(rates), [0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(("lepe", "qkv_bias"), [(None, True), ("input", False), ("value", True)])
def test_global_attention_against_its_formula(lepe, qkv_bias):
    x = normal(0, 2, 4, 3, 8)
    module = vision.GlobalAttention(8, 2, qkv_bias=qkv_bias, lepe=lepe, side_dwconv=3, capture_attention=True)
    variables = filled(module, x)
    p = variables["params"]
    q, k, v = (np.einsum("byxd,dnh->byxnh", x, p[n]["kernel"]) + p[n].get("bias", 0.0) for n in ("query", "key", "value"))
    flat_q, flat_k, flat_v = (side.reshape(2, 12, 2, 4) for side in (q, k, v))
    weights = np.exp(np.einsum("btnh,bsnh->bnts", flat_q, flat_k) / 2.0)
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bnts,bsnh->btnh", weights, flat_v).reshape(x.shape)
    if lepe is not None:
        conv = vision.Conv(8, (3, 3), depthwise=True)
        y = y + jax.jit(conv.apply)({"params": p["lepe"]}, x if lepe == "input" else v.reshape(x.shape))
    want = np.einsum("byxe,ed->byxd", y, p["out"]["kernel"].reshape(8, 8)) + p["out"]["bias"]
    have, sown = jax.jit(lambda v, x: module.apply(v, x, mutable=["intermediates"]))(variables, x)
    np.testing.assert_allclose(have, want, atol=2e-5)
    np.testing.assert_allclose(sown["intermediates"]["attention"][0], weights, atol=1e-5)
    assert ("lepe" in p) == (lepe is not None) and ("bias" in p["query"]) == qkv_bias


def test_global_attention_refuses():
    x = np.zeros((1, 2, 2, 8), np.float32)
    with pytest.raises(ConfigError, match="num_heads = 3: does not divide dim = 8"):
        shape_of(vision.GlobalAttention(8, 3), x)
    with pytest.raises(ConfigError, match="lepe = 'values'"):
        shape_of(vision.GlobalAttention(8, 2, lepe="values"), x)

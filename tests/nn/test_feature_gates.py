"""Gates, the blocks and networks that have them, and folding them away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models import multistream
from attnlab.models.gated_vit import GatedViT
from attnlab.models.multistream import MultiStreamNet
from attnlab.nn.feature_gates import GATE, FeatureGate, GatedBlock, fold_gates, gate_weights, is_gate, raw_gates


def drawn(module, *inputs, seed=0):
    """Variables with gates, biases and statistics far from their start."""
    variables = meta.unbox(jax.jit(module.init)(jax.random.key(seed), *inputs))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 500))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), variables["params"])
    stats = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.uniform(next(keys), leaf.shape), variables.get("batch_stats", {}))
    return {"params": params} | ({"batch_stats": stats} if stats else {})


def test_gate_and_its_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    gate = {"params": {GATE: jnp.linspace(-3.0, 3.0, 6)}}
    s = 1 / (1 + np.exp(-np.linspace(-3, 3, 6)))
    np.testing.assert_allclose(FeatureGate().apply(gate, x), x * s, atol=1e-6)
    gradient = jax.grad(lambda gate: jnp.sum(jnp.sin(FeatureGate().apply(gate, x))))(gate)["params"][GATE]
    np.testing.assert_allclose(gradient, np.sum(np.cos(x * s) * x, axis=(0, 1)) * s * (1 - s), atol=1e-5)


@pytest.mark.parametrize(("init", "std"), [("xavier", np.sqrt(2 / 4001)), ("he", np.sqrt(2 / 4000))])
def test_gates_start_near_a_half(init, std):
    params = FeatureGate(init).init(jax.random.key(0), jnp.zeros((1, 4000)))["params"]
    assert params[GATE].names == ("norm",)
    assert np.std(params[GATE].value) == pytest.approx(std, rel=0.05)
    with pytest.raises(ConfigError, match="gate_init = 'kaiming'"):
        FeatureGate("kaiming").init(jax.random.key(0), jnp.zeros((1, 4)))


def test_block_adds_gated_branches():
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))
    gated, plain = GatedBlock(2, 16), GatedBlock(2, 16, gates=False)
    params = drawn(gated, x)["params"]
    gated, plain = (jax.jit(block.apply) for block in (gated, plain))
    closed = params | {name: {GATE: jnp.full(8, -40.0)} for name in ("attention_gate", "mlp_gate")}
    np.testing.assert_allclose(gated({"params": closed}, x), x, atol=1e-6)
    opened = params | {name: {GATE: jnp.full(8, 40.0)} for name in ("attention_gate", "mlp_gate")}
    without = {name: value for name, value in params.items() if not name.endswith("_gate")}
    np.testing.assert_allclose(gated({"params": opened}, x), plain({"params": without}, x), atol=1e-6)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_folded_vit_gives_the_same(pool):
    model = GatedViT(num_classes=5, image_shape=(8, 12, 3), patch=4, dim=12, num_layers=2, num_heads=3, mlp_ratio=2.0, pool=pool)
    images = jax.random.normal(jax.random.key(3), (2, 8, 12, 3))
    params = drawn(model, images)["params"]
    want = jax.jit(lambda params: model.apply({"params": params}, images))(params)
    folded = fold_gates(params)
    assert not raw_gates(folded) and len(raw_gates(params)) == 4
    plain = model.clone(gates=False)
    wanted = meta.unbox(jax.eval_shape(plain.init, jax.random.key(0), images))["params"]
    assert jax.tree.structure(folded) == jax.tree.structure(wanted)
    np.testing.assert_allclose(jax.jit(lambda params: plain.apply({"params": params}, images))(folded), want, atol=2e-5)
    assert want.shape == (2, 5) and want.dtype == jnp.float32


def test_stacked_layers_fold_alike():
    block, x = GatedBlock(2, 16), jnp.zeros((1, 3, 8))
    layers = [drawn(block, x, seed=seed)["params"] for seed in (0, 7)]
    stacked = fold_gates({"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)})["layers"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-6), stacked, fold_gates(layers[1]))
    with pytest.raises(ConfigError, match="do not belong to blocks"):
        fold_gates({"odd": {GATE: jnp.zeros(3)}})


@pytest.mark.parametrize("branch", ["plain", "resnet18"])
def test_folded_network_gives_the_same(branch):
    model = MultiStreamNet(2, ("depth", "rgb"), branch, stem_width=4, widths=(4, 6, 8, 10), hidden=12)
    keys = jax.random.split(jax.random.key(0))
    inputs = {"rgb": jax.random.normal(keys[0], (2, 33, 32, 3)), "depth": jax.random.normal(keys[1], (2, 33, 32, 1))}
    variables = drawn(model, inputs)
    params = variables["params"]
    want = jax.jit(model.apply)(variables, inputs)
    folded = variables | {"params": multistream.fold_gates(params)}
    assert not raw_gates(folded["params"]) and len(raw_gates(params)) == 10
    np.testing.assert_allclose(jax.jit(model.clone(gates=False).apply)(folded, inputs), want, rtol=2e-4, atol=2e-4)
    if branch == "resnet18":
        trained, moved = model.apply(variables, inputs, deterministic=False, mutable=["batch_stats"])
        assert trained.shape == (2, 2)
        before, after = (jax.tree.leaves(tree) for tree in (variables["batch_stats"], moved["batch_stats"]))
        assert all(not np.allclose(a, b) for a, b in zip(before, after, strict=True))


def test_resnet18_has_its_published_size():
    model = MultiStreamNet(outputs=1, streams=("rgb",), gates=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    backbone = sum(leaf.size for leaf in jax.tree.leaves(shapes["rgb"]))
    assert backbone == 11_689_512 - (512 * 1000 + 1000)  # torchvision's resnet18 without its head


def test_vit_tiny_has_its_published_size():
    model = GatedViT()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 384, 384, 3)))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == 5_790_376 + 12 * 2 * 192  # timm's vit_tiny_patch16_384 and the gates


def test_gates_are_listed_as_weights_and_raw():
    params = {"a": {"gate_1": {GATE: jnp.zeros(3)}, "gate": {"kernel": jnp.ones(2)}}}
    np.testing.assert_allclose(gate_weights(params)["a/gate_1"], 0.5)
    np.testing.assert_allclose(raw_gates(params)["a/gate_1"], 0.0)
    assert is_gate(("x", GATE)) and not is_gate(("gate", "kernel"))


def test_inputs_that_do_not_fit():
    images = jnp.zeros((1, 16, 16, 3))
    init = lambda model, x: model.init(jax.random.key(0), x)  # noqa: E731
    with pytest.raises(ConfigError, match=r"inputs of \['rgb'\]: the model has the streams \['depth', 'rgb'\]"):
        init(MultiStreamNet(streams=("rgb", "depth"), branch="plain"), {"rgb": images})
    with pytest.raises(ConfigError, match="choose some of rgb, mask, depth"):
        init(MultiStreamNet(streams=("infrared",)), images)
    with pytest.raises(ConfigError, match="branch = 'vgg'"):
        init(MultiStreamNet(branch="vgg"), images)
    with pytest.raises(ConfigError, match="patch = 5: does not divide images of 16 x 16"):
        init(GatedViT(image_shape=(16, 16, 3), patch=5), images)
    with pytest.raises(ConfigError, match="the model is for"):
        init(GatedViT(image_shape=(32, 32, 3)), images)

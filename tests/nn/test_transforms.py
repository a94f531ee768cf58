"""Modules under vmap, pmap, nn.scan, nn.remat and flax.nnx, without config and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import meta

from attnlab import nn

MIXERS = [
    nn.SoftmaxAttention(dim=16, num_heads=4, num_kv_heads=2),
    nn.SigmoidAttention(dim=16, num_heads=4, train_length=8),
]
X = jax.random.normal(jax.random.key(0), (3, 2, 8, 16))


@pytest.mark.parametrize("mixer", MIXERS, ids=["softmax", "sigmoid"])
def test_vmap_over_data_and_over_ensembles(mixer):
    variables = meta.unbox(mixer.init(jax.random.key(1), X[0]))
    want = jnp.stack([mixer.apply(variables, x)[0] for x in X])
    np.testing.assert_allclose(jax.vmap(lambda x: mixer.apply(variables, x)[0])(X), want, atol=1e-5)
    ensemble = jax.vmap(lambda key: meta.unbox(mixer.init(key, X[0])))(jax.random.split(jax.random.key(2), 3))
    together = jax.vmap(lambda variables, x: mixer.apply(variables, x)[0])(ensemble, X)
    for i in range(3):
        alone = mixer.apply(jax.tree.map(lambda leaf, i=i: leaf[i], ensemble), X[i])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS, ids=["softmax", "sigmoid"])
def test_scan_and_remat_of_blocks(mixer):
    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            block = linen.scan(
                linen.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2,
                metadata_params={linen.PARTITION_NAME: "layers"},
            )  # fmt: skip
            return block(name="layers")(x, None)[0]

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return nn.Block(mixer=mixer.clone(parent=None))(x)[0], None

    variables = Stack().init(jax.random.key(1), X[0])
    plain = meta.unbox(variables)
    x = X[0]
    for i in range(2):
        layer = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], plain["params"]["layers"])}
        x, _ = Layer().apply(layer, x, None)
    np.testing.assert_allclose(Stack().apply(plain, X[0]), x, atol=1e-5)
    kernel = variables["params"]["layers"]["Block_0"]["mixer"]["query"]["kernel"]
    assert kernel.names == ("layers", "embed", "heads", "head_dim")
    gradient = jax.grad(lambda variables: Stack().apply(variables, X[0]).sum())(plain)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("mixer", MIXERS, ids=["softmax", "sigmoid"])
def test_bridge_to_nnx(mixer):
    module = nnx.bridge.ToNNX(mixer, rngs=nnx.Rngs(0)).lazy_init(X[0])
    y, cache = module(X[0])
    assert y.shape == X[0].shape and cache is None
    state = nnx.state(module, nnx.Param)
    assert {"query", "key", "value", "out"} <= set(state)
    loss = nnx.grad(lambda module: module(X[0])[0].sum())(module)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(loss))


PMAP = """
import jax, jax.numpy as jnp, numpy as np, warnings
warnings.simplefilter("ignore")
from flax.core import meta
from attnlab import nn
for mixer in (nn.SoftmaxAttention(dim=16, num_heads=4), nn.SigmoidAttention(dim=16, num_heads=4, train_length=8)):
    block = nn.Block(mixer=mixer)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 16))
    variables = meta.unbox(block.init(jax.random.key(1), x[0]))

    def step(variables, x):
        gradient = jax.grad(lambda variables: jnp.mean(block.apply(variables, x)[0] ** 2))(variables)
        return jax.lax.pmean(gradient, "batch")

    have = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=None)(variables, x)
    want = jax.grad(lambda v: jnp.mean(block.apply(v, x.reshape(6, 8, 16))[0] ** 2))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), have, want)
print("equal")
"""


def test_pmap_over_two_devices(run_python):
    assert run_python(["-c", PMAP], devices=2).stdout.strip() == "equal"


CONSTRAIN = """
import jax, jax.numpy as jnp
from flax import linen
from jax.sharding import AxisType, PartitionSpec as P
from attnlab.nn.partitioning import constrain
x = jnp.zeros((4, 6, 8))
assert constrain(x, "act_batch", "act_seq", "act_mlp") is x
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rules = (("act_batch", ("data", "fsdp")), ("act_seq", None), ("act_mlp", "tensor"))
with jax.set_mesh(mesh), linen.logical_axis_rules(rules):
    y = jax.jit(lambda x: constrain(x, "act_batch", "act_seq", "act_mlp"))(x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data", None, "tensor")), 3), y.sharding
    y = jax.jit(lambda x: constrain(x, "act_batch", None, "act_mlp"))(x[:3, :, :7])  # nothing divides
    assert y.sharding.is_fully_replicated, y.sharding
    split = dict(in_specs=P("data"), out_specs=P("data"))
    jax.jit(jax.shard_map(lambda x: constrain(x, "act_batch", "act_seq", "act_mlp"), **split))(x)
print("laid out")
"""


def test_activations_are_laid_out_by_rules(run_python):
    assert run_python(["-c", CONSTRAIN], devices=4).stdout.strip() == "laid out"

"""The module of bi-level routing attention: both variants, maps and tokens, padding, maps on request, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import meta

from attnlab import registry
from attnlab.errors import ConfigError
from attnlab.nn.bilevel_routing import BiLevelRoutingAttention
from attnlab.ops import bilevel_routing as op

DIM = 8


def layer(**fields):
    return BiLevelRoutingAttention(**{"dim": DIM, "num_heads": 2, "n_win": 2, "topk": 2, "side_dwconv": 3} | fields)


def filled(module, x, scale=0.4):
    """Kernels and biases larger than at initialisation, so that attention is far from uniform."""
    rng = np.random.default_rng(1)
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    return jax.tree.map(lambda leaf: (scale * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def start(module, height=6, width=4, seed=0):
    x = np.random.default_rng(seed).standard_normal((2, height, width, DIM)).astype(np.float32)
    return x, filled(module, x)


def by_hand(params, x, n_win, topk, lepe=True, ragged=False):
    """The layer from its equations with the op for the attention: projection, LePE on the values, output."""
    q, k, v = (jnp.einsum("byxd,dnh->byxnh", x, params[n]["kernel"]) + params[n]["bias"] for n in ("query", "key", "value"))
    attend = op.ragged_bilevel_routing_attention if ragged else op.bilevel_routing_attention
    y, _ = attend(q, k, v, n_win=n_win, topk=topk, implementation="gather")
    if lepe:
        flat = jnp.pad(v.reshape(x.shape), ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = params["lepe"]["kernel"]
        height, width = x.shape[1:3]
        conv = sum(flat[:, i : i + height, j : j + width] * kernel[i, j, 0] for i in range(3) for j in range(3))
        y = y + (conv + params["lepe"]["bias"]).reshape(y.shape)
    return jnp.einsum("byxnh,nhd->byxd", y, params["out"]["kernel"]) + params["out"]["bias"]


@pytest.mark.parametrize(("fields", "size"), [
    ({}, (6, 4)), ({"side_dwconv": 0, "qk_dim": 4}, (4, 4)), ({"variant": "nchw"}, (7, 5)), ({"variant": "nchw"}, (6, 4)),
])  # fmt: skip
def test_layer_from_its_equations(fields, size):
    module = layer(**fields)
    x, variables = start(module, *size)
    ragged = module.variant == "nchw"
    hand = functools.partial(by_hand, n_win=2, topk=2, lepe=module.side_dwconv > 0, ragged=ragged)
    (y, cache), want = jax.jit(lambda v, x: (module.apply(v, x), hand(v["params"], x)))(variables, x)
    assert cache is None
    np.testing.assert_allclose(y, want, atol=1e-4)


def test_padding_before_the_projection():
    """auto_pad equals a larger map of zeros, whose keys are the biases; the refactored form pads later and differs."""
    module = layer(auto_pad=True)
    x, variables = start(module, 5, 7)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))

    @jax.jit
    def run(variables, x, padded):
        other = layer(variant="nchw")
        sides = (module, x), (layer(), padded), (other, x), (module, padded), (other, padded)
        return [m.apply(variables, x)[0] for m, x in sides]

    y, zeros, later, whole, whole_later = run(variables, x, padded)
    np.testing.assert_allclose(y, zeros[:, :5, :7], atol=1e-5)
    assert y.shape == later.shape == x.shape and not np.allclose(y, later, atol=1e-2)
    np.testing.assert_allclose(whole, whole_later, atol=1e-5)


def test_tokens_are_maps_row_by_row():
    module = layer(causal=False, grid=(6, 4))
    x, variables = start(module)
    square = x[:, :4]

    @jax.jit
    def run(variables, x, square):
        tokens, cache = module.apply(variables, x.reshape(2, 24, DIM), positions=np.arange(24)[None])
        assert cache is None
        whole = layer(causal=False).apply(variables, square.reshape(2, 16, DIM))[0]
        return (tokens, whole), [layer().apply(variables, x)[0] for x in (x, square)]

    for tokens, maps in zip(*run(variables, x, square), strict=True):
        np.testing.assert_allclose(tokens, maps.reshape(tokens.shape), atol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_maps_are_sown_on_request(soft):
    module = layer(capture_attention=True, soft_routing=soft, side_dwconv=0)
    x, variables = start(module)
    (y, _), sown = jax.jit(lambda v, x: module.apply(v, x, mutable=["intermediates"]))(variables, x)
    sown = sown["intermediates"]
    weights = np.asarray(sown["attention"][0])
    assert weights.shape == (2, 2, 24, 24) and sown["route_index"][0].shape == (2, 4, 2)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    region = (np.arange(24) // 4 // 3) * 2 + np.arange(24) % 4 // 2
    chosen = (np.asarray(sown["route_index"][0])[..., None] == np.arange(4)).any(2)
    assert not np.any(weights[np.broadcast_to(~chosen[:, None, region][..., region], weights.shape)])
    if not soft:
        p = variables["params"]
        v = np.einsum("btd,dnh->btnh", x.reshape(2, 24, DIM), p["value"]["kernel"]) + p["value"]["bias"]
        want = np.einsum("bnts,bsnh,nhd->btd", weights, v, p["out"]["kernel"]) + p["out"]["bias"]
        np.testing.assert_allclose(y.reshape(2, 24, DIM), want, atol=1e-4)
    assert "intermediates" not in jax.eval_shape(lambda v: module.apply(v, x, mutable=["losses"])[1], variables)
    for fields, size in (({"auto_pad": True}, (5, 4)), ({"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}, (4, 4))):
        other = layer(capture_attention=True, side_dwconv=0, **fields)
        image = np.ones((1, *size, DIM), np.float32)
        _, sown = jax.eval_shape(lambda v, x, m=other: m.apply(v, x, mutable=["intermediates"]), variables, image)
        assert set(sown["intermediates"]) == {"route_index", "route_weight"}


def test_gradients_of_the_router():
    """With one key per query there is nothing for queries to learn; with weighted regions there is, if gradients may flow."""

    x, variables = start(layer(n_win=4, side_dwconv=0), 4, 4)

    @jax.jit
    def run(variables):
        def gradient(topk, **fields):
            module = layer(n_win=4, side_dwconv=0, topk=topk, **fields)
            return jax.grad(lambda v: jnp.sum(module.apply(v, x)[0] ** 2))(variables)["params"]["query"]["kernel"]

        soft = [gradient(2, soft_routing=True, diff_routing=diff) for diff in (False, True)]
        return gradient(1), gradient(1, soft_routing=True, diff_routing=True), soft

    *nothing, (held, free) = run(variables)
    for gradient in nothing:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)  # one region of one token: its weight is 1
    assert np.any(held) and not np.allclose(held, free, atol=1e-3)


def test_under_transformations():
    module = layer()
    x, variables = start(module)
    kept = linen.remat(BiLevelRoutingAttention)(dim=DIM, num_heads=2, n_win=2, topk=2, side_dwconv=3)

    @jax.jit
    def run(variables, x):
        whole = lambda v, m=module: m.apply(v, x)[0]  # noqa: E731
        each = jax.vmap(lambda x: module.apply(variables, x[None])[0][0])(x)
        gradients = [jax.grad(lambda v, m=m: jnp.mean(whole(v, m) ** 2))(variables) for m in (kept, module)]
        return each, whole(variables), *gradients

    each, want, *gradients = run(variables, x)
    np.testing.assert_allclose(each, want, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients)

    def bridged(x):
        module_nnx = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x)
        assert {"query", "key", "value", "out", "lepe"} <= set(nnx.state(module_nnx, nnx.Param))
        return module_nnx(x)[0]

    assert jax.eval_shape(bridged, x).shape == x.shape
    assert jax.eval_shape(layer(dtype=jnp.bfloat16).apply, variables, x)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(("fields", "shape", "message"), [
    ({}, (1, 16, DIM), "causal = True: bilevel_routing sees the whole map"),
    ({"causal": False}, (1, 15, DIM), "15 tokens are no map of 3 x 3. Set grid"),
    ({"causal": False, "grid": (5, 4)}, (1, 16, DIM), r"grid = \(5, 4\)"),
    ({}, (1, 5, 4, DIM), "n_win = 2: does not divide a map of 5 x 4. Set auto_pad=True"),
    ({"topk": 5}, (1, 4, 4, DIM), "topk = 5: the map has 4 regions"),
    ({"num_heads": 3}, (1, 4, 4, DIM), "num_heads = 3: does not divide dim = 8"),
    ({"qk_dim": 5}, (1, 4, 4, DIM), "does not divide qk_dim = 5"),
    ({"side_dwconv": 4}, (1, 4, 4, DIM), "side_dwconv = 4: not an odd kernel"),
    ({"variant": "nhwc"}, (1, 4, 4, DIM), "variant = 'nhwc'"),
    ({"variant": "nchw", "soft_routing": True}, (1, 4, 4, DIM), "soft_routing = True: variant 'nchw'"),
    ({"variant": "nchw", "kv_downsample_mode": "avgpool"}, (1, 4, 4, DIM), "kv_downsample_mode = 'avgpool': variant 'nchw'"),
])  # fmt: skip
def test_bad_input(fields, shape, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(layer(**fields).init, jax.random.key(0), np.zeros(shape, np.float32))


def test_what_a_map_does_not_have():
    x = np.zeros((1, 4, 4, DIM), np.float32)

    def apply(module=None, **arguments):
        jax.eval_shape(lambda v: (module or layer()).apply(v, x, **arguments), filled(layer(), x))

    for name, value in (("mask", np.ones((1, 16), bool)), ("segment_ids", np.ones((1, 16), np.int32)), ("cache", {})):
        with pytest.raises(ConfigError, match=f"{name} with bilevel_routing"):
            apply(**{name: value})
    with pytest.raises(ConfigError, match="Use a causal mixer to decode"):
        layer().init_cache(1, 8)
    with pytest.raises(NotImplementedError, match="diff_routing without soft_routing"):
        apply(layer(diff_routing=True))
    assert registry.get("mixer", "bilevel_routing") is BiLevelRoutingAttention


def test_flops_of_the_two_levels():
    module = BiLevelRoutingAttention(dim=64, num_heads=2, n_win=7, topk=4)
    tokens, regions = 784, 49
    want = (4 * tokens * 4 * tokens / regions * 64 + 2 * regions**2 * 64) / tokens
    assert module.sequence_flops(tokens) == pytest.approx(want)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import linen
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from attnlab.nn.bilevel_routing import BiLevelRoutingAttention
module = BiLevelRoutingAttention(dim=16, num_heads=4, n_win=2, topk=2, side_dwconv=3)
rng = np.random.default_rng(0)
x = rng.standard_normal((4, 6, 6, 16)).astype(np.float32)
shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(1), x))
variables = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
f = lambda v, x: jax.value_and_grad(lambda v: jnp.mean(module.apply(v, x)[0] ** 2))(v)
want = jax.jit(f)(variables, x)
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rules = (("act_batch", ("data",)), ("act_heads", "tensor"))
with jax.set_mesh(mesh), linen.logical_axis_rules(rules):
    have = jax.jit(f)(variables, jax.device_put(x, NamedSharding(mesh, P("data"))))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), have, want)
print("equal")
"""


def test_sharded_over_batch_and_heads(run_python):
    assert run_python(["-c", SHARDED], devices=4).stdout.strip() == "equal"

"""The Triton attention kernels in Triton's interpreter against the XLA reference: values and gradients, case by case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from kernels_pallas.attention_triton import attention, launch, refusal, tuning

OPS = {"softmax": ops.softmax_attention, "sigmoid": ops.sigmoid_attention}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 32 x 16, so that short sequences have wholly visible tiles, partly visible ones and hidden ones."""

    def lookup(kind, dtype, padded, device_kind, *, length, keys, block_q, block_kv):
        return tuning.Tile(tuning._fit(32, length, block_q), tuning._fit(16, keys, block_kv), 4, 1)

    monkeypatch.setattr(tuning, "lookup", lookup)


def draw(length, keys, heads, kv_heads, width, dtype, batch=1, seed=0):
    shapes = [(batch, length, heads, width), *[(batch, keys, kv_heads, width)] * 2, (batch, length, heads, width)]
    split = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(split, shapes, strict=True)]


def pulled(op, arrays):
    out, pullback = jax.vjp(op, *arrays[:3])
    return out, *pullback(arrays[3])


def segments(length, batch):
    starts = jax.random.bernoulli(jax.random.key(3), 0.06, (batch, length))
    return jnp.cumsum(starts, axis=1).astype(jnp.int32)


SCATTERED = jax.random.randint(jax.random.key(4), (2, 70), -20, 90)
CASES = {
    "one query": {"length": 1, "keys": 63, "options": {"causal": True}},
    "whole tiles": {"length": 64, "keys": 96, "width": 16, "options": {}},
    "grouped, ragged, causal": {"length": 100, "heads": 4, "kv_heads": 2, "width": 24, "options": {"causal": True}},
    "window of both sides, more keys": {"length": 70, "keys": 131, "options": {"window": (40, 20)}},
    "window, fewer keys": {"length": 131, "keys": 70, "options": {"window": (20, None), "causal": True}},
    "rows without keys": {"length": 100, "keys": 45, "options": {"causal": True}},
    "large scores": {"length": 80, "gain": 30.0, "options": {"causal": True}},
    "segments and padding": {
        "length": 90,
        "batch": 2,
        "options": {
            "causal": True,
            "q_segment_ids": segments(90, 2),
            "kv_segment_ids": segments(90, 2),
            "kv_mask": jnp.arange(90)[None] < jnp.array([[90], [50]]),
        },
    },
    "positions, empty slots, ALiBi": {
        "length": 70,
        "batch": 2,
        "options": {
            "causal": True,
            "q_positions": jnp.abs(SCATTERED[:1]),
            "kv_positions": SCATTERED,
            "alibi_slopes": jnp.array([[0.5, 0.1]]),
        },
    },
    "ALiBi of both sides": {"length": 50, "options": {"alibi_slopes": jnp.array([[0.5, 0.1], [0.2, 0.0]])}, "batch": 2},
    "bfloat16": {"length": 70, "dtype": jnp.bfloat16, "options": {"causal": True}},
    "float16": {"length": 70, "dtype": jnp.float16, "options": {"causal": True}},
}


@pytest.mark.parametrize("normalization", OPS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, normalization):
    case = {"keys": None, "heads": 2, "kv_heads": 2, "width": 32, "dtype": jnp.float32, "batch": 1, "gain": 1.0}
    case |= CASES[name]
    keys = case["length"] if case["keys"] is None else case["keys"]
    arrays = draw(case["length"], keys, case["heads"], case["kv_heads"], case["width"], case["dtype"], case["batch"])
    arrays[0] = arrays[0] * case["gain"]
    options = dict(case["options"])
    if normalization == "sigmoid":
        options["bias"] = -3.0
    kernel = functools.partial(attention, normalization=normalization, interpret=True, **options)
    run = jax.jit(functools.partial(pulled, kernel))
    have = run(arrays)
    again = run(arrays) if name == "whole tiles" else have
    wide = [x.astype(jnp.float32) for x in arrays]
    op = functools.partial(OPS[normalization], implementation="xla", **options)
    want = jax.jit(functools.partial(pulled, op))(wide)
    # 16 bits: weights and score gradients are rounded once before their products
    tolerance = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}[arrays[0].dtype.name]
    for one, other, second in zip(have, want, again, strict=True):
        assert one.dtype == arrays[0].dtype
        scale = float(jnp.abs(other).max() + 1e-3)
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=tolerance * scale, rtol=0)
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(second, np.float32))


@pytest.mark.parametrize("normalization", OPS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_block_lists(groups, normalization):
    arrays = draw(150, 260, 4, 2, 16, jnp.float32, batch=2)
    order = jnp.argsort(jax.random.uniform(jax.random.key(7), (2, groups, 3, 9)), axis=-1)[..., :4]
    index = jnp.where(jax.random.bernoulli(jax.random.key(8), 0.3, order.shape), -1, order).astype(jnp.int32)
    index = index.at[1, 0, 1].set(-1)  # a query block without keys
    options = {"block_q": 64, "block_kv": 32, "normalization": normalization, "causal": groups == 1}
    if groups == 2:
        options |= {"q_segment_ids": segments(150, 2), "kv_segment_ids": segments(260, 2)}

    def op(implementation, *arrays):
        return ops.block_attention(*arrays, index, implementation=implementation, **options)

    with dispatch.interpreted():
        have = jax.jit(functools.partial(pulled, functools.partial(op, "triton")))(arrays)
    want = jax.jit(functools.partial(pulled, functools.partial(op, "xla_dense")))(arrays)
    for one, other in zip(have, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert not np.any(have[0][1, 64:128, 0])


def test_log_sum_exp_and_its_gradient():
    q, k, v, cotangent = draw(50, 80, 2, 1, 16, jnp.float32)
    q = q.at[:, 30:].multiply(40.0)

    def kernel(q, k, v):
        return attention(q, k, v, normalization="softmax", window=(40, 0), return_lse=True, interpret=True)

    def reference(q, k, v):
        scores = jnp.einsum("btnh,bskh->bnts", q, k, precision="highest") / 4.0
        at, to = jnp.arange(50)[:, None] + 30, jnp.arange(80)
        lse = jax.nn.logsumexp(jnp.where((to <= at) & (to >= at - 40), scores, -jnp.inf), axis=-1)
        return ops.softmax_attention(q, k, v, window=(40, 0), implementation="xla"), lse

    weights = jax.random.normal(jax.random.key(5), (1, 2, 50))
    results = []
    for fn in (kernel, reference):
        out, pullback = jax.jit(lambda q, k, v, fn=fn: jax.vjp(fn, q, k, v))(q, k, v)
        results.append([*out, *pullback((cotangent, weights))])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()), rtol=1e-5)


def test_vmap_and_a_query_without_any_key():
    q, k, v, _ = draw(20, 40, 2, 2, 16, jnp.float32, batch=3)
    mask = jnp.ones((3, 40), bool).at[1].set(False)

    def one(q, k, v, mask):
        call = functools.partial(attention, normalization="softmax", interpret=True, return_lse=True)
        return call(q[None], k[None], v[None], kv_mask=mask[None])

    out, lse = jax.jit(jax.vmap(one))(q, k, v, mask)
    want = ops.softmax_attention(q, k, v, kv_mask=mask, implementation="xla")
    np.testing.assert_allclose(out[:, 0], want, atol=2e-5)
    assert not np.any(out[1]) and np.all(lse[1] == -np.inf) and np.all(np.isfinite(lse[0]))


def test_the_tables_have_it_and_say_why_not():
    q, k, v, _ = draw(64, 64, 2, 2, 16, jnp.bfloat16)
    with dispatch.target("gpu", "NVIDIA H100 80GB HBM3"):
        assert ops.explain("sigmoid_attention", q, k, v).chosen == "triton"
        assert ops.explain("sigmoid_attention", q, k, v, mask=jnp.ones((64, 64), bool)).chosen == "xla"
        with pytest.raises(NotImplementedError, match="dense mask"):
            ops.softmax_attention(q, k, v, mask=jnp.ones((64, 64), bool), implementation="triton")
        index = jnp.zeros((1, 1, 3, 1), jnp.int32)
        with pytest.raises(NotImplementedError, match="block_q = 24: the kernel needs a multiple of 16"):
            ops.block_attention(q, k, v, index, block_q=24, block_kv=32, implementation="triton")
        names = list(dispatch.implementations("softmax_attention"))
        assert names.index("cudnn") < names.index("triton") < names.index("xla")
    with pytest.raises(NotImplementedError, match="runs on gpu, and this is cpu"):
        ops.sigmoid_attention(q, k, v, implementation="triton")
    with pytest.raises(ConfigError, match="triton"):
        ops.sigmoid_attention(q, k, v, implementation="tritn")


def test_refusals(monkeypatch):
    sizes = {"keys": 64, "kv_heads": 2}
    assert refusal((1, 64, 2, 64), jnp.float16, **sizes) is None
    assert "H <= 256" in refusal((1, 64, 2, 512), jnp.float16, **sizes)
    assert "not float64" in refusal((1, 64, 2, 64), np.dtype("float64"), **sizes)
    assert "2^31" in refusal((1, 2**24, 2, 64), jnp.float16, **sizes)
    assert "positive" in refusal((1, 64, 2, 64), jnp.float16, scale=-1.0, **sizes)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in refusal((1, 64, 2, 64), jnp.float16, **sizes)
    find = {"triton": 1}.get
    monkeypatch.setattr(launch.importlib.util, "find_spec", find)
    assert "pip install jax-triton" in refusal((1, 64, 2, 64), jnp.float16, **sizes)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from attnlab import ops
from attnlab.ops import dispatch
q, k, v = (jax.random.normal(key, (2, 40, n, 16)) for key, n in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2)))
index = jnp.array([[[[0, 1], [1, 0], [1, -1]]]] * 2, jnp.int32)
def loss(q, k, v, implementation):
    call = {"implementation": implementation, "causal": True}
    listed = ops.block_attention(q, k, v, index, block_q=16, block_kv=32, **call)
    return (ops.sigmoid_attention(q, k, v, bias=-3.0, **call) * listed).sum()
step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
want = step(q, k, v, "xla" )
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
with jax.set_mesh(mesh), dispatch.interpreted():
    parts = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (q, k, v)]
    have = step(*parts, "triton")
for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
    np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)
print("equal")
"""


def test_sharded_over_batch_and_heads_equals_unsharded(run_python):
    assert run_python(["-c", SHARDED], devices=8).stdout.strip().endswith("equal")

"""The attention kernels in Pallas' interpreter against the XLA reference: values and gradients, case by case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.ops import dispatch
from kernels_pallas.attention import attention, tuning

# Interpreted kernels are long programs that run for milliseconds: compile them without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(length, keys, heads, kv_heads, width, dtype, batch=1, seed=0):
    shapes = [(batch, length, heads, width), *[(batch, keys, kv_heads, width)] * 2, (batch, length, heads, width)]
    split = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(split, shapes, strict=True)]


def pulled(op, arrays):
    out, pullback = jax.vjp(op, *arrays[:3])
    return out, *pullback(arrays[3])


def small_lengths(length, keys):
    return {"length": length, "keys": keys, "width": 16, "options": {"causal": True}}


def segments(length, batch):
    starts = jax.random.bernoulli(jax.random.key(3), 0.02, (batch, length))
    return jnp.cumsum(starts, axis=1).astype(jnp.int32)


SCATTERED = jax.random.randint(jax.random.key(4), (2, 300), -30, 400)
CASES = {
    "one query": small_lengths(1, 63),
    "63": small_lengths(63, 63),
    "grouped, ragged, causal": {"length": 300, "heads": 4, "kv_heads": 2, "options": {"causal": True}},
    "window of both sides, more keys": {"length": 200, "keys": 333, "options": {"window": (100, 50)}},
    "rows without keys": {"length": 300, "keys": 130, "options": {"causal": True}},
    "large scores": {"length": 200, "gain": 30.0, "options": {"causal": True}},
    "segments and padding": {
        "length": 300,
        "batch": 2,
        "options": {
            "causal": True,
            "q_segment_ids": segments(300, 2),
            "kv_segment_ids": segments(300, 2),
            "kv_mask": jnp.arange(300)[None] < jnp.array([[300], [170]]),
        },
    },
    "positions, empty slots, ALiBi": {
        "length": 300,
        "batch": 2,
        "options": {
            "causal": True,
            "q_positions": jnp.abs(SCATTERED),
            "kv_positions": SCATTERED,
            "alibi_slopes": jnp.array([[0.5, 0.1]]),
        },
    },
    "ALiBi of both sides": {"length": 150, "options": {"alibi_slopes": jnp.array([[0.5, 0.1], [0.2, 0.0]])}, "batch": 2},
    "bfloat16": {"length": 200, "width": 64, "dtype": jnp.bfloat16, "options": {"causal": True}},
}


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, normalization):
    case = {"keys": None, "heads": 2, "kv_heads": 2, "width": 32, "dtype": jnp.float32, "batch": 1, "gain": 1.0}
    case |= CASES[name]
    keys = case["length"] if case["keys"] is None else case["keys"]
    shape = (case["length"], keys, case["heads"], case["kv_heads"], case["width"])
    arrays = draw(*shape, case["dtype"], case["batch"])
    arrays[0] = arrays[0] * case["gain"]
    options = dict(case["options"])
    if normalization == "sigmoid":
        options["bias"] = -3.0
    op = ops.softmax_attention if normalization == "softmax" else ops.sigmoid_attention
    kernel = functools.partial(
        attention, normalization=normalization, block_q=128, block_kv=128, interpret=True, **options
    )
    have = jit(functools.partial(pulled, kernel))(arrays)
    wide = [x.astype(jnp.float32) for x in arrays]
    want = jax.jit(functools.partial(pulled, functools.partial(op, implementation="xla", **options)))(wide)
    # bfloat16: weights and score gradients are rounded to 8 bits once before their products
    tolerance = {"float32": 2e-5, "bfloat16": 2e-2}[arrays[0].dtype.name]
    for one, other in zip(have, want, strict=True):
        assert one.dtype == arrays[0].dtype
        np.testing.assert_allclose(
            one.astype(jnp.float32), other, atol=tolerance * float(jnp.abs(other).max() + 1e-3), rtol=0
        )


@pytest.mark.parametrize("gain", [1.0, 30.0])  # small scores, and such that need a running maximum
def test_tiles_do_not_change_the_result(gain):
    arrays = draw(500, 500, 1, 1, 32, jnp.float32)
    arrays[0] = arrays[0] * gain
    kernel = functools.partial(attention, normalization="softmax", causal=True, block_q=256, block_kv=256, interpret=True)
    results = []
    for full, partial in (((256, 256, 0, False), (256, 256, 0, False)), ((128, 256, 1, False, True), (256, 128, 1, True, True))):
        pair = (tuning.Tiles(*full), tuning.Tiles(*partial))
        with tuning.using(forward=pair, online=pair, dq=pair, dkv=pair):
            results.append(jit(functools.partial(pulled, kernel))(arrays))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_block_lists(groups, normalization):
    arrays = draw(300, 500, 4, 2, 32, jnp.float32, batch=2)
    order = jnp.argsort(jax.random.uniform(jax.random.key(7), (2, groups, 3, 4)), axis=-1)[..., :3]
    index = jnp.where(jax.random.bernoulli(jax.random.key(8), 0.3, order.shape), -1, order).astype(jnp.int32)
    index = index.at[1, 0, 1].set(-1)  # a query block without keys
    options = {"block_q": 128, "block_kv": 128, "normalization": normalization, "causal": groups == 1}

    def op(implementation, *arrays):
        return ops.block_attention(*arrays, index, implementation=implementation, **options)

    with dispatch.interpreted():
        run = jit(functools.partial(pulled, functools.partial(op, "pallas")))
        have, again = run(arrays), run(arrays)
    want = jax.jit(functools.partial(pulled, functools.partial(op, "xla_dense")))(arrays)
    for one, other, second in zip(have, want, again, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)
        np.testing.assert_array_equal(one, second)
    assert not np.any(have[0][1, 128:256, 0])


def test_log_sum_exp_and_its_gradient():
    q, k, v, cotangent = draw(130, 200, 2, 1, 16, jnp.float32)
    q = q.at[:, 100:].multiply(40.0)

    def kernel(q, k, v):
        return attention(q, k, v, normalization="softmax", window=(150, 0), return_lse=True, interpret=True)

    def reference(q, k, v):
        scores = jnp.einsum("btnh,bskh->bnts", q, k, precision="highest") / 4.0
        at, to = jnp.arange(130)[:, None] + 70, jnp.arange(200)
        lse = jax.nn.logsumexp(jnp.where((to <= at) & (to >= at - 150), scores, -jnp.inf), axis=-1)
        return ops.softmax_attention(q, k, v, window=(150, 0), implementation="xla"), lse

    weights = jax.random.normal(jax.random.key(5), (1, 2, 130))
    for compiled, fn in ((jit, kernel), (jax.jit, reference)):
        out, pullback = compiled(lambda q, k, v, fn=fn: jax.vjp(fn, q, k, v))(q, k, v)
        results = [*out, *pullback((cotangent, weights))]
        if fn is kernel:
            have = results
    for one, other in zip(have, results, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()), rtol=1e-5)


def test_long_lists_run_some_rows_at_a_time(monkeypatch):
    arrays = draw(130, 130, 2, 2, 16, jnp.float32, batch=4)
    index = jnp.array([[[[0, -1], [0, 1]]]] * 4, jnp.int32)

    def gradients(*arrays):
        options = {"block_q": 128, "block_kv": 128, "implementation": "pallas", "normalization": "sigmoid"}
        return pulled(lambda *x: ops.block_attention(*x, index, **options), arrays)

    with dispatch.interpreted():
        whole = jit(gradients)(*arrays)
        monkeypatch.setattr("kernels_pallas.attention.vjp._SCALAR_ENTRIES", 13)  # two rows of six entries
        parts = jax.jit(gradients)(*arrays)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_under_vmap():
    q, k, v, _ = draw(130, 130, 1, 1, 16, jnp.float32, batch=2)
    kernel = functools.partial(attention, normalization="sigmoid", causal=True, interpret=True)
    mapped = jit(jax.vmap(lambda q, k, v: kernel(q[None], k[None], v[None])[0]))(q, k, v)
    np.testing.assert_allclose(mapped, jit(kernel)(q, k, v), atol=1e-6)


def test_small_weights_keep_their_relative_accuracy():
    q, k, v, _ = draw(128, 128, 1, 1, 32, jnp.float32)
    run = jit(functools.partial(attention, normalization="sigmoid", bias=-20.0, interpret=True))
    want = ops.sigmoid_attention(q, k, jnp.abs(v), bias=-20.0, implementation="xla")
    np.testing.assert_allclose(run(q, k, jnp.abs(v)), want, rtol=1e-5)


def test_the_table_of_implementations():
    q = jax.ShapeDtypeStruct((1, 512, 4, 128), jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((4,), jnp.float32)
    with dispatch.target("tpu", "TPU v5 lite"):
        assert ops.explain("sigmoid_attention", q, q, q, causal=True).chosen == "pallas"
        assert ops.explain("softmax_attention", q, q, q, causal=True).chosen == "splash"
        decision = ops.explain("softmax_attention", q, q, q, causal=True, alibi_slopes=slopes)
        assert decision.chosen == "pallas" and "ALiBi" in decision.reasons["splash"]
        few = jax.ShapeDtypeStruct((1, 1, 4, 128), jnp.bfloat16)
        assert "queries" in ops.explain("sigmoid_attention", few, q, q).reasons["pallas"]


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "reason"),
    [
        ((1, 128, 1, 320), jnp.float32, {}, "H <= 256, not 320"),
        ((1, 128, 1, 64), jnp.float16, {}, "float16"),
        ((1, 128, 1, 64), jnp.float32, {"mask": np.ones((1, 1, 128, 128), bool)}, "dense mask"),
    ],
)
def test_named_kernel_refuses_before_it_is_traced(shape, dtype, options, reason):
    x = jnp.zeros(shape, dtype)
    with dispatch.interpreted(), pytest.raises(NotImplementedError, match=reason):
        ops.sigmoid_attention(x, x, x, implementation="pallas", **options)


def test_block_sizes_that_the_kernel_refuses():
    x = jnp.zeros((1, 128, 1, 64))
    index = jnp.zeros((1, 1, 2, 1), jnp.int32)
    with dispatch.interpreted(), pytest.raises(NotImplementedError, match=r"block_q = 64.*multiple of 128"):
        ops.block_attention(x, x, x, index, block_q=64, block_kv=128, implementation="pallas")
    with pytest.raises(NotImplementedError, match="runs on tpu"):
        ops.block_attention(x, x, x, index, block_q=64, block_kv=128, implementation="pallas")


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from attnlab import ops
from attnlab.ops import dispatch
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
keys = jax.random.split(jax.random.key(0), 4)
q, do = (jax.random.normal(key, (2, 200, 4, 16)) for key in keys[:2])
k, v = (jax.random.normal(key, (2, 200, 2, 16)) for key in keys[2:])
index = jnp.array([[[[0, -1], [1, 0]], [[0, -1], [1, -1]]]] * 2, jnp.int32)
padding = jnp.broadcast_to(jnp.arange(200) < 190, (2, 200))
def dense(q, k, v):
    return ops.sigmoid_attention(q, k, v, causal=True, bias=-3.0, implementation="pallas", kv_mask=padding)
def listed(q, k, v):
    return ops.block_attention(q, k, v, index, block_q=128, block_kv=128, causal=True, implementation="pallas")
def both(q, k, v, do):
    results = []
    for op in (dense, listed):
        out, pullback = jax.vjp(op, q, k, v)
        results += [out, *pullback(do)]
    return results
options = {"xla_backend_optimization_level": 0}
with dispatch.interpreted():
    alone = jax.jit(both, compiler_options=options)(q, k, v, do)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P("data"))
        args = [jax.device_put(x, split) for x in (q, k, v, do)]
        program = jax.jit(both, compiler_options=options)
        shared = program(*args)
for one, other in zip(alone, shared):
    np.testing.assert_allclose(one, other, atol=1e-5)
assert len(shared[0].sharding.device_set) == 8
print("equal")
"""


def test_sharded_equals_unsharded(run_python):
    assert "equal" in run_python(["-c", SHARDED], devices=8).stdout

"""Attention of sequences that eight devices split equals that of one: values and gradients, in processes of their own."""

COMMON = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from attnlab import ops
from attnlab.ops import dispatch

def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

def draw(length=64, keys=None, heads=4, kv_heads=2, batch=2, width=16, dtype=jnp.float32):
    keys = length if keys is None else keys
    shapes = ((batch, length, heads, width), *[(batch, keys, kv_heads, width)] * 2, (batch, length, heads, width))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(jax.random.split(jax.random.key(0), 4), shapes)]

def pulled(op, implementation, options, q, k, v, do, slopes):
    extra = {} if slopes is None else {"alibi_slopes": slopes}
    out, pullback = jax.vjp(lambda q, k, v, s: op(q, k, v, implementation=implementation, **options, **(s or {})), q, k, v, extra)
    return out, *pullback(do)

def compare(op, mesh, arrays, options, implementation="ring", atol=2e-5, compiler_options=None):
    slopes = options.pop("alibi_slopes", None)
    want = jax.jit(functools.partial(pulled, op, "xla", options))(*arrays, slopes)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(pulled, op, implementation, options), compiler_options=compiler_options)
        have = run(*arrays, slopes)
    if implementation != "pallas" and not dispatch.interpreting():
        assert len(have[0].sharding.device_set) == 8
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), atol=atol, rtol=1e-4)
"""

MASKS = """
segments = jnp.cumsum(jax.random.bernoulli(jax.random.key(3), 0.1, (2, 64)), axis=1).astype(jnp.int32)
positions = jax.random.randint(jax.random.key(4), (2, 64), -10, 80)
slopes = jnp.array([0.5, 0.2, 0.1, 0.0])
CASES = {
    "causal": ({}, {"causal": True}),
    "full, ragged, more keys": ({"length": 50, "keys": 61, "kv_heads": 4}, {}),
    "queries before the first key": ({"keys": 40}, {"causal": True}),
    "causal window: the ring stops early": ({}, {"causal": True, "window": 20}),
    "window of both sides": ({}, {"window": (20, 9)}),
    "segments and padding": (
        {}, {"causal": True, "q_segment_ids": segments, "kv_mask": jnp.arange(64)[None] < jnp.array([[64], [40]])},
    ),
    "positions, empty slots, ALiBi": (
        {}, {"causal": True, "q_positions": jnp.abs(positions), "kv_positions": positions, "alibi_slopes": slopes},
    ),
    "ALiBi of both sides, one per row": ({}, {"alibi_slopes": jnp.stack([slopes, 2 * slopes])}),
}
mesh = mesh_of(tensor=2, context=4)
for name, (shape, options) in CASES.items():
    for op, more in ((ops.softmax_attention, {}), (ops.sigmoid_attention, {"bias": -2.0})):
        print(name, op.__name__, flush=True)
        compare(op, mesh, draw(**shape), {**options, **more})
eight = mesh_of(context=8)
compare(ops.softmax_attention, eight, draw(kv_heads=1), {"causal": True})
compare(ops.sigmoid_attention, eight, draw(), {"causal": True, "row_normalization": "row", "temperature": 0.3})
compare(ops.softmax_attention, mesh_of(data=2, context=4), draw(dtype=jnp.bfloat16), {"causal": True}, atol=6e-2)
print("equal")
"""


def test_every_mask_equals_one_device(run_python):
    assert run_python(["-c", COMMON + MASKS], devices=8).stdout.strip().endswith("equal")


KERNELS = """
mesh = mesh_of(data=2, context=4)
low = {"xla_backend_optimization_level": 0}
segments = jnp.broadcast_to(jnp.arange(512) // 200, (2, 512))
shape = {"length": 512, "heads": 2, "kv_heads": 1, "width": 32}
with dispatch.interpreted():
    compare(ops.softmax_attention, mesh, draw(**shape), {"causal": True, "q_segment_ids": segments}, compiler_options=low)
    compare(ops.sigmoid_attention, mesh, draw(**shape), {"causal": True, "bias": -3.0}, compiler_options=low)
print("equal")
"""


def test_kernels_in_the_ring_equal_the_reference(run_python):
    assert run_python(["-c", COMMON + KERNELS], devices=8).stdout.strip() == "equal"


CHOICE = """
mesh = mesh_of(context=8)

def bytes_of(length, op):
    split = NamedSharding(mesh, P(None, "context"))
    x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16, sharding=split)
    with jax.set_mesh(mesh):
        assert ops.explain(op, x, x, x, causal=True).chosen == "ring"
        loss = lambda q, k, v: op(q, k, v, causal=True).astype(jnp.float32).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    text = compiled.as_text()
    assert "collective-permute" in text and "all-gather" not in text
    return compiled.memory_analysis().temp_size_in_bytes

for op in (ops.softmax_attention, ops.sigmoid_attention):
    short, long = (bytes_of(length, op) for length in (2**15, 2**16))
    print(op.__name__, short, long)
    assert long < 2.2 * short  # scores of whole parts would make it four times

x = jnp.zeros((1, 64, 2, 8))
try:
    ops.softmax_attention(x, x, x, implementation="ring")
except NotImplementedError as error:
    assert "no mesh in force splits sequences" in str(error)
with jax.set_mesh(mesh):
    one = jnp.zeros((1, 1, 2, 8))
    decision = ops.explain(ops.softmax_attention, one, x, x)
    assert decision.chosen == "xla" and "fewer" in decision.reasons["ring"], str(decision)
    mask = jnp.ones((1, 1, 64, 64), bool)
    decision = ops.explain(ops.sigmoid_attention, x, x, x, mask=mask)
    assert decision.chosen == "xla" and "dense mask" in decision.reasons["ring"], str(decision)
    with dispatch.target("tpu", "TPU v5 lite"):
        decision = ops.explain(ops.softmax_attention, x, x, x)
        assert decision.chosen == "ring" and "'ring'" in decision.reasons["splash"], str(decision)
print("chosen")
"""


def test_the_ring_is_chosen_and_its_memory_is_linear(run_python):
    assert run_python(["-c", COMMON + CHOICE], devices=8).stdout.strip().endswith("chosen")

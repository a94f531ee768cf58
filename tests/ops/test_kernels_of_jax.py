"""Splash attention and cuDNN as we call them: values in the interpreter, compiled for the chips, split over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.ops import dispatch
from attnlab.ops.splash import block_length


def lengths(*, length=200, keys=None, width=64, **options):
    return length, length if keys is None else keys, width, options


CASES = {
    "causal": lengths(causal=True),
    "fewer queries": lengths(length=100, keys=300, width=32, causal=True),
    "full, ragged": lengths(),
    "window": lengths(length=130, keys=200, window=(30, 10)),
    "segments": lengths(causal=True, q_segment_ids=jnp.broadcast_to(jnp.arange(200) // 70, (2, 200))),
    "padding": lengths(causal=True, window=20, kv_mask=jnp.arange(200)[None] >= jnp.array([[40], [0]])),
}


@pytest.mark.parametrize("name", CASES)
def test_splash_equals_the_reference(name, draw):
    length, keys, width, options = CASES[name]
    arrays = draw(length=length, keys=keys, width=width)

    def gradients(implementation, *arrays):
        def op(*x):
            return ops.softmax_attention(*x, implementation=implementation, **options)

        out, pullback = jax.vjp(op, *arrays[:3])
        return out, *pullback(arrays[3])

    with dispatch.interpreted():
        have = jax.jit(lambda *x: gradients("splash", *x))(*arrays)
    for one, other in zip(have, jax.jit(lambda *x: gradients("xla", *x))(*arrays), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_blocks_pad_little():
    for length in (1, 63, 128, 200, 512, 600, 1000, 4096, 5000):
        block = block_length(length)
        assert block % 128 == 0 and block <= 512
        assert -length % block < max(128, length / 3)


COMPILE = """
import sys
from attnlab.training import aot_environment
spec, chosen, marker, count = sys.argv[1:]
aot_environment.prepare(spec)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnlab import ops
from attnlab.training import aot, topology

target = topology.parse(spec)
mesh = Mesh(np.array(target.devices()).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
with jax.set_mesh(mesh), aot.cudnn_without_device():
    for length, kv_heads, width, options in (
        (512, 2, 128, dict(causal=True)), (600, 1, 64, dict(causal=True, window=128)), (300, 2, 64, {}),
    ):
        whole = NamedSharding(mesh, P("data", None, "tensor"))
        few = whole if kv_heads % 2 == 0 else NamedSharding(mesh, P("data"))
        q = jax.ShapeDtypeStruct((4, length, 8, width), jnp.bfloat16, sharding=whole)
        kv = jax.ShapeDtypeStruct((4, length, kv_heads, width), jnp.bfloat16, sharding=few)
        decision = ops.explain(ops.softmax_attention, q, kv, kv, **options)
        assert decision.chosen == chosen, str(decision)
        loss = lambda q, k, v: ops.softmax_attention(q, k, v, **options).astype(jnp.float32).sum()
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, kv, kv)
        text = traced.lower(lowering_platforms=(target.lowering_platform,)).compile().as_text()
        assert text.count(marker) >= int(count), text.count(marker)
        assert f"{length},{length}" not in text  # no score matrix anywhere
print("compiled")
"""


@pytest.mark.parametrize(
    ("spec", "chosen", "marker", "count"),
    [("tpu:v5e:2x2", "splash", "tpu_custom_call", 3), ("gpu:h100:4", "cudnn", "__cudnn$fmha", 2)],
)
def test_forward_and_backward_compile_for_the_chip(spec, chosen, marker, count, run_python):
    done = run_python(["-c", COMPILE, spec, chosen, marker, str(count)])
    assert done.stdout.strip().endswith("compiled"), done.stderr[-2000:]


MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from attnlab import ops
from attnlab.ops import dispatch, sharding

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
key = jax.random.split(jax.random.key(0), 3)
for batch, heads, kv_heads in ((4, 4, 2), (2, 4, 1), (3, 2, 2), (4, 3, 3)):
    q = jax.random.normal(key[0], (batch, 128, heads, 32))
    k, v = (jax.random.normal(one, (batch, 128, kv_heads, 32)) for one in key[1:])
    segments = jnp.broadcast_to(jnp.arange(128) // 50, (batch, 128))
    options = dict(causal=True, q_segment_ids=segments)
    fn = lambda name: jax.jit(lambda *x: ops.softmax_attention(*x, implementation=name, **options))
    want = fn("xla")(q, k, v)
    with jax.set_mesh(mesh), dispatch.interpreted():
        assert sharding.axes_for("batch", batch) == {4: ("data", "fsdp"), 2: ("data",), 3: None}[batch]
        np.testing.assert_allclose(fn("splash")(q, k, v), want, atol=1e-5)
        np.testing.assert_allclose(fn(None)(q, k, v), want, atol=1e-5)
context = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
with jax.set_mesh(context), dispatch.target("tpu"):
    whole = jax.ShapeDtypeStruct((4, 1024, 4, 64), jnp.bfloat16)
    decision = ops.explain(ops.softmax_attention, whole, whole, whole, causal=True)
    assert decision.chosen == "ring" and "splits sequences" in decision.reasons["splash"], str(decision)
    with sharding.mesh_axes(batch=("data",), heads=(), sequence=()):
        assert ops.explain(ops.softmax_attention, whole, whole, whole, causal=True).chosen == "splash"
print("equal")
"""


def test_kernels_over_a_mesh_equal_one_device(run_python):
    assert run_python(["-c", MESH], devices=8).stdout.strip() == "equal"

"""The memory kernels in the interpreters of Pallas and Triton: values and gradients against the token-by-token reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.ops import dispatch
from attnlab.ops.neural_memory import MemoryState, neural_memory

# Interpreted kernels are long programs that run for milliseconds: compile them without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(length, depth=1, batch=2, heads=1, width=4, inner=6):
    """Inputs of `neural_memory`, weights, and a state that an earlier call may have left."""
    keys = iter(jax.random.split(jax.random.key(0), 20))
    q, k, v = (jax.random.normal(next(keys), (batch, length, heads, width)) for _ in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    theta, eta, alpha = (jax.random.uniform(next(keys), (batch, length, heads)) for _ in range(3))
    widths = [width, *(inner,) * (depth - 1), width]

    def layers(*lead):
        return [jax.random.normal(next(keys), (*lead, heads, i, o)) * i**-0.5 for i, o in itertools.pairwise(widths)]

    weights = layers()
    carried = [tuple(layers(batch)) for _ in range(3)]
    return (q, k, v, 0.1 * theta, eta, 0.3 * alpha), weights, MemoryState(*carried, jnp.full((batch,), 3, jnp.int32))


def pulled(op, *arrays):
    """Results, and gradients for cotangents that differ from element to element."""
    results, pullback = jax.vjp(op, *arrays)
    wave = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), results)
    return results, pullback(wave)


def packed(length):
    ids = np.ones((2, length), np.int32)
    ids[0, length // 4 :] = 2
    ids[0, length // 2] = 0
    ids[1, length // 3 :] = 3
    return jnp.asarray(ids)


PADDED = jnp.asarray(np.arange(14) % 5 != 2)[None].repeat(2, axis=0).at[1, 4:].set(False)
CASES = {
    "two layers, segments, a carried state": {"length": 17, "depth": 2, "carried": True, "segment_ids": packed(17)},
    "read before the write": {"length": 11, "heads": 2, "width": 40, "chunk_size": 5, "retrieve": "before"},
    "a carried chunk goes on, padding": {"length": 14, "carried": True, "mask": PADDED},
    "segments after a prefix, gates at their ends": {"length": 22, "prefix": 3, "ends": True, "segment_ids": packed(22)},
    "many short segments": {"length": 12, "segment_ids": jnp.arange(24).reshape(2, 12) // 2 + 1},
}


def both(case, implementation):
    """Results and gradients of a case by a kernel and by the reference."""
    case = {"depth": 1, "heads": 1, "width": 4, "carried": False, "ends": False, "prefix": 0, "chunk_size": 8} | case
    inputs, weights, state = draw(**{name: case.pop(name) for name in ("length", "depth", "heads", "width")})
    carried, ends, prefix = (case.pop(name) for name in ("carried", "ends", "prefix"))
    if ends:
        inputs = (*inputs[:4], jnp.round(inputs[4]), jnp.round(inputs[5]))
    given = state if carried else jax.tree.map(lambda x: x[:1], state)

    def op(name, inputs, weights, states):
        options = dict(case)
        if carried:
            options["state"] = MemoryState(*states, given.count)
        elif prefix:
            options |= {"begin": MemoryState(*states, given.count), "begin_count": prefix}
        result = neural_memory(*inputs, weights, implementation=name, **options)
        after = result.state
        return result.y, result.loss, (after.start, after.weights, after.momentum)

    states = (given.start, given.weights, given.momentum) if carried or prefix else ()
    with dispatch.interpreted():
        have = jit(functools.partial(pulled, functools.partial(op, implementation)))(inputs, weights, states)
    return have, jax.jit(functools.partial(pulled, functools.partial(op, "xla_recurrent")))(inputs, weights, states)


NAMES = list(CASES)
KERNELS = [*(("pallas", name) for name in NAMES[:-1]), *(("triton", name) for name in NAMES[1:])]


@pytest.mark.parametrize(("implementation", "name"), KERNELS)
def test_equals_the_recurrent_form(implementation, name):
    for have, want in zip(*map(jax.tree.leaves, both(CASES[name], implementation)), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5 * (1 + np.abs(want).max()), rtol=0)


def test_refusals_and_choice():
    def explain(length=64, width=64, inner=(), **options):
        tokens = [jax.ShapeDtypeStruct((1, length, 2, width), jnp.float32)] * 3
        gates = [jax.ShapeDtypeStruct((1, length, 2), jnp.float32)] * 3
        weights = [jnp.zeros((2, *pair)) for pair in itertools.pairwise((width, *inner, width))]
        return ops.explain("neural_memory", *tokens, *gates, weights=weights, **options)

    for kernel, platform in (("pallas", "tpu"), ("triton", "gpu")):
        with dispatch.target(platform):
            decision = explain()
            assert decision.chosen == "xla_chunked" and "name it" in decision.reasons[kernel]
            assert "at least 16" in explain(length=3).reasons[kernel]
            assert explain(implementation=kernel).chosen == kernel
            with pytest.raises(NotImplementedError, match="chunk_size = 256"):
                explain(chunk_size=256, implementation=kernel)
        with pytest.raises(NotImplementedError, match=f"runs on {platform}"):
            explain(implementation=kernel)
    with dispatch.target("tpu"):
        assert explain(inner=(256,), implementation="pallas").chosen == "pallas"
        with pytest.raises(NotImplementedError, match="64 x 4096 x 64 does not fit"):
            explain(inner=(4096,), implementation="pallas")
        with pytest.raises(NotImplementedError, match="up to 2 layers, not 3"):
            explain(inner=(64, 64), implementation="pallas")
    with dispatch.target("gpu"):
        with pytest.raises(NotImplementedError, match="one layer in registers, not one of 2"):
            explain(inner=(64,), implementation="triton")
        with pytest.raises(NotImplementedError, match="H <= 64 in registers, not 128"):
            explain(width=128, implementation="triton")


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from attnlab.ops import dispatch
from attnlab.ops.neural_memory import neural_memory

keys = jax.random.split(jax.random.key(0), 7)
q, k, v = (0.5 * jax.random.normal(key, (2, 9, 2, 4)) for key in keys[:3])
gates = [0.2 * jax.random.uniform(key, (2, 9, 2)) for key in keys[3:6]]
weights = [0.5 * jax.random.normal(keys[6], (2, 4, 4))]

def run(name, *inputs):
    result, pullback = jax.vjp(lambda *x: neural_memory(*x[:6], x[6], chunk_size=8, implementation=name).y, *inputs)
    return result, pullback(jnp.cos(result))

inputs = (q, k, v, *gates, weights)
want = jax.jit(lambda *x: run("xla_chunked", *x))(*inputs)
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
for kernel in ("pallas", "triton"):
    with jax.set_mesh(mesh), dispatch.interpreted():
        have = jax.jit(lambda *x: run(kernel, *x), compiler_options={"xla_backend_optimization_level": 0})(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), have, want)
print("equal")
"""


def test_sharded_over_batch_and_heads_equals_unsharded(run_python):
    assert run_python(["-c", SHARDED], devices=4).stdout.strip().endswith("equal")

"""The scan kernels in Pallas' interpreter: values and gradients against the token-by-token reference and `run_chains`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.ops import chunk_scan, dispatch, sparse_state
from attnlab.ops.linear_scan import l2_normalize
from kernels_pallas.common.state_scan import sharded_scan
from kernels_pallas.state_scan import state_scan
from kernels_pallas.state_scan.chunk import unit_lower_inverses

HK, HV = 8, 4
# Interpreted kernels are long programs that run for milliseconds: compile them without optimisation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(lead, channel=True, strength=0.3, seed=0):
    """q, k, v [*lead, H], log decays [*lead, Hk or 1], beta [*lead, 1]."""
    keys = jax.random.split(jax.random.key(seed), 5)
    q, k = (jax.random.normal(key, (*lead, HK)) for key in keys[:2])
    v = jax.random.normal(keys[2], (*lead, HV))
    log_decay = -strength * jax.random.exponential(keys[3], (*lead, HK if channel else 1))
    return q, l2_normalize(k), v, log_decay, jax.nn.sigmoid(jax.random.normal(keys[4], (*lead, 1)))


def pulled(op, *arrays):
    """Results, and gradients for cotangents that differ from element to element."""
    results, pullback = jax.vjp(op, *arrays)
    cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype), results)
    return results, pullback(cotangents)


def assert_close(have, want, tolerance):
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        other = np.asarray(other, np.float32)
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=tolerance * (1 + np.abs(other).max()), rtol=0)


def masks(batch, length):
    segments = np.ones((batch, length), np.int32)
    segments[:, length // 3 :] = 2
    segments[-1, length // 2 : length // 2 + 3] = 0
    segments[-1, -2:] = 7
    real = np.arange(length) % 11 != 5
    return {"segment_ids": jnp.asarray(segments), "mask": jnp.asarray(np.broadcast_to(real, segments.shape))}


# length, heads, delta, per channel, type, masks, strength of the decay
CASES = {
    "linear, one token": (1, 1, False, False, jnp.float32, False, 0.3),
    "linear, bfloat16": (40, 2, False, False, jnp.bfloat16, True, 0.3),
    "linear, channels, resets and strong decays": (40, 1, False, True, jnp.float32, True, 60.0),
    "delta, heads side by side": (17, 3, True, False, jnp.float32, True, 0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_recurrent_form(name):
    length, heads, delta, channel, dtype, masked, strength = CASES[name]
    q, k, v, log_decay, beta = draw((1, length, heads), channel, strength)
    if strength > 1:
        log_decay = log_decay.at[:, ::7].set(0.0).at[:, 5::9].set(-jnp.inf)
    state = jax.random.normal(jax.random.key(9), (1, heads, HK, HV))
    options = {"chunk_size": 16, **(masks(1, length) if masked else {})}
    low = [x.astype(dtype) for x in (q, k, v)]
    log_decay, beta = log_decay if channel else log_decay[..., 0], beta[..., 0]

    def op(implementation, state, log_decay, beta, *qkv):
        named = {"initial_state": state, "implementation": implementation, **options}
        return ops.gated_delta_scan(*qkv, log_decay, beta, **named) if delta else ops.gated_linear_scan(*qkv, log_decay, **named)

    with dispatch.interpreted():
        have = jit(functools.partial(pulled, functools.partial(op, "pallas")))(state, log_decay, beta, *low)
    wide = [x.astype(jnp.float32) for x in low]
    want = jax.jit(functools.partial(pulled, functools.partial(op, "recurrent")))(state, log_decay, beta, *wide)
    assert have[0][0].dtype == dtype and have[0][1].dtype == jnp.float32
    # bfloat16: factors of products are rounded to 8 bits
    assert_close(have, want, {"float32": 5e-6, "bfloat16": 2e-2}[jnp.dtype(dtype).name])
    assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(have))


def test_chains_of_chunks():
    """Several chains per row, chains without chunks, cleared ones, a row of padding alone; and the same bits twice."""
    chain = jnp.array([[0, 0, 2, 3], [1, 1, 1, 3], [3, 3, 3, 3]])  # ends in the padding of the last chain, as streams do
    first = jnp.array([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    last = jnp.array([[1, -1, 2, 3], [-1, 2, -1, -1], [-1, -1, -1, -1]])
    used = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)[:, None, :, None, None]
    cleared = jnp.zeros((3, 4), bool).at[0, 1:3].set(True)
    chains = chunk_scan.Chains(chain, first, last, cleared)
    initial = jax.random.normal(jax.random.key(5), (3, 4, 1, HK, HV))
    high = jax.lax.Precision.HIGHEST

    def padded(q, k, v, log_decay):  # in here, so that nothing that padding does counts as a gradient
        q, k, v = (jnp.where(used, x, 0.0) for x in (q, k, v))
        return q, k, v, jnp.where(used, jnp.exp(log_decay), 1.0), None

    def kernel(*arrays):
        return state_scan(*padded(*arrays[:-1]), chains, arrays[-1], high, interpret=True)

    def reference(*arrays):
        parts = chunk_scan.contributions(*padded(*arrays[:-1]), high)
        return chunk_scan.run_chains(parts, chains, arrays[-1], None, high)

    run = jit(functools.partial(pulled, kernel))
    arrays = (*draw((3, 1, 4, 16), channel=False)[:4], initial)
    have, again = run(*arrays), run(*arrays)
    assert_close(have, jax.jit(functools.partial(pulled, reference))(*arrays), 5e-6)
    jax.tree.map(np.testing.assert_array_equal, have, again)
    assert not np.any(have[0][1][0, 1:3]) and np.any(have[0][1][0, 0])
    np.testing.assert_array_equal(have[0][1][2], initial[2])  # padding leaves every state as it was


def test_a_split_sequence_continues():
    """Two parts of a sequence on an axis give what the whole gives (`vmap` stands for the mesh)."""
    whole = draw((1, 1, 4, 16), channel=False)
    whole = (*whole[:3], jnp.exp(whole[3]))
    initial = jax.random.normal(jax.random.key(5), (1, 1, 1, HK, HV))
    high = jax.lax.Precision.HIGHEST

    def split(*arrays):
        parts = [x.reshape(1, 1, 2, 2, *x.shape[3:]).swapaxes(0, 2)[:, 0, :, None] for x in arrays]
        local = lambda *x: sharded_scan(state_scan, *x, None, None, initial, "context", high, interpret=True)  # noqa: E731
        out, final = jax.vmap(local, axis_name="context")(*parts)
        return out, final

    out, final = jit(split)(*whole)
    parts = chunk_scan.contributions(*whole, None, high)
    want, state = jax.jit(lambda parts: chunk_scan.run_chains(parts, None, initial, None, high))(parts)
    assert_close((out.reshape(want.shape), final[0], final[1]), (want, state, state), 5e-6)


def test_sparse_states_equal_the_sorted_streams_in_xla():
    """Ragged partitions, one of them without tokens, segments, padding and states that go on."""
    q, k, v, decay, beta = draw((1, 30, 1), channel=False)
    q2, k2, _, decay2, beta2 = draw((1, 30, 1), channel=False, seed=1)
    logits = (2.0 * jax.random.normal(jax.random.key(2), (1, 30, 4))).at[..., 3].set(-9.0)
    initial = jax.random.normal(jax.random.key(3), (1, 5, 1, HK, HV))
    betas = {"beta_shared": beta[..., 0], "beta_sparse": beta2[..., 0]}

    def op(implementation, logits, initial, betas, *arrays):
        options = {"chunk_size": 16, "implementation": implementation, **masks(1, 30), **betas}
        return ops.sparse_state_attention(*arrays, sparse_state.route(logits, 2, 2), initial_state=initial, **options)

    arrays = (logits, initial, betas, q, q2, k, k2, v, decay[..., 0], decay2[..., 0])
    with dispatch.interpreted():
        have = jit(functools.partial(pulled, functools.partial(op, "pallas")))(*arrays)
    want = jax.jit(functools.partial(pulled, functools.partial(op, "varlen")))(*arrays)
    assert_close(have, want, 2e-5)


@pytest.mark.parametrize("size", [16, 64])
def test_inverses_are_stable(size):
    """Triangles that are close to singular in float32 for other methods: repeated keys, three of them side by side."""
    lower = [jnp.tril(jnp.ones((size, size)), -1), jnp.tril(0.3 * jax.random.normal(jax.random.key(0), (size, size)), -1)]
    lower.append(-0.5 * lower[0])
    have = jit(functools.partial(unit_lower_inverses, passes=6))(tuple(lower))
    for one, matrix in zip(have, lower, strict=True):
        want = np.linalg.inv(np.eye(size) + np.asarray(matrix, np.float64))
        np.testing.assert_allclose(one, want, atol=2e-6 * np.abs(want).max())


def test_refusals_and_choice():
    arrays = [jax.ShapeDtypeStruct((1, 32, 1, 8), jnp.float32)] * 3
    with dispatch.target("tpu", "TPU v5 lite"):
        decision = ops.explain(ops.gated_linear_scan, *arrays)
        assert decision.chosen == "chunked" and "name it" in decision.reasons["pallas"]
        assert ops.explain(ops.gated_linear_scan, *arrays, implementation="pallas").chosen == "pallas"
        short = [jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)] * 3
        decision = ops.explain(ops.gated_linear_scan, *short)
        assert decision.chosen == "chunked" and "at least 16" in decision.reasons["pallas"]
        for change, reason in (((1, 32, 1, 300), "up to 256 x 512"), (jnp.float16, "not float16")):
            shape, dtype = (change, jnp.float32) if isinstance(change, tuple) else ((1, 32, 1, 8), change)
            given = [jax.ShapeDtypeStruct(shape, dtype)] * 3
            with pytest.raises(NotImplementedError, match=reason):
                ops.explain(ops.gated_linear_scan, *given, implementation="pallas")
        sparse = [*[arrays[0]] * 7, sparse_state.route(jnp.zeros((1, 32, 4)), 1, 2)]
        with pytest.raises(NotImplementedError, match="as many writers as readers"):
            ops.explain(ops.sparse_state_attention, *sparse, implementation="pallas")
    with pytest.raises(NotImplementedError, match="runs on tpu"):
        ops.explain(ops.gated_linear_scan, *arrays, implementation="pallas")

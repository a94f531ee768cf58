"""The Triton scan kernels in Triton's interpreter: values and gradients against the token-by-token reference and `run_chains`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.ops import chunk_scan, dispatch, sparse_state
from attnlab.ops.linear_scan import l2_normalize
from kernels_pallas.attention_triton import launch
from kernels_pallas.common.state_scan import sharded_scan
from kernels_pallas.state_scan_triton import refusal, state_scan, tuning

HIGHEST = jax.lax.Precision.HIGHEST


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 channels, so that small states have several of them."""
    monkeypatch.setattr(tuning, "lookup", lambda kernel, **sizes: tuning.Tile(16, 16, 4, 1))


def draw(lead, channel=True, strength=0.3, rows=24, width=20, seed=0):
    """q, k, v [*lead, H], log decays [*lead, Hk or 1], beta [*lead, 1]."""
    keys = jax.random.split(jax.random.key(seed), 5)
    q, k = (jax.random.normal(key, (*lead, rows)) for key in keys[:2])
    v = jax.random.normal(keys[2], (*lead, width))
    log_decay = -strength * jax.random.exponential(keys[3], (*lead, rows if channel else 1))
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


# length, heads, delta, per channel, type, masks, strength of the decay, chunk
CASES = {
    "linear, one token": (1, 1, False, False, "float32", False, 0.3, 64),
    "linear, two chunks of the largest size": (80, 1, False, False, "float32", True, 0.3, 128),
    "linear, channels, resets and strong decays": (63, 1, False, True, "float32", True, 60.0, 32),
    "linear, channels, bfloat16": (30, 1, False, True, "bfloat16", True, 0.3, 16),
    "delta": (50, 2, True, False, "float32", True, 0.3, 32),
    "delta, bfloat16": (40, 1, True, False, "bfloat16", True, 0.3, 16),
    "delta, channels, resets and strong decays": (40, 1, True, True, "float32", True, 60.0, 16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_recurrent_form(name):
    length, heads, delta, channel, dtype, masked, strength, chunk = CASES[name]
    q, k, v, log_decay, beta = draw((1, length, heads), channel, strength)
    if strength > 1:
        log_decay = log_decay.at[:, ::7].set(0.0).at[:, 5::9].set(-jnp.inf)
    beta = beta.at[:, ::5].set(0.0)
    state = jax.random.normal(jax.random.key(9), (1, heads, 24, 20))
    options = {"chunk_size": chunk, **(masks(1, length) if masked else {})}
    low = [x.astype(dtype) for x in (q, k, v)]
    log_decay, beta = log_decay if channel else log_decay[..., 0], beta[..., 0]

    def op(implementation, state, log_decay, beta, *qkv):
        named = {"initial_state": state, "implementation": implementation, **options}
        return ops.gated_delta_scan(*qkv, log_decay, beta, **named) if delta else ops.gated_linear_scan(*qkv, log_decay, **named)

    with dispatch.interpreted():
        have = jax.jit(functools.partial(pulled, functools.partial(op, "triton")))(state, log_decay, beta, *low)
    wide = [x.astype(jnp.float32) for x in low]
    want = jax.jit(functools.partial(pulled, functools.partial(op, "recurrent")))(state, log_decay, beta, *wide)
    assert have[0][0].dtype == dtype and have[0][1].dtype == jnp.float32
    # bfloat16: the interpreter computes in float32, and only the inputs and results of kernels are rounded
    assert_close(have, want, {"float32": 2e-6, "bfloat16": 1e-2}[dtype])
    assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(have))


def test_chains_of_chunks():
    """Several chains per row, chains without chunks, cleared ones, a row of padding alone; and the same bits twice."""
    chain = jnp.array([[0, 0, 2, 3], [1, 1, 1, 3], [3, 3, 3, 3]])  # ends in the padding of the last chain, as streams do
    first = jnp.array([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    last = jnp.array([[1, -1, 2, 3], [-1, 2, -1, -1], [-1, -1, -1, -1]])
    used = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)[:, None, :, None, None]
    cleared = jnp.zeros((3, 4), bool).at[0, 1:3].set(True)
    chains = chunk_scan.Chains(chain, first, last, cleared)
    initial = jax.random.normal(jax.random.key(5), (3, 4, 1, 8, 4))

    def padded(q, k, v, log_decay):  # in here, so that nothing that padding does counts as a gradient
        q, k, v = (jnp.where(used, x, 0.0) for x in (q, k, v))
        return q, k, v, jnp.where(used, jnp.exp(log_decay), 1.0), None

    def kernel(*arrays):
        return state_scan(*padded(*arrays[:-1]), chains, arrays[-1], HIGHEST, interpret=True)

    def reference(*arrays):
        return chunk_scan.scan(*padded(*arrays[:-1]), chains, arrays[-1], None, HIGHEST)

    run = jax.jit(functools.partial(pulled, kernel))
    arrays = (*draw((3, 1, 4, 16), channel=False, rows=8, width=4)[:4], initial)
    have, again = run(*arrays), run(*arrays)
    assert_close(have, jax.jit(functools.partial(pulled, reference))(*arrays), 2e-6)
    jax.tree.map(np.testing.assert_array_equal, have, again)
    assert not np.any(have[0][1][0, 1:3]) and np.any(have[0][1][0, 0])
    np.testing.assert_array_equal(have[0][1][2], initial[2])  # padding leaves every state as it was


def test_a_split_sequence_continues():
    """Two parts of a sequence on an axis give what the whole gives (`vmap` stands for the mesh)."""
    q, k, v, log_decay, beta = draw((1, 1, 4, 16), channel=False, rows=8, width=4)
    whole = (q, k, v, jnp.exp(log_decay), beta)
    initial = jax.random.normal(jax.random.key(5), (1, 1, 1, 8, 4))

    def split(*arrays):
        parts = [x.reshape(1, 1, 2, 2, *x.shape[3:]).swapaxes(0, 2)[:, 0, :, None] for x in arrays]
        scan = functools.partial(sharded_scan, state_scan, interpret=True)
        return jax.vmap(lambda *x: scan(*x, None, initial, "context", HIGHEST), axis_name="context")(*parts)

    out, final = jax.jit(split)(*whole)
    want, state = jax.jit(lambda *x: chunk_scan.scan(*x, None, initial, None, HIGHEST))(*whole)
    assert_close((out.reshape(want.shape), final[0], final[1]), (want, state, state), 2e-6)


@pytest.mark.parametrize("delta", [False, True])
def test_sparse_states_equal_the_sorted_streams_in_xla(delta):
    """Ragged partitions, one of them without tokens, segments, padding and states that go on."""
    batch, length, heads = 2, 22, 1
    lead = (batch, length, heads)
    q, k, v, decay, beta = draw(lead, not delta, rows=8, width=4)
    q2, k2, _, decay2, beta2 = draw(lead, not delta, rows=8, width=4, seed=1)
    decay, decay2 = (x[..., 0] if delta else x for x in (decay, decay2))
    logits = (2.0 * jax.random.normal(jax.random.key(2), (batch, length, 4))).at[..., 3].set(-9.0)
    initial = jax.random.normal(jax.random.key(3), (batch, 5, heads, 8, 4))
    betas = {"beta_shared": beta[..., 0], "beta_sparse": beta2[..., 0]} if delta else {}

    def op(implementation, logits, initial, betas, *arrays):
        routing = sparse_state.route(logits, 2, 2)
        options = {"chunk_size": 16, "implementation": implementation, **masks(batch, length), **betas}
        return ops.sparse_state_attention(*arrays, routing, initial_state=initial, **options)

    arrays = (logits, initial, betas, q, q2, k, k2, v, decay, decay2)
    with dispatch.interpreted():
        have = jax.jit(functools.partial(pulled, functools.partial(op, "triton")))(*arrays)
    want = jax.jit(functools.partial(pulled, functools.partial(op, "varlen")))(*arrays)
    assert_close(have, want, 1e-5)


def test_refusals_and_choice(monkeypatch):
    arrays = [jax.ShapeDtypeStruct((1, 32, 1, 8), jnp.float32)] * 3
    with dispatch.target("gpu", "NVIDIA H100 80GB HBM3"):
        decision = ops.explain(ops.gated_linear_scan, *arrays)
        assert decision.chosen == "chunked" and "name it" in decision.reasons["triton"]
        assert ops.explain(ops.gated_linear_scan, *arrays, implementation="triton").chosen == "triton"
        short = [jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)] * 3
        assert "at least 16" in ops.explain(ops.gated_linear_scan, *short).reasons["triton"]
        for shape, dtype, reason in (((1, 32, 1, 300), jnp.float32, "up to 256"), ((1, 32, 1, 8), jnp.float16, "not float16")):
            given = [jax.ShapeDtypeStruct(shape, dtype)] * 3
            with pytest.raises(NotImplementedError, match=reason):
                ops.explain(ops.gated_linear_scan, *given, implementation="triton")
        routing = sparse_state.route(jnp.zeros((1, 32, 4)), 1, 2)
        sparse = [*[arrays[0]] * 7, routing]
        with pytest.raises(NotImplementedError, match="as many writers as readers"):
            ops.explain(ops.sparse_state_attention, *sparse, implementation="triton")
    with pytest.raises(NotImplementedError, match="runs on gpu"):
        ops.explain(ops.gated_linear_scan, *arrays, implementation="triton")
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in refusal(rows=8, dtype=jnp.float32)

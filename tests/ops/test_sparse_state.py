"""Sparse state expansion: sorted streams, masks and single steps equal a float64 transcription, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops import dispatch, partition_streams, row_sparse, sparse_state
from attnlab.ops.linear_scan import gated_linear_scan

B, N, HK, HV, P = 2, 2, 8, 4, 4


def draw(length, update="gla", partitions=P, seed=0):
    keys = jax.random.split(jax.random.key(seed), 12)
    q1, q2, k1, k2 = (jax.random.normal(key, (B, length, N, HK)) for key in keys[:4])
    v = jax.random.normal(keys[4], (B, length, N, HV))
    shape = (B, length, N, HK) if update == "gla" else (B, length, N)
    g1, g2 = (-0.3 * jax.random.exponential(key, shape) for key in keys[5:7])
    arrays = {"q_shared": q1, "q_sparse": q2, "k_shared": k1, "k_sparse": k2, "v": v}
    arrays |= {"log_decay_shared": g1, "log_decay_sparse": g2}
    if update == "gdn":
        betas = (jax.nn.sigmoid(jax.random.normal(key, (B, length, N))) for key in keys[7:9])
        arrays |= dict(zip(("beta_shared", "beta_sparse"), betas, strict=True))
    arrays["logits"] = 2.0 * jax.random.normal(keys[9], (B, length, partitions))
    arrays["initial_state"] = jax.random.normal(keys[10], (B, 1 + partitions, N, HK, HV))
    return arrays


def call(arrays, writers=1, readers=1, **options):
    arrays = dict(arrays)
    routing = sparse_state.route(arrays.pop("logits"), writers, readers)
    return sparse_state.sparse_state_attention(routing=routing, **arrays, **options)


def transcription(arrays, writers, readers, segments=None, real=None, read_factor=True, write_factor=True):
    """Token by token in float64, as the paper prints it."""
    a = {name: None if x is None else np.asarray(x, np.float64) for name, x in arrays.items()}
    length, partitions = a["logits"].shape[1:]
    out = np.zeros((B, length, N, HV))
    initial = a.get("initial_state")
    states = np.zeros((B, 1 + partitions, N, HK, HV)) if initial is None else initial.copy()

    def normal(x):
        return x / np.sqrt(np.sum(x * x) + 1e-6) if "beta_shared" in a else x

    for b in range(B):
        segment = None
        for t in range(length):
            if real is not None and not real[b, t]:
                continue
            if segments is not None:
                if segment is not None and segments[b, t] != segment:
                    states[b] = 0.0
                segment = segments[b, t]
            e = a["logits"][b, t]
            p = np.exp(e - e.max()) / np.exp(e - e.max()).sum()
            order = np.argsort(-p, kind="stable")
            for i in [-1, *order[:writers]]:
                side, factor = ("shared", 1.0) if i < 0 else ("sparse", p[i] if write_factor else 1.0)
                for n in range(N):
                    s = np.exp(a[f"log_decay_{side}"][b, t, n] * np.ones(HK))[:, None] * states[b, 1 + i, n]
                    k, u = normal(factor * a[f"k_{side}"][b, t, n]), a["v"][b, t, n]
                    if "beta_shared" in a:
                        u = a[f"beta_{side}"][b, t, n] * (u - k @ s)
                    states[b, 1 + i, n] = s + np.outer(k, u)
            for i in [-1, *order[:readers]]:
                side, factor = ("shared", 1.0) if i < 0 else ("sparse", p[i] if read_factor else 1.0)
                for n in range(N):
                    out[b, t, n] += HK**-0.5 * normal(factor * a[f"q_{side}"][b, t, n]) @ states[b, 1 + i, n]
    return out, states


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def with_gradients(arrays, writers, readers, implementation, chunk, flags, segment_ids=None, mask=None):
    masks = {"segment_ids": segment_ids, "mask": mask}
    options = {"implementation": implementation, "chunk_size": chunk, "read_factor": flags[0], "write_factor": flags[1]}
    fn = lambda arrays: call(arrays, writers, readers, **options, **masks)  # noqa: E731
    results, pullback = jax.vjp(fn, arrays)
    ct = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), results)
    return results, pullback(ct)[0]


def assert_all_equal(have, want, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), have, want)


CASES = [
    ("gla", 1, 1, 1, (True, True)),
    ("gla", 63, 2, 2, (True, True)),
    ("gla", 64, 1, 2, (True, True)),
    ("gla", 100, 1, 1, (False, True)),
    ("gdn", 100, 3, 3, (True, False)),
    ("gdn", 20, 1, 3, (True, True)),
]


@pytest.mark.parametrize(("update", "length", "writers", "readers", "flags"), CASES)
def test_forms_and_gradients_are_equal(update, length, writers, readers, flags):
    arrays = draw(length, update)
    expected = transcription(arrays, writers, readers, None, None, *flags)
    results, want = with_gradients(arrays, writers, readers, "recurrent", 16, flags)
    assert_all_equal(results, expected, 3e-5)
    for form in ("varlen", "mask") if writers == readers else ("mask",):
        results, gradients = with_gradients(arrays, writers, readers, form, 16, flags)
        assert_all_equal(results, expected, 3e-5)
        # The normalisation of the delta rule multiplies errors by 1 / |k p|.
        assert_all_equal(gradients, want, 1e-4 if update == "gla" else 1e-3)


@pytest.mark.parametrize("update", ["gla", "gdn"])
def test_segments_and_padding(update):
    length = 40
    segments = np.repeat([[1, 2, 3], [4, 0, 4]], [15, 2, 23], axis=1)
    mask = np.ones((B, length), bool)
    mask[0, [0, 15, 16, 20, 39]] = False
    real = mask & (segments != 0)
    clean = draw(length, update)
    arrays = {
        name: jnp.where(real.reshape(B, length, *(1,) * (x.ndim - 2)), x, jnp.nan) if x.shape[1] == length else x
        for name, x in clean.items()
    }
    expected = transcription(clean, 2, 2, segments, real)
    masks = {"segment_ids": jnp.asarray(segments), "mask": jnp.asarray(mask)}
    _, want = with_gradients(clean, 2, 2, "recurrent", 8, (True, True), **masks)
    for form in ("recurrent", "varlen", "mask"):
        results, gradients = with_gradients(arrays, 2, 2, form, 8, (True, True), **masks)
        assert_all_equal(results, expected, 3e-5)
        assert not np.any(results[0][~real])
        for name, leaf in gradients.items():
            if name != "logits":  # the softmax of NaN logits is the caller's
                np.testing.assert_allclose(leaf, want[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["varlen", "recurrent"])
def test_a_reset_clears_partitions_that_are_not_written_after_it(form):
    arrays = draw(12)
    arrays["logits"] = jnp.zeros((B, 12, P)).at[:, :6, 1].set(9.0).at[:, 6:, 2].set(9.0)
    segments = np.repeat([[1, 2], [5, 7]], 6, axis=1)
    results, gradients = with_gradients(arrays, 1, 1, form, 4, (True, True), segment_ids=jnp.asarray(segments))
    assert_all_equal(results, transcription(arrays, 1, 1, segments), 3e-5)
    assert not np.any(results[1][:, [1, 2, 4]]) and not np.any(gradients["initial_state"][:, [1, 3, 4]])


def test_empty_partitions_and_rows_of_padding():
    """All tokens to one partition: the others have streams of length zero; a padded row has no stream at all."""
    arrays = draw(40)
    arrays["logits"] = jnp.zeros((B, 40, P)).at[..., 2].set(9.0)
    mask = jnp.zeros((B, 40), bool).at[0].set(True)
    for form in ("varlen", "mask", "recurrent"):
        (out, state), gradients = with_gradients(arrays, 1, 1, form, 16, (True, True), mask=mask)
        assert_all_equal((out[0], state[0]), tuple(x[0] for x in transcription(arrays, 1, 1)), 3e-5)
        assert not np.any(out[1])
        np.testing.assert_array_equal(state[1], arrays["initial_state"][1])
        np.testing.assert_array_equal(state[0, [1, 2, 4]], arrays["initial_state"][0, [1, 2, 4]])
        for name, leaf in gradients.items():
            assert np.all(np.isfinite(leaf))
            assert name == "initial_state" or not np.any(leaf[1])


def test_streams_are_sorted_padded_and_bounded():
    index = jax.random.randint(jax.random.key(0), (B, 50, 1), 0, 5)
    index = jnp.concatenate([index, (index + 1) % 5], axis=-1)
    valid = jnp.ones((B, 50), bool).at[1, 40:].set(False)
    streams = partition_streams.lay_out(index, 5, 8, valid)
    slots, chunks = streams.used.shape[1], streams.chain.shape[1]
    assert slots == 8 * chunks == 8 * ((100 + 5 * 7) // 8)
    for b in range(B):
        used = np.flatnonzero(streams.used[b])
        entries = np.asarray(streams.entry[b])[used]
        partition = np.asarray(index[b]).reshape(-1)[entries]
        order = np.stack([partition, entries // 2], axis=1)
        assert order.tolist() == sorted(order.tolist())
        assert np.array_equal(np.asarray(streams.chain[b])[used // 8], partition)  # a chunk has one partition
        assert sorted(entries) == list(range(100 if b == 0 else 80))
        assert np.array_equal(np.asarray(streams.slot[b]).reshape(-1)[entries], used)
        for p in range(5):
            mine = np.flatnonzero((np.asarray(streams.chain[b]) == p)[: used.max() // 8 + 1])
            assert streams.first[b, mine[0]] and streams.last[b, p] == mine[-1]
    x = jax.random.normal(jax.random.key(1), (B, 50, 2, 3))
    y = jax.random.normal(jax.random.key(2), (B, slots, 2, 3))
    spread, back = jax.vjp(lambda x: partition_streams.expand(x, streams), x)
    collapsed = partition_streams.collapse(y, streams)
    np.testing.assert_allclose(jnp.sum(spread * y), jnp.sum(x * collapsed), rtol=1e-4)
    np.testing.assert_allclose(back(y)[0], collapsed)


def test_routing_is_float32_ordered_and_carries_gradients_only_where_chosen():
    logits = jnp.array([[[0.0, 1.0, 1.0, 1.0], [3.0, -1.0, 0.0, 2.0]]], jnp.bfloat16)
    routing = sparse_state.route(logits, 2, 1)
    assert routing.probability.dtype == jnp.float32
    assert routing.write_index.tolist() == [[[1, 2], [0, 3]]] and routing.read_index.tolist() == [[[1], [0]]]
    assert routing.write_mask().tolist() == [[[False, True, True, False], [True, False, False, True]]]
    arrays = draw(1)
    arrays.pop("initial_state")
    gradient = jax.grad(lambda e: call(arrays | {"logits": e})[0].sum())(arrays["logits"])
    assert np.all(gradient != 0)  # the Jacobian of the softmax spreads it
    np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=1e-5)


def test_load_balance_loss():
    balanced = sparse_state.route(10.0 * jnp.eye(4)[None].repeat(2, axis=0), 1, 1)
    np.testing.assert_allclose(sparse_state.load_balance_loss(balanced), 1.0, rtol=1e-5)
    logits = jax.random.normal(jax.random.key(0), (2, 9, 4))
    routing = sparse_state.route(logits, 2, 1)
    valid = jnp.ones((2, 9), bool).at[0, 4:].set(False)
    p, w = (np.asarray(x)[np.asarray(valid)] for x in (routing.probability, routing.write_mask()))
    want = 4 / 2 * np.sum(p.mean(0) * w.mean(0))
    np.testing.assert_allclose(sparse_state.load_balance_loss(routing, valid), want, rtol=1e-5)
    assert sparse_state.load_balance_loss(routing, jnp.zeros((2, 9), bool)) == 0.0


def test_row_sparse_update():
    arrays = draw(30)
    q, logits, v, g = (arrays[name] for name in ("q_shared", "k_shared", "v", "log_decay_shared"))
    result = jax.jit(row_sparse.row_sparse_scan, static_argnums=4)(q, logits, v, g, 3)
    assert np.all(result.row_mask.sum(-1) == 3) and not np.any(result.key[~result.row_mask])
    np.testing.assert_allclose(result.key.sum(-1), 1.0, rtol=1e-5)
    assert np.all(np.where(result.row_mask, logits, np.inf).min(-1) >= np.where(result.row_mask, -np.inf, logits).max(-1))
    scan = jax.jit(functools.partial(gated_linear_scan, implementation="recurrent"))
    want = scan(q, result.key, v, jnp.where(result.row_mask, g, 0.0))
    assert_all_equal((result.out, result.state), want, 2e-5)
    with pytest.raises(ConfigError, match="num_rows = 9: there are 8 rows"):
        row_sparse.row_sparse_scan(q, logits, v, g, 9)


def test_what_runs_by_default():
    with dispatch.record() as decisions:
        for length, writers, readers in ((40, 1, 1), (40, 2, 1), (1, 1, 1)):
            jax.eval_shape(functools.partial(call, writers=writers, readers=readers), draw(length))
    assert [decision.chosen for decision in decisions] == ["varlen", "mask", "recurrent"]
    assert "as many writers as readers" in decisions[1].reasons["varlen"]


def test_bad_input():
    arrays = draw(10)
    with pytest.raises(NotImplementedError, match="as many writers as readers, and there are 2 and 1"):
        call(arrays, 2, 1, implementation="varlen")
    for writers, readers, name in ((4, 1, "num_writers = 4"), (1, 4, "num_readers = 4"), (0, 1, "num_writers = 0")):
        with pytest.raises(ConfigError, match=f"{name}: needs 1 or more, and fewer than num_partitions = 4"):
            call(arrays, writers, readers)
    for name, value, message in (
        ("k_sparse", jnp.zeros((B, 10, N, 3)), "they need four times"),
        ("log_decay_sparse", jnp.zeros((B, 10, N)), "log_decay_sparse has shape"),
        ("logits", jnp.zeros((B, 9, P)), "routing of shape"),
        ("initial_state", jnp.zeros((B, P, N, HK, HV)), "initial_state is float32"),
        ("beta_shared", jnp.zeros((B, 10, N)), "one of them is missing"),
        ("chunk_size", 24, "not a power of two"),
        ("mask", jnp.ones((1, 10), bool), "mask has shape"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(arrays | {name: value})

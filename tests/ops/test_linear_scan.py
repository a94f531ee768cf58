"""The gated scans: all forms equal a float64 transcription, with segments, padding, strong decays, and a split sequence."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops import chunk_products, chunk_scan, linear_scan
from attnlab.ops.linear_scan import gated_delta_scan, gated_linear_scan

KINDS = {
    "linear": (gated_linear_scan, "channel"),
    "linear scalar": (gated_linear_scan, "head"),
    "delta": (gated_delta_scan, "head"),
    "delta channel": (gated_delta_scan, "channel"),
}
B, N, HK, HV = 2, 2, 8, 4


def draw(length, decay="channel", strength=0.3, seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    q, k = (jax.random.normal(key, (B, length, N, HK)) for key in keys[:2])
    v = jax.random.normal(keys[2], (B, length, N, HV))
    shape = (B, length, N, HK) if decay == "channel" else (B, length, N)
    log_decay = -strength * jax.random.exponential(keys[3], shape)
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (B, length, N)))
    state = jax.random.normal(keys[5], (B, N, HK, HV))
    return q, linear_scan.l2_normalize(k), v, log_decay, beta, state


def call(kind, arrays, **options):
    op, _ = KINDS[kind]
    q, k, v, log_decay, beta, state = arrays
    if op is gated_linear_scan:
        return op(q, k, v, log_decay, initial_state=state, **options)
    return op(q, k, v, log_decay, beta, initial_state=state, **options)


def transcription(kind, arrays, segments=None, real=None):
    """Token by token in float64, as the formula is printed."""
    q, k, v, g, beta, state = (None if x is None else np.asarray(x, np.float64) for x in arrays)
    out = np.zeros(v.shape)
    last = np.zeros((B, N, HK, HV)) if state is None else state.copy()
    for b in range(B):
        segment = None
        for t in range(q.shape[1]):
            if real is not None and not real[b, t]:
                continue
            if segments is not None:
                if segment is not None and segments[b, t] != segment:
                    last[b] = 0.0
                segment = segments[b, t]
            for n in range(N):
                a = np.exp(g[b, t, n]) * np.ones(HK)
                s = a[:, None] * last[b, n]
                u = v[b, t, n]
                if KINDS[kind][0] is gated_delta_scan:
                    u = beta[b, t, n] * (u - k[b, t, n] @ s)
                last[b, n] = s + np.outer(k[b, t, n], u)
                out[b, t, n] = HK**-0.5 * q[b, t, n] @ last[b, n]
    return out, last


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def with_gradients(kind, arrays, implementation, chunk, cotangents, **masks):
    fn = lambda arrays: call(kind, arrays, implementation=implementation, chunk_size=chunk, **masks)  # noqa: E731
    results, pullback = jax.vjp(fn, arrays)
    return results, pullback(cotangents)[0]


def cotangents(length, seed=9):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (B, length, N, HV)), jax.random.normal(keys[1], (B, N, HK, HV))


def assert_all_equal(have, want, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), have, want)


CASES = [("linear", 1), ("linear", 63), ("linear", 64), ("delta", 63), ("delta", 100)]
CASES += [("linear scalar", 100), ("delta channel", 100)]


@pytest.mark.parametrize(("kind", "length"), CASES)
def test_forms_and_gradients_are_equal(kind, length):
    arrays = draw(length, KINDS[kind][1])
    ct = cotangents(length)
    (out, state), want = with_gradients(kind, arrays, "recurrent", 64, ct)
    expected = transcription(kind, arrays)
    assert_all_equal((out, state), expected, 2e-5)
    assert state.dtype == jnp.float32
    forms = [("chunked", 16), ("parallel", 64)] if length == 63 else [("chunked", 64 if length == 64 else 16)]
    for form, chunk in forms:
        results, gradients = with_gradients(kind, arrays, form, chunk, ct)
        assert_all_equal(results, expected, 3e-5)
        assert_all_equal(gradients, want, 5e-5)


@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_groups_of_chunks_are_one_scan(kind, monkeypatch):
    """Seven chunks in groups of two, with and without a table of chains: the values and gradients of one piece."""
    length = 100
    arrays, ct = draw(length, KINDS[kind][1]), cotangents(length)
    want = with_gradients(kind, arrays, "recurrent", 16, ct)
    monkeypatch.setattr(chunk_scan, "_group_length", lambda k, v: 2)
    assert_all_equal(with_gradients(kind, arrays, "chunked", 16, ct), want, 5e-5)

    index = np.asarray([[0, 0, 1, 1, 1, 3, 3], [0, 1, 1, 2, 2, 2, 0]], np.int32)
    first = np.asarray([[1, 0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 0, 0]], bool)
    last = np.asarray([[1, 4, -1, 6], [0, 2, 5, -1]], np.int32)
    table = chunk_scan.Chains(*map(jnp.asarray, (index, first, last, last == 4)))
    q, k, v, g, beta, _ = arrays
    starts = jax.random.normal(jax.random.key(3), (B, 4, N, HK, HV))

    def run(arrays, group):
        monkeypatch.setattr(chunk_scan, "_group_length", lambda k, v: group)
        beta = arrays[4] if kind == "delta" else None
        return chunk_scan.scan(*arrays[:4], beta, table, arrays[5], None, jax.lax.Precision.HIGHEST)

    chunks = [chunk_scan.to_chunks(x, 16) for x in (q, k, v)]
    decay = chunk_scan.to_chunks(jnp.exp(g if g.ndim == 4 else g[..., None]), 16, fill=1.0)
    inputs = (*chunks, decay, chunk_scan.to_chunks(beta[..., None], 16), starts)
    results = []
    for group in (2, 100):
        out, pullback = jax.jit(lambda inputs, group=group: jax.vjp(lambda x: run(x, group), inputs))(inputs)
        results.append((out, pullback(jax.tree.map(jnp.cos, out))))
    assert_all_equal(*results, 5e-5)


@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_segments_and_padding(kind):
    """Packed rows never leak; padding, also in the middle and with NaN in it, neither writes nor decays."""
    length = 40
    segments = np.repeat([[1, 2, 3], [4, 0, 4]], [15, 2, 23], axis=1)
    mask = np.ones((B, length), bool)
    mask[0, [0, 15, 16, 20, 39]] = False  # all of segment 2 among them: a segment without a token
    real = mask & (segments != 0)
    clean = draw(length, KINDS[kind][1])
    arrays = tuple(
        jnp.where(real.reshape(B, length, *(1,) * (x.ndim - 2)), x, jnp.nan) if x.shape[1] == length else x for x in clean
    )
    ct = cotangents(length)
    masks = {"segment_ids": jnp.asarray(segments), "mask": jnp.asarray(mask)}
    (out, state), want = with_gradients(kind, arrays, "recurrent", 16, ct, **masks)
    expected = transcription(kind, clean, segments, real)
    assert_all_equal((out, state), expected, 2e-5)
    assert not np.any(out[~real])
    results, gradients = with_gradients(kind, arrays, "chunked", 16, ct, **masks)
    assert_all_equal(results, expected, 2e-5)
    assert_all_equal(gradients, want, 5e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in gradients)
    assert not any(np.any(leaf[~real]) for leaf in gradients[:5])


@pytest.mark.parametrize("kind", ["linear", "delta channel"])
def test_strong_decays(kind):
    """Log decays of 0, -30, -200 and -inf side by side: no overflow, no lost digits, finite gradients."""
    length = 50
    arrays = list(draw(length, "channel"))
    choice = jax.random.randint(jax.random.key(3), arrays[3].shape, 0, 8)
    arrays[3] = jnp.select([choice == 0, choice == 1, choice == 2, choice == 3], [-30.0, -200.0, -jnp.inf, 0.0], arrays[3])
    ct = cotangents(length)
    (_, want) = with_gradients(kind, tuple(arrays), "recurrent", 32, ct)
    results, gradients = with_gradients(kind, tuple(arrays), "chunked", 32, ct)
    assert_all_equal(results, transcription(kind, arrays), 2e-5)
    assert_all_equal(gradients, want, 5e-5)


def test_repeated_keys_do_not_break_the_delta_rule():
    """One key over a whole chunk, beta 1 and no decay: the inverse of the chunk must not cancel."""
    q, k, v, _, _, _ = draw(64)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    arrays = (q, k, v, jnp.zeros((B, 64, N)), jnp.ones((B, 64, N)), None)
    out, state = jax.jit(functools.partial(call, "delta", implementation="chunked"))(arrays)
    assert_all_equal((out, state), transcription("delta", arrays), 3e-5)


@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_continues_from_its_state(kind):
    arrays = draw(100, KINDS[kind][1])
    want = jax.jit(functools.partial(call, kind))(arrays)
    parts, state = [], arrays[5]
    for piece in (slice(0, 1), slice(1, 64), slice(64, 100)):
        part, state = jax.jit(functools.partial(call, kind))((*(x[:, piece] for x in arrays[:5]), state))
        parts.append(part)
    assert_all_equal((jnp.concatenate(parts, axis=1), state), want, 2e-5)


def test_rows_of_padding_and_no_tokens():
    q, k, v, g, beta, _ = draw(20)
    mask = jnp.zeros((B, 20), bool).at[0].set(True)

    @jax.jit
    def run(*arrays):
        results, pullback = jax.vjp(lambda *a: gated_delta_scan(*a, mask=mask), *arrays)
        return results, pullback(results)

    (out, state), gradients = run(q, k, v, g[..., 0], beta)
    assert not np.any(out[1]) and not np.any(state[1]) and np.any(out[0])
    for leaf in gradients:
        assert np.all(np.isfinite(leaf)) and not np.any(leaf[1])
    for form in ("chunked", "recurrent"):
        scan = jax.jit(functools.partial(gated_linear_scan, implementation=form))
        out, state = scan(q[:, :0], k[:, :0], v[:, :0], g[:, :0])
        assert out.shape == (B, 0, N, HV) and not np.any(state)


def test_defaults_and_types():
    q, k, v, g, _, _ = draw(30)
    plain, _ = jax.jit(functools.partial(gated_linear_scan, scale=1.0))(q, k, v)
    scores = np.tril(np.einsum("btnh,bsnh->bnts", q, k))
    np.testing.assert_allclose(plain, np.einsum("bnts,bsnv->btnv", scores, v), atol=2e-5)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    scan = jax.jit(gated_linear_scan)
    out, state = scan(*low, g)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    want, _ = scan(*(x.astype(jnp.float32) for x in low), g)
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.03)
    assert np.array_equal(scan(*low, g)[0], out)


def test_inverse_of_unit_lower_triangles():
    lower = jnp.tril(jax.random.normal(jax.random.key(0), (3, 16, 16)) * 0.5, -1)
    want = np.linalg.inv(np.eye(16) + np.asarray(lower, np.float64))
    ct = jax.random.normal(jax.random.key(1), lower.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def run(fn, x):
        value, pullback = jax.vjp(fn, x)
        return value, pullback(ct)[0]

    have, gradient = run(chunk_products.unit_lower_inverse, lower)
    _, plain = run(lambda x: jnp.linalg.inv(jnp.eye(16) + x), lower)
    np.testing.assert_allclose(have, want, atol=2e-5)
    np.testing.assert_allclose(gradient, np.tril(plain, -1), atol=1e-3, rtol=1e-3)


def test_gradient_of_whole_chunks_per_channel():
    """64 tokens and wide heads: sums of products of many axes have crashed the CPU compiler here."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, 256, 2, 32)) for key in keys[:3])
    g = -jax.random.exponential(keys[3], q.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form):
        return jax.grad(lambda *a: jnp.sum(gated_linear_scan(*a, implementation=form)[0] ** 2), argnums=(0, 1, 2, 3))(q, k, v, g)

    assert_all_equal(gradients("chunked"), gradients("recurrent"), 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (B, 9, N, HK)}, "they need twice"),
        ({"log_decay": (B, 10, 1)}, "log_decay has shape"),
        ({"beta": (B, 10)}, "beta has shape"),
        ({"initial_state": (B, N, HV, HK)}, "initial_state is float32"),
        ({"mask": (B, 9)}, r"mask has shape \(2, 9\)"),
        ({"chunk_size": 48}, "chunk_size = 48: not a power of two"),
    ],
)
def test_bad_input(change, message):
    q, k, v, g, beta, state = draw(10)
    arguments = {"q": q, "k": k, "v": v, "log_decay": g, "beta": beta, "initial_state": state}
    arguments |= {name: jnp.zeros(value) if isinstance(value, tuple) else value for name, value in change.items()}
    with pytest.raises(ConfigError, match=message):
        gated_delta_scan(**arguments)
    with pytest.raises(ConfigError, match="float32"):
        gated_delta_scan(q, k, v, g, beta, initial_state=state.astype(jnp.bfloat16))


SHARDED = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from attnlab.ops import linear_scan, sparse_state

B, T, N, K, V, P = 2, 64, 2, 8, 4, 4
rng = np.random.default_rng(0)  # arrays of numpy: nothing to compile
draw = lambda *shape: rng.standard_normal(shape, np.float32)
unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
q, k, q2, k2 = draw(B, T, N, K), unit(draw(B, T, N, K)), draw(B, T, N, K), unit(draw(B, T, N, K))
v = draw(B, T, N, V)
g, g2 = (-0.3 * rng.standard_exponential((B, T, N, K), np.float32) for _ in range(2))
beta = rng.random((B, T, N), np.float32)
state, states, logits = draw(B, N, K, V), draw(B, 1 + P, N, K, V), 2 * draw(B, T, P)
segments = np.repeat([[1, 2, 3], [1, 1, 2]], [10, 17, 37], axis=1).astype(np.int32)
mask = np.ones((B, T), bool)
mask[0, 30:35] = False
masks = dict(segment_ids=segments, mask=mask, chunk_size=8)

def sparse(implementation, writers, readers, *arrays):
    *arrays, logits, states = arrays
    routing = sparse_state.route(logits, writers, readers)
    return sparse_state.sparse_state_attention(*arrays, routing, initial_state=states, implementation=implementation, **masks)

def sparse_delta(*arrays):
    *arrays, beta, logits, states = arrays
    routing = sparse_state.route(logits, 1, 1)
    return sparse_state.sparse_state_attention(*arrays, routing, beta_shared=beta, beta_sparse=1 - beta, initial_state=states,
                                               implementation="varlen", **masks)

chunked = dict(implementation="chunked", **masks)
MESHES = ({"context": 8}, {"data": 2, "tensor": 2, "context": 2})
CASES = {
    "linear": (lambda q, k, v, g, s: linear_scan.gated_linear_scan(q, k, v, g, initial_state=s, **chunked), (q, k, v, g, state)),
    "delta": (lambda q, k, v, g, b, s: linear_scan.gated_delta_scan(q, k, v, g, b, initial_state=s, **chunked),
              (q, k, v, g[..., 0], beta, state)),
    "varlen": (functools.partial(sparse, "varlen", 2, 2), (q, q2, k, k2, v, g, g2, logits, states)),
    "mask": (functools.partial(sparse, "mask", 2, 1), (q, q2, k, k2, v, g, g2, logits, states)),
    "varlen delta": (sparse_delta, (q, q2, k, k2, v, g[..., 0], g2[..., 0], beta, logits, states)),
}

def run(fn, arrays):
    results, pullback = jax.vjp(fn, *arrays)
    ct = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), results)
    return results, pullback(ct)

worst = {}
for number, (name, (fn, arrays)) in enumerate(CASES.items()):
    step = lambda arrays: run(fn, arrays)
    want = jax.jit(step)(arrays)
    for sizes in MESHES if name == "varlen delta" else (MESHES[number % 2],):
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        with jax.set_mesh(mesh):
            compiled = jax.jit(step).lower(arrays).compile()
            have = compiled(arrays)
        pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (have, want)), strict=True)
        error = max(float(np.abs(a - b).max()) for a, b in pairs)
        worst[f"{name} {sizes}"] = error
print(json.dumps(worst))
"""


def test_a_split_sequence_equals_a_whole_one(run_python):
    """Forward and backward, over 8 devices along the sequence, and along batch, heads and sequence."""
    errors = json.loads(run_python(["-c", SHARDED], devices=8, quickly=True, timeout=600).stdout.splitlines()[-1])
    assert len(errors) == 6
    assert max(errors.values()) < 1e-4, errors

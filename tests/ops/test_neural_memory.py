"""The neural memory against a loop that differentiates its loss token by token; chunks, segments, padding, bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.ops.local_attention import local_attention
from attnlab.ops.neural_memory import fresh_memory, neural_memory
from attnlab.ops.softmax import softmax_attention
from attnlab.ops.tiles import make_tiles

FORMS = ("xla_recurrent", "xla_chunked")


def draw(batch=2, length=13, heads=2, width=4, depth=2, inner=6, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    q, k, v = (jax.random.normal(next(keys), (batch, length, heads, width)) for _ in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    theta, eta, alpha = (jax.random.uniform(next(keys), (batch, length, heads)) for _ in range(3))
    widths = [width, *(inner,) * (depth - 1), width]
    weights = [jax.random.normal(next(keys), (heads, i, o)) * i**-0.5 for i, o in itertools.pairwise(widths)]
    return (q, k, v, 0.1 * theta, eta, 0.3 * alpha), weights


def model(weights, x):
    for i, w in enumerate(weights):
        x = (0.5 * x * (1 + jax.scipy.special.erf(x / np.sqrt(2))) if i else x) @ w
    return x


def naive(q, k, v, theta, eta, alpha, weights, chunk, before=False):
    """One row and head: [T, H] and [T]; the rule as the paper writes it, by jax.grad of the memory's loss."""
    loss = jax.grad(lambda w, k, v: jnp.sum((model(w, k) - v) ** 2))

    def token(carry, inputs):
        base, now, momentum = carry
        t, q, k, v, theta, eta, alpha = inputs
        base = [jnp.where(t % chunk == 0, n, b) for n, b in zip(now, base, strict=True)]
        gradient = loss(base, k, v)
        momentum = [eta * s - theta * u for s, u in zip(momentum, gradient, strict=True)]
        after = [(1 - alpha) * w + s for w, s in zip(now, momentum, strict=True)]
        return (base, after, momentum), model(now if before else after, q)

    start = (weights, weights, [jnp.zeros_like(w) for w in weights])
    (_, last, momentum), rows = jax.lax.scan(token, start, (jnp.arange(len(q)), q, k, v, theta, eta, alpha))
    return rows, last, momentum


def run(inputs, weights, **options):
    return jax.jit(lambda inputs, weights: neural_memory(*inputs, weights, **options))(inputs, weights)


@pytest.mark.parametrize(
    ("depth", "chunk", "retrieve", "momentum"),
    [(2, 4, "after", True), (1, 5, "before", False), (3, 1, "before", True)],
)
def test_against_the_gradient_of_the_memory_loss(depth, chunk, retrieve, momentum):
    inputs, weights = draw(length=9, depth=depth)
    cotangent = jax.random.normal(jax.random.key(9), inputs[0].shape)

    def ours(inputs, weights, form):
        result = run(inputs, weights, chunk_size=chunk, retrieve=retrieve, momentum=momentum, implementation=form)
        return jnp.sum(result.y * cotangent) + sum(jnp.sum(jnp.sin(w)) for w in result.state.weights), result

    def reference(inputs, weights):
        q, k, v, theta, eta, alpha = inputs
        eta = eta if momentum else jnp.zeros_like(eta)
        one = functools.partial(naive, chunk=chunk, before=retrieve == "before")
        heads = jax.vmap(one, in_axes=(1, 1, 1, 1, 1, 1, 0), out_axes=(1, 0, 0))
        y, last, momenta = jax.vmap(lambda *row: heads(*row, weights))(q, k, v, theta, eta, alpha)
        return jnp.sum(y * cotangent) + sum(jnp.sum(jnp.sin(w)) for w in last), (y, last, momenta)

    def both(function):
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(inputs, weights)

    (_, want), gradients = both(reference)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-4)
    for form in FORMS:
        (_, have), ours_gradients = both(functools.partial(ours, form=form))
        jax.tree.map(close, (have.y, list(have.state.weights), list(have.state.momentum)), want)
        jax.tree.map(close, ours_gradients, gradients)


@pytest.mark.parametrize("length", [1, 63, 64, 100])
def test_forms_agree_at_ragged_lengths(length):
    """The outer gradient is second order in the memory's loss, so it is asked for as well."""
    inputs, weights = draw(length=length)

    def value(inputs, weights, form):
        result = run(inputs, weights, chunk_size=16, implementation=form)
        return jnp.sum(jnp.sin(result.y)), result

    both = []
    for form in FORMS:
        function = functools.partial(value, form=form)
        if length == 100:
            function = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
        both.append(jax.jit(function)(inputs, weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-3), *both)
    result = both[0][0][1] if length == 100 else both[0][1]
    assert result.state.count.tolist() == [length % 16] * 2


@pytest.mark.parametrize("form", FORMS)
def test_pieces_continue_each_other(form):
    inputs, weights = draw(length=101)
    whole = run(inputs, weights, chunk_size=8, implementation=form)
    step = jax.jit(lambda inputs, state: run(inputs, weights, chunk_size=8, state=state))
    state, parts = fresh_memory(weights, 2), []
    for start, stop in ((0, 1), (1, 63), (63, 64), (64, 100), (100, 101)):
        result = step([x[:, start:stop] for x in inputs], state)
        state = result.state
        parts.append(result.y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole.y, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state, whole.state)


@pytest.mark.parametrize("form", FORMS)
def test_padding_neither_writes_nor_decays_nor_counts(form):
    inputs, weights = draw(length=12)
    mask = jnp.array([[0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0], [0] * 12], bool)

    def loud(inputs):
        spoilt = [jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 1e3) for x in inputs]
        result = run(spoilt, weights, chunk_size=3, mask=mask, implementation=form)
        return jnp.sum(result.y**2) + jnp.sum(result.state.weights[0] ** 2), result

    (_, have), gradients = jax.jit(jax.value_and_grad(loud, has_aux=True))(inputs)
    there = np.flatnonzero(mask[0])
    want = run([x[:1, there] for x in inputs], weights, chunk_size=3)
    np.testing.assert_allclose(have.y[0, there], want.y[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:1], b, atol=1e-5), have.state, want.state)
    assert not np.any(have.y[0, ~np.asarray(mask[0])]) and not np.any(have.y[1])
    np.testing.assert_array_equal(have.state.weights[0][1], weights[0])  # a row of padding: nothing happened
    assert int(have.state.count[1]) == 0
    for x in gradients:
        assert np.all(np.isfinite(x)) and not np.any(x[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "segments", [[1] * 5 + [2] * 9 + [3] * 6, [1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 14, 15, 16, 0, 17]]
)
def test_packed_segments_are_as_if_alone(form, segments):
    """The second row has more chunks than tiles: the slower path, the same numbers."""
    inputs, weights = draw(length=20, batch=1)
    ids = jnp.array([segments])
    assert bool(make_tiles(1, 20, 8, segment_ids=ids).used > make_tiles(1, 20, 8, segment_ids=ids).valid.shape[1]) == (
        17 in segments
    )
    value = jax.jit(lambda inputs: run(inputs, weights, chunk_size=8, segment_ids=ids, implementation=form).y)
    have = value(inputs)
    each = ids == jnp.array(sorted(set(segments) - {0}))[:, None]  # a row per segment, all else padding
    alone = run([jnp.repeat(x, len(each), axis=0) for x in inputs], weights, chunk_size=8, mask=each)
    np.testing.assert_allclose(jnp.where((ids[0] > 0)[:, None, None], have[0], 0), alone.y.sum(axis=0), atol=1e-5)
    at = np.flatnonzero(ids[0] == 3)
    leak = jax.jit(jax.grad(lambda inputs: jnp.sum(value(inputs)[:, at[-1]] ** 2)))(inputs)
    outside = np.asarray(ids[0] != 3)
    assert all(np.any(x[:, at]) and not np.any(x[:, outside]) for x in leak)


def test_a_common_beginning_and_causality():
    inputs, weights = draw(length=15)
    common = [x[:1, :5] for x in inputs]
    begin = run(common, weights, chunk_size=4).state
    joined = [jnp.concatenate([jnp.repeat(c, 2, axis=0), x], axis=1) for c, x in zip(common, inputs, strict=True)]
    want = run(joined, weights, chunk_size=4).y[:, 5:]
    for form in FORMS:
        result = run(inputs, weights, chunk_size=4, begin=begin, begin_count=5, implementation=form)
        np.testing.assert_allclose(result.y, want, atol=1e-5)
    for retrieve, last in (("after", 8), ("before", 7)):
        value = lambda inputs, r=retrieve: jnp.sum(run(inputs, weights, chunk_size=4, retrieve=r).y[:, 8] ** 2)  # noqa: E731
        gradient = jax.jit(jax.grad(value))(inputs)
        for x in gradient[1:]:
            assert np.any(x[:, last]) and not np.any(x[:, last + 1 :])


def test_the_choice_of_form():
    inputs, weights = draw(length=1)
    for length, form in ((1, "xla_recurrent"), (9, "xla_chunked")):
        inputs, _ = draw(length=length)
        with dispatch.record() as decisions:
            run(inputs, weights)
        assert decisions[0].chosen == form


def test_low_precision_inputs_and_gates_at_their_ends():
    """eta and alpha of exactly 0 and 1 have gradients (a logarithm would not); the state is float32 whatever the inputs."""
    inputs, weights = draw(length=7)
    q, k, v, theta, eta, alpha = inputs
    inputs = (q, k, v, theta, jnp.round(eta), jnp.round(alpha))
    value = lambda inputs, form: jnp.sum(run(inputs, weights, chunk_size=4, implementation=form).y ** 2)  # noqa: E731
    gradients = [jax.jit(jax.grad(functools.partial(value, form=form)))(inputs) for form in FORMS]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), *gradients)
    result = run([x.astype(jnp.bfloat16) for x in inputs], weights, chunk_size=4)
    assert result.y.dtype == jnp.bfloat16 and result.state.weights[0].dtype == jnp.float32


def test_bad_input():
    inputs, weights = draw(length=4)
    q = inputs[0]
    with pytest.raises(ConfigError, match="three equal ones"):
        run((q[:, :3], *inputs[1:]), weights)
    with pytest.raises(ConfigError, match="eta has shape"):
        run((*inputs[:4], inputs[4][:, :2], inputs[5]), weights)
    with pytest.raises(ConfigError, match="chunk_size = 0"):
        run(inputs, weights, chunk_size=0)
    with pytest.raises(ConfigError, match="retrieve = 'later'"):
        run(inputs, weights, retrieve="later")
    with pytest.raises(ConfigError, match="memory weights of shapes"):
        run(inputs, weights[:1])
    with pytest.raises(ConfigError, match="memory weights of shapes"):
        run(inputs, [])
    with pytest.raises(ConfigError, match="state of batch 3 used with batch 2"):
        run(inputs, weights, state=fresh_memory(weights, 3))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, fresh_memory(weights, 2))
    with pytest.raises(ConfigError, match="in float32"):
        run(inputs, weights, state=half)
    with pytest.raises(ConfigError, match="did you mean 'xla_chunked'"):
        run(inputs, weights, implementation="xla_chunk")


@pytest.mark.parametrize(("length", "window", "past"), [(5, 3, 0), (100, 3, 2), (100, 40, 0), (70, 70, 11)])
def test_local_attention_against_a_mask(length, window, past):
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (2, length, 2, 4))
    k, v = (jax.random.normal(key, (2, past + length, 1, 4)) for key in keys[1:3])
    front = tuple(jax.random.normal(key, (3, 1, 4)) for key in keys[3:])
    groups = jnp.where(jnp.arange(past + length) < (past + length) // 2, 0, 1)[None].repeat(2, axis=0).at[1, :2].set(-1)
    seen = jnp.arange(length)[None, :, None] >= 4 * jnp.arange(3)
    seen = jnp.broadcast_to(seen, (2, length, 3))
    distance = jnp.arange(length)[:, None] + past - jnp.arange(past + length)
    mask = (distance >= 0) & (distance < window) & (groups[:, past:, None] == groups[:, None]) & (groups >= 0)[:, None]
    mask = jnp.concatenate([seen, mask], axis=2)[:, None]
    wide = (jnp.concatenate([jnp.broadcast_to(f, (2, *f.shape)), x], axis=1) for f, x in zip(front, (k, v), strict=True))
    want = softmax_attention(q, *wide, mask=mask)
    local = jax.jit(functools.partial(local_attention, window=window))
    have = local(q, k, v, groups[:, past:], groups, prefix=front, prefix_mask=seen)
    np.testing.assert_allclose(have, want, atol=1e-5)
    with pytest.raises(ConfigError, match="window = 0"):
        local_attention(q, k, v, groups[:, past:], groups, window=0)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from attnlab.ops.neural_memory import fresh_memory, neural_memory

B, T, N, H = 4, 20, 2, 4
keys = jax.random.split(jax.random.key(0), 8)
q, k, v = (jax.random.normal(key, (B, T, N, H)) for key in keys[:3])
k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
theta, eta, alpha = (0.2 * jax.random.uniform(key, (B, T, N)) for key in keys[3:6])
weights = [0.5 * jax.random.normal(keys[6], (N, H, 6)), 0.5 * jax.random.normal(keys[7], (N, 6, H))]
segments = jnp.asarray(np.repeat([[1, 2, 0]], [9, 8, 3], axis=1).repeat(B, axis=0))

def run(state, inputs, weights):
    fn = lambda *a: neural_memory(*a[:6], a[6], chunk_size=4, state=state, segment_ids=None if state else segments)
    result, pullback = jax.vjp(fn, *inputs, weights)
    none = np.zeros(B, jax.dtypes.float0)  # of the count
    return result, pullback(jax.tree.map(lambda x: jnp.cos(x) if x.dtype == jnp.float32 else none, result))

inputs = (q, k, v, theta, eta, alpha)
for state, sizes in ((None, {"data": 4, "tensor": 2}), (fresh_memory(weights, B), {"data": 2, "context": 4})):
    want = jax.jit(run)(state, inputs, weights)
    with jax.set_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2)):
        compiled = jax.jit(run).lower(state, inputs, weights).compile()
        have = compiled(state, inputs, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), have, want)
    text = compiled.as_text()
    loops = [line for line in text.splitlines() if "all-reduce" in line and "/while/" in line]
    assert not loops, loops[:2]  # no exchange per chunk
print("equal")
"""


def test_a_mesh_equals_one_device(run_python):
    assert run_python(["-c", SHARDED], devices=8, timeout=600, quickly=True).stdout.strip() == "equal"

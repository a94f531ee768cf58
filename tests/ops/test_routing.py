"""Routing attention: k-means, membership, attention inside clusters, the strict rule, block-local heads, the port."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.ops import dispatch, kmeans, routing
from attnlab.ops.block_window import in_chunks, local_block_attention
from attnlab.ops.kmeans_attention import kmeans_attention
from attnlab.ops.relative import attend_relative

HEADS, WIDTH, CLUSTERS = 2, 4, 3


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draw(length, batch=2, seed=0):
    means = normalised(normal(seed + 50, HEADS, CLUSTERS, WIDTH)).astype(np.float32)
    return *normal(seed, 3, batch, length, HEADS, WIDTH), means


def tables(reach=3, seed=5):
    keys, values = normal(seed, 2, 2 * reach + 1, WIDTH)
    return {"rel_keys": keys, "rel_values": values}


def attend(q, k, v, seen, step, rel_keys=None, rel_values=None):
    """Attention over the last two axes in NumPy; where nothing is seen, all is seen alike."""
    scores, at = np.einsum("...th,...sh->...ts", q, k), None
    if rel_keys is not None:
        reach = rel_keys.shape[0] // 2
        at = np.broadcast_to(np.clip(step, -reach, reach) + reach, scores.shape)
        scores = scores + np.einsum("...th,...tsh->...ts", q, rel_keys[at])
    scores = scores - 1e9 * ~seen
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    return out if rel_values is None else out + np.einsum("...ts,...tsh->...th", weights, rel_values[at])


def normalised(x):
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def pulled(f, cotangent, *arguments):
    """The values of f and their gradients under the cotangent."""
    y, pull = jax.vjp(f, *arguments)
    return y, *pull(cotangent)


def close(got, want, atol, rtol=0.0):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def by_hand(q, k, v, means, window, causal=True, block=1, **extra):
    """The published rule, head by head and cluster by cluster: the outputs and the queries' members."""
    length = q.shape[1]
    pad = [(0, 0), (0, -length % block), (0, 0), (0, 0)]
    q, k, v = normalised(np.pad(q, pad)), normalised(np.pad(q if k is None else k, pad)), np.pad(v, pad)
    total, count = np.zeros(v.shape), np.zeros((*v.shape[:3], 1))
    members = np.zeros((q.shape[0], *means.shape[:2], window), int)
    for b, n, c in np.ndindex(members.shape[:3]):
        near = [np.sort(np.argsort(-(x[b, :, n] @ means[n, c]), kind="stable")[:window]) for x in (q, k)]
        members[b, n, c] = near[0]
        one_q, one_k, one_v = q[b, near[0], n], k[b, near[1], n], v[b, near[1], n]
        step = np.arange(window)[None] - np.arange(window)[:, None]
        out = attend(one_q, one_k, one_v, one_v.any(-1)[None] & ~(causal & (step > 0)), step, **extra)
        np.add.at(total[b, :, n], near[0], out)
        np.add.at(count[b, :, n], near[0], 1.0)
    return (total / (count + 0.01))[:, :length], members


@pytest.mark.parametrize(("length", "causal", "block", "shared", "relative"), [
    (24, True, 4, True, False), (19, True, 8, True, True), (21, False, 4, False, False), (17, False, 1, True, True),
    (22, False, 5, False, True),
])  # fmt: skip
def test_routing_attention_is_the_published_rule(length, causal, block, shared, relative):
    q, k, v, means = draw(length)
    k, extra = None if shared else k, tables() if relative else {}

    @jax.jit
    def run(q, k, v):
        options = {"window": 7, "causal": causal, "block": block}
        found = routing.routing_attention(q, k, v, means, **options, **extra)
        blocks = None if relative else routing.routing_attention(q, k, v, means, implementation="blocks", **options).out
        return found, blocks

    want, members = by_hand(q, k, v, means, 7, causal, block, **extra)
    found, blocks = run(q, k, v)
    np.testing.assert_allclose(found.out, want, atol=2e-5)
    np.testing.assert_array_equal(found.q_members, members)
    assert found.q_members.dtype == jnp.int32
    if not relative:
        np.testing.assert_allclose(blocks, want, atol=2e-5)


def test_gradients_flow_through_values_and_scores_and_not_through_choices():
    q, _, v, means = draw(12, batch=1)
    extra, cotangent = tables(), normal(8, *q.shape)

    def reference(q, v, extra, members):
        """Dense scores of every cluster over the whole row, masked to its members."""
        inside = jax.nn.one_hot(members, 12).sum(3)  # [B, N, C, T]
        places = (jnp.cumsum(inside, -1) - 1).astype(jnp.int32)
        hidden = (inside[..., None, :] == 0) | ~jnp.tri(12, dtype=bool)
        x, v = (jnp.repeat(y.swapaxes(1, 2)[:, :, None], CLUSTERS, 2) for y in (kmeans.plain_layer_norm(q), v))
        out = attend_relative(x, x, v, hidden=hidden, offsets=places[..., None, :] - places[..., None], **extra)
        total = jnp.sum(inside[..., None] * out, axis=2) / (inside.sum(2)[..., None] + 0.01)
        return total.swapaxes(1, 2)

    @jax.jit
    def run(q, v, extra, means):
        def ours(q, v, extra, implementation="xla"):
            options = {"window": 5, "causal": True, "implementation": implementation}
            return routing.routing_attention(q, None, v, means, **options, **extra)

        def of_means(means):
            found = routing.routing_attention(q, None, v, means, window=5)
            return jnp.sum(found.out) + kmeans.commitment_loss(found.q, means)

        members = ours(q, v, extra).q_members
        got = pulled(lambda *xs: ours(*xs).out, cotangent, q, v, extra)
        want = pulled(lambda *xs: reference(*xs, members), cotangent, q, v, extra)
        blocks, plain = (pulled(lambda *xs, i=i: ours(*xs, {}, i).out, cotangent, q, v) for i in ("blocks", "xla"))
        return got, want, blocks, plain, jax.grad(of_means)(means)

    got, want, blocks, plain, of_means = run(q, v, extra, means)
    close(got, want, atol=3e-5)
    close(blocks, plain, atol=3e-5)
    assert np.any(got[1]) and not np.any(of_means)


def test_padding_and_segments_inside_clusters():
    q, _, v, means = draw(20)
    mask, segments = np.ones((2, 20), bool), np.tile(np.where(np.arange(20) < 9, 1, 2), (2, 1))
    mask[0, 3:6] = False
    attend = functools.partial(routing.routing_attention, q, None, means=means, window=8, causal=True)
    masked = jax.jit(lambda v, mask: pulled(lambda v: attend(v=v, kv_mask=mask).out, jnp.ones_like(v), v))
    want = masked(v, mask)
    zeros = masked(np.where(mask[:, :, None, None], v, 0), np.ones_like(mask))
    np.testing.assert_allclose(zeros[0][mask], want[0][mask], atol=1e-6)  # a mask is what zero values are
    empty = masked(v, mask & (np.arange(2) == 0)[:, None])  # nothing in row 1
    assert all(np.all(np.isfinite(x)) for x in empty)
    np.testing.assert_allclose(empty[0][0], want[0][0], atol=1e-6)

    @jax.jit
    def mixed(v):
        """Of later documents alone, by both implementations."""
        late = lambda v, name: jnp.sum(attend(v=v, segment_ids=segments, implementation=name).out[:, 9:])  # noqa: E731
        return [jax.grad(late)(v, name) for name in ("xla", "blocks")]

    for gradient in mixed(v):
        assert not np.any(gradient[:, :9]) and np.any(gradient[:, 9:])


def strict_pairs(q, means, window, mask, segments):
    """Clusters [N, T]; which keys each query sees by the strict rule, and how many members lie between: [N, T, S] each."""
    clusters = np.einsum("tnh,nch->nct", normalised(q[0]), means).argmax(1)
    heads, length = clusters.shape
    seen, step = np.zeros((heads, length, length), bool), np.zeros((heads, length, length), np.int32)
    for n, t in np.ndindex(heads, length):
        alike = (clusters[n, : t + 1] == clusters[n, t]) & mask[0, : t + 1] & (segments[0, : t + 1] == segments[0, t])
        for back, s in enumerate(reversed(np.flatnonzero(alike))):
            step[n, t, s] = -back
            seen[n, t, s] = back < window
    return clusters, seen, step


@pytest.mark.parametrize(("length", "window"), [(1, 4), (37, 5), (20, 50)])
def test_strict_rule_against_its_definition(length, window):
    q, _, v, means = draw(length, batch=1)
    mask, segments, extra = np.ones((1, length), bool), np.where(np.arange(length) < 10, 1, 2)[None], tables()
    mask[0, 2:4] = False
    real = mask[:, :, None, None]
    clusters, seen, step = strict_pairs(q, means, window, mask, segments)

    def ours(q, v, extra, implementation=None):
        options = {"window": window, "mask": mask, "segment_ids": segments, "implementation": implementation}
        return routing.causal_routing_attention(q, v, means, **options, **extra)

    @jax.jit
    def run(q, v, extra):
        found = ours(q, v, extra)
        return found.clusters[0], found.out * real, ours(q, v, {}, "blocks").out * real

    found, relative, plain = run(q, v, extra)
    np.testing.assert_array_equal(found, clusters)
    heads = [y.swapaxes(1, 2) for y in (*[normalised(q)] * 2, v)]
    for got, options in ((relative, extra), (plain, {})):
        np.testing.assert_allclose(got, attend(*heads, seen, step, **options).swapaxes(1, 2) / 1.01 * real, atol=3e-5)
    if length != 37:
        return

    def reference(q, v, extra):
        heads = (y.swapaxes(1, 2) for y in (*[kmeans.plain_layer_norm(q)] * 2, v))
        return attend_relative(*heads, hidden=~seen, offsets=step, **extra).swapaxes(1, 2) / 1.01

    cotangent = normal(3, *q.shape) * real
    both = jax.jit(lambda *xs: [pulled(f, cotangent, *xs)[1:] for f in (lambda *xs: ours(*xs).out, reference)])
    close(*both(q, v, extra), atol=5e-5)


def test_no_output_of_the_strict_rule_depends_on_a_later_token():
    q, _, v, means = draw(30)

    @jax.jit
    def run(q, v):
        strict = routing.causal_routing_attention(q, v, means, window=5).out
        return strict, routing.routing_attention(q, None, v, means, window=5, causal=True).out

    strict, official = run(q, v)
    before = np.arange(30)[None, :, None, None]
    for at in (1, 14, 29):
        changed, other = run(np.where(before < at, q, -3 * q), np.where(before < at, v, v + 1))
        np.testing.assert_allclose(changed[:, :at], strict[:, :at], atol=1e-6)
        assert not np.allclose(changed[:, at:], strict[:, at:], atol=1e-3)
        if at == 14:  # the published rule takes other positions into its clusters
            assert not np.allclose(other[:, :14], official[:, :14], atol=1e-3)


@pytest.mark.parametrize(("length", "block", "flange", "causal"), [(17, 4, 8, True), (19, 5, 5, False), (3, 8, 8, True)])
def test_block_local_heads_against_a_dense_mask(length, block, flange, causal):
    q, k, v, _ = draw(length)
    extra, at = tables(), np.arange(length)
    first = at // block * block - flange
    last = at if causal else at // block * block + block - 1 + flange
    mask, segments = np.ones((2, length), bool), np.tile(at // 6 + 1, (2, 1))
    mask[1, 1] = False
    seen = (at[None] >= first[:, None]) & (at[None] <= last[:, None])
    seen = (seen & mask[:, None] & (segments[:, None] == segments[:, :, None]))[:, None]  # [B, 1, T, S]
    # bidirectional relative positions are shifted by the flange, as published
    step = at[None] - at[:, None] - (0 if causal else flange)
    real = seen.any(-1)[:, 0, :, None, None]

    def ours(q, k, v, extra, implementation=None):
        options = {"kv_mask": mask, "segment_ids": segments, "implementation": implementation}
        return local_block_attention(q, k, v, block=block, flange=flange, causal=causal, **options, **extra) * real

    found = jax.jit(lambda *xs: (ours(*xs, extra), ours(*xs, {}, "blocks"), ours(*xs, {}, "xla")))(q, k, v)
    heads = [y.swapaxes(1, 2) for y in (q, k, v)]
    for got, options in zip(found, (extra, {}, {}), strict=True):
        np.testing.assert_allclose(got, attend(*heads, seen, step, **options).swapaxes(1, 2) * real, atol=2e-5)
    if length != 19:
        return

    def reference(q, k, v, extra):
        heads = (y.swapaxes(1, 2) for y in (q, k, v))
        return attend_relative(*heads, hidden=~seen, offsets=step, **extra).swapaxes(1, 2) * real

    cotangent = normal(1, *q.shape)
    both = jax.jit(lambda *xs: [pulled(f, cotangent, *xs)[1:] for f in (ours, reference)])
    close(*both(q, k, v, extra), rtol=1e-4, atol=5e-5)


def test_large_calls_run_some_clusters_at_a_time(monkeypatch):
    q, k, v, means = draw(24)
    extra = tables()

    def each(q, v):
        routed = routing.routing_attention(q, None, v, means, window=8, causal=True, **extra).out
        port = kmeans_attention(q, None, v, means, window=8, causal=True).out
        return routed, port, local_block_attention(q, k, v, block=4, flange=4, causal=True, **extra)

    want = jax.jit(lambda q, v: each(q, v))(q, v)
    calls = []

    def apart(inputs):
        x, none, y = inputs
        calls.append(x.shape)
        assert none is None
        return jnp.sin(x) * y.sum(-1, keepdims=True)

    monkeypatch.setattr("attnlab.ops.block_window.CHUNK_BYTES", 2048)
    close(jax.jit(lambda q, v: each(q, v))(q, v), want, atol=1e-5)
    x, y = normal(0, 1, 2, 5, 3), normal(1, 1, 2, 5, 3)
    some = lambda x, y: in_chunks(apart, (x, None, y), 700)  # noqa: E731
    got, want = jax.jit(lambda x, y: [pulled(f, x, x, y) for f in (some, lambda x, y: apart((x, None, y)))])(x, y)
    close(got, want, atol=1e-6)
    assert min(shape[2] for shape in calls) < 5


def test_moving_averages_by_hand():
    """Two steps with one head and two clusters; padding does not count, and a batch of it changes no mean."""
    means = np.array([[[1.0, 0.0], [0.0, 1.0]]], np.float32)
    state = kmeans.Centroids(means, np.zeros((1, 2), np.float32), means)
    x = np.array([[[[2.0, 1.0]], [[4.0, 1.0]], [[1.0, 3.0]], [[0.0, 0.0]]]], np.float32)

    @jax.jit
    def run(x):
        update = functools.partial(kmeans.update_centroids, decay=0.5, epsilon=0.0)
        first = update(state, x)
        two, both = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), state), jnp.concatenate([x, -x], axis=2)
        counted = [kmeans.update_centroids(two, both, counting=counting) for counting in ("per_head", "official")]
        return first, update(first, x), update(first, x, epsilon=0.1), update(state, jnp.zeros_like(x)), *counted

    first, second, smoothed, untouched, right, wrong = run(x)
    np.testing.assert_allclose(first.counts, [[1.0, 0.5]])
    np.testing.assert_allclose(first.sums, [[[3.5, 1.0], [0.5, 2.0]]])
    np.testing.assert_allclose(first.means, [[[3.5, 1.0], [1.0, 4.0]]], rtol=1e-6)
    np.testing.assert_allclose(second.counts, [[1.5, 0.75]])
    total = (np.asarray(second.counts) + 0.1) / 2.45 * 2.25
    np.testing.assert_allclose(smoothed.means, second.sums / total[..., None], rtol=1e-6)
    np.testing.assert_array_equal(untouched.means, means)
    np.testing.assert_array_equal(right.sums, wrong.sums)
    assert not np.allclose(right.counts, wrong.counts)
    np.testing.assert_allclose(right.counts.sum(), wrong.counts.sum(), rtol=1e-6)
    with pytest.raises(ConfigError, match="counting = 'mixed'"):
        jax.eval_shape(functools.partial(kmeans.update_centroids, counting="mixed"), state, x)


def test_centroids_find_clusters():
    """Three bundles of directions: Lloyd steps from a draw of vectors, and moving averages from nothing."""
    rng = np.random.default_rng(0)
    truth = normalised(rng.standard_normal((1, 3, 8))).astype(np.float32)
    which = rng.integers(0, 3, (4, 50))
    x = normalised(truth[0, which][:, :, None] + 0.1 * rng.standard_normal((4, 50, 1, 8))).astype(np.float32)
    means = truth + 0.7 * normal(1, *truth.shape)
    start = kmeans.Centroids(means, np.zeros((1, 3), np.float32), means)

    @jax.jit
    def run(x):
        unit = kmeans.unit_vectors(x)
        found = jax.lax.map(lambda key: kmeans.lloyd(unit, key, 3), jax.random.split(jax.random.key(3), 6))
        more = kmeans.lloyd(unit[:1, :2], jax.random.key(1), 5)  # more clusters than vectors
        step = lambda state, _: (kmeans.update_centroids(state, x, decay=0.9), None)  # noqa: E731
        state, _ = jax.lax.scan(step, start, length=60)
        loss, gradient = jax.value_and_grad(kmeans.commitment_loss)(x, state.means)
        at_zero = jax.grad(lambda x: kmeans.unit_vectors(x).sum())(jnp.zeros(3))
        return found, more, state.means, (kmeans.commitment_loss(x, start.means), loss), gradient, at_zero

    found, more, moved, (before, after), gradient, at_zero = run(x)
    unit = truth / np.linalg.norm(truth, axis=-1, keepdims=True)
    near = np.einsum("dnch,nkh->dnck", found, unit).max(2)
    assert np.any(np.all(near > 0.95, axis=(1, 2)))  # a draw with two vectors of one bundle may stay there
    assert np.all(np.isfinite(more)) and np.all(np.isfinite(at_zero))
    assert after < 0.5 * before
    target = np.asarray(moved)[0, np.einsum("btnh,nch->btnc", x, moved).argmax(-1)]
    np.testing.assert_allclose(gradient, 2 * (x - target) / x.size, atol=1e-6)
    np.testing.assert_allclose(after, np.mean((x - target) ** 2), rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_port_against_a_dense_form(shared):
    """Row 0 holds padding at its end, row 1 nothing else. Scores of all pairs, masked to the members of each cluster."""
    q, k, v, means = draw(17)
    mask = np.ones((2, 17), bool)
    mask[0, 10:] = mask[1] = False
    memory, cotangent = normal(9, 2, HEADS, CLUSTERS, 1, WIDTH), normal(6, *v.shape)
    at = np.arange(17)

    def ours(q, k, v, memory):
        options = {"mask": mask, "mem_key": memory[0], "mem_value": memory[1]}
        return kmeans_attention(q, None if shared else k, v, means, window=6, causal=True, **options)

    def reference(q, k, v, memory, found):
        keys = q / jnp.linalg.norm(q, axis=-1, keepdims=True) if shared else k
        in_q, in_k = (jax.nn.one_hot(members, 17).sum(3) for members in (found.q_members, found.k_members))  # [B, N, C, T]
        scores = jnp.einsum("btnh,bsnh->bnts", q, keys, precision="highest") / 2.0
        blind = (at[:, None] < at) | ~(mask[:, None, :, None] & mask[:, None, None])
        scores = jnp.where(blind, -1e30, scores)
        scores = jnp.where(shared & (at[:, None] == at), -5e4, scores)[:, :, None]
        scores = jnp.where(in_k[..., None, :] > 0, scores, -jnp.inf)
        old = jnp.einsum("btnh,ncmh->bnctm", q, memory[0], precision="highest") / 2.0
        weights = jax.nn.softmax(jnp.concatenate([old, scores], -1), axis=-1)
        out = jnp.einsum("bncts,bsnh->bncth", weights[..., 1:], v, precision="highest")
        out = out + jnp.einsum("bnctm,ncmh->bncth", weights[..., :1], memory[1], precision="highest")
        return (jnp.sum(in_q[..., None] * out, axis=2) / (in_q.sum(2)[..., None] + 1e-5)).swapaxes(1, 2)

    @jax.jit
    def run(*arguments):
        found = ours(*arguments)
        want = pulled(lambda *xs: reference(*xs, found), cotangent, *arguments)
        return found, pulled(lambda *xs: ours(*xs).out, cotangent, *arguments), want

    found, got, want = run(q, k, v, memory)
    close(got, want, atol=5e-5)
    assert found.x.shape == (2, 17 if shared else 34, HEADS, WIDTH)
    # the most similar first, and rows shorter than the window are one window
    scores = np.einsum("btnh,nch->bnct", q / np.linalg.norm(q, axis=-1, keepdims=True), means)
    np.testing.assert_array_equal(found.q_members[..., 0], scores.argmax(-1))
    short = jax.eval_shape(lambda q, v: kmeans_attention(q, None, v, means, window=6), q[:, :4], v[:, :4])
    assert short.q_members.shape[-1] == 4


def test_narrow_types():
    """Choices and scores are made in float32."""
    q, _, v, means = draw(16, batch=1)
    q, v = (x.astype(jnp.bfloat16) for x in (q, v))

    @jax.jit
    def run(q, v):
        found = routing.routing_attention(q, None, v, means, window=6, causal=True)
        return found.out, found.q_members, routing.causal_routing_attention(q, v, means, window=6).out

    official, found, strict = run(q, v)
    q, v = (x.astype(np.float32) for x in (q, v))
    want, members = by_hand(q, None, v, means, 6)
    np.testing.assert_array_equal(found, members)
    np.testing.assert_allclose(official.astype(np.float32), want, atol=0.1)
    _, seen, step = strict_pairs(q, means, 6, np.ones((1, 16), bool), np.ones((1, 16), int))
    want = attend(*(y.swapaxes(1, 2) for y in (*[normalised(q)] * 2, v)), seen, step).swapaxes(1, 2)
    np.testing.assert_allclose(strict.astype(np.float32), want, atol=0.1)
    assert official.dtype == strict.dtype == jnp.bfloat16


def test_what_runs_and_why():
    q, _, v, means = draw(16)

    def run(q, v, means, **options):
        return routing.routing_attention(q, None, v, means, window=8, **options)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, v, means)]
    assert ops.explain(run, *shapes).chosen == "xla"
    with dispatch.target("tpu", device_kind="TPU v5 lite"):
        assert ops.explain(run, *shapes).chosen == "blocks"
        decision = ops.explain(run, *shapes, **tables())
    assert decision.chosen == "xla" and "need the scores" in decision.reasons["blocks"]
    with pytest.raises(NotImplementedError, match="need the scores"):
        jax.eval_shape(functools.partial(run, implementation="blocks", **tables()), q, v, means)
    with pytest.raises(ConfigError, match="unknown implementation 'block'"):
        jax.eval_shape(functools.partial(run, implementation="block"), q, v, means)


def test_bad_input():
    q, k, v, means = draw(10)
    with pytest.raises(ConfigError, match="causal = True with unshared queries and keys"):
        routing.routing_attention(q, k, v, means, window=4, causal=True)
    for window in (0, 13):
        with pytest.raises(ConfigError, match=f"window = {window}: .* between 1 and 12"):
            routing.routing_attention(q, None, v, means, window=window, block=4)
    with pytest.raises(ConfigError, match=r"means has shape \(3, 2, 4\)"):
        routing.routing_attention(q, None, v, means.swapaxes(0, 1), window=4)
    with pytest.raises(ConfigError, match="block = 0"):
        routing.routing_attention(q, None, v, means, window=4, block=0)
    with pytest.raises(ConfigError, match="window = 0"):
        routing.causal_routing_attention(q, v, means, window=0)
    with pytest.raises(ConfigError, match="flange = 6: block = 4 does not divide it"):
        local_block_attention(q, k, v, block=4, flange=6, causal=True)
    with pytest.raises(ConfigError, match="num_mem_kv = 0 with causal, unshared"):
        kmeans_attention(q, k, v, means, window=4, causal=True)
    with pytest.raises(ConfigError, match="window = 0"):
        kmeans_attention(q, None, v, means, window=0)

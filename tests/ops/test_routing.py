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


def draw(length, batch=2, seed=0, kinds=3):
    keys = jax.random.split(jax.random.key(seed), kinds + 1)
    arrays = [jax.random.normal(key, (batch, length, HEADS, WIDTH)) for key in keys[:-1]]
    return *arrays, kmeans.init_centroids(keys[-1], HEADS, CLUSTERS, WIDTH).means


def tables(reach=3, seed=5):
    keys, values = jax.random.normal(jax.random.key(seed), (2, 2 * reach + 1, WIDTH))
    return {"rel_keys": keys, "rel_values": values}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def normalised(x):
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def published(q, k, v, means, window, causal, block, rel_keys=None, rel_values=None):
    """The rule, head by head and cluster by cluster, in NumPy."""
    length = q.shape[1]
    pad = [(0, 0), (0, -length % block), (0, 0), (0, 0)]
    q, k, v = normalised(np.pad(q, pad)), normalised(np.pad(q if k is None else k, pad)), np.pad(v, pad)
    total, count = np.zeros(v.shape), np.zeros((*v.shape[:3], 1))
    for b, n, c in np.ndindex(q.shape[0], q.shape[2], means.shape[1]):
        near = [np.sort(np.argsort(-(x[b, :, n] @ np.asarray(means[n, c])), kind="stable")[:window]) for x in (q, k)]
        one_q, one_k, one_v = q[b, near[0], n], k[b, near[1], n], v[b, near[1], n]
        step = np.arange(window)[None] - np.arange(window)[:, None]
        scores, extra = one_q @ one_k.T, 0.0
        if rel_keys is not None:
            reach = rel_keys.shape[0] // 2
            at = np.clip(step, -reach, reach) + reach
            scores = scores + np.einsum("th,tsh->ts", one_q, np.asarray(rel_keys)[at])
        hidden = np.broadcast_to(~one_v.any(-1)[None], scores.shape) | (causal & (step > 0))
        weights = softmax(scores - 1e9 * hidden)
        if rel_values is not None:
            extra = np.einsum("ts,tsh->th", weights, np.asarray(rel_values)[at])
        np.add.at(total[b, :, n], near[0], weights @ one_v + extra)
        np.add.at(count[b, :, n], near[0], 1.0)
    return (total / (count + 0.01))[:, :length]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("length", "causal", "block"), [(24, True, 4), (19, True, 8), (19, False, 4), (63, True, 1)])
def test_routing_attention_is_the_published_rule(length, causal, block, relative):
    q, k, v, means = draw(length)
    k = None if causal else k
    extra = tables() if relative else {}
    run = functools.partial(routing.routing_attention, window=7, causal=causal, block=block)
    want = published(*(x if x is None else np.asarray(x) for x in (q, k, v, means)), 7, causal, block, **extra)
    found = jax.jit(run)(q, k, v, means, **extra)
    np.testing.assert_allclose(found.out, want, atol=2e-5)
    assert np.all(np.diff(found.q_members) > 0) and found.q_members.dtype == jnp.int32
    if not relative:
        blocks = jax.jit(functools.partial(run, implementation="blocks"))(q, k, v, means).out
        np.testing.assert_allclose(blocks, want, atol=2e-5)


@pytest.mark.parametrize("relative", [False, True])
def test_gradients_flow_through_values_and_scores_and_not_through_choices(relative):
    q, _, v, means = draw(12, batch=1)
    extra = tables() if relative else {}
    found = routing.routing_attention(q, None, v, means, window=5, causal=True, **extra)
    cotangent = jax.random.normal(jax.random.key(8), found.out.shape)

    def reference(q, v, extra):
        """Dense scores of every cluster over the whole row, masked to its members."""
        x = kmeans.plain_layer_norm(q)
        total, count = 0.0, 0.0
        for c in range(CLUSTERS):
            inside = jax.nn.one_hot(found.q_members[:, :, c], 12).sum(2)  # [B, N, T]
            places = jnp.cumsum(inside, -1) - 1
            step = (places[:, :, None] - places[..., None]).astype(jnp.int32)
            hidden = (inside[:, :, None] == 0) | ~jnp.tri(12, dtype=bool)
            heads = (y.swapaxes(1, 2) for y in (x, x, v))
            out = attend_relative(*heads, hidden=hidden, offsets=step, **extra)
            total, count = total + inside[..., None] * out, count + inside[..., None]
        return jnp.sum((total / (count + 0.01)).swapaxes(1, 2) * cotangent)

    def ours(q, v, extra, implementation="xla"):
        options = {"window": 5, "causal": True, "implementation": implementation}
        return jnp.sum(routing.routing_attention(q, None, v, means, **options, **extra).out * cotangent)

    want = jax.jit(jax.grad(reference, argnums=(0, 1, 2)))(q, v, extra)
    got = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(q, v, extra)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
    if not relative:
        blocks = jax.jit(jax.grad(functools.partial(ours, implementation="blocks"), argnums=(0, 1, 2)))(q, v, extra)
        for a, b in zip(jax.tree.leaves(blocks), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5)

    def of_means(means):
        routed = routing.routing_attention(q, None, v, means, window=5)
        return jnp.sum(routed.out) + kmeans.commitment_loss(routed.q, means)

    assert not np.any(jax.jit(jax.grad(of_means))(means))


def test_padding_and_segments_inside_clusters():
    q, _, v, means = draw(20)
    mask = jnp.ones((2, 20), bool).at[0, 3:6].set(False)
    zeros = jnp.where(mask[:, :, None, None], v, 0.0)
    run = jax.jit(functools.partial(routing.routing_attention, window=8, causal=True))
    # a mask is what zero values are
    real = np.asarray(mask)
    np.testing.assert_allclose(
        run(q, None, v, means, kv_mask=mask).out[real], run(q, None, zeros, means).out[real], atol=1e-6
    )
    segments = jnp.where(jnp.arange(20) < 9, 1, 2)[None].repeat(2, axis=0)
    for implementation in ("xla", "blocks"):
        mixed = jax.jit(
            jax.grad(
                lambda v, i=implementation: jnp.sum(
                    routing.routing_attention(
                        q, None, v, means, window=8, causal=True, segment_ids=segments, implementation=i
                    ).out[:, 9:]
                )
            )
        )(v)
        assert not np.any(mixed[:, :9]) and np.any(mixed[:, 9:])


def strict_weights(clusters, window, mask=None, segments=None):
    """Which keys each query sees by the strict rule, and how many members lie between: [T, S] each."""
    length = len(clusters)
    seen, step = np.zeros((length, length), bool), np.zeros((length, length), np.int32)
    for t in range(length):
        members = [
            s
            for s in range(t + 1)
            if clusters[s] == clusters[t]
            and (mask is None or mask[s])
            and (segments is None or segments[s] == segments[t])
        ]
        for back, s in enumerate(reversed(members)):
            step[t, s] = -back
            seen[t, s] = back < window
    return seen, step


@pytest.mark.parametrize(("length", "window"), [(1, 4), (63, 8), (100, 200)])
def test_strict_rule_against_its_definition(length, window):
    q, v, means = draw(length, batch=1, kinds=2)
    mask = jnp.ones((1, length), bool).at[0, 2:4].set(False)
    segments = jnp.where(jnp.arange(length) < 10, 1, 2)[None]
    extra = tables()

    def ours(q, v, extra, implementation=None):
        found = routing.causal_routing_attention(
            q, v, means, window=window, mask=mask, segment_ids=segments, implementation=implementation, **extra
        )
        return found.out, found.clusters

    found, clusters = jax.jit(ours)(q, v, extra)
    np.testing.assert_array_equal(clusters, kmeans.nearest_centroid(kmeans.centroid_scores(normalised(q), means)))
    pairs = [strict_weights(np.asarray(clusters[0, n]), window, np.asarray(mask[0]), np.asarray(segments[0])) for n in range(HEADS)]
    seen, step = (jnp.asarray(np.stack(part)) for part in zip(*pairs, strict=True))

    def reference(q, v, extra):
        heads = (y.swapaxes(1, 2) for y in (*[kmeans.plain_layer_norm(q)] * 2, v))
        return attend_relative(*heads, hidden=~seen, offsets=step, **extra).swapaxes(1, 2) / 1.01

    real = mask[:, :, None, None]
    np.testing.assert_allclose(found * real, reference(q, v, extra) * real, atol=2e-5)
    cotangent = jax.random.normal(jax.random.key(3), found.shape) * real
    want, got = (
        jax.jit(jax.grad(lambda *xs, f=f: jnp.sum(f(*xs) * cotangent), argnums=(0, 1, 2)))(q, v, extra)
        for f in (reference, lambda *xs: ours(*xs)[0])
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
    blocks = jax.jit(functools.partial(ours, implementation="blocks"))(q, v, {})[0]
    np.testing.assert_allclose(blocks * real, reference(q, v, {}) * real, atol=2e-5)


def test_no_output_of_the_strict_rule_depends_on_a_later_token():
    q, v, means = draw(30, kinds=2)
    run = jax.jit(lambda q, v: routing.causal_routing_attention(q, v, means, window=5).out)
    for at in (1, 14, 29):
        changed = run(q.at[:, at:].multiply(-3.0), v.at[:, at:].add(1.0))
        np.testing.assert_allclose(changed[:, :at], run(q, v)[:, :at], atol=1e-6)
    official = jax.jit(lambda q: routing.routing_attention(q, None, v, means, window=5, causal=True).out)
    assert not np.allclose(official(q.at[:, 14:].multiply(-3.0))[:, :14], official(q)[:, :14], atol=1e-3)


@pytest.mark.parametrize(
    ("length", "block", "flange", "causal"), [(17, 4, 8, True), (19, 5, 5, False), (3, 8, 8, True)]
)
def test_block_local_heads_against_a_dense_mask(length, block, flange, causal):
    q, k, v, _ = draw(length)
    extra = tables()
    at = np.arange(length)
    first = at // block * block - flange
    last = at if causal else at // block * block + block - 1 + flange
    seen = (at[None] >= first[:, None]) & (at[None] <= last[:, None])
    # bidirectional relative positions are shifted by the flange, as published
    step = at[None] - at[:, None] - (0 if causal else flange)

    def reference(q, k, v, extra):
        heads = (y.swapaxes(1, 2) for y in (q, k, v))
        return attend_relative(*heads, hidden=jnp.asarray(~seen), offsets=jnp.asarray(step), **extra).swapaxes(1, 2)

    ours = functools.partial(local_block_attention, block=block, flange=flange, causal=causal)
    cotangent = jax.random.normal(jax.random.key(1), q.shape)
    want, got = (
        jax.jit(jax.value_and_grad(lambda q, k, v, e, f=f: jnp.sum(f(q, k, v, e) * cotangent), argnums=(0, 1, 2, 3)))(
            q, k, v, extra
        )
        for f in (reference, lambda q, k, v, e: ours(q, k, v, **e))
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)
    for implementation in ("blocks", "xla"):
        found = jax.jit(functools.partial(ours, implementation=implementation))(q, k, v)
        np.testing.assert_allclose(found, jax.jit(reference)(q, k, v, {}), atol=2e-5)


def test_large_calls_run_some_clusters_at_a_time(monkeypatch):
    q, k, v, means = draw(24)
    extra = tables()

    def both(q, v):
        routed = routing.routing_attention(q, None, v, means, window=8, causal=True, **extra).out
        port = kmeans_attention(q, None, v, means, window=8, causal=True).out
        return routed + port + local_block_attention(q, k, v, block=4, flange=4, causal=True, **extra)

    gradient = jax.grad(lambda q, v: jnp.sum(jnp.sin(both(q, v))), argnums=(0, 1))
    want = jax.jit(both)(q, v), jax.jit(gradient)(q, v)
    monkeypatch.setattr("attnlab.ops.block_window.CHUNK_BYTES", 2048)
    got = jax.jit(lambda q, v: both(q, v))(q, v), jax.jit(lambda q, v: gradient(q, v))(q, v)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    calls = []
    in_chunks(lambda inputs: (calls.append(inputs[0].shape), inputs[0])[1], (jnp.ones((1, 1, 5, 2)),), 700)
    assert calls[0][2] < 5


def test_moving_averages_by_hand():
    """Two steps with one head and two clusters; padding does not count, and a batch of it changes no mean."""
    means = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    state = kmeans.Centroids(means, jnp.zeros((1, 2)), means)
    x = jnp.array([[[[2.0, 1.0]], [[4.0, 1.0]], [[1.0, 3.0]], [[0.0, 0.0]]]])
    first = kmeans.update_centroids(state, x, decay=0.5, epsilon=0.0)
    np.testing.assert_allclose(first.counts, [[1.0, 0.5]])
    np.testing.assert_allclose(first.sums, [[[3.5, 1.0], [0.5, 2.0]]])
    np.testing.assert_allclose(first.means, [[[3.5, 1.0], [1.0, 4.0]]], rtol=1e-6)
    second = kmeans.update_centroids(first, x, decay=0.5, epsilon=0.0)
    np.testing.assert_allclose(second.counts, [[1.5, 0.75]])
    smoothed = kmeans.update_centroids(first, x, decay=0.5, epsilon=0.1)
    np.testing.assert_allclose(smoothed.means, second.sums / (((second.counts + 0.1) / 2.45) * 2.25)[..., None], rtol=1e-6)
    untouched = kmeans.update_centroids(state, jnp.zeros_like(x))
    np.testing.assert_array_equal(untouched.means, means)
    two = kmeans.Centroids(*(jnp.concatenate([leaf, leaf]) for leaf in state))
    both = jnp.concatenate([x, -x], axis=2)
    right, wrong = (kmeans.update_centroids(two, both, counting=counting) for counting in ("per_head", "official"))
    np.testing.assert_array_equal(right.sums, wrong.sums)
    assert not np.allclose(right.counts, wrong.counts)
    np.testing.assert_allclose(right.counts.sum(), wrong.counts.sum(), rtol=1e-6)
    with pytest.raises(ConfigError, match="counting = 'mixed'"):
        kmeans.update_centroids(state, x, counting="mixed")


def test_centroids_find_clusters():
    """Three bundles of directions: Lloyd steps from a draw of vectors, and moving averages from nothing."""
    keys = jax.random.split(jax.random.key(0), 4)
    truth = kmeans.plain_layer_norm(jax.random.normal(keys[0], (1, 3, 8)))
    which = jax.random.randint(keys[1], (4, 50), 0, 3)
    x = kmeans.plain_layer_norm(truth[0, which][:, :, None] + 0.1 * jax.random.normal(keys[2], (4, 50, 1, 8)))
    draws = jax.random.split(keys[3], 6)
    found = jax.jit(jax.vmap(lambda key: kmeans.lloyd(kmeans.unit_vectors(x), key, 3)))(draws)
    near = jnp.einsum("dnch,nkh->dnck", found, kmeans.unit_vectors(truth)).max(2)
    assert np.any(np.all(near > 0.95, axis=(1, 2)))  # a draw with two vectors of one bundle may stay there
    means = truth + 0.7 * jax.random.normal(keys[3], truth.shape)
    state = kmeans.Centroids(means, jnp.zeros((1, 3)), means)
    before = float(kmeans.commitment_loss(x, state.means))
    step = jax.jit(lambda state: kmeans.update_centroids(state, x, decay=0.9))
    for _ in range(60):
        state = step(state)
    assert float(kmeans.commitment_loss(x, state.means)) < 0.5 * before
    with_gradient = jax.grad(lambda x: kmeans.commitment_loss(x, state.means))(x)
    target = state.means[0, kmeans.nearest_centroid(kmeans.centroid_scores(x, state.means))[:, 0]][:, :, None]
    np.testing.assert_allclose(with_gradient, 2 * (x - target) / x.size, atol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: kmeans.unit_vectors(x).sum())(jnp.zeros(3))))


def test_more_clusters_than_vectors_in_the_first_batch():
    x = kmeans.unit_vectors(jax.random.normal(jax.random.key(0), (1, 2, 1, 4)))
    assert np.all(np.isfinite(kmeans.lloyd(x, jax.random.key(1), 5)))


@pytest.mark.parametrize("shared", [True, False])
def test_port_against_a_dense_form(shared):
    q, k, v, means = draw(17)
    k = None if shared else k
    memory = {"mem_key": jnp.ones((HEADS, CLUSTERS, 1, WIDTH)), "mem_value": jnp.full((HEADS, CLUSTERS, 1, WIDTH), 0.5)}
    mask = jnp.ones((2, 17), bool).at[1, 10:].set(False)
    run = jax.jit(functools.partial(kmeans_attention, window=6, causal=True))
    found = run(q, k, v, means, mask=mask, **memory)
    total, count = np.zeros(v.shape), np.zeros((*v.shape[:3], 1))
    for b, n, c in np.ndindex(2, HEADS, CLUSTERS):
        at_q, at_k = (np.asarray(members[b, n, c]) for members in (found.q_members, found.k_members))
        keys = np.asarray(kmeans.unit_vectors(q) if shared else k)[b, at_k, n]
        scores = np.asarray(q)[b, at_q, n] @ keys.T / WIDTH**0.5
        blind = (at_q[:, None] < at_k[None]) | ~(np.asarray(mask)[b, at_q, None] & np.asarray(mask)[b, None, at_k])
        scores = np.where(blind, -1e30, scores)
        scores = np.where(shared & (at_q[:, None] == at_k[None]), -5e4, scores)
        old = np.asarray(q)[b, at_q, n].sum(-1, keepdims=True) / WIDTH**0.5
        weights = softmax(np.concatenate([old, scores], -1))
        out = weights[:, 1:] @ np.asarray(v)[b, at_k, n] + 0.5 * weights[:, :1]
        np.add.at(total[b, :, n], at_q, out)
        np.add.at(count[b, :, n], at_q, 1.0)
    np.testing.assert_allclose(found.out, total / (count + 1e-5), atol=2e-5)
    assert found.x.shape == (2, 17 if shared else 34, HEADS, WIDTH)
    # the most similar first, and rows shorter than the window are one window
    scores = kmeans.centroid_scores(kmeans.unit_vectors(q), means)
    np.testing.assert_array_equal(found.q_members[..., 0], jnp.argmax(scores, axis=-1))
    assert run(q[:, :4], None if k is None else k[:, :4], v[:, :4], means, **memory).q_members.shape[-1] == 4


def test_narrow_types_and_vmap():
    q, k, v, means = draw(16)
    narrow = [x.astype(jnp.bfloat16) for x in (q, v)]
    wide = [x.astype(jnp.float32) for x in narrow]
    run = jax.jit(lambda q, v: routing.routing_attention(q, None, v, means, window=6, causal=True))
    got, want = run(*narrow), run(*wide)
    assert got.out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.q_members, want.q_members)  # choices are made in float32
    np.testing.assert_allclose(got.out.astype(jnp.float32), want.out, atol=0.1)
    strict = jax.jit(lambda q, v: routing.causal_routing_attention(q, v, means, window=6).out)
    assert strict(*narrow).dtype == jnp.bfloat16
    stacked = jnp.stack([q, k])
    each = jax.jit(jax.vmap(lambda q: strict(q, v)))(stacked)
    np.testing.assert_allclose(each[1], strict(k, v), atol=1e-5)
    each = jax.jit(jax.vmap(lambda q: run(q, v).out))(stacked)
    np.testing.assert_allclose(each[0], run(q, v).out, atol=1e-5)


def test_what_runs_and_why():
    q, _, v, means = draw(16)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, v, means)]

    def run(q, v, means, **options):
        return routing.routing_attention(q, None, v, means, window=8, **options)

    assert ops.explain(run, *shapes).chosen == "xla"
    with dispatch.target("tpu", device_kind="TPU v5 lite"):
        assert ops.explain(run, *shapes).chosen == "blocks"
        decision = ops.explain(run, *shapes, **tables())
    assert decision.chosen == "xla" and "need the scores" in decision.reasons["blocks"]
    with pytest.raises(NotImplementedError, match="need the scores"):
        run(q, v, means, implementation="blocks", **tables())
    with pytest.raises(ConfigError, match="unknown implementation 'block'"):
        run(q, v, means, implementation="block")


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

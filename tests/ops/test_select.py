"""Choosing blocks: scores, visibility, forced blocks, top-k, thresholds, and lists from regions and clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.ops import select


def test_pooling_of_a_ragged_length():
    x = jax.random.normal(jax.random.key(0), (2, 10, 3, 4))
    parts = [np.asarray(x[:, at : at + 4]) for at in (0, 4, 8)]
    for pooling, pool in (("mean", np.mean), ("max", np.max)):
        want = np.stack([pool(part, axis=1) for part in parts], axis=1)
        np.testing.assert_allclose(select.pool_blocks(x, 4, pooling), want, atol=1e-6)
    np.testing.assert_array_equal(select.pool_blocks(x, 4, "first"), x[:, ::4])
    mask = jnp.arange(10)[None] < jnp.array([[3], [10]])
    masked = select.pool_blocks(x, 4, "mean", mask)
    np.testing.assert_allclose(masked[0, 0], np.asarray(x[0, :3]).mean(0), atol=1e-6)
    assert not np.any(masked[0, 1:]) and not np.any(select.pool_blocks(x, 4, "max", mask)[0, 1:])
    with pytest.raises(ConfigError, match="pooling = 'sum'"):
        select.pool_blocks(x, 4, "sum")


def test_scores_by_group():
    q = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    k = jax.random.normal(jax.random.key(1), (2, 7, 2, 8))
    want = np.einsum("brnh,bcnh->bnrc", q, np.repeat(k, 2, axis=2)) / 8**0.5
    np.testing.assert_allclose(select.block_scores(q, k), want, atol=1e-5)
    np.testing.assert_allclose(select.block_scores(q, k, "kv"), want.reshape(2, 2, 2, 5, 7).mean(2), atol=1e-5)
    np.testing.assert_allclose(select.block_scores(q, k, "all"), want.mean(1, keepdims=True), atol=1e-5)
    with pytest.raises(ConfigError, match="groups = 'heads'"):
        select.block_scores(q, k, "heads")


@pytest.mark.parametrize(("length", "keys"), [(24, 24), (20, 33), (33, 20)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (5, 2)}, {"causal": True, "window": (4, -1)}])
def test_visible_blocks(length, keys, options):
    x, y = jnp.zeros((1, length, 1, 4)), jnp.zeros((1, keys, 1, 4))
    seen = np.asarray(ops.attention_weights("sigmoid", x, y, **options))[0, 0] > 0
    have = select.visible_blocks(length, keys, 8, 4, **options)
    for r, c in np.ndindex(*have.shape):
        assert have[r, c] == seen[r * 8 : (r + 1) * 8, c * 4 : (c + 1) * 4].any(), (r, c)


def test_forced_blocks():
    have = select.forced_blocks(32, 32, 8, 4, sink=1, local=2)
    for r in range(4):
        want = {0, 2 * r, 2 * r + 1} | {c for c in (2 * r - 2, 2 * r - 1) if c >= 0}
        assert set(np.flatnonzero(have[r])) == want
    assert not select.forced_blocks(32, 32, 8, 4, own=False).any()


def test_top_blocks():
    scores = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    visible = select.visible_blocks(32, 32, 8, 4, causal=True)
    forced = select.forced_blocks(32, 32, 8, 4, sink=1)
    index = np.asarray(select.top_blocks(scores, 4, visible=visible, forced=forced))
    for b, g, r in np.ndindex(2, 3, 4):
        chosen = index[b, g, r][index[b, g, r] >= 0]
        must = np.flatnonzero(forced[r] & visible[r])
        rest = sorted(set(np.flatnonzero(visible[r])) - set(must), key=lambda c: -scores[b, g, r, c])
        assert set(chosen[: len(must)]) == set(must)
        assert list(chosen[len(must) :]) == rest[: 4 - len(must)]
        assert len(set(chosen)) == len(chosen)
    assert select.top_blocks(jnp.zeros((1, 1, 1, 4)), 3).tolist() == [[[[0, 1, 2]]]]
    kept = np.asarray(select.top_blocks(scores, 8, threshold=0.5))
    np.testing.assert_array_equal((kept >= 0).sum(-1), (scores >= 0.5).sum(-1))
    with pytest.raises(ConfigError, match="count = 9: there are 8"):
        select.top_blocks(scores, 9)


def test_a_choice_has_no_gradient():
    def total(scores):
        return select.top_blocks(scores, 2).sum() * 1.0 + select.mass_blocks(scores, 0.5, 2).sum()

    assert not np.any(jax.grad(total)(jax.random.normal(jax.random.key(0), (1, 1, 2, 4))))


def test_mass_blocks():
    scores = jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3]))[None, None, None]
    assert select.mass_blocks(scores, 0.4, 4).tolist() == [[[[1, -1, -1, -1]]]]
    assert select.mass_blocks(scores, 0.75, 4).tolist() == [[[[1, 3, -1, -1]]]]
    assert select.mass_blocks(scores, 0.9, 2).tolist() == [[[[1, 3]]]]
    forced = np.array([True, False, False, False])
    assert select.mass_blocks(scores, 0.4, 4, forced=forced).tolist() == [[[[0, 1, -1, -1]]]]


def test_regions_become_lists():
    index = jnp.array([[[[1, -1], [0, 2]]]])
    assert select.expand_blocks(index, 2, 2).tolist() == [[[[2, 3, -1, -1]] * 2 + [[0, 1, 4, 5]] * 2]]
    assert select.cluster_blocks(2, 2, 1).tolist() == [[[[0], [0], [1], [1]]]]


def test_clusters_attend_among_themselves():
    """Gathered clusters with their old positions equal dense attention under "same cluster and not later"."""
    members = jax.random.permutation(jax.random.key(0), 32).reshape(4, 8).sort(axis=1)
    q, k, v = (jax.random.normal(key, (1, 32, 2, 8)) for key in jax.random.split(jax.random.key(1), 3))
    order = members.reshape(-1)
    index = jnp.asarray(select.cluster_blocks(4, 2, 1))
    gathered = ops.block_attention(
        *(x[:, order] for x in (q, k, v)),
        index,
        block_q=4,
        block_kv=8,
        causal=True,
        q_positions=order[None],
        kv_positions=order[None],
    )
    have = jnp.zeros_like(q).at[:, order].set(gathered)
    cluster = jnp.zeros(32, int).at[order].set(jnp.arange(32) // 8)
    want = ops.softmax_attention(q, k, v, causal=True, q_segment_ids=cluster[None], kv_segment_ids=cluster[None])
    np.testing.assert_allclose(have, want, atol=1e-6)

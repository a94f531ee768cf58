"""Token pruning and MixToken: choices and ties, what is merged, results in place, boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops.mix_token import box_share, sample_box, swap_box
from attnlab.ops.token_pruning import choose_tokens, gather_tokens, merge_dropped, place_tokens, pool_scores

SCORES = jnp.asarray([[0.1, 0.4, 0.1, 0.4, 0.3, 0.2], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])


def test_choice_is_ascending_and_ties_go_to_the_earlier():
    np.testing.assert_array_equal(choose_tokens(SCORES, 3), [[1, 3, 4], [0, 1, 2]])
    np.testing.assert_array_equal(choose_tokens(jnp.ones((1, 4)), 2), [[0, 1]])
    assert choose_tokens(SCORES, 0).shape == (2, 0)
    with pytest.raises(ConfigError, match="there are 6 tokens"):
        choose_tokens(SCORES, 7)


def test_merged_token_and_its_gradients():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 3)), jnp.float32)
    kept = choose_tokens(SCORES, 3)

    def merged(scores):
        return merge_dropped(x, scores, kept)

    y, pullback = jax.vjp(merged, SCORES)
    want = (0.1 * x[0, 0] + 0.1 * x[0, 2] + 0.2 * x[0, 5]) / 0.4
    np.testing.assert_allclose(y[0, 0], want, rtol=1e-5)
    (gradient,) = pullback(jnp.ones_like(y))
    dropped = np.ones((2, 6), bool)
    np.put_along_axis(dropped, np.asarray(kept), False, axis=1)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, dropped)


def test_gathered_tokens_return_to_their_places():
    x = jnp.arange(24.0).reshape(2, 6, 2)
    kept = choose_tokens(SCORES, 2)
    np.testing.assert_array_equal(place_tokens(x, kept, gather_tokens(x, kept)), x)
    changed = np.asarray(place_tokens(x, kept, -gather_tokens(x, kept)) != x)[:, :, 1]
    np.testing.assert_array_equal(changed, [[False, True, False, True, False, False], [True, True, False, False, False, False]])


def test_pooled_scores_keep_their_sum():
    scores = jnp.asarray(np.random.default_rng(1).random((2, 15)), jnp.float32)
    pooled = pool_scores(scores, (3, 5))
    assert pooled.shape == (2, 2)
    np.testing.assert_allclose(pooled.sum(1), scores.sum(1), rtol=1e-5)
    cells = np.asarray(scores[0]).reshape(3, 5)
    np.testing.assert_allclose(pooled[0, 0] / pooled[0, 1], cells[:2, :2].sum() / cells[:2, 2:4].sum(), rtol=1e-5)


def test_boxes():
    draw = jax.jit(jax.vmap(lambda key: sample_box(key, (8, 12))))
    boxes = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 8 and boxes[:, 3].max() <= 12
    assert np.all(boxes[:, :2] <= boxes[:, 2:])
    x = jnp.arange(3 * 8 * 12.0).reshape(3, 8, 12, 1)
    box = jnp.asarray([2, 3, 6, 11])
    mixed = swap_box(x, box)
    np.testing.assert_array_equal(mixed[0, 2:6, 3:11], x[2, 2:6, 3:11])
    assert np.sum(mixed[0] != x[0]) == 32 and box_share(box, (8, 12)) == pytest.approx(32 / 96)
    np.testing.assert_array_equal(swap_box(mixed, box), x)

"""MoH-ViT: published sizes, aggregated attention against loops, gates and losses, bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.models.flops import count_flops
from attnlab.models.moh_vit import MoHViT
from attnlab.nn.aggregated_attention import MixtureOfHeadsAggregatedAttention, aggregated_attention
from attnlab.nn.mixture_of_heads_map import pooling, relative_coordinates

# Millions of parameters and billions of multiply-adds of TransNeXt (arXiv 2311.17132, table 1).
PUBLISHED = {"small": (49.7, 10.3), "base": (89.7, 18.4)}
TINY = {"num_classes": 5, "dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "heads": (2, 2, 4, 4)}
ROUTED = {**TINY, "shared_heads": (2, 1, 2, 1), "top_ks": (0, 1, 1, 2)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    counts = []

    def init(image):
        counts.append(sum(leaf.size for leaf in jax.tree.leaves(MoHViT.sized(size).init(jax.random.key(0), image))))

    flops = count_flops(init, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    millions, billions = PUBLISHED[size]
    assert round(counts[0] / 1e6, 1) == millions
    assert flops / 2e9 == pytest.approx(billions, rel=0.03)


def test_aggregated_attention_equals_loops():
    """Each position by itself in float64: nine neighbours, cut at the border, and the pooled positions, in one softmax."""
    rng = np.random.default_rng(0)
    height, width, heads, size, small = 3, 4, 2, 5, 2
    draw = rng.standard_normal
    q, k, v = (draw((1, height, width, heads, size)) for _ in range(3))
    far_k, far_v = (draw((1, small, heads, size)) for _ in range(2))
    scale, embedding = rng.random((height, width, heads)) + 0.5, draw((heads, size))
    bias, far_bias = draw((heads, 9)), draw((heads, height * width, small))
    tokens, token_bias = draw((heads, size, 9)), draw((heads, 9))
    want = np.zeros_like(q)
    for y, x, n in itertools.product(range(height), range(width), range(heads)):
        asked = (q[0, y, x, n] + embedding[n]) * scale[y, x, n]
        places = [(i, y + i // 3 - 1, x + i % 3 - 1) for i in range(9)]
        near = [(i, r, c) for i, r, c in places if 0 <= r < height and 0 <= c < width]
        scores = [asked @ k[0, r, c, n] + bias[n, i] for i, r, c in near]
        scores += [asked @ far_k[0, p, n] + far_bias[n, y * width + x, p] for p in range(small)]
        weights = np.exp(scores) / np.exp(scores).sum()
        for weight, (i, r, c) in zip(weights, near, strict=False):
            want[0, y, x, n] += (weight + q[0, y, x, n] @ tokens[n, :, i] + token_bias[n, i]) * v[0, r, c, n]
        want[0, y, x, n] += weights[len(near) :] @ far_v[0, :, n]
    arrays = (q, scale, embedding, (k, v), (far_k, far_v), bias, far_bias, (tokens, token_bias))
    with jax.default_matmul_precision("highest"):
        have, near, far = jax.jit(aggregated_attention)(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays))
    np.testing.assert_allclose(have, want, atol=2e-5)
    np.testing.assert_allclose(near.sum(-1) + far.sum(-1), 1.0, atol=1e-6)
    assert not np.any(near[0, 0, :, :, :3]) and np.all(near[0, 1, 1] > 0)


def test_pooled_axes():
    """Parts of an axis as adaptive pooling has them, and offsets to their middles."""
    np.testing.assert_allclose(pooling(5, 2), [[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    table, index = relative_coordinates((5, 4), (2, 2))
    assert index.shape == (20, 4)
    offset = np.array([0 - 1, 3 - 0.5]) / [4, 3] * 8  # from row 0, column 3 to the first pooled place
    np.testing.assert_allclose(table[index[3, 0]], np.sign(offset) * np.log2(np.abs(offset) + 1) / 3, rtol=1e-6)


def test_gates_losses_and_gradients():
    model = MoHViT(**ROUTED, drop_path=0.1, remat="full", capture_attention=True)
    images = jax.random.normal(jax.random.key(0), (2, 68, 64, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)

    def loss(params):
        options = {"deterministic": False, "rngs": {"dropout": jax.random.key(2)}, "mutable": ["losses", "metrics", "intermediates"]}
        logits, sown = model.apply({"params": params}, images, **options)
        return jnp.square(logits).sum() + sum(map(jnp.sum, jax.tree.leaves(sown["losses"]))), (logits, sown)

    gradients, (logits, sown) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    # three layers have routed heads; a balanced layer's loss is k
    losses = {path[0].key: float(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(sown["losses"])}
    assert set(losses) == {"stages_1_0", "stages_2_0", "stages_3_0"}
    assert losses["stages_3_0"] == pytest.approx(0.01 * 2 / 3, rel=0.2)
    gates = sown["intermediates"]["stages_1_0"]["attention"]["gates"][0]
    assert gates.shape == (2, 9 * 8, 2) and np.all(gates > 0)
    assert [x.shape for x in model.bind(variables).features(images)] == [
        (2, 17, 16, 8), (2, 9, 8, 16), (2, 5, 4, 24), (2, 3, 2, 32),
    ]  # fmt: skip


def test_plain_attention_is_every_gate_at_one():
    """Without a router the result is that of heads whose gates are all one."""
    fields = {"dim": 8, "num_heads": 2, "reduction": 2}
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    plain, mixed = MixtureOfHeadsAggregatedAttention(**fields), MixtureOfHeadsAggregatedAttention(**fields, shared_heads=2)
    variables = jax.jit(mixed.init)(jax.random.key(1), x)
    params = dict(variables["params"])
    params["router"] = jax.tree.map(jnp.zeros_like, params["router"])  # two shared heads of equal weight: 2 * 1/2
    have = mixed.apply({"params": params}, x)
    params.pop("router")
    np.testing.assert_allclose(have, plain.apply({"params": params}, x), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": (3, 2, 4, 4)}, "does not divide dim = 8"),
        ({"shared_heads": (2, 2)}, "one entry for each stage"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"reductions": (64, 4, 2, 1)}, "Use larger images"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    model = MoHViT(**{**ROUTED, **fields})
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))

"""Block lists and attention over them by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.ops import block_index
from attnlab.ops.block_attention import attend_listed
from attnlab.ops.block_index import BlockIndex


def lists(batch, groups, rows, columns, width, seed=0):
    rng = np.random.default_rng(seed)
    index = np.argsort(rng.random((batch, groups, rows, columns)), axis=-1)[..., :width]
    index[rng.random(index.shape) < 0.2] = -1
    index[0, 0, 0] = -1
    return jnp.array(index, jnp.int32)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window, padding": {"window": (20, 9), "kv_mask": jnp.arange(70)[None] < jnp.array([[70], [41]])},
    "segments": {"q_segment_ids": jnp.arange(50)[None] // 20 + jnp.zeros((2, 1), int), "kv_segment_ids": None},
    "positions, ALiBi": {
        "causal": True,
        "q_positions": jnp.arange(50)[None] * 2,
        "kv_positions": jnp.arange(70)[None] - 3,
        "alibi_slopes": jnp.array([0.5, 0.25, 0.1, 0.0]),
    },
}


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_gather_equals_the_mask(name, groups, normalization, draw):
    arrays = draw(length=50, keys=70)
    options = dict(OPTIONS[name])
    if "q_segment_ids" in options:
        options["kv_segment_ids"] = jnp.broadcast_to(jnp.arange(70) // 30, (2, 70))
    if normalization == "sigmoid":
        options["bias"] = -1.0
    index = lists(2, groups, 4, 5, 3)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation, *arrays):
        def op(*x):
            return ops.block_attention(
                *x, index, block_q=16, block_kv=14, normalization=normalization, implementation=implementation, **options
            )

        out, pullback = jax.vjp(op, *arrays[:3])
        return out, *pullback(arrays[3])

    for one, other in zip(gradients("xla", *arrays), gradients("xla_dense", *arrays), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_all_blocks_listed_is_dense_attention(draw):
    q, k, v, _ = draw(length=48)
    index = jnp.broadcast_to(jnp.array([2, 0, 1]), (2, 1, 3, 3))
    have = ops.block_attention(q, k, v, index, block_q=16, block_kv=16, causal=True)
    np.testing.assert_allclose(have, ops.softmax_attention(q, k, v, causal=True), atol=1e-6)


def test_chunks_do_not_matter(draw):
    q, k, v, _ = draw(length=70)
    from attnlab.ops.attention import make_call

    call = make_call(q, k, v, normalization="softmax")
    blocks = BlockIndex(lists(2, 4, 5, 5, 2), 16, 16)
    for chunk in (1, 2, 5):
        np.testing.assert_allclose(attend_listed(call, blocks, chunk), attend_listed(call, blocks), atol=1e-6)


def test_bfloat16_keeps_its_type(draw):
    q, k, v, _ = draw(length=32, dtype=jnp.bfloat16)
    index = lists(2, 1, 2, 2, 1)
    have = ops.block_attention(q, k, v, index, block_q=16, block_kv=16)
    assert have.dtype == jnp.bfloat16
    wide = ops.block_attention(*(x.astype(jnp.float32) for x in (q, k, v)), index, block_q=16, block_kv=16)
    np.testing.assert_allclose(have.astype(jnp.float32), wide, atol=3e-2)


def test_unlisted_blocks_are_skipped(draw):
    """An eighth of the blocks costs about an eighth of the work."""
    q, k, v, _ = draw(batch=1, length=1024, heads=1, kv_heads=1, width=16)
    index = jnp.broadcast_to(jnp.arange(16)[:, None] // 2 * 2 + jnp.arange(2), (1, 1, 16, 2))

    def cost(implementation):
        def op(q, k, v):
            return ops.block_attention(q, k, v, index, block_q=64, block_kv=64, implementation=implementation)

        return jax.jit(op).lower(q, k, v).compile().cost_analysis()["flops"]

    # the loop over chunks is counted once: all 16 query blocks are one chunk here
    assert cost("xla") < cost("xla_dense") / 6


@pytest.mark.parametrize("width", [None, 2])
def test_transpose(width):
    index = lists(2, 3, 6, 5, 3)
    have = np.asarray(jax.jit(functools.partial(block_index.transpose, kv_blocks=5, width=width))(index))
    assert have.shape == (2, 3, 5, width or 6)
    for b, g, c in np.ndindex(2, 3, 5):
        want = [r for r in range(6) if c in np.asarray(index)[b, g, r]][: have.shape[-1]]
        assert list(have[b, g, c]) == want + [-1] * (have.shape[-1] - len(want))


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        (jnp.zeros((2, 1, 4, 1)), {}, "signed integers"),
        (jnp.zeros((2, 1, 3, 1), jnp.int32), {}, r"\[2, 1 or 2 or 4, 4, J\]"),
        (jnp.zeros((2, 3, 4, 1), jnp.int32), {}, r"shape \(2, 3, 4, 1\)"),
        (jnp.zeros((1, 1, 4, 1), jnp.int32), {}, "block_index has shape"),
        (jnp.full((2, 1, 4, 1), 5, jnp.int32), {}, "holds 5.*blocks 0 to 4"),
        (jnp.full((2, 1, 4, 1), -2, jnp.int32), {}, "holds -2.*-1 for an unused"),
        (jnp.zeros((2, 1, 4, 2), jnp.int32), {}, "lists a key block twice"),
        (jnp.zeros((2, 1, 4, 1), jnp.int32), {"block_q": 0}, "block_q = 0"),
    ],
)
def test_wrong_lists_are_refused(index, options, message, draw):
    q, k, v, _ = draw(length=50, keys=70)
    with pytest.raises(ConfigError, match=message):
        ops.block_attention(q, k, v, index, **{"block_q": 16, "block_kv": 14, **options})

"""Shifted groups and sinks: who sees whom, values and gradients of every implementation, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.ops.shifted import ShiftedPattern, interpolation_factor, shifted_attention, shifted_block_index

PATTERNS = {
    "s2 windows": ShiftedPattern(8),
    "s2 roll": ShiftedPattern(6, "roll"),
    "sf": ShiftedPattern(8, num_sinks=4, returned_fraction=0.5),
    "sinks over several groups": ShiftedPattern(2, num_sinks=5, returned_fraction=0.25),
    "odd groups": ShiftedPattern(3, num_sinks=1),
    "odd groups rolled": ShiftedPattern(3, "roll", returned_fraction=0.5),
    "rolled with sinks": ShiftedPattern(6, "roll", num_sinks=4),
    "all returned": ShiftedPattern(6, num_sinks=2, returned_fraction=1.0),
    "share of the sequence": ShiftedPattern(4, num_sinks=4, returned_fraction=0.5, reassembly="sequence"),
    "single tokens": ShiftedPattern(1, num_sinks=2),
    "one group": ShiftedPattern(24, num_sinks=4),
}
LENGTH = 24


def plainly_visible(pattern, length, heads):
    """The specification, word by word, query by query."""
    size, half = pattern.group_size, pattern.group_size // 2
    offset_heads = heads - heads // 2
    returned = round(pattern.returned_fraction * offset_heads) if pattern.reassembly == "heads" else 0
    border = round(pattern.returned_fraction * length / size) * size if pattern.reassembly == "sequence" else 0
    seen = np.zeros((heads, length, length), bool)
    for head in range(heads):
        offset = head >= heads // 2 + returned
        for query in range(length):
            for key in range(length):
                if offset and pattern.variant == "roll":
                    a, b = (query - half) % length, (key - half) % length
                    near = a // size == b // size and b <= a
                elif offset and query >= border:
                    near = key >= border and (query - border + half) // size == (key - border + half) // size and key <= query
                else:
                    near = query // size == key // size and key <= query
                seen[head, query, key] = near or (key < pattern.num_sinks and key <= query)
    return seen


@pytest.mark.parametrize("name", PATTERNS)
def test_who_sees_whom(name):
    pattern = PATTERNS[name]
    for heads in (1, 2, 4, 5):
        want = plainly_visible(pattern, LENGTH, heads)
        np.testing.assert_array_equal(pattern.visible(LENGTH, heads), want)
        if pattern.variant == "windows":
            assert pattern.keys_per_query(LENGTH, heads) == pytest.approx(want.sum() / (heads * LENGTH))
            if pattern.reassembly == "heads":
                queries, keys = np.array([3, 17, 20]), np.arange(30)
                cached = pattern.visible_slots(queries, keys, heads)
                np.testing.assert_array_equal(cached[..., :LENGTH], want[:, queries])
                assert not np.any(cached[..., LENGTH:])


def plain_heads(heads, fraction):
    return ShiftedPattern(4, returned_fraction=fraction).plain_heads(heads)


def test_heads_are_given_back_by_the_fraction():
    assert [plain_heads(8, r) for r in (0.0, 0.25, 0.5, 1.0)] == [4, 5, 6, 8]
    assert plain_heads(6, 0.5) == 5  # 1.5 rounds to 2
    assert plain_heads(5, 1.0) == 5 and plain_heads(1, 0.0) == 0


STRUCTURES = {
    "plain": {},
    "segments": {"q_segment_ids": jnp.where(jnp.arange(LENGTH) < 11, 1, 2)[None].repeat(2, axis=0)},
    "padding": {"kv_mask": jnp.arange(LENGTH)[None] < jnp.array([[24], [13]])},
    "both, scaled": {
        "q_segment_ids": jnp.where(jnp.arange(LENGTH) < 5, 1, 2)[None].repeat(2, axis=0),
        "kv_mask": jnp.arange(LENGTH)[None] != jnp.array([[1], [30]]),
        "scale": 0.7,
    },
}


@functools.lru_cache
def value_and_gradients(pattern, implementation, structure):
    """One program per case."""

    @jax.jit
    def run(q, k, v, cotangent):
        def attend(q, k, v):
            return shifted_attention(q, k, v, **vars(pattern), implementation=implementation, **STRUCTURES[structure])

        y, pullback = jax.vjp(attend, q, k, v)
        return y, pullback(cotangent)

    return run


CASES = [(name, "plain") for name in PATTERNS] + [(name, s) for name in ("sf", "s2 roll") for s in list(STRUCTURES)[1:]]


@pytest.mark.parametrize(("name", "structure"), CASES)
def test_values_and_gradients_agree(name, structure, draw):
    pattern = PATTERNS[name]
    arrays = draw(length=LENGTH, heads=6 if name == "s2 windows" else 4, kv_heads=2)
    want = value_and_gradients(pattern, "xla_dense", structure)(*arrays)
    others = [] if name == "rolled with sinks" else ["grouped"]
    others += ["block_list"] if pattern.variant == "windows" else []
    for implementation in others:
        got = value_and_gradients(pattern, implementation, structure)(*arrays)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=implementation)


def test_the_reference_is_softmax_over_the_visible_keys(draw):
    q, k, v, _ = draw(length=LENGTH)
    pattern = PATTERNS["sf"]
    scores = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)) / np.sqrt(8)
    weights = np.where(plainly_visible(pattern, LENGTH, 4), np.exp(scores), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, 2, axis=2))
    got = jax.jit(lambda *x: shifted_attention(*x, **vars(pattern)))(q, k, v)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_bfloat16_stays_near(draw):
    q, k, v, _ = draw(length=LENGTH, dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    run = jax.jit(lambda *x: shifted_attention(*x, **vars(PATTERNS["sf"])))
    got = run(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), run(*wide), atol=3e-2)


def test_windows_are_causal_and_rolling_is_not(draw):
    q, k, v, _ = draw(length=LENGTH)

    @functools.partial(jax.jit, static_argnums=0)
    def influence(pattern, k, v):
        """[T, T]: whether a key or value changes a query's result, in any head."""

        def attend(k, v):
            return shifted_attention(q, k, v, **vars(pattern)).sum((0, 2, 3))

        return sum(jnp.abs(x).sum((1, 3, 4)) for x in jax.jacrev(attend, (0, 1))(k, v)) > 0

    for name in ("sf", "share of the sequence"):
        seen = influence(PATTERNS[name], k, v)
        np.testing.assert_array_equal(seen, plainly_visible(PATTERNS[name], LENGTH, 4).any(0))
        assert not np.any(np.triu(seen, 1))
    leak = influence(PATTERNS["s2 roll"], k, v)
    assert leak[:3, -3:].all() and not np.any(np.triu(leak, 1)[:, :-3]) and not np.any(np.triu(leak, 1)[3:])


def test_dropout_drops_weights(draw):
    q, k, v, _ = draw(length=LENGTH)
    options = {**vars(PATTERNS["sf"]), "dropout_rate": 0.5, "deterministic": False}
    run = jax.jit(lambda key: shifted_attention(q, k, v, **options, dropout_rng=key))
    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    with pytest.raises(ConfigError, match="dropout_rng"):
        shifted_attention(q, k, v, **options)
    with pytest.raises(NotImplementedError, match="do not drop weights"):
        shifted_attention(q, k, v, **options, dropout_rng=jax.random.key(0), implementation="block_list")


def test_block_lists_name_the_groups():
    index = shifted_block_index(ShiftedPattern(8, num_sinks=4), 24, 2, 4)
    assert index.shape == (2, 6, 3)
    np.testing.assert_array_equal(index[0], [[0, -1, -1], [0, 1, -1], [0, 2, -1], [0, 2, 3], [0, 4, -1], [0, 4, 5]])
    np.testing.assert_array_equal(index[1], [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 3, -1], [0, 3, 4], [0, 5, -1]])
    with pytest.raises(ConfigError, match="block = 8: does not divide every border"):
        shifted_block_index(ShiftedPattern(8), 24, 2, 8)
    with pytest.raises(ConfigError, match="rolled groups"):
        shifted_block_index(ShiftedPattern(8, "roll"), 24, 2, 4)


def test_what_runs_and_why(draw):
    q, k, v, _ = draw(length=LENGTH)

    def chosen(name):
        with dispatch.record() as decisions:
            jax.eval_shape(lambda q: shifted_attention(q, k, v, **vars(PATTERNS[name])), q)
        return decisions[0]

    assert chosen("sf").chosen == chosen("s2 roll").chosen == "grouped"
    assert chosen("rolled with sinks").chosen == "xla_dense" and "wraps around" in str(chosen("rolled with sinks"))
    with pytest.raises(NotImplementedError, match="rolled groups are not causal"):
        shifted_attention(q, k, v, group_size=6, variant="roll", implementation="block_list")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 7}, "group_size = 7: does not divide T = 24. Set (6|8) or another divisor"),
        ({"group_size": 0}, "group_size = 0"),
        ({"group_size": 2.0}, "group_size = 2.0"),
        ({"group_size": 8, "variant": "rol"}, "variant = 'rol': is not known. Did you mean 'roll'"),
        ({"group_size": 8, "reassembly": "head"}, "reassembly = 'head'.*'heads'"),
        ({"group_size": 8, "num_sinks": -1}, "num_sinks = -1"),
        ({"group_size": 8, "returned_fraction": 1.5}, "returned_fraction = 1.5"),
        ({"group_size": 8, "variant": "roll", "reassembly": "sequence", "returned_fraction": 0.5}, "not defined for"),
        ({"group_size": 8, "implementation": "pallas"}, "unknown implementation 'pallas'"),
    ],
)
def test_bad_input(options, message, draw):
    q, k, v, _ = draw(length=LENGTH)
    with pytest.raises(ConfigError, match=message):
        shifted_attention(q, k, v, **options)


def test_lengths_must_agree(draw):
    q, k, v, _ = draw(length=LENGTH, keys=32)
    with pytest.raises(ConfigError, match="T = 24 queries and S = 32 keys"):
        shifted_attention(q, k, v, group_size=8)


def test_interpolation_factor():
    assert [interpolation_factor(new, 4096) for new in (100, 4096, 4097, 8192, 32768)] == [1.0, 1.0, 2.0, 2.0, 8.0]
    with pytest.raises(ConfigError, match="lengths 0 and 4096"):
        interpolation_factor(0, 4096)

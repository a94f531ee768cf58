"""The list of block pairs that the attention kernels walk, against brute force over single pairs of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import schedule, tuning
from kernels_pallas.attention.spec import Tiles
from kernels_pallas.attention.tpu import sub_tiles


def visible(q_at, kv_at, window, q_segments=None, kv_segments=None):
    left, right = window
    seen = kv_at[None] >= 0
    seen = np.broadcast_to(seen, (q_at.size, kv_at.size)).copy()
    if right is not None:
        seen &= kv_at[None] <= q_at[:, None] + right
    if left is not None:
        seen &= kv_at[None] >= q_at[:, None] - left
    if q_segments is not None:
        seen &= q_segments[:, None] == kv_segments[None]
    return seen


def blocks_of(seen, block_q, block_kv):
    """Any and all of every pair of blocks."""
    rows, columns = -(-seen.shape[0] // block_q), -(-seen.shape[1] // block_kv)
    some, every = np.zeros((rows, columns), bool), np.zeros((rows, columns), bool)
    for r in range(rows):
        for c in range(columns):
            part = seen[r * block_q : (r + 1) * block_q, c * block_kv : (c + 1) * block_kv]
            some[r, c], every[r, c] = part.any(), part.all()
    return some, every


def check_walk(steps, rows, columns, transposed, some, every, exact=True):
    kinds = np.full((rows, columns), schedule.SKIP)
    stays, streams, kind = (np.asarray(f(steps)) for f in (schedule.stays, schedule.streams, schedule.kind))
    for major, minor, what in zip(stays, streams, kind, strict=True):
        if what != schedule.SKIP:
            r, c = (minor, major) if transposed else (major, minor)
            assert kinds[r, c] == schedule.SKIP, "visited twice"
            kinds[r, c] = what
    assert not np.any(some & (kinds == schedule.SKIP)), "a visible pair is skipped"
    assert not np.any(~every & (kinds == schedule.FULL)), "a hidden pair goes unmasked"
    if exact:
        np.testing.assert_array_equal(kinds != schedule.SKIP, some)
        np.testing.assert_array_equal(kinds == schedule.FULL, every)
    assert np.all(np.diff(stays) >= 0)
    np.testing.assert_array_equal(np.unique(stays), np.arange(columns if transposed else rows))
    first, last = np.asarray(schedule.is_first(steps)), np.asarray(schedule.is_last(steps))
    np.testing.assert_array_equal(first[1:], np.diff(stays) > 0)
    np.testing.assert_array_equal(last[:-1], np.diff(stays) > 0)
    assert first[0] and last[-1]
    after = (kind[1:] == schedule.SKIP) & (np.cumsum(kind != schedule.SKIP)[:-1] > 0)
    np.testing.assert_array_equal(streams[1:][after], streams[:-1][after], err_msg="fetches for a skipped step")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (5, 0), (7, 3), (0, 0)])
@pytest.mark.parametrize(("length", "keys"), [(32, 32), (30, 45), (45, 30), (1, 9)])
def test_static_walks(length, keys, window, transposed):
    q = schedule.index_ranges(length, 8, keys - length, mask_tail=False)
    kv = schedule.index_ranges(keys, 4, 0, mask_tail=True)
    steps = schedule.dense(q, kv, window, transposed=transposed)
    assert isinstance(steps, np.ndarray) and steps.shape[:2] == (1, 1)
    seen = visible(np.arange(length) + keys - length, np.arange(keys), window)
    some, every = blocks_of(seen, 8, 4)
    if keys % 4:
        every[:, -1] = False
    check_walk(steps[0, 0], *some.shape, transposed, some, every)
    assert steps.shape[-1] <= some.sum() + max(some.shape)


@pytest.mark.parametrize("transposed", [False, True])
def test_positions_and_segments(transposed):
    rng = np.random.default_rng(0)
    q_at, kv_at = np.sort(rng.integers(0, 60, 32)), np.sort(rng.integers(-20, 60, 32))
    q_segments, kv_segments = np.sort(rng.integers(0, 4, 32)), np.sort(rng.integers(0, 4, 32))
    q = schedule.with_segments(
        schedule.position_ranges(jnp.array(q_at[None]), 8, empty=False), jnp.array(q_segments[None]), 8
    )
    kv = schedule.with_segments(
        schedule.position_ranges(jnp.array(kv_at[None]), 4, empty=True), jnp.array(kv_segments[None]), 4
    )
    steps = jax.jit(lambda: schedule.dense(q, kv, (20, 0), transposed=transposed))()
    seen = visible(q_at, kv_at, (20, 0), q_segments, kv_segments)
    check_walk(steps[0, 0], 4, 8, transposed, *blocks_of(seen, 8, 4), exact=False)


@pytest.mark.parametrize("transposed", [False, True])
def test_listed_walks(transposed):
    rng = np.random.default_rng(1)
    index = np.argsort(rng.random((2, 3, 4, 8)), axis=-1)[..., :5]
    index[rng.random(index.shape) < 0.3] = -1
    index[0, 0, 2] = -1
    q, kv = schedule.index_ranges(32, 8, 0, mask_tail=False), schedule.index_ranges(32, 4, 0, mask_tail=True)
    steps = schedule.listed(jnp.array(index, jnp.int32), q, kv, (None, 0), transposed=transposed)
    some, every = blocks_of(visible(np.arange(32), np.arange(32), (None, 0)), 8, 4)
    for b in range(2):
        for g in range(3):
            listed = np.array([[c in index[b, g, r] for c in range(8)] for r in range(4)])
            check_walk(steps[b, g], 4, 8, transposed, some & listed, every & listed)


def test_tiles_cover_a_block_once():
    for tiles in (Tiles(512, 512, 0, False), Tiles(128, 256, 2, True), Tiles(192, 128, 1, False)):
        covered = np.zeros((512, 256), int)
        for rows, columns in sub_tiles(tiles, 512, 256):
            covered[rows, columns] += 1
        assert np.all(covered == 1)


def test_every_device_has_sizes():
    for kind in (None, "TPU v4", "TPU v5 lite", "TPU v5p", "TPU v6 lite", "TPU7x", "a TPU of tomorrow"):
        for form in ("softmax", "tanh", "logistic"):
            tuned = tuning.lookup(kind, form)
            assert tuned.block % 128 == 0 and all(len(pair) == 2 for pair in tuned[1:])
    for length in (1, 128, 200, 600, 1000, 5000):
        block = tuning.block_size(length, 512)
        assert block % 128 == 0 and block <= 512 and -length % block < max(128, length / 3)

"""The H2O caches: against a transcription, per row and per head, and equal to full attention while the budget covers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab import nn
from attnlab.errors import ConfigError
from attnlab.inference import decode, heavy_hitter_cache
from attnlab.inference.heavy_hitter import HeavyHitterAttention, HeavyHitterLM, heavy_hitter_model
from attnlab.inference.heavy_hitter_cache import (
    Budget,
    attend_evicting,
    attend_masked,
    init_evicting_cache,
    init_masked_cache,
)
from attnlab.models.lm import LM

PROMPT, LENGTH, WIDTH = 7, 16, 4


def arrays(heads, kv_heads, batch=1, seed=0):
    random = np.random.default_rng(seed)
    sizes = ((heads, 2.0), (kv_heads, 2.0), (kv_heads, 1.0))
    return [(scale * random.normal(size=(batch, LENGTH, count, WIDTH))).astype(np.float32) for count, scale in sizes]


def probabilities(q, k, shown):
    """[t, s] of the queries at the end of s keys; `shown` [s]."""
    causal = np.tri(len(q), len(k), len(k) - len(q), dtype=bool) & shown
    scores = np.where(causal, q.astype(np.float64) @ k.astype(np.float64).T / np.sqrt(WIDTH), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def forwards(chunk=1):
    return [(0, PROMPT), *((i, min(i + chunk, LENGTH)) for i in range(PROMPT, LENGTH, chunk))]


def evicting_by_hand(q, k, v, heavy, recent, chunk):
    """One row with lists that grow and shrink: (y [T, N, H], positions and scores per key/value head after each forward)."""
    kv_heads, share = k.shape[1], q.shape[1] // k.shape[1]
    y, history = np.zeros(q.shape), []
    kept = [[] for _ in range(kv_heads)]
    score = [{} for _ in range(kv_heads)]
    for first, last in forwards(chunk):
        for g in range(kv_heads):
            kept[g] += range(first, last)
            for head in range(g * share, (g + 1) * share):
                weights = probabilities(q[first:last, head], k[kept[g], g], np.ones(len(kept[g]), bool))
                y[first:last, head] = weights @ v[kept[g], g]
                for position, drawn in zip(kept[g], weights.sum(0), strict=True):
                    score[g][position] = score[g].get(position, 0.0) + drawn
            if len(kept[g]) > heavy + recent:
                old = kept[g][: len(kept[g]) - recent]
                best = sorted(sorted(old, key=lambda position: -score[g][position])[:heavy])
                kept[g] = best + kept[g][len(kept[g]) - recent :]
        history.append([(list(kept[g]), [score[g][position] for position in kept[g]]) for g in range(kv_heads)])
    return y, history


@functools.partial(jax.jit, static_argnames=("budget", "chunk"))
def evicting(q, k, v, mask, budget, chunk):
    positions = jnp.cumsum(mask, axis=1) - 1
    cache = init_evicting_cache(q.shape[0], budget.heavy + budget.recent, k.shape[2], WIDTH, q.dtype)
    ys, history = [], []
    for first, last in forwards(chunk):
        now = slice(first, last)
        y, cache = attend_evicting(q[:, now], k[:, now], v[:, now], positions[:, now], mask[:, now], cache, budget)
        ys.append(y)
        history.append(cache.ordered())
    return jnp.concatenate(ys, axis=1), history


@pytest.mark.parametrize(
    ("heads", "kv_heads", "heavy", "recent", "chunk"),
    [(2, 2, 2, 3, 1), (4, 2, 3, 1, 1), (2, 1, 0, 4, 1), (2, 2, 2, 2, 4), (2, 2, 3, 0, 1)],
)
def test_evicting_against_lists(heads, kv_heads, heavy, recent, chunk):
    q, k, v = arrays(heads, kv_heads)
    want, history = evicting_by_hand(q[0], k[0], v[0], heavy, recent, chunk)
    y, got = evicting(q, k, v, np.ones((1, LENGTH), bool), Budget(heavy, recent), chunk)
    np.testing.assert_allclose(y[0], want, atol=2e-5)
    for (positions, scores), heads_of in zip(got, history, strict=True):
        for g, (kept, score) in enumerate(heads_of):
            np.testing.assert_array_equal(positions[0, g], kept + [-1] * (heavy + recent - len(kept)))
            np.testing.assert_allclose(scores[0, g, : len(score)], score, rtol=1e-4)
            assert not np.any(scores[0, g, len(score) :])


def masked_by_hand(q, k, v, budget):
    """One row and head: (y [T, H], mask and scores after each forward)."""
    heavy = budget.heavy or int(budget.heavy_ratio * PROMPT)
    recent = budget.recent or int(budget.recent_ratio * PROMPT)
    shown, score, y, history = np.ones(PROMPT, bool), np.zeros(0), np.zeros(v.shape), []
    for first, last in forwards():
        weights = probabilities(q[first:last], k[:last], shown)
        y[first:last] = weights @ v[:last]
        score = np.append(score, np.zeros(last - first)) + weights.sum(0)
        shown = np.ones(last + 1, bool)
        if last > heavy + recent:
            best = np.argsort(-score[: last - recent], kind="stable")[:heavy]
            shown = np.isin(np.arange(last + 1), best) | (np.arange(last + 1) > last - recent)
            score = np.where(shown[:-1] | (np.arange(last) >= last - recent), score, 0.0)
        history.append((shown, score))
    return y, history


@functools.partial(jax.jit, static_argnames="budget")
def masked(q, k, v, mask, budget):
    positions = jnp.cumsum(mask, axis=1) - 1
    cache = init_masked_cache(q.shape[0], LENGTH + 1, q.shape[2], k.shape[2], WIDTH, q.dtype)
    ys, history = [], []
    for first, last in forwards():
        now = slice(first, last)
        y, cache = attend_masked(q[:, now], k[:, now], v[:, now], positions[:, now], mask[:, now], cache, budget)
        ys.append(y)
        history.append((cache.keep, cache.score))
    return jnp.concatenate(ys, axis=1), history


@pytest.mark.parametrize("budget", [Budget(2, 3), Budget(0, 3), Budget(heavy_ratio=0.3, recent_ratio=0.29)])
def test_masked_against_a_transcription(budget):
    q, k, v = arrays(4, 2, seed=1)
    y, got = masked(q, k, v, np.ones((1, LENGTH), bool), budget)
    for head in range(4):
        want, history = masked_by_hand(q[0, :, head], k[0, :, head // 2], v[0, :, head // 2], budget)
        np.testing.assert_allclose(y[0, :, head], want, atol=2e-5)
        for (keep, score), (shown, expected) in zip(got, history, strict=True):
            np.testing.assert_array_equal(keep[0, head], np.pad(shown, (0, LENGTH + 1 - len(shown))))
            np.testing.assert_allclose(score[0, head, : len(expected)], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", [functools.partial(evicting, chunk=1), masked])
def test_rows_are_alone_and_padding_does_not_count(run):
    q, k, v = arrays(2, 2, batch=2, seed=2)
    mask = np.arange(LENGTH)[None] >= np.array([[0], [4]])
    mask[0, 12] = False  # a row that pauses
    together, _ = run(q, k, v, mask, budget=Budget(2, 2))
    for row in range(2):
        alone, _ = run(q[row, None], k[row, None], v[row, None], mask[row, None], budget=Budget(2, 2))
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
    assert not np.any(together[~mask])
    gone = [np.where(mask[..., None, None], x, 7.0).astype(np.float32) for x in (q, k, v)]
    np.testing.assert_array_equal(run(*gone, mask, budget=Budget(2, 2))[0][mask], together[mask])


def test_long_prompts_are_taken_in_pieces(monkeypatch):
    q, k, v = arrays(2, 2, batch=2)
    at = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    inputs = (q, k.swapaxes(1, 2), v.swapaxes(1, 2), at, at[:, None], None, None)
    whole = heavy_hitter_cache._attend_and_sum(*inputs)
    monkeypatch.setattr(heavy_hitter_cache, "_CHUNK_BYTES", 4 * 2 * 2 * LENGTH * 5)  # five queries, the last piece ragged
    for a, b in zip(heavy_hitter_cache._attend_and_sum(*inputs), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("form", ["evict", "mask"])
def test_a_budget_that_covers_is_full_attention(form):
    fields = {"dim": 8, "num_heads": 4, "num_kv_heads": 2, "qk_norm": "rmsnorm"}
    x = jax.random.normal(jax.random.key(0), (2, 13, 8))
    plain = nn.SoftmaxAttention(**fields)
    variables = jax.tree.map(lambda leaf: 8 * leaf, meta.unbox(plain.init(jax.random.key(1), x)))
    mask = jnp.arange(13)[None] >= jnp.array([[0], [3]])
    want = plain.apply(variables, x, mask=mask)[0]
    mixer = HeavyHitterAttention(**fields, budget=Budget(9, 4), form=form)
    np.testing.assert_array_equal(mixer.apply(variables, x, mask=mask)[0], want)
    step = jax.jit(lambda x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))
    for splits in ((6, 7, 8), (1, 4)):
        cache, parts = mixer.init_cache(2, 20), []
        for chunk in zip(jnp.split(x, splits, axis=1), jnp.split(mask, splits, axis=1), strict=True):
            part, cache = step(*chunk, cache)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1)[mask], want[mask], atol=3e-5)


@pytest.fixture(scope="module")
def language_model():
    options = {"near": {"mixer": "softmax", "window": 4}, "softmax": {"rope_scaling": 2.0}}
    model = LM(vocab_size=19, num_layers=3, dim=16, num_heads=4, num_kv_heads=2, pattern=("softmax", "near"), mixer_options=options)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    random = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: (0.4 * random.normal(size=leaf.shape)).astype(np.float32), shapes)


def test_language_models_decode_with_a_budget(language_model):
    model, variables = language_model
    prompt = np.random.default_rng(0).integers(0, 19, (2, 6)).astype(np.int32)
    options = {"max_new_tokens": 10, "temperature": 0, "prompt_mask": np.arange(6)[None] >= np.array([[0], [2]])}
    full = decode.generate(model, variables, prompt, **options).tokens
    covered = heavy_hitter_model(model, heavy=8, recent=8)
    assert isinstance(covered, HeavyHitterLM) and covered.make_mixer("softmax").rope_scaling == 2.0
    np.testing.assert_array_equal(decode.generate(covered, variables, prompt, **options).tokens, full)
    for small in (heavy_hitter_model(model, heavy=1, recent=2), heavy_hitter_model(model, heavy=1, recent=2, form="mask")):
        assert np.any(decode.generate(small, variables, prompt, **options).tokens != full)
    cache = covered.clone(budget=Budget(1, 2)).init_cache(2, 500)
    assert cache[0][0].k.shape == (1, 2, 2, 4, 4) and cache[0][1].k.shape == (1, 2, 500, 2, 4)  # the window keeps its own


def test_bad_input(language_model):
    model, _ = language_model
    for options, message in (
        ({}, "recent, heavy = "),
        ({"heavy": 4, "recent": 0}, "is no budget"),
        ({"heavy": -1, "recent": 2}, "is no budget"),
        ({"heavy": 4, "recent": 2, "heavy_ratio": 0.1}, "Give either ratios or tokens"),
        ({"heavy_ratio": 0.1, "recent_ratio": 0.1}, "needs form = 'mask'"),
        ({"heavy_ratio": 1.1, "recent_ratio": 0.1, "form": "mask"}, "is not in"),
        ({"heavy": 4, "recent": 2, "form": "evicting"}, "form = 'evicting': is not known. Did you mean 'evict'"),
    ):
        with pytest.raises(ConfigError, match=message):
            heavy_hitter_model(model, **options)
    with pytest.raises(ConfigError, match="no mixer decodes with full softmax attention"):
        heavy_hitter_model(model.clone(pattern=("near",)), heavy=4, recent=4)
    with pytest.raises(ConfigError, match="model is a SoftmaxAttention"):
        heavy_hitter_model(nn.SoftmaxAttention(dim=8, num_heads=2), heavy=4, recent=4)
    mixer = HeavyHitterAttention(dim=8, num_heads=2)
    for fields, message in (({"causal": False}, "causal = False"), ({"window": 3}, "window = 3"), ({"alibi": True}, "alibi")):
        with pytest.raises(ConfigError, match=message):
            mixer.clone(**fields).init_cache(1, 8)
    x = jnp.zeros((2, 3, 8))
    variables = meta.unbox(mixer.init(jax.random.key(0), x))
    with pytest.raises(ConfigError, match="cache of batch 3"):
        mixer.apply(variables, x, cache=mixer.init_cache(3, 8))
    masked_mixer = mixer.clone(form="mask")
    with pytest.raises(ConfigError, match="longer than the cache"):
        masked_mixer.apply(variables, x, cache=masked_mixer.init_cache(2, 2))

"""The decode loop: equal to the full forward pass, to each row alone, and compiled once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.inference import decode
from attnlab.models.lm import LM

VOCAB = 19


class Recurrent(nn.Module):
    """A model of the cache contract with a state instead of slots: h_t = 0.7 h_(t-1) + f(h_(t-1) + embed(token))."""

    dim: int = 8

    def setup(self):
        self.embedder = nn.Embed(VOCAB, self.dim)
        self.mix = nn.Dense(self.dim)
        self.out = nn.Dense(VOCAB)

    def init_cache(self, batch, max_len):
        return jnp.zeros((batch, self.dim))

    def features(self, tokens, *, positions=None, segment_ids=None, mask=None, cache=None, deterministic=True):
        state = self.init_cache(tokens.shape[0], 0) if cache is None else cache
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        outputs = []
        for t in range(tokens.shape[1]):
            new = 0.7 * state + jnp.tanh(self.mix(state + 3 * self.embedder(tokens[:, t])))
            state = jnp.where(mask[:, t, None], new, state)
            outputs.append(state)
        return jnp.stack(outputs, axis=1), None if cache is None else state

    def head(self, x):
        return 5 * self.out(x)

    def __call__(self, tokens, **settings):
        x, cache = self.features(tokens, **settings)
        return self.head(x), cache


def language_model(pattern):
    return LM(
        vocab_size=VOCAB, num_layers=3, dim=16, num_heads=2, pattern=pattern, train_length=12,
        mixer_options={"near": {"mixer": "softmax", "window": 4}},
    )  # fmt: skip


MODELS = {
    "recurrent": Recurrent,
    "softmax": lambda: language_model(("softmax", "near")),
    "sigmoid": lambda: language_model(("sigmoid",)),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request):
    model = MODELS[request.param]()
    return model, random_variables(model)


def random_variables(model):
    """Parameters from numpy: nothing to compile, and large enough that the argmax depends on the context."""
    random = np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    return {"params": jax.tree.map(lambda leaf: (0.4 * random.normal(size=leaf.shape)).astype(np.float32), shapes)}


def prompts(shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def test_greedy_equals_argmax_of_the_full_pass(case):
    model, variables = case
    prompt = prompts((2, 5))
    result = decode.generate(model, variables, prompt, max_new_tokens=6, temperature=0)
    assert result.tokens.shape == (2, 6) and result.lengths.tolist() == [6, 6]
    sequence = np.concatenate([prompt, result.tokens], axis=1)
    logits, _ = jax.jit(lambda variables, tokens: model.apply(variables, tokens))(variables, sequence)
    # the model is causal: position t of one pass over the whole sequence is the full pass over its first t + 1 tokens
    np.testing.assert_array_equal(result.tokens, np.asarray(logits)[:, 4:-1].argmax(-1))
    assert len(np.unique(result.tokens)) > 2


def test_ragged_batch_equals_each_row_alone(case):
    model, variables = case
    lengths, prompt = [7, 1, 4], prompts((3, 8), seed=2)
    settings = {"max_new_tokens": 5, "temperature": 0, "cache_len": 16}
    alone = [
        decode.generate(model, variables, prompt[row, :length][None], **settings).tokens[0]
        for row, length in enumerate(lengths)
    ]
    right = np.arange(8)[None] < np.array(lengths)[:, None]
    shifted = np.stack([np.roll(row, 8 - length) for row, length in zip(prompt, lengths, strict=True)])
    for tokens, mask in ((prompt, right), (shifted, right[:, ::-1])):
        together = decode.generate(model, variables, tokens, prompt_mask=mask, **settings)
        np.testing.assert_array_equal(together.tokens, alone)


@pytest.fixture(scope="module")
def recurrent():
    model = Recurrent()
    return model, random_variables(model)


def test_rows_end_at_eos_and_the_rest_is_filled(recurrent):
    model, variables = recurrent
    prompt = prompts((6, 3), seed=5)
    free = np.asarray(decode.generate(model, variables, prompt, max_new_tokens=9, temperature=0).tokens)
    eos = int(free[0, 3])
    result = decode.generate(model, variables, prompt, max_new_tokens=9, temperature=0, eos_id=eos)
    for row in range(6):
        found = np.flatnonzero(free[row] == eos)
        length = found[0] + 1 if len(found) else 9
        assert result.lengths[row] == length
        np.testing.assert_array_equal(result.tokens[row, :length], free[row, :length])
        assert (np.asarray(result.tokens[row, length:]) == eos).all()


def test_sampling_is_reproducible_and_stays_in_the_vocabulary(recurrent):
    model, variables = recurrent
    settings = {"max_new_tokens": 12, "temperature": 4.0, "top_p": 0.99, "vocab_size": 7}
    prompt = prompts((16, 3)) % 7
    one, again, other = (
        np.asarray(decode.generate(model, variables, prompt, rng=jax.random.key(seed), **settings).tokens)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert one.max() < 7 and len(np.unique(one)) > 3


def test_one_compilation_for_all_tokens_prompts_and_settings(recurrent):
    model, variables = recurrent
    settings = {"max_new_tokens": 10, "cache_len": 40}
    decode.prefill.clear_cache()
    decode.decode_loop.clear_cache()
    for seed, (temperature, top_k, top_p) in enumerate([(1.0, 3, 0.9), (0.5, 5, 0.7), (2.0, 1, 0.2)]):
        decode.generate(
            model, variables, prompts((2, 4), seed), rng=jax.random.key(seed), temperature=temperature, top_k=top_k,
            top_p=top_p, **settings,
        )  # fmt: skip
    assert decode.decode_loop._cache_size() == 1 and decode.prefill._cache_size() == 1


def test_the_cache_is_donated(recurrent):
    model, variables = recurrent
    cache = model.init_cache(2, 8)
    sampler = decode.make_sampler(temperature=0)
    start = jnp.zeros(2, jnp.int32)
    decode.decode_loop(
        decode.Static(model), variables, cache, start, start, jax.random.key(0), (0.0, 0, 1.0), sampler=sampler,
        max_new_tokens=3, eos_id=None, vocab_size=None,
    )  # fmt: skip
    assert cache.is_deleted()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_len": 10}, "sequence longer than the cache: 5 prompt .* = 13"),
        ({"max_new_tokens": 0}, "^max_new_tokens = 0"),
        ({"prompt": np.zeros((2, 0), np.int32)}, "prompt is empty"),
        ({"prompt": np.zeros(4, np.int32)}, r"shape \(4,\)"),
        ({"prompt": np.zeros((2, 4))}, "integer token ids"),
        ({"prompt": np.full((1, 3), VOCAB)}, "outside the vocabulary"),
        ({"prompt": np.full((1, 3), -1)}, "outside the vocabulary"),
        ({"prompt_mask": np.ones((2, 3))}, "same shape"),
        ({"prompt_mask": np.array([[1] * 5, [0] * 5])}, "row 1 has no real token"),
        ({"temperature": 1.0}, "^rng = None"),
        ({"temperature": -1.0}, "^temperature = -1"),
        ({"temperature": 1.0, "top_p": 2.0}, "^top_p = 2"),
    ],
)
def test_bad_input_is_found_before_compute(change, message):
    def never(*_, **__):
        raise AssertionError("compute started")

    settings = {"prompt": prompts((2, 5)), "max_new_tokens": 8, "temperature": 0, "vocab_size": VOCAB} | change
    with pytest.raises(ConfigError, match=message):
        decode.generate(never, {}, settings.pop("prompt"), **settings)

"""Autoregressive decoding with a cache: one compiled prefill, one compiled loop for all new tokens.

    result = generate(model, {"params": params}, prompt, max_new_tokens=64, rng=jax.random.key(0), top_p=0.95)

Works for every model of the cache contract (`init_cache(batch, max_len)`, `apply(..., cache=) -> (output, cache)`).
Compiled programs are kept per (model, shapes, which of top-k/top-p are on); other temperatures, keys, or values of
top-k and top-p reuse them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.errors import ConfigError, field_error
from attnlab.inference.sampling import Sampler, draw, make_sampler
from attnlab.models.static import Static


class Generation(NamedTuple):
    """What `generate` returns.

    tokens: [B, max_new_tokens] int32, the new tokens only; after a row's end it repeats `eos_id`.
    lengths: [B] int32, new tokens of each row, its `eos_id` included.
    """

    tokens: jax.Array
    lengths: jax.Array


def generate(
    model: nn.Module,
    variables: Any,
    prompt: jax.Array | np.ndarray,
    *,
    max_new_tokens: int,
    prompt_mask: jax.Array | np.ndarray | None = None,
    rng: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    cache_len: int | None = None,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens.

    Args:
        model: an unbound language model with a cache, for example `attnlab.models.lm.LM`.
        variables: its variables ({"params": ..., other collections, read only}).
        prompt: [B, P] int32 token ids, P >= 1.
        max_new_tokens: upper limit of new tokens, >= 1.
        prompt_mask: [B, P] bool, True = a real token, for prompts of different lengths. Padding may stand anywhere; the
            rows are moved to the right edge on the host (left padding), so that the last column is every row's last
            token and mixers that look at neighbouring slots see no gap. A row's result does not depend on the others.
        rng: PRNG key; needed unless temperature is 0.
        temperature: 0 is greedy; see `attnlab.inference.sampling` for the exact rules of these three.
        top_k: tokens kept by rank (None = all).
        top_p: mass kept (None = all).
        eos_id: a row ends with this token; decoding stops early when all rows ended. None = never.
        vocab_size: ids from here on (padding of the vocabulary) are never drawn. None = all can be.
        cache_len: slots of the cache; default P + max_new_tokens. Give one number to several calls to share a program.

    Raises:
        ConfigError: before any compute: empty prompt, prompt and new tokens longer than the cache, bad sampling
            settings, ids outside the vocabulary, a fully masked row.
    """
    sampler = make_sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    if rng is None and not sampler.greedy:
        raise field_error("rng", None, "sampling with a temperature above 0 draws at random", "Pass a PRNG key")
    prompt, mask = _checked_prompt(prompt, prompt_mask, vocab_size)
    if max_new_tokens < 1:
        raise field_error("max_new_tokens", max_new_tokens, "nothing to decode", "Give a number >= 1")
    needed = prompt.shape[1] + max_new_tokens
    cache_len = needed if cache_len is None else cache_len
    if needed > cache_len:
        raise field_error(
            "cache_len",
            cache_len,
            f"sequence longer than the cache: {prompt.shape[1]} prompt + {max_new_tokens} new tokens = {needed}",
            f"Use cache_len >= {needed}, a shorter prompt or fewer new tokens",
        )
    rng = jax.random.key(0) if rng is None else rng
    prefill_key, loop_key = jax.random.split(rng)
    numbers = (np.float32(sampler.temperature), np.int32(sampler.top_k), np.float32(sampler.top_p))
    static = Static(model)
    shape_of_rule = sampler._replace(temperature=0.0, top_k=0, top_p=1.0)  # the numbers are arguments, not constants
    token, cache = prefill(
        static, variables, prompt, mask, prefill_key, numbers, sampler=shape_of_rule, cache_len=cache_len,
        vocab_size=vocab_size,
    )  # fmt: skip
    tokens, lengths, _ = decode_loop(
        static, variables, cache, token, mask.sum(axis=1, dtype=np.int32), loop_key, numbers, sampler=shape_of_rule,
        max_new_tokens=max_new_tokens, eos_id=eos_id, vocab_size=vocab_size,
    )  # fmt: skip
    return Generation(tokens, lengths)


@partial(jax.jit, static_argnums=0, static_argnames=("sampler", "cache_len", "vocab_size"))
def prefill(
    static: Static, variables, prompt, mask, key, numbers, *, sampler: Sampler, cache_len: int, vocab_size: int | None
):
    """Runs left-padded prompts [B, P] into a new cache; returns the first new token [B] and the cache."""
    model = static.model
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)
    cache = model.init_cache(prompt.shape[0], cache_len)
    features, cache = model.apply(
        variables, prompt, positions=positions, mask=mask, cache=cache, deterministic=True, method="features"
    )
    logits = model.apply(variables, features[:, -1:], method="head")
    return draw(_real_vocabulary(logits[:, 0], vocab_size), key, sampler, *numbers), cache


@partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("sampler", "max_new_tokens", "eos_id", "vocab_size"),
    donate_argnames=("cache",),
)
def decode_loop(
    static: Static,
    variables,
    cache,
    token,
    position,
    key,
    numbers,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    eos_id: int | None,
    vocab_size: int | None,
):
    """Decodes on from a filled cache, which is donated.

    Args:
        token: [B] the first new token, already drawn, not yet in the cache; position: [B] int32 its position.

    Returns:
        (tokens [B, max_new_tokens], lengths [B], cache).
    """
    model, batch = static.model, token.shape[0]
    filler = 0 if eos_id is None else eos_id
    tokens = jnp.full((batch, max_new_tokens), filler, jnp.int32).at[:, 0].set(token)
    done = jnp.zeros(batch, bool) if eos_id is None else token == eos_id
    state = (jnp.int32(1), cache, tokens, position, jnp.ones(batch, jnp.int32), done)

    def unfinished(state):
        count, _, _, _, _, done = state
        return (count < max_new_tokens) & ~jnp.all(done)

    def step(state):
        count, cache, tokens, position, lengths, done = state
        last = lax.dynamic_slice_in_dim(tokens, count - 1, 1, axis=1)
        alive = ~done[:, None]
        logits, cache = model.apply(
            variables,
            last,
            positions=jnp.where(alive, position[:, None], -1),
            mask=alive,
            cache=cache,
            deterministic=True,
        )
        logits = _real_vocabulary(logits[:, 0], vocab_size)
        new = draw(logits, jax.random.fold_in(key, count), sampler, *numbers)
        new = jnp.where(done, filler, new)
        tokens = lax.dynamic_update_slice_in_dim(tokens, new[:, None], count, axis=1)
        lengths = lengths + ~done
        if eos_id is not None:
            done = done | (new == eos_id)
        return count + 1, cache, tokens, position + 1, lengths, done

    _, cache, tokens, _, lengths, _ = lax.while_loop(unfinished, step, state)
    return tokens, lengths, cache


def _real_vocabulary(logits, vocab_size):
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def _checked_prompt(prompt, prompt_mask, vocab_size):
    """Returns (prompt [B, P] int32, mask [B, P] bool) as numpy arrays, left padded, without columns that are empty."""
    prompt = np.asarray(prompt)
    if prompt.ndim != 2 or not np.issubdtype(prompt.dtype, np.integer):
        raise ConfigError(
            f"prompt has shape {prompt.shape} and type {prompt.dtype}. Pass integer token ids of shape [batch, length]."
        )
    if prompt.shape[1] == 0:
        raise ConfigError("prompt is empty. Start with at least one token, for example the document separator.")
    mask = np.ones(prompt.shape, bool) if prompt_mask is None else np.asarray(prompt_mask, bool)
    if mask.shape != prompt.shape:
        raise ConfigError(f"prompt_mask has shape {mask.shape}, prompt {prompt.shape}. Give both the same shape.")
    if not mask.any(axis=1).all():
        raise ConfigError(
            f"prompt row {int(np.argmin(mask.any(axis=1)))} has no real token. Give each row at least one."
        )
    real = prompt[mask]
    if real.min() < 0 or (vocab_size is not None and real.max() >= vocab_size):
        raise ConfigError(
            f"prompt holds token ids {real.min()}..{real.max()}, outside the vocabulary of {vocab_size or 'ids >= 0'}. "
            "Encode it with the tokenizer of the run."
        )
    width = int(mask.sum(axis=1).max())
    order = np.argsort(mask, axis=1, kind="stable")[:, -width:]  # padding first, real tokens in their order
    mask = np.take_along_axis(mask, order, axis=1)
    prompt = np.where(mask, np.take_along_axis(prompt, order, axis=1), 0)
    return prompt.astype(np.int32), mask

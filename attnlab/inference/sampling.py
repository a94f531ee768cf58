"""From logits to the next token: temperature, then top-k, then top-p (nucleus), then one categorical draw.

Exact rules, in this order:

1. temperature `t > 0`: logits are divided by `t` in float32. `t = 0` is greedy: the largest logit, the lowest id on a
   tie; top-k and top-p then change nothing.
2. top-k `k > 0`: the k largest logits stay (exactly k; among equal logits the lower ids come first). `k = 0`, or k at
   least the number of tokens, keeps all.
3. top-p `0 < p <= 1`: the probabilities of what top-k left are renormalised and sorted downwards (equal ones by id);
   a token stays while the sum of those before it is below `p`: the smallest set whose mass reaches `p`. `p = 1` keeps
   all.

The first token in that order always stays, so at least one token can be drawn. Nucleus sampling: Holtzman et al.,
"The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.errors import field_error


class Sampler(NamedTuple):
    """Checked sampling settings. The booleans decide what is compiled; the numbers can change without a new compile."""

    greedy: bool
    use_top_k: bool
    use_top_p: bool
    temperature: float
    top_k: int
    top_p: float


def make_sampler(*, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Sampler:
    """Checks the three settings (None = off).

    Raises:
        ConfigError: a negative or non-finite temperature, a negative top_k, a top_p outside (0, 1].
    """
    top_k = 0 if top_k is None else top_k
    top_p = 1.0 if top_p is None else top_p
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise field_error(
            "temperature", temperature, "not a finite number >= 0", "Use 0 for greedy decoding or, say, 0.8"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 0:
        raise field_error("top_k", top_k, "not a whole number >= 0", "Use 0 to keep all tokens or, say, 40")
    if isinstance(top_p, bool) or not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise field_error("top_p", top_p, "not a probability in (0, 1]", "Use 1 to keep all tokens or, say, 0.95")
    greedy = temperature == 0
    return Sampler(
        greedy=greedy,
        use_top_k=not greedy and top_k > 0,
        use_top_p=not greedy and top_p < 1,
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
    )


def filter_logits(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> jax.Array:
    """Returns logits whose softmax is the distribution that is drawn from: [B, V] float32, -inf where dropped.

    Args:
        logits: [B, V]; -inf marks tokens that can never be drawn.
        temperature: > 0 here (greedy has no distribution with ties; use `sample`).
        top_k: tokens kept by rank; None or 0 keeps all.
        top_p: mass kept; None or 1 keeps all.

    Raises:
        ConfigError: see `make_sampler`; also temperature 0.
    """
    sampler = make_sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    if sampler.greedy:
        raise field_error("temperature", temperature, "greedy decoding has no filtered logits", "Use `sample`")
    return _filter(logits, sampler, sampler.temperature, sampler.top_k, sampler.top_p)


def sample(
    logits: jax.Array,
    rng: jax.Array | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Draws one token per row.

    Args:
        logits: [B, V], any floating dtype.
        rng: a PRNG key; may be None when temperature is 0.
        temperature: 0 is greedy.
        top_k: tokens kept by rank; None or 0 keeps all.
        top_p: mass kept; None or 1 keeps all.

    Returns:
        [B] int32.

    Raises:
        ConfigError: bad settings (named), or no rng when one is needed.
    """
    sampler = make_sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    return draw(logits, rng, sampler, sampler.temperature, sampler.top_k, sampler.top_p)


def draw(logits: jax.Array, rng: jax.Array | None, sampler: Sampler, temperature, top_k, top_p) -> jax.Array:
    """`sample` with checked settings: `sampler` gives the shape of the rule, the last three its (traceable) numbers."""
    if sampler.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if rng is None:
        raise field_error("rng", None, "sampling with a temperature above 0 draws at random", "Pass a PRNG key")
    kept = _filter(logits, sampler, temperature, top_k, top_p)
    return jax.random.categorical(rng, kept, axis=-1).astype(jnp.int32)


def _filter(logits, sampler: Sampler, temperature, top_k, top_p):
    logits = logits.astype(jnp.float32) / temperature
    if not (sampler.use_top_k or sampler.use_top_p):
        return logits
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    keep = jnp.ones(ranked.shape, bool)
    if sampler.use_top_k:
        keep = jnp.broadcast_to(rank < top_k, ranked.shape)
    if sampler.use_top_p:
        probabilities = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep &= (before < top_p) | (rank == 0)
    # back to vocabulary order: the rank of token v is where v stands in `order`
    keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)

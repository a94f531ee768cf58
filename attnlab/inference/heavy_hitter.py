"""H2O: decoding with a key/value cache of the recent tokens and of those that drew most attention so far.

"H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (Zhang et al., NeurIPS 2023, arXiv
2306.14048), in both published forms:

    "evict"  a cache of `heavy + recent` tokens per key/value head; what is evicted never returns. Memory and time per
             token do not grow with the length.
    "mask"   a cache of all tokens, of which a mask per query head shows the budget; the form of the accuracy studies.
             Budgets may be shares of the prompt.

    small = heavy_hitter_model(model, heavy=64, recent=64)      # the same parameters
    generate(small, variables, prompt, max_new_tokens=500)

A choice follows every forward, so the prompt is to be given whole (as `generate` does); while the budget covers the
sequence, any chunking equals full attention. `heavy_hitter_cache` has the computation, and where it goes beyond the
published one. Shapes are static.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, field_error
from attnlab.inference.heavy_hitter_cache import (
    Budget,
    EvictingCache,
    MaskedCache,
    attend_evicting,
    attend_masked,
    init_evicting_cache,
    init_masked_cache,
)
from attnlab.models.lm import LM
from attnlab.nn.attention import DenseAttention
from attnlab.nn.shifted import ShiftedAttention
from attnlab.nn.softmax import SoftmaxAttention


class HeavyHitterAttention(SoftmaxAttention):
    """`SoftmaxAttention` whose cache holds a budget; without a cache it is full attention.

    Attributes:
        budget: what stays.
        form: "evict" or "mask".
    """

    budget: Budget = Budget(heavy=64, recent=64)
    form: str = "evict"

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> MaskedCache | EvictingCache:
        """Returns an empty cache; an evicting one takes any number of tokens and no more memory than `max_len` needs."""
        self.budget.check(self.form)
        for field, needed in (("window", None), ("alibi", False), ("causal", True)):
            if getattr(self, field) != needed:
                raise field_error(field, getattr(self, field), "does not fit a heavy-hitter cache", f"Set {field}={needed}")
        kv_heads, head_dim = self.widths()
        dtype = self.dtype or jnp.float32
        if self.form == "mask":
            return init_masked_cache(batch, max_len, self.num_heads, kv_heads, head_dim, dtype)
        return init_evicting_cache(batch, min(self.budget.heavy + self.budget.recent, max_len), kv_heads, head_dim, dtype)

    def attend_cached(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, mask: jax.Array | None, cache: Any, **masks: Any
    ) -> tuple[jax.Array, MaskedCache | EvictingCache]:
        """One forward of H2O; weights are not sown, and are not dropped."""
        attend = attend_masked if self.form == "mask" else attend_evicting
        return attend(q, k, v, positions, mask, cache, self.budget)


class HeavyHitterLM(LM):
    """`models.lm.LM` with a heavy-hitter cache in every mixer that decodes with full softmax attention."""

    budget: Budget = Budget(heavy=64, recent=64)
    form: str = "evict"

    @nn.nowrap
    def make_mixer(self, entry: str) -> nn.Module:
        """Builds the mixer of a pattern entry, detached; windowed attention and other families keep their own cache."""
        mixer = super().make_mixer(entry)
        if not _replaceable(mixer):
            return mixer
        skipped = {"parent", "name", "implementation"}
        names = [field.name for field in dataclasses.fields(DenseAttention) if field.name not in skipped]
        fields = {name: getattr(mixer, name) for name in names}
        return HeavyHitterAttention(budget=self.budget, form=self.form, parent=None, **fields)


def heavy_hitter_model(
    model: LM,
    *,
    heavy: int = 0,
    recent: int = 0,
    heavy_ratio: float = 0.0,
    recent_ratio: float = 0.0,
    form: str = "evict",
) -> HeavyHitterLM:
    """Returns the model with an H2O cache; it takes the same variables and goes wherever the model goes.

    Args:
        model: a decoder with softmax attention (also "s2" and "sf", which decode with full attention).
        heavy: tokens of the highest score that stay.
        recent: newest tokens that stay.
        heavy_ratio: instead, the share of the prompt ("mask" only); `recent_ratio` the same.
        recent_ratio: see there.
        form: "evict" or "mask".

    Raises:
        ConfigError: no such mixer in the model, or a budget that the form does not know.
    """
    if not isinstance(model, LM):
        raise ConfigError(f"model is a {type(model).__name__}: the heavy-hitter cache knows attnlab.models.lm.LM. Pass one.")
    budget = Budget(heavy, recent, heavy_ratio, recent_ratio)
    budget.check(form)
    if not any(_replaceable(model.make_mixer(entry)) for entry in model.entries()):
        raise ConfigError(
            f"pattern {model.entries()}: no mixer decodes with full softmax attention. Use 'softmax', 's2' or 'sf' without a window."
        )
    names = [field.name for field in dataclasses.fields(LM) if field.name not in ("parent", "name")]
    return HeavyHitterLM(**{name: getattr(model, name) for name in names}, budget=budget, form=form, parent=None)


def _replaceable(mixer: nn.Module) -> bool:
    if not (isinstance(mixer, SoftmaxAttention) or (isinstance(mixer, ShiftedAttention) and mixer.train_only)):
        return False
    return mixer.window is None and not mixer.alibi

"""Shifted sparse attention (S2) and sink fixed attention (SF) as token mixers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab import ops
from attnlab.errors import ConfigError, field_error
from attnlab.nn.attention import DenseAttention
from attnlab.nn.mixer import KVCache
from attnlab.ops.shifted import ShiftedPattern, shifted_attention


class ShiftedAttention(DenseAttention):
    """Grouped attention while training, full attention at evaluation and decoding, with the same parameters.

    As published: `deterministic=False` without a cache attends inside groups (`ops.shifted.shifted_attention`); everything
    else is plain causal softmax attention, so that a full deterministic pass equals any chunking with a cache. With
    `train_only=False` the groups hold everywhere; then too every chunking gives the numbers of the full pass, where
    groups do not depend on the whole sequence (windows, an explicit `group_size`).

    Groups and sinks are counted in places of the row; see `shifted_attention` about padding and packed documents.

    Attributes:
        group_size: G; None = `group_ratio` of the sequence.
        group_ratio: share of the sequence in a group.
        variant: "windows" or "roll" (looks into the future).
        num_sinks: first tokens that all later ones see.
        returned_fraction: share of the offset heads that uses plain groups after all.
        reassembly: "heads" or "sequence", what that fraction is a share of.
        train_only: see above.
        implementation: of `shifted_attention`, where the groups hold.
    """

    group_size: int | None = None
    group_ratio: float = 0.25
    variant: str = "windows"
    num_sinks: int = 0
    returned_fraction: float = 0.0
    reassembly: str = "heads"
    train_only: bool = True

    @nn.nowrap
    def pattern(self, length: int) -> ShiftedPattern:
        """Returns the groups of a sequence of `length` tokens.

        Raises:
            ConfigError: fields that do not fit it or each other.
        """
        self._check_fields()
        group_size = self.group_size
        if not group_size:
            group_size = round(length * self.group_ratio)
            if not 0 < self.group_ratio <= 1 or length % max(group_size, 1) or group_size < 1:
                raise field_error(
                    "group_ratio", self.group_ratio, f"does not cut T = {length} into equal groups",
                    "Set 1 / n for an n that divides T, or group_size",
                )  # fmt: skip
        pattern = ShiftedPattern(group_size, self.variant, self.num_sinks, self.returned_fraction, self.reassembly)
        pattern.check()
        return pattern

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> KVCache:
        """Returns an empty cache for `batch` rows of at most `max_len` tokens."""
        if not self.train_only:
            if not self.group_size:
                raise ConfigError("group_size = None: a cache needs groups of a known size. Set group_size.")
            self.pattern(max_len).visible_slots(jnp.arange(1), jnp.arange(1), self.num_heads)
        return super().init_cache(batch, max_len)

    @nn.nowrap
    def attend_options(self, cache: Any, deterministic: bool) -> dict[str, Any]:
        """Says where the groups hold: `grouped`, and with a cache the slot of the first token."""
        self._check_fields()
        if self.train_only and (deterministic or cache is not None):
            return {}
        return {"grouped": True} if cache is None else {"grouped": True, "first_slot": cache.index}

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *, grouped: bool = False, **masks: Any
    ) -> jax.Array:
        """Calls `shifted_attention` or `ops.softmax_attention`."""
        if grouped and "first_slot" not in masks:
            masks.pop("causal"), masks.pop("window")
            fields = vars(self.pattern(q.shape[1]))
            return shifted_attention(q, k, v, **fields, **masks)
        masks.pop("implementation", None)
        return ops.softmax_attention(q, k, v, **self._visible(q, k, masks, grouped))

    def weights(
        self, q: jax.Array, k: jax.Array, positions: jax.Array, *, grouped: bool = False, **masks: Any
    ) -> jax.Array:
        """Rows sum to one."""
        return ops.attention_weights("softmax", q, k, **self._visible(q, k, masks, grouped))

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of the two products with keys and values in training, averaged over a sequence."""
        if not self.causal:  # asked for the size of the whole square
            return super().sequence_flops(length)
        pattern = self.pattern(length)
        pattern.check(length)
        return 4.0 * self.num_heads * self.widths()[1] * pattern.keys_per_query(length, self.num_heads)

    @nn.nowrap
    def _check_fields(self) -> None:
        for field, needed in (("window", None), ("alibi", False), ("causal", True)):
            if getattr(self, field) != needed:
                raise field_error(field, getattr(self, field), "does not fit groups, which are causal", f"Set {field}={needed}")

    def _visible(self, q: jax.Array, k: jax.Array, masks: dict[str, Any], grouped: bool) -> dict[str, Any]:
        """The arguments of full attention, with the groups as a mask where they hold."""
        if not grouped:
            return masks
        first_slot = masks.pop("first_slot", None)
        pattern = self.pattern(k.shape[1])
        if first_slot is not None:
            q_slots = first_slot + jnp.arange(q.shape[1])
            return masks | {"mask": pattern.visible_slots(q_slots, jnp.arange(k.shape[1]), self.num_heads)[None]}
        # the mask has its own causal order: that of rolled tokens is another one
        pattern.check(k.shape[1])
        return masks | {"mask": pattern.visible(k.shape[1], self.num_heads)[None], "causal": False}


class S2Attention(ShiftedAttention):
    """S2-Attn of LongLoRA (Chen et al., 2023, arXiv 2309.12307): half of the heads in groups that lie half a group off."""


class SFAttention(ShiftedAttention):
    """SF-Attn of SinkLoRA (Zhang, 2024, arXiv 2406.05678): half of those heads back in plain groups, and four sinks."""

    num_sinks: int = 4
    returned_fraction: float = 0.5

"""The attention-free language model of the Grassmann paper, and the transformer that it is compared with.

"Attention Is Not What You Need" (Zhang, 2025, arXiv 2512.19428): token embedding and learned positions, blocks with a GELU
feed-forward and biases, tied output embedding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from attnlab.errors import ConfigError, nearest
from attnlab.models.lm import LM
from attnlab.nn.grassmann import GrassmannBlock
from attnlab.nn.partitioning import named
from attnlab.nn.projection import INIT_STD

SCHEDULES = ("all", "per_layer")


@struct.dataclass
class PositionedCache:
    """Caches of the layers, and how many tokens they hold: the next one's position.

    Attributes:
        layers: those of `LM`.
        index: int32 scalar.
    """

    layers: Any
    index: jax.Array


class GrassmannLM(LM):
    """`models.lm.LM` with learned positions, biases and the blocks of `nn.grassmann`; any mixer by name, default "grassmann".

    Parameters are those of `LM`, with `positions` [max_len, D] and the parameters of `GrassmannBlock`s.

    With `mixer="softmax"` and options `rope=False, proj_bias=True` it is the paper's transformer baseline.

    Attributes:
        max_len: how many positions are learned; 0 = `train_length`.
        offset_schedule: "all": every layer pairs by all of the mixer's offsets; "per_layer": layer l by its l-th only, one for
            each layer.
        norm_style: of the blocks, "pre" or "post".
        use_final_norm: layer norm before the output embedding.
    """

    mixer: str = "grassmann"
    mlp: str = "gelu"
    norm: str = "layernorm"
    max_len: int = 0
    offset_schedule: str = "all"
    norm_style: str = "pre"
    use_final_norm: bool = True

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        self._check()
        super().setup()
        init = named(nn.initializers.normal(INIT_STD), None, "embed")
        shape = (self.max_len or self.train_length, self.dim)
        self.position_table = self.param("positions", init, shape, self.param_dtype)

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: PositionedCache | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, PositionedCache | None]:
        """All but the head: ([B, T, D], cache).

        Raises:
            ConfigError: a sequence longer than the learned positions.
        """
        length, most = tokens.shape[1], self.max_len or self.train_length
        used = 0 if cache is None or isinstance(cache.index, jax.core.Tracer) else int(cache.index)
        if used + length > most:
            raise ConfigError(f"sequence of {used + length} tokens: the model has max_len = {most} learned positions.")
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None] + (0 if cache is None else cache.index)
        # Padding (below 0) takes the first position; one that does not exist is loud.
        table = self.position_table.astype(self.dtype)
        offset = jnp.take(table, jnp.maximum(positions, 0), axis=0, mode="fill", fill_value=jnp.nan)

        def around(call, args, kwargs, context):
            """Puts the positions after the embedding, and leaves the final norm out where there is none."""
            if context.module is self.final_norm and not self.use_final_norm:
                return args[0]
            y = call(*args, **kwargs)
            return y + offset if context.module is self.embed and context.method_name == "__call__" else y

        with nn.intercept_methods(around):
            x, layers = super().features(
                tokens,
                positions=positions,
                segment_ids=segment_ids,
                mask=mask,
                cache=None if cache is None else cache.layers,
                deterministic=deterministic,
            )
        return x, None if cache is None else PositionedCache(layers, cache.index + length)

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> PositionedCache:
        """Returns the empty caches of all layers."""
        return PositionedCache(super().init_cache(batch, max_len), jnp.zeros((), jnp.int32))

    @nn.nowrap
    def entries(self) -> tuple[str, ...]:
        """The pattern that repeats; with one offset per layer all layers, by number."""
        if self.offset_schedule == "per_layer":
            return tuple(f"layer_{layer}" for layer in range(self.num_layers))
        return super().entries()

    @nn.nowrap
    def make_mixer(self, entry: str) -> nn.Module:
        """Builds the mixer of a pattern entry, detached; see `LM.make_mixer`."""
        if self.offset_schedule != "per_layer":
            return super().make_mixer(entry)
        mixer = super().make_mixer(self.mixer)
        offsets = tuple(getattr(mixer, "offsets", ()))
        if len(offsets) != self.num_layers:
            raise ConfigError(
                f"offset_schedule = 'per_layer': mixer {self.mixer!r} has offsets {offsets} for {self.num_layers} layers. Give one "
                f"for each layer."
            )
        return mixer.clone(offsets=(offsets[int(entry.rpartition("_")[2])],), parent=None)

    @nn.nowrap
    def _check(self) -> None:
        if self.offset_schedule not in SCHEDULES:
            raise ConfigError(f"offset_schedule = {self.offset_schedule!r}: unknown, {nearest(self.offset_schedule, SCHEDULES)}")
        if self.offset_schedule == "per_layer" and self.pattern:
            raise ConfigError("offset_schedule = 'per_layer' with a pattern: one of the two says what a layer is. Clear pattern.")
        if not (self.max_len or self.train_length):
            raise ConfigError("max_len = 0: how many positions are to be learned? Set max_len, or train_length.")
        for entry in self.entries():
            mixer = self.make_mixer(entry)
            if getattr(mixer, "direction", "past") != "past":
                raise ConfigError(
                    f"direction = {mixer.direction!r}: a language model would read its own targets. Set direction='past'."
                )

    def _blocks(self, entries: tuple[str, ...]) -> tuple[nn.Module, ...]:
        return tuple(
            GrassmannBlock(
                mixer=self.make_mixer(entry),
                norm_style=self.norm_style,
                ff_dim=self.mlp_dim,
                dropout=self.dropout,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                parent=None,
            )
            for entry in entries
        )

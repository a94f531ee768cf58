"""A modern decoder language model: any mixer by name, any pattern of mixers over the layers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab import registry
from attnlab.errors import ConfigError, nearest
from attnlab.nn.block import Block
from attnlab.nn.norm import norm_of
from attnlab.nn.partitioning import constrain
from attnlab.nn.projection import Embedding, Projection

# What the backward pass keeps of a layer, by name; all else it computes again.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    **{
        name: getattr(jax.checkpoint_policies, name)
        for name in (
            "nothing_saveable",
            "everything_saveable",
            "dots_saveable",
            "checkpoint_dots",
            "dots_with_no_batch_dims_saveable",
            "checkpoint_dots_with_no_batch_dims",
        )
    },
}


class Group(nn.Module):
    """The blocks of one turn of the pattern: `block_0`, `block_1`, ...; the unit that is scanned and rematerialised."""

    blocks: tuple[Block, ...]

    @nn.compact
    def __call__(self, x, caches, positions, segment_ids, mask, deterministic):
        """Arguments are positional for nn.scan: carry, scanned, broadcast, ..."""
        new = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(
                x,
                positions=positions,
                segment_ids=segment_ids,
                mask=mask,
                cache=cache,
                deterministic=deterministic,
            )
            new.append(cache)
        return x, tuple(new)


class LM(nn.Module):
    """Embedding, blocks (norm, mixer, norm, MLP), final norm, head.

    Layer l has the mixer `pattern[l % P]`, P the length of the pattern; R = num_layers // P. Parameters and sown
    collections:

        embed                                        [V, D]
        layers/blocks_{p}/{mixer, mixer_norm, ...}   layers p, p + P, ...: every leaf stacked [R, ...]
        tail/blocks_{p}/{mixer, ...}                 layer R P + p, where the pattern does not divide `num_layers`
        final_norm, output                           [D], [D, V] (unless tied)

    Without `scan_layers`, "layers" becomes "layers_0" .. "layers_{R-1}" with leaves as they are. With
    `capture_attention` and `apply(..., mutable=["intermediates"])` every attention mixer sows `attention`, a tuple of
    one array [B, N, T, S] (stacked [R, B, N, T, S] under "layers"); `attention_maps` puts them in order.

    Attributes:
        vocab_size: V.
        num_layers: layers in all.
        dim: D.
        num_heads: N.
        num_kv_heads: K of attention mixers; 0 = N.
        head_dim: H of attention mixers; 0 = D / N.
        mixer: name of the mixer of every layer.
        pattern: names of mixers that repeat over the layers; wins over `mixer`.
        mixer_options: pattern entry -> keyword arguments of its mixer. An entry that is no mixer's name is an alias:
            its options say which one by `mixer`, for example `{"local": {"mixer": "softmax", "window": 128}}`.
        train_length: the sequence length trained with, for mixers that have such a constant.
        scan_layers: one compiled layer, scanned; else one after another. The same numbers.
        remat: name of `REMAT_POLICIES`.
        capture_attention: sow attention weights; see `attention_maps`.
    """

    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    mixer: str = "softmax"
    pattern: tuple[str, ...] = ()
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mlp: str = "gated"
    mlp_dim: int = 0
    norm: str = "rmsnorm"
    layer_scale: float = 0.0
    hybrid_norm: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    train_length: int = 0
    scan_layers: bool = True
    remat: str = "none"
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model: Any, vocab_size: int, train_length: int = 0) -> LM:
        """Builds the module from `config.model`; only the options of mixers in use are read."""
        skipped = {"name", "vocab_size", "mixer_options"}
        fields = {name: model[name] for name in model.keys() if name not in skipped}  # noqa: SIM118 (ConfigDict)
        entries = tuple(model.pattern) or (model.mixer,)
        options = {entry: dict(model.mixer_options[entry].items()) for entry in entries if entry in model.mixer_options}
        fields |= {name: jnp.dtype(model[name]) for name in ("dtype", "param_dtype")}
        fields["pattern"] = tuple(model.pattern)
        return cls(vocab_size=vocab_size, train_length=train_length, mixer_options=options, **fields)

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        entries = self.entries()
        turns, left = divmod(self.num_layers, len(entries))
        group = Group
        if self.remat not in REMAT_POLICIES:
            raise ConfigError(f"remat = {self.remat!r}: unknown, {nearest(self.remat, REMAT_POLICIES)}")
        if REMAT_POLICIES[self.remat] is not None:
            # 0 is self, 6 is `deterministic`
            group = nn.remat(
                Group, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers, static_argnums=(6,)
            )
        self.embed = Embedding(self.vocab_size, self.dim, self.dtype, self.param_dtype)
        if turns and self.scan_layers:
            scanned = nn.scan(
                group,
                variable_axes={True: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=turns,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers = scanned(self._blocks(entries))
        elif turns:
            self.layers = [group(self._blocks(entries)) for _ in range(turns)]
        if left:
            self.tail = group(self._blocks(entries[:left]))
        self.final_norm = norm_of(self.norm)(param_dtype=self.param_dtype)
        if not self.tie_embeddings:
            self.output = Projection(
                (self.dim, self.vocab_size), ("embed", "vocab"), dtype=self.dtype, param_dtype=self.param_dtype
            )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: Any = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Any]:
        """Maps ids [B, T] int32 to (logits [B, T, V] float32, cache); other arguments are the mixers' (`nn.mixer`)."""
        x, cache = self.features(
            tokens, positions=positions, segment_ids=segment_ids, mask=mask, cache=cache, deterministic=deterministic
        )
        return self.head(x), cache

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: Any = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Any]:
        """All but the head: ([B, T, D], cache)."""
        entries = self.entries()
        turns, left = divmod(self.num_layers, len(entries))
        rest = (positions, segment_ids, mask, deterministic)
        x = constrain(self.embed(tokens), "act_batch", "act_seq", "act_embed")
        none = (None,) * len(entries)
        layers, tail = ((none if self.scan_layers else (none,) * turns), none[:left]) if cache is None else cache
        if turns and self.scan_layers:
            x, layers = self.layers(x, layers, *rest)
        elif turns:
            new = []
            for group, caches in zip(self.layers, layers, strict=True):
                x, caches = group(x, caches, *rest)
                new.append(caches)
            layers = tuple(new)
        if left:
            x, tail = self.tail(x, tail, *rest)
        return self.final_norm(x), None if cache is None else (layers, tail)

    def head(self, x: jax.Array) -> jax.Array:
        """Features [B, T, D] to logits [B, T, V] float32."""
        logits = self.embed.attend(x) if self.tie_embeddings else self.output(x).astype(jnp.float32)
        return constrain(logits, "act_batch", "act_seq", "act_vocab")

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int) -> Any:
        """Returns the empty caches of all layers; those of scanned layers are stacked along a leading axis."""
        entries = self.entries()
        turns, left = divmod(self.num_layers, len(entries))
        one = tuple(self.make_mixer(entry).init_cache(batch, max_len) for entry in entries)
        if self.scan_layers:
            layers = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], turns, axis=0), one)
        else:
            layers = (one,) * turns
        return layers, one[:left]

    @nn.nowrap
    def entries(self) -> tuple[str, ...]:
        """The pattern that repeats."""
        return tuple(self.pattern) or (self.mixer,)

    @nn.nowrap
    def make_mixer(self, entry: str) -> nn.Module:
        """Builds the mixer of a pattern entry, detached.

        Raises:
            ConfigError: unknown mixer, or an option that it does not have.
        """
        options = dict(self.mixer_options.get(entry, {}))
        target = registry.get("mixer", options.pop("mixer", entry))
        known = {field.name for field in dataclasses.fields(target)} if inspect.isclass(target) else set(options)
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"mixer_options.{entry} = {unknown}: {target.__name__} has no such option.")
        common = {"num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim, "train_length": self.train_length}
        options |= {name: value for name, value in common.items() if name in known and value and not options.get(name)}
        if "capture_attention" in known:
            options["capture_attention"] = self.capture_attention
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return target(dim=self.dim, num_heads=self.num_heads, parent=None, **types, **options)

    @nn.nowrap
    def forward_flops_per_token(self, params: Any, length: int) -> float:
        """Forward FLOPs per token: twice the parameters that multiply (the head, not the lookup), and the mixers'."""
        sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
        if not self.tie_embeddings:
            sizes -= self.vocab_size * self.dim
        entries = self.entries()
        mixers = [self.make_mixer(entry) for entry in entries]
        mixing = [mixer.sequence_flops(length) if hasattr(mixer, "sequence_flops") else 0.0 for mixer in mixers]
        return 2.0 * sizes + sum(mixing[layer % len(entries)] for layer in range(self.num_layers))

    def _blocks(self, entries: tuple[str, ...]) -> tuple[Block, ...]:
        return tuple(
            Block(
                mixer=self.make_mixer(entry),
                norm=self.norm,
                mlp=self.mlp,
                mlp_dim=self.mlp_dim,
                layer_scale=self.layer_scale,
                hybrid_norm=self.hybrid_norm,
                dropout=self.dropout,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                parent=None,
            )
            for entry in entries
        )


def attention_maps(model: LM, intermediates: Any, kind: str = "attention") -> list[jax.Array | None]:
    """Returns the weights [B, N, T, S] that each layer sowed, in order; None for a mixer that has no such weights.

    Args:
        model: with `capture_attention=True`.
        intermediates: the collection of `model.apply(..., mutable=["intermediates"])`.
        kind: the name of something else that mixers sow.
    """
    entries = model.entries()
    turns = model.num_layers // len(entries)
    maps = []
    for layer in range(model.num_layers):
        turn, place = divmod(layer, len(entries))
        if turn >= turns:
            name, index = "tail", None
        elif model.scan_layers:
            name, index = "layers", turn
        else:
            name, index = f"layers_{turn}", None
        node = intermediates.get(name, {}).get(f"blocks_{place}", {}).get("mixer", {})
        sown = node.get(kind)
        maps.append(None if sown is None else sown[0] if index is None else sown[0][index])
    return maps

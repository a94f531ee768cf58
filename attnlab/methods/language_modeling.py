"""Next-token prediction: cross-entropy of `models.lm` over packed or plain windows of text."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from attnlab import data, registry
from attnlab.errors import field_error
from attnlab.methods import fields
from attnlab.methods.task import SOWN, LossAux, Variables, sown
from attnlab.models.lm import REMAT_POLICIES

VOCAB_MULTIPLE = 64  # so that the vocabulary divides over devices and fills matrix units


class LanguageModeling:
    """The task of `configs/lm.py`: a decoder, on any `data.open_text` text or on a set of rows by its name in the registry.

    Args:
        config: the whole config; reads `model`, `data.packing`, `batch_size`, `seq_len` and `loss_chunk`.
        vocab_size: V, ids that the tokenizer uses, rounded up.
    """

    def __init__(self, config: ml_collections.ConfigDict, vocab_size: int):
        self.model = registry.get("model", config.model.name).from_config(
            config.model, vocab_size, config.seq_len
        )
        self.vocab_size = vocab_size
        self.batch_size, self.seq_len = config.batch_size, config.seq_len
        self.packed = config.data.packing == "packed"
        self.loss_chunk = config.loss_chunk
        self.units_per_step = self.batch_size * self.seq_len

    unit = "tokens"
    batch_axes = ("act_batch", "act_seq")

    @staticmethod
    def defaults(config: ml_collections.ConfigDict) -> None:
        """Adds the fields of data and model: a small byte-level decoder on the standard-library text."""
        config.seq_len = 256
        config.loss_chunk = 0  # tokens of a sequence per cross-entropy chunk; 0 = the whole sequence at once

        config.data = text = ml_collections.ConfigDict()
        text.name = "stdlib"  # or tfds:NAME/CONFIG, or text:PATH, or a generated set of configs/recall.py
        text.dir = ""  # where prepared data sets live; "" = the user's cache
        text.tokenizer = "bytes"  # or bpe:VOCAB
        text.packing = "windows"  # or packed
        text.workers = 0
        text.feature = "text"
        text.errors = "strict"  # or skip: leave undecodable files out, counted

        config.model = model = ml_collections.ConfigDict()
        model.name = "lm"
        model.mixer = "softmax"
        model.pattern = ()  # mixers (or aliases of mixer_options) that repeat over the layers; wins over `mixer`
        model.num_layers = 4
        model.dim = 256
        model.num_heads = 4
        model.num_kv_heads = 0  # 0 = num_heads
        model.head_dim = 0  # 0 = dim / num_heads
        model.mlp = "gated"
        model.mlp_dim = 0  # 0 = 8/3 dim for gated, 4 dim for gelu
        model.norm = "rmsnorm"
        model.layer_scale = 0.0
        model.hybrid_norm = False
        model.tie_embeddings = True
        model.vocab_size = 0  # 0 = the tokenizer's
        model.dropout = 0.0
        model.scan_layers = True
        model.remat = "none"
        model.dtype = "bfloat16"
        model.param_dtype = "float32"
        model.mixer_options = fields.mixer_options()

    @staticmethod
    def validate(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
        """Checks the fields of `defaults`; `values` has them all by dotted names.

        Raises:
            ConfigError: the first bad field, with its value and the fix.
        """
        fields.check(
            values,
            positive=("seq_len", "model.num_layers", "model.dim", "model.num_heads"),
            not_negative=(
                "loss_chunk", "model.num_kv_heads", "model.head_dim", "model.mlp_dim", "model.vocab_size", "model.layer_scale",
            ),
        )  # fmt: skip
        if not 0 <= config.model.dropout < 1:
            raise field_error("config.model.dropout", config.model.dropout, "must be in [0, 1)", "Set 0 to switch it off")
        fields.one_of("data.packing", config.data.packing, ("windows", "packed"))
        fields.one_of("model.mlp", config.model.mlp, ("gated", "gelu"))
        fields.one_of("model.norm", config.model.norm, ("rmsnorm", "layernorm"))
        fields.one_of("model.remat", config.model.remat, REMAT_POLICIES)
        fields.validate_mixers(config.model)
        if config.loss_chunk and config.seq_len % config.loss_chunk:
            raise field_error(
                "config.loss_chunk", config.loss_chunk, f"does not divide config.seq_len = {config.seq_len}",
                f"Set 0 (off) or one of {fields.divisors(config.seq_len)[-6:]}",
            )  # fmt: skip

    @staticmethod
    def open_data(config: ml_collections.ConfigDict) -> data.Dataset:
        """Opens a registered set of rows, or text."""
        if config.data.name in registry.names("dataset"):
            return registry.get("dataset", config.data.name)(config)
        return data.open_text(config)

    @classmethod
    def outputs(cls, config: ml_collections.ConfigDict, needed: int | None = None) -> int:
        """V of the model: `model.vocab_size`, or the ids of the data rounded up to a multiple of 64.

        Args:
            config: the whole config.
            needed: ids that the data has; None = what the config says of them, without text.

        Raises:
            ConfigError: `model.vocab_size` is smaller than that.
        """
        if needed is None:
            generated = config.data.name in registry.names("dataset")
            needed = cls.open_data(config).outputs if generated else data.vocab_size_of(config.data.tokenizer)
        chosen = config.model.vocab_size or -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        if chosen < needed:
            raise field_error("config.model.vocab_size", chosen, f"is smaller than the vocabulary of the data, {needed}",
                              "Set 0 to take that")  # fmt: skip
        return chosen

    @staticmethod
    def eval_batch(batch: dict[str, np.ndarray], dataset: data.Dataset) -> dict[str, np.ndarray]:
        """Adds `target_bytes` int32 [b, T]: bytes of text that each counted target stands for; 0 where it is no text."""
        tokenizer = getattr(dataset, "tokenizer", None)
        sizes = np.zeros_like(batch["targets"]) if tokenizer is None else np.asarray(tokenizer.token_bytes)[batch["targets"]]
        return batch | {"target_bytes": (sizes * batch["mask"]).astype(np.int32)}

    @staticmethod
    def figures(totals: dict[str, float]) -> dict[str, float]:
        """`loss` (nats per token), `accuracy`, `tokens`; of text also `bits_per_byte` and `bytes`."""
        tokens, text_bytes = totals.get("weight", 0.0), totals.get("bytes", 0.0)
        found = {
            "loss": totals["loss"] / tokens if tokens else math.nan,
            "bits_per_byte": totals["loss"] / math.log(2) / text_bytes if text_bytes else math.nan,
            "accuracy": totals["correct"] / tokens if tokens else math.nan,
            "tokens": int(tokens),
            "bytes": int(text_bytes),
        }
        if tokens and not text_bytes:
            del found["bits_per_byte"], found["bytes"]
        return found

    @staticmethod
    def summary(figures: dict[str, float]) -> str:
        """The figures in a line."""
        last = f"{figures['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in figures else f"accuracy {figures['accuracy']:.4f}"
        return f"loss {figures['loss']:.4f} nats/token, {last}"

    @staticmethod
    def describe(config: ml_collections.ConfigDict) -> tuple[str, str]:
        """Model and step of the run header, in words."""
        model = config.model
        mixers = " ".join(fields.layer_pattern(model))
        return f"{mixers}, {model.num_layers} layers, width {model.dim}", f"{config.batch_size} x {config.seq_len}"

    def init(self, rng: jax.Array) -> Variables:
        """Returns the variables of the model, boxed."""
        # One batch row per mesh shard is not needed: shapes of parameters do not depend on the batch.
        variables = self.model.init(rng, jnp.zeros((1, min(self.seq_len, 128)), jnp.int32))
        return {name: tree for name, tree in variables.items() if name not in (*SOWN, "intermediates")}

    def loss(
        self, params: Any, collections: Variables, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, LossAux]:
        """Mean cross-entropy in nats per target token, plus the losses that modules sowed."""
        (features, _), updated = self.model.apply(
            {"params": params, **collections},
            batch["inputs"],
            **self._structure(batch),
            deterministic=False,
            rngs={"dropout": rng},
            mutable=[*collections, *SOWN],
            method="features",
        )
        sums = self._sums(params, collections, features, batch)
        weight = sums["weight"]
        cross_entropy = sums["loss"] / jnp.maximum(weight, 1.0)
        auxiliary, metrics = sown(updated)
        metrics |= {"loss": cross_entropy, "accuracy": sums["correct"] / jnp.maximum(weight, 1.0)}
        kept = {name: updated.get(name, tree) for name, tree in collections.items()}
        return cross_entropy + auxiliary, LossAux(weight=weight, metrics=metrics, collections=kept)

    def eval(self, params: Any, collections: Variables, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Sums over the target tokens: `loss` (nats), `correct`, `weight`, and `bytes` of the text they stand for."""
        features, _ = self.model.apply(
            {"params": params, **collections}, batch["inputs"], **self._structure(batch), method="features"
        )
        sums = self._sums(params, collections, features, batch)
        return sums | {"bytes": jnp.sum(batch["target_bytes"].astype(jnp.float32))}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch: `inputs`, `targets` and `mask` [B, T], and the structure of packed rows."""
        shape = (self.batch_size, self.seq_len)
        spec = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("inputs", "targets")}
        spec["mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
        if self.packed:
            spec |= {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("segment_ids", "positions")}
        return spec

    def eval_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The training batch, and `target_bytes` [B, T]: the bytes that each target stands for, 0 where not counted."""
        return self.batch_spec() | {"target_bytes": jax.ShapeDtypeStruct((self.batch_size, self.seq_len), jnp.int32)}

    def flops_per_step(self, params: Any) -> float:
        """6 FLOPs per matrix parameter and token, plus what the mixers do over the sequence (forward and twice backward)."""
        tokens = self.batch_size * self.seq_len
        return tokens * 3.0 * self.model.forward_flops_per_token(params, self.seq_len)

    def _structure(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Packed rows carry their own positions and segments (0 is padding); plain windows are whole."""
        return {name: batch[name] for name in ("segment_ids", "positions")} if self.packed else {}

    def _sums(self, params: Any, collections: Variables, features: jax.Array, batch: dict[str, jax.Array]):
        """Sums of the cross-entropy over tokens, in chunks of the sequence so that [B, T, V] need not exist at once."""

        def chunk_sums(features, targets, mask):
            logits = self.model.apply({"params": params, **collections}, features, method="head").astype(jnp.float32)
            target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            nats = jax.nn.logsumexp(logits, axis=-1) - target_logit
            counted = mask.astype(jnp.float32)
            correct = (jnp.argmax(logits, axis=-1) == targets) * counted
            return {"loss": jnp.sum(nats * counted), "correct": jnp.sum(correct), "weight": jnp.sum(counted)}

        arrays = (features, batch["targets"], batch["mask"])
        if not self.loss_chunk or self.loss_chunk >= features.shape[1]:
            return chunk_sums(*arrays)
        batch_size, length = features.shape[:2]
        pieces = jax.tree.map(
            lambda x: x.reshape(batch_size, length // self.loss_chunk, self.loss_chunk, *x.shape[2:]).swapaxes(0, 1),
            arrays,
        )
        zeros = {name: jnp.float32(0) for name in ("loss", "correct", "weight")}

        def step(total, piece):
            return jax.tree.map(jnp.add, total, jax.checkpoint(chunk_sums)(*piece)), None

        return jax.lax.scan(step, zeros, pieces)[0]

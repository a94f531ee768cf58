"""Next-token prediction: cross-entropy of `models.lm` over packed or plain windows of text."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from attnlab import registry
from attnlab.methods.task import LossAux, Variables

_SOWN = ("losses", "metrics")


class LanguageModeling:
    """The task of `configs/lm.py`.

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

    def init(self, rng: jax.Array) -> Variables:
        """Returns the variables of the model, boxed."""
        # One batch row per mesh shard is not needed: shapes of parameters do not depend on the batch.
        variables = self.model.init(rng, jnp.zeros((1, min(self.seq_len, 128)), jnp.int32))
        return {name: tree for name, tree in variables.items() if name not in (*_SOWN, "intermediates")}

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
            mutable=[*collections, *_SOWN],
            method="features",
        )
        sums = self._sums(params, collections, features, batch)
        weight = sums["weight"]
        cross_entropy = sums["loss"] / jnp.maximum(weight, 1.0)
        auxiliary = sum((jnp.sum(leaf) for leaf in jax.tree.leaves(updated.get("losses", {}))), jnp.float32(0))
        metrics = {"loss": cross_entropy, "accuracy": sums["correct"] / jnp.maximum(weight, 1.0)}
        if updated.get("losses"):
            metrics["auxiliary_loss"] = auxiliary
        for path, leaf in jax.tree_util.tree_leaves_with_path(updated.get("metrics", {})):
            keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
            metrics["/".join(keys)] = jnp.mean(leaf)
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

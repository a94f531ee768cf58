"""The contract between what is minimised (a method) and the one train step."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from flax import struct

from attnlab.data.dataset import Dataset

Variables = dict[str, Any]


@struct.dataclass
class LossAux:
    """What a loss reports beside its value.

    Attributes:
        weight: scalar, the mass of the batch that the loss is a mean over (tokens, images); gradient accumulation
            weighs micro-batches by it, so that the accumulated gradient equals the whole batch's.
        metrics: scalars, each a mean over the same mass.
        collections: the updated variable collections that are not parameters (online statistics).
    """

    weight: jax.Array
    metrics: dict[str, jax.Array]
    collections: Variables


SOWN = ("losses", "metrics")  # collections that modules sow into; no state of the model


def sown(updated: Variables) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the sum of the losses that modules sowed, and what to report: that sum, and the means of their metrics by path."""
    losses = jax.tree.leaves(updated.get("losses", {}))
    auxiliary = sum(map(jnp.sum, losses), jnp.float32(0))
    metrics = {"auxiliary_loss": auxiliary} if losses else {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updated.get("metrics", {})):
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        metrics["/".join(keys)] = jnp.mean(leaf)
    return auxiliary, metrics


class Task(Protocol):
    """A model and what is minimised on which data; built as `Task(config, outputs)`.

    Two methods are optional. `optimizer(tx, params)` returns the transformation to use instead of the run's, for a task that
    trains a part of its parameters or each part in its own way (`methods.lora`). `update(compute, tx, params, opt_state,
    collections, batch, rng)` makes the whole step, for a task of several passes (`methods.gradient_routing.Routing.update`).

    Attributes:
        model: the module.
        unit: what a batch is counted in, "tokens" or "images".
        units_per_step: of the global training batch.
        batch_axes: logical names of the leading axes of every array of a batch.
    """

    model: nn.Module
    unit: str
    units_per_step: int
    batch_axes: tuple[str, ...]

    @staticmethod
    def defaults(config: ml_collections.ConfigDict) -> None:
        """Adds the fields that this task has beyond the common ones, at least `data` and `model`."""

    @staticmethod
    def validate(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
        """Checks those fields; `values` is the whole config by dotted names.

        Raises:
            ConfigError: the first bad field, with its value and the fix.
        """

    @staticmethod
    def open_data(config: ml_collections.ConfigDict) -> Dataset:
        """Opens the data that the config names."""

    @classmethod
    def outputs(cls, config: ml_collections.ConfigDict, needed: int | None = None) -> int:
        """Returns what the model has to tell apart (ids, classes): as the data says (`needed`), or the config without data."""

    def init(self, rng: jax.Array) -> Variables:
        """Returns all variables, parameters boxed with their logical axis names."""

    def loss(
        self, params: Any, collections: Variables, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, LossAux]:
        """Returns the scalar to minimise on a batch, in training mode."""

    def eval(self, params: Any, collections: Variables, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns sums over a batch; `figures` makes figures of their totals over all batches."""

    def eval_batch(self, batch: dict[str, np.ndarray], dataset: Dataset) -> dict[str, np.ndarray]:
        """Returns the loader's batch with what `eval` needs beside it."""

    def figures(self, totals: dict[str, float]) -> dict[str, float]:
        """Returns the figures of an evaluation, `loss` among them."""

    def summary(self, figures: dict[str, float]) -> str:
        """Returns the figures in a line."""

    def describe(self, config: ml_collections.ConfigDict) -> tuple[str, str]:
        """Returns the model, and the batch of a step, in words."""

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the global training batch."""

    def eval_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the global evaluation batch."""

    def flops_per_step(self, params: Any) -> float:
        """Returns the model FLOPs of one training step over the global batch (forward and backward, no recomputation)."""

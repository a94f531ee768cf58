"""The contract between what is minimised (a method) and the one train step."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from flax import linen as nn
from flax import struct

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


class Task(Protocol):
    """A model and what is minimised on it; built from the config and the size of the vocabulary."""

    model: nn.Module

    def init(self, rng: jax.Array) -> Variables:
        """Returns all variables, parameters boxed with their logical axis names."""

    def loss(
        self, params: Any, collections: Variables, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, LossAux]:
        """Returns the scalar to minimise on a batch, in training mode."""

    def eval(self, params: Any, collections: Variables, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns sums over a batch (they are added up over batches, then divided by `weight`)."""

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the global training batch."""

    def eval_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the global evaluation batch."""

    def flops_per_step(self, params: Any) -> float:
        """Returns the model FLOPs of one training step over the global batch (forward and backward, no recomputation)."""

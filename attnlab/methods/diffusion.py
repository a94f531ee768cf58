"""Denoising diffusion: a model learns the noise that was added to images (Ho et al., 2020, arXiv 2006.11239).

The noise has a linear schedule over discrete times; the loss is the mean squared error of the predicted noise at a random
time. Labels are left out at random, so that `inference.denoising` can guide samples by class. Variances are not learned
(DiT learns them beside the noise, for its likelihoods).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from attnlab.data import Dataset
from attnlab.data.images import ImageData
from attnlab.errors import field_error
from attnlab.methods import fields
from attnlab.methods.image_classification import ImageClassification
from attnlab.methods.task import SOWN, LossAux, Variables, sown
from attnlab.models.flops import count_flops

_EVAL_TIMES = 4  # at which the loss of an evaluation is taken


class Diffusion(ImageClassification):
    """The task of `configs/moh.py:dit_mnist`: images and labels as in image classification, the noise as the target.

    Args:
        config: the whole config; reads `model`, `data`, `batch_size` and `diffusion`.
        num_classes: of the labels.

    Attributes:
        schedule: see `linear_schedule`.
        options: `config.diffusion`.
    """

    def __init__(self, config: ml_collections.ConfigDict, num_classes: int):
        super().__init__(config, num_classes)
        self.options = config.diffusion
        self.schedule = linear_schedule(config.diffusion.times)

    @staticmethod
    def defaults(config: ml_collections.ConfigDict) -> None:
        """Adds `diffusion` to the fields of images; their values are scaled to -1 .. 1."""
        ImageClassification.defaults(config)
        config.data.mean, config.data.std = (0.5,), (0.5,)
        config.diffusion = ml_collections.ConfigDict(
            {
                "times": 1000,
                "label_dropout": 0.1,  # share of images whose label the model does not see
                "sample_steps": 50,  # of eval.py's samples
                "guidance": 2.0,  # alike; 1 = off
            }
        )
        config.model.name = "dit"

    @staticmethod
    def validate(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
        """Checks those fields.

        Raises:
            ConfigError: the first bad field, with its value and the fix.
        """
        ImageClassification.validate(config, values)
        fields.check(values, positive=("diffusion.times", "diffusion.sample_steps"))
        if config.diffusion.sample_steps > config.diffusion.times:
            raise field_error("config.diffusion.sample_steps", config.diffusion.sample_steps,
                              f"is more than the {config.diffusion.times} times", "Lower it")  # fmt: skip
        if not 0 <= config.diffusion.label_dropout <= 1:
            raise field_error("config.diffusion.label_dropout", config.diffusion.label_dropout, "is no share", "Set 0 to 1")
        for field in ("label_smoothing", "data.augment.mixup", "data.augment.cutmix"):
            if values[field]:
                raise field_error(f"config.{field}", values[field], "labels are conditions here, not targets", "Set 0")

    @staticmethod
    def open_data(config: ml_collections.ConfigDict) -> ImageData:
        """Opens the images of `config.data`; eval.py looks at samples, not at classes."""
        data = ImageClassification.open_data(config)
        data.evaluation = "denoising"
        return data

    @staticmethod
    def eval_batch(batch: dict[str, np.ndarray], dataset: Dataset) -> dict[str, np.ndarray]:
        """The batch as it is."""
        return batch

    @staticmethod
    def figures(totals: dict[str, float]) -> dict[str, float]:
        """`loss`, the mean squared error of the noise, and `images`."""
        count = totals.get("weight", 0.0)
        return {"loss": totals["loss"] / count if count else math.nan, "images": int(count)}

    @staticmethod
    def summary(figures: dict[str, float]) -> str:
        """The figures in a line."""
        return f"loss {figures['loss']:.4f} (squared error of the noise)"

    def init(self, rng: jax.Array) -> Variables:
        """Returns the variables of the model, boxed."""
        images = jnp.zeros((1, *self.image_shape), jnp.float32)
        variables = self.model.init(rng, images, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
        return {name: tree for name, tree in variables.items() if name not in (*SOWN, "intermediates")}

    def loss(
        self, params: Any, collections: Variables, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, LossAux]:
        """Mean squared error of the noise over the images, plus the losses that modules sowed."""
        time_key, noise_key, label_key, model_key = jax.random.split(rng, 4)
        images, labels = batch["images"], batch["labels"]
        times = jax.random.randint(time_key, labels.shape, 0, self.options.times)
        unseen = jax.random.bernoulli(label_key, self.options.label_dropout, labels.shape)
        noisy, noise = self._noisy(images, times, noise_key)
        found, updated = self.model.apply(
            {"params": params, **collections},
            noisy,
            times,
            jnp.where(unseen, self.num_classes, labels),
            deterministic=False,
            rngs={"dropout": model_key},
            mutable=[*collections, *SOWN],
        )
        counted = batch["mask"].astype(jnp.float32)
        weight = jnp.sum(counted)
        error = jnp.sum(_squared_error(found, noise) * counted) / jnp.maximum(weight, 1.0)
        auxiliary, metrics = sown(updated)
        metrics["loss"] = error
        kept = {name: updated.get(name, tree) for name, tree in collections.items()}
        return error + auxiliary, LossAux(weight=weight, metrics=metrics, collections=kept)

    def eval(self, params: Any, collections: Variables, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Sums over the images: `loss`, averaged over four times and with the same noise in every evaluation; `weight`."""
        images, labels, counted = batch["images"], batch["labels"], batch["mask"].astype(jnp.float32)
        error = jnp.zeros(labels.shape, jnp.float32)
        for i in range(_EVAL_TIMES):
            time = (2 * i + 1) * self.options.times // (2 * _EVAL_TIMES)
            times = jnp.full(labels.shape, time, jnp.int32)
            noisy, noise = self._noisy(images, times, jax.random.key(i))
            found = self.predict_noise(params, collections, noisy, times, labels)
            error = error + _squared_error(found, noise) / _EVAL_TIMES
        return {"loss": jnp.sum(error * counted), "weight": jnp.sum(counted)}

    def predict_noise(
        self, params: Any, collections: Variables, images: jax.Array, times: jax.Array, labels: jax.Array
    ) -> jax.Array:
        """Returns the noise in images [B, Y, X, C] at times [B] int32; the label `num_classes` stands for none."""
        return self.model.apply({"params": params, **collections}, images, times, labels)

    def flops_per_step(self, params: Any) -> float:
        """Three times the products of a forward pass."""
        one = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        variables = jax.eval_shape(self.init, jax.random.key(0))
        return 3.0 * self.batch_size * count_flops(self.model.apply, variables, one, number, number)

    def _noisy(self, images: jax.Array, times: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images at the given times, and the noise in them."""
        left = jnp.asarray(self.schedule, jnp.float32)[times][:, None, None, None]
        noise = jax.random.normal(key, images.shape)
        return jnp.sqrt(left) * images + jnp.sqrt(1.0 - left) * noise, noise


def linear_schedule(times: int, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """Shares of the signal's variance that are left, [times] float64: products of 1 - beta, beta from `first` to `last`.

    "Denoising Diffusion Probabilistic Models" (Ho et al., 2020, arXiv 2006.11239) has 1000 times; for other numbers the
    betas are scaled so that as little signal is left at the end.
    """
    scale = 1000.0 / times
    betas = np.minimum(np.linspace(scale * first, scale * last, times), 0.999)
    return np.cumprod(1.0 - betas)


def _squared_error(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """[B, Y, X, C] to the mean over each image, [B]."""
    return jnp.mean(jnp.square(found.astype(jnp.float32) - wanted), axis=(1, 2, 3))

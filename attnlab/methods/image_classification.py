"""Classification of images: cross-entropy with label smoothing and mixed targets, for any registered image model."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from attnlab import registry
from attnlab.data import Dataset, images
from attnlab.data.images import policy, transforms
from attnlab.data.images.dataset import CROPS, image_shape, normalisation, open_images
from attnlab.data.images.sources import open_source
from attnlab.errors import field_error
from attnlab.methods import fields
from attnlab.methods.task import SOWN, LossAux, Variables, sown
from attnlab.models.flops import count_flops


class ImageClassification:
    """The task of `configs/biformer.py`, `configs/vit.py` and other image models.

    A batch has `images` float32 [B, H, W, C] (of video [B, frames, H, W, C]), `labels`, `other_labels` int32 [B], `mix` float32
    [B] and `mask` bool [B]; the target is mix times the label and 1 - mix times the other one.

    Args:
        config: the whole config; reads `model`, `data.image_size`, `data.channels`, `batch_size` and `label_smoothing`.
        num_classes: of the logits.
    """

    unit = "images"
    batch_axes = ("act_batch",)

    def __init__(self, config: ml_collections.ConfigDict, num_classes: int):
        self.image_shape = image_shape(config)
        model = registry.get("model", config.model.name)
        self.model = model.from_config(config.model, num_classes, self.image_shape)
        self.num_classes, self.batch_size = num_classes, config.batch_size
        self.units_per_step = config.batch_size
        self.label_smoothing = float(config.label_smoothing)

    @staticmethod
    def defaults(config: ml_collections.ConfigDict) -> None:
        """Adds the fields of data and loss; the model's own are added by its config file (`attnlab.models.options`)."""
        config.label_smoothing = 0.0  # share of the target that is spread evenly over all classes

        config.data = data = ml_collections.ConfigDict()
        # or orl_faces, lookup (generated), texture_match (generated from photographs), moving_digits[:direction] (video),
        # tfds:NAME/CONFIG, folder:PATH
        data.name = "mnist_5k"
        data.dir = ""  # where prepared data sets live; "" = the user's cache
        data.workers = 0  # processes; 0 = threads
        data.errors = "strict"  # or skip: leave images out that cannot be decoded, counted
        data.image = "image"  # features of a TFDS set
        data.label = "label"
        data.num_classes = 0  # 0 = the data's
        data.train_examples = 0  # images to learn from, spread evenly over the train split; 0 = all
        data.image_size = 32  # pixels
        data.image_width = 0  # 0 = square images
        data.channels = 3  # or 1: grey
        data.frames = 0  # of each clip of video; 0 = single images
        data.mean = ()  # of each channel in 0..1; () = ImageNet's
        data.std = ()
        data.crop_fraction = 1.0  # of the resized image that an evaluation sees
        data.interpolation = "bicubic"

        data.augment = augment = ml_collections.ConfigDict()
        augment.crop = "none"  # or shift, or resized
        augment.shift = 2  # pixels
        augment.scale = (0.08, 1.0)  # share of the area that "resized" keeps
        augment.ratio = (3 / 4, 4 / 3)
        augment.flip = 0.0  # probability
        augment.policy_layers = 0  # operations of RandAugment per image; 0 = off
        augment.policy_strength = 9.0  # of 10
        augment.policy_deviation = 0.5
        augment.policy_probability = 0.5  # of each operation
        augment.policy_operations = ()  # names; () = all
        augment.policy_fill = -1  # grey level of uncovered pixels; -1 = the mean
        augment.mixup = 0.0  # alpha; 0 = off
        augment.cutmix = 0.0  # alpha; 0 = off
        augment.mix_probability = 1.0
        augment.cutmix_share = 0.5  # where both are on
        augment.erase = 0.0  # probability

        config.model = ml_collections.ConfigDict({"name": "vit", "dtype": "float32", "param_dtype": "float32"})

    @staticmethod
    def validate(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
        """Checks the fields of `defaults`; `values` has them all by dotted names.

        Raises:
            ConfigError: the first bad field, with its value and the fix.
        """
        augment = config.data.augment
        fields.check(
            values,
            positive=("data.image_size",),
            not_negative=(
                "data.num_classes", "data.train_examples", "data.frames", "data.image_width", "data.augment.shift",
                "data.augment.policy_layers", "data.augment.policy_strength", "data.augment.policy_deviation",
                "data.augment.mixup", "data.augment.cutmix",
            ),
        )  # fmt: skip
        for field in ("flip", "policy_probability", "mix_probability", "cutmix_share", "erase"):
            if not 0 <= augment[field] <= 1:
                raise field_error(f"config.data.augment.{field}", augment[field], "is not a probability", "Set 0 to 1")
        if not 0 <= config.label_smoothing < 1:
            raise field_error("config.label_smoothing", config.label_smoothing, "must be in [0, 1)", "Set 0 to switch it off")
        if config.data.channels not in (1, 3):
            raise field_error("config.data.channels", config.data.channels, "images are grey or in colour", "Set 1 or 3")
        if not 0 < config.data.crop_fraction <= 1:
            raise field_error("config.data.crop_fraction", config.data.crop_fraction, "must be in (0, 1]", "Set 1 for all")
        fields.one_of("data.interpolation", config.data.interpolation, transforms.INTERPOLATIONS)
        fields.one_of("data.augment.crop", augment.crop, CROPS)
        for name in augment.policy_operations:
            fields.one_of("data.augment.policy_operations", name, policy.OPERATIONS)
        if augment.policy_strength > policy.MAX_STRENGTH:
            raise field_error("config.data.augment.policy_strength", augment.policy_strength, "the scale ends at 10", "Lower it")
        normalisation(config)

    @staticmethod
    def open_data(config: ml_collections.ConfigDict) -> images.ImageData:
        """Opens the images of `config.data`."""
        return open_images(config)

    @classmethod
    def outputs(cls, config: ml_collections.ConfigDict, needed: int | None = None) -> int:
        """The classes of the data (`needed`), else `data.num_classes`, else those that the data say when they are opened.

        Raises:
            ConfigError: `data.num_classes` is another number than the data have.
        """
        chosen = config.data.num_classes
        if needed is None:
            return chosen or len(open_source(config).class_names)
        if chosen not in (0, needed):
            raise field_error("config.data.num_classes", chosen, f"the data have {needed} classes", "Set 0 to take the data's")
        return needed

    @staticmethod
    def eval_batch(batch: dict[str, np.ndarray], dataset: Dataset) -> dict[str, np.ndarray]:
        """The batch as it is."""
        return batch

    @staticmethod
    def figures(totals: dict[str, float]) -> dict[str, float]:
        """`loss` (nats per image), `accuracy`, `accuracy_top5`, `images`."""
        count = totals.get("weight", 0.0)
        found = {
            name: totals[key] / count if count else math.nan
            for name, key in (("loss", "loss"), ("accuracy", "correct"), ("accuracy_top5", "correct_top5"))
        }
        return found | {"images": int(count)}

    @staticmethod
    def summary(figures: dict[str, float]) -> str:
        """The figures in a line."""
        return f"loss {figures['loss']:.4f} nats/image, accuracy {100 * figures['accuracy']:.2f} %"

    @staticmethod
    def describe(config: ml_collections.ConfigDict) -> tuple[str, str]:
        """Model and step of the run header, in words."""
        shown = {name: config.model[name] for name in ("num_layers", "dim", "depths", "dims") if name in config.model}
        words = ", ".join(f"{name} {tuple(value) if isinstance(value, list | tuple) else value}" for name, value in shown.items())
        return words or "defaults", f"{config.batch_size} of {' x '.join(map(str, image_shape(config)))}"

    def init(self, rng: jax.Array) -> Variables:
        """Returns the variables of the model, boxed."""
        variables = self.model.init(rng, jnp.zeros((1, *self.image_shape), jnp.float32))
        return {name: tree for name, tree in variables.items() if name not in (*SOWN, "intermediates")}

    def loss(
        self, params: Any, collections: Variables, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, LossAux]:
        """Mean cross-entropy in nats per image to the mixed, smoothed targets, plus the losses that modules sowed."""
        # some models train several heads, each on its own; the first is the one that is used
        method = "training_logits" if hasattr(self.model, "training_logits") else None
        logits, updated = self.model.apply(
            {"params": params, **collections},
            batch["images"],
            deterministic=False,
            rngs={"dropout": rng},
            mutable=[*collections, *SOWN],
            method=method,
        )
        heads = logits if isinstance(logits, tuple) else (logits,)
        counted = batch["mask"].astype(jnp.float32)
        weight = jnp.sum(counted)
        mean = lambda values: jnp.sum(values * counted) / jnp.maximum(weight, 1.0)  # noqa: E731
        mix = batch["mix"]

        def likelihood(logits):
            logs = jax.nn.log_softmax(logits.astype(jnp.float32))
            nats = mix * _picked(logs, batch["labels"]) + (1.0 - mix) * _picked(logs, batch["other_labels"])
            return (1.0 - self.label_smoothing) * nats + self.label_smoothing * jnp.mean(logs, axis=-1)

        cross_entropy = -mean(sum(map(likelihood, heads)) / len(heads))
        guess = jnp.argmax(heads[0], axis=-1)
        right = mix * (guess == batch["labels"]) + (1.0 - mix) * (guess == batch["other_labels"])
        auxiliary, metrics = sown(updated)
        metrics |= {"loss": cross_entropy, "accuracy": mean(right)}
        kept = {name: updated.get(name, tree) for name, tree in collections.items()}
        return cross_entropy + auxiliary, LossAux(weight=weight, metrics=metrics, collections=kept)

    def predict(self, params: Any, collections: Variables, images: jax.Array) -> jax.Array:
        """Returns the logits [B, num_classes] float32 of images in evaluation mode."""
        return self.model.apply({"params": params, **collections}, images).astype(jnp.float32)

    def eval(self, params: Any, collections: Variables, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Sums over the images: `loss` (nats, to the plain label), `correct`, `correct_top5`, `weight`."""
        logits = self.predict(params, collections, batch["images"])
        counted, labels = batch["mask"].astype(jnp.float32), batch["labels"]
        nats = -_picked(jax.nn.log_softmax(logits), labels)
        # The label's place among the classes; of equal logits the label counts as the last, a constant output is no success.
        above = jnp.sum(logits >= _picked(logits, labels)[:, None], axis=-1) - 1
        return {
            "loss": jnp.sum(nats * counted),
            "correct": jnp.sum((above < 1) * counted),
            "correct_top5": jnp.sum((above < 5) * counted),
            "weight": jnp.sum(counted),
        }

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        rows = {"images": jnp.float32, "labels": jnp.int32, "other_labels": jnp.int32, "mix": jnp.float32, "mask": jnp.bool_}
        shapes = {name: (self.batch_size, *(self.image_shape if name == "images" else ())) for name in rows}
        return {name: jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in rows.items()}

    def eval_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The training batch's."""
        return self.batch_spec()

    def flops_per_step(self, params: Any) -> float:
        """Three times the products and convolutions of a forward pass (twice more in the backward pass)."""
        one = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        variables = jax.eval_shape(self.init, jax.random.key(0))
        return 3.0 * self.batch_size * count_flops(self.model.apply, variables, one)


def _picked(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[b, labels[b]]: [B]."""
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]

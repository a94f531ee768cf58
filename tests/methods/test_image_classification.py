"""Image classification: the loss against plain numpy, batch statistics, sums of an evaluation, refusals of the config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from attnlab import registry
from attnlab.errors import ConfigError
from attnlab.methods.image_classification import ImageClassification
from attnlab.training.config import base, validate

CLASSES = 7


class Plain(nn.Module):
    """A linear classifier behind batch norm, with dropout and a sown loss."""

    num_classes: int

    @classmethod
    def from_config(cls, model, num_classes, image_shape):
        return cls(num_classes)

    @nn.compact
    def __call__(self, images, *, deterministic=True):
        x = nn.BatchNorm(use_running_average=deterministic, momentum=0.5)(images.reshape(len(images), -1))
        self.sow("losses", "penalty", jnp.float32(0.25))
        self.sow("metrics", "mean", x.mean())
        return nn.Dense(self.num_classes)(nn.Dropout(0.0, deterministic=deterministic)(x))


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(registry._registered, "model", {"plain": Plain})
    config = base("image_classification")
    config.model.name, config.batch_size = "plain", 6
    config.data.image_size, config.data.image_width, config.data.name = 4, 5, "lookup"
    return config


def batch_of(rng, mixed):
    labels = rng.integers(0, CLASSES, 6).astype(np.int32)
    return {
        "images": rng.standard_normal((6, 4, 5, 3)).astype(np.float32),
        "labels": labels,
        "other_labels": rng.integers(0, CLASSES, 6).astype(np.int32) if mixed else labels,
        "mix": rng.random(6).astype(np.float32) if mixed else np.ones(6, np.float32),
        "mask": np.array([True] * 5 + [False]),
    }


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_to_the_mixed_and_smoothed_target(config, mixed, smoothing):
    config.label_smoothing = smoothing
    task = ImageClassification(config, CLASSES)
    variables = nn.unbox(task.init(jax.random.key(0)))
    batch = batch_of(np.random.default_rng(0), mixed)
    collections = {"batch_stats": variables["batch_stats"]}
    loss, aux = jax.jit(task.loss)(variables["params"], collections, batch, jax.random.key(1))

    x = batch["images"].reshape(6, -1)
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    dense = variables["params"]["Dense_0"]
    logits = x @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    eye, mix = np.eye(CLASSES), batch["mix"][:, None]
    target = mix * eye[batch["labels"]] + (1 - mix) * eye[batch["other_labels"]]
    target = (1 - smoothing) * target + smoothing / CLASSES
    want = -(target * logs).sum(-1)[:5].mean()
    np.testing.assert_allclose(aux.metrics["loss"], want, rtol=1e-5)
    np.testing.assert_allclose(loss, want + 0.25, rtol=1e-5)
    assert aux.weight == 5 and aux.metrics["auxiliary_loss"] == 0.25 and "mean" in aux.metrics
    guess = logits.argmax(-1)
    right = mix[:, 0] * (guess == batch["labels"]) + (1 - mix[:, 0]) * (guess == batch["other_labels"])
    np.testing.assert_allclose(aux.metrics["accuracy"], right[:5].mean(), rtol=1e-5)
    kept = aux.collections["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(kept, 0.5 * batch["images"].reshape(6, -1).mean(0), atol=1e-5)
    assert set(aux.collections) == {"batch_stats"}


def test_sums_of_an_evaluation(config):
    task = ImageClassification(config, CLASSES)
    variables = nn.unbox(task.init(jax.random.key(0)))
    collections = {"batch_stats": variables["batch_stats"]}
    batch = batch_of(np.random.default_rng(1), mixed=False)
    logits = np.asarray(task.predict(variables["params"], collections, batch["images"]))
    order = np.argsort(-logits, axis=-1)
    sums = jax.jit(task.eval)(variables["params"], collections, batch)
    hits = order[:5] == batch["labels"][:5, None]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert sums["weight"] == 5 and sums["correct"] == hits[:, 0].sum() and sums["correct_top5"] == hits[:, :5].sum()
    np.testing.assert_allclose(sums["loss"], -np.take_along_axis(logs, batch["labels"][:, None], 1)[:5].sum(), rtol=1e-5)
    figures = task.figures({name: float(value) for name, value in sums.items()})
    assert figures["images"] == 5 and figures["accuracy"] == pytest.approx(hits[:, 0].mean())
    assert "accuracy" in task.summary(figures)
    flat = jax.tree.map(jnp.zeros_like, variables["params"])
    assert task.eval(flat, collections, batch)["correct_top5"] == 0, "a constant output knows nothing"


def test_shapes_and_flops(config):
    task = ImageClassification(config, CLASSES)
    assert {name: (spec.shape, spec.dtype) for name, spec in task.batch_spec().items()} == {
        "images": ((6, 4, 5, 3), jnp.float32), "labels": ((6,), jnp.int32), "other_labels": ((6,), jnp.int32),
        "mix": ((6,), jnp.float32), "mask": ((6,), jnp.bool_),
    }  # fmt: skip
    assert task.flops_per_step(None) == 3 * 6 * 2 * 60 * CLASSES
    assert task.units_per_step == 6


def test_number_of_classes(config):
    assert ImageClassification.outputs(config) == 4  # the data's
    config.data.num_classes = 9
    assert ImageClassification.outputs(config) == 9
    with pytest.raises(ConfigError, match=r"config.data.num_classes = 9: the data have 4 classes"):
        ImageClassification.outputs(config, 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_smoothing", 1.0, "must be in"),
        ("data.image_size", 0, "must be at least 1"),
        ("data.image_width", -1, "must not be negative"),
        ("data.channels", 4, "grey or in colour"),
        ("data.crop_fraction", 1.5, "must be in"),
        ("data.interpolation", "cubic", "Did you mean 'bicubic'"),
        ("data.augment.crop", "resize", "Did you mean 'resized'"),
        ("data.augment.flip", 2.0, "is not a probability"),
        ("data.augment.mixup", -0.5, "must not be negative"),
        ("data.augment.policy_operations", ("rotat",), "Did you mean 'rotate'"),
        ("data.augment.policy_strength", 11.0, "the scale ends at 10"),
        ("data.std", (0.0,), "above 0"),
    ],
)
def test_refusals(config, field, value, message):
    validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=rf"config.{field} = .*{message}"):
        validate(config)


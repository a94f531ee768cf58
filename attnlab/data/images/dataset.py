"""Images for classifiers: `open_images(config)` joins a source, transforms and mixing into loaders."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from attnlab.data import storage
from attnlab.data.images import policy, transforms
from attnlab.data.images.mixing import Mix
from attnlab.data.images.sources import Example, ImageSource, Reader, UnreadableImage, open_source
from attnlab.data.loader import Loader
from attnlab.data.sources import checked_errors
from attnlab.errors import ConfigError, field_error, nearest

CLASSES_FILE = "classes.json"
CROPS = ("none", "shift", "resized")
_THREADS = 8


class ImageData:
    """A set of labelled images with its transforms.

    Attributes:
        name: config.data.name.
        fingerprint: sha256 hex over the content and its split.
        splits: split name to the number of images.
        notes: sentences about choices that the user should know, for the run header.
        outputs: number of classes.
        class_names: of the labels.
        evaluation: see `attnlab.data.dataset.Dataset`.
        image_shape: (H, W, C) of the batches, of video (frames, H, W, C).
        normalise: the last step of the pipeline; its `undo` gives pictures.
    """

    evaluation = "images"

    def __init__(self, source: ImageSource, config):
        data = config.data
        self._source, self._augment = source, data.augment
        self._skip = checked_errors(config) == "skip"
        self._workers = int(data.workers)
        self.name, self.fingerprint, self.splits = source.name, source.fingerprint, dict(source.splits)
        self._fewer = int(storage.option(config, "train_examples", 0))
        if self._fewer > self.splits["train"]:
            problem = f"{self.name} has {self.splits['train']} images to learn from"
            raise field_error("config.data.train_examples", self._fewer, problem, "Set at most that, or 0 for all")
        if self._fewer:
            self.splits["train"] = self._fewer
            self.fingerprint = hashlib.sha256(f"{source.fingerprint} {self._fewer}".encode()).hexdigest()
        self.class_names = tuple(source.class_names)
        self.outputs = len(self.class_names)
        self.image_shape = image_shape(config)
        if source.channels > self.image_shape[-1]:
            raise field_error("config.data.channels", data.channels, f"the images of {self.name} are in colour", "Set 3")
        self._check_frames(config, getattr(source, "frames", 0))
        grey = source.channels < self.image_shape[-1]
        self.notes = (*source.notes, *([f"the grey images of {self.name} are repeated over three channels"] if grey else []))
        self.normalise = normalisation(config)
        self._fraction, self._interpolation = float(data.crop_fraction), str(data.interpolation)

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        repeat: bool,
        shard_index: int = 0,
        shard_count: int = 1,
        augment: bool | None = None,
    ) -> Loader:
        """Returns the batches of a split; the arguments are those of `Loader`. Endless loaders augment, if not told otherwise.

        A batch has `images` float32 [b, H, W, C], `labels`, `other_labels` int32 [b], `mix` float32 [b] (the target is mix times
        the label and 1 - mix times the other one), `mask` bool [b] (False = no image) and `record` int64 [b].

        Raises:
            ConfigError: unknown split, bad sizes, or mixing with an odd number of rows.
        """
        if split not in self.splits:
            problem = f"unknown split of {self.name}, {nearest(split, self.splits)}"
            raise field_error("split", split, problem, "Name one of them")
        augment = repeat if augment is None else augment
        mix = mixing(self._augment) if augment else None
        if mix is not None and (batch_size // shard_count) % 2:
            raise field_error(
                "config.batch_size", batch_size, f"mixup and cutmix mix pairs, and a process has {batch_size // shard_count} rows",
                f"Use a multiple of {2 * shard_count}",
            )  # fmt: skip
        pipeline = self._training() if augment else self._evaluation()
        reader = self.reader(split)
        rows = ImageRows(reader, pipeline, self.image_shape, self.outputs, seed=seed, mix=mix, skip=self._skip)
        identity = {
            "data": self.name,
            "split": split,
            "content": self.fingerprint,
            "transforms": repr(pipeline),
            "mixing": repr(mix),
        }
        return Loader(
            rows,
            identity,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            repeat=repeat,
            shard_index=shard_index,
            shard_count=shard_count,
            # An evaluation is over before worker processes would have started.
            workers=self._workers if repeat else 0,
            threads=min(_THREADS, os.cpu_count() or 1),
            describe_row=lambda record: reader.name(record % len(reader)),
            content="images",
        )

    def _check_frames(self, config, frames: int) -> None:
        wanted, augment = int(config.data.frames), config.data.augment
        if wanted != frames:
            what = f"clips of {frames} frames" if frames else "single images"
            raise field_error("config.data.frames", wanted, f"{self.name} has {what}", f"Set {frames}")
        flat = augment.crop == "none" and not (augment.flip or augment.policy_layers or augment.erase or augment.cutmix)
        if frames and not flat:
            fix = 'Set crop = "none", and flip, policy_layers, erase and cutmix to 0'
            raise field_error("config.data.augment", "...", "clips are augmented by mixup alone", fix)

    def reader(self, split: str) -> Reader:
        """Returns the images as they are, without transforms."""
        reader = self._source.reader(split)
        return FewerImages(reader, self._fewer) if split == "train" and self._fewer else reader

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the names of the classes to `folder/classes.json`."""
        with open(os.path.join(folder, CLASSES_FILE), "w", encoding="utf-8") as file:
            json.dump(list(self.class_names), file, indent=1, ensure_ascii=False)

    def describe(self) -> str:
        """Name, classes and hash."""
        return f"{self.name}, {self.outputs} classes, {' x '.join(map(str, self.image_shape))}, sha256 {self.fingerprint[:12]}"

    def picture(self, image: np.ndarray) -> np.ndarray:
        """Returns the uint8 picture [H, W, C] of an image of a batch (of a clip, its middle frame)."""
        return self.normalise.undo(image if image.ndim == 3 else image[len(image) // 2])

    def _evaluation(self) -> transforms.Pipeline:
        *size, channels = self.image_shape
        if len(size) == 3:  # clips come in their size
            return transforms.Pipeline((transforms.Channels(channels), self.normalise))
        crop = transforms.ResizeAndCrop(tuple(size), self._fraction, self._interpolation)
        return transforms.Pipeline((transforms.Channels(channels), crop, self.normalise))

    def _training(self) -> transforms.Pipeline:
        options = self._augment
        *size, channels = self.image_shape
        if len(size) == 3:
            return self._evaluation()
        size = tuple(size)
        steps: list[Any] = []
        if options.crop == "resized":
            crop = transforms.RandomResizedCrop(size, tuple(options.scale), tuple(options.ratio), self._interpolation)
            steps.append(crop)
        else:
            steps.append(transforms.ResizeAndCrop(size, 1.0, self._interpolation))
        if options.flip:
            steps.append(transforms.Flip(float(options.flip)))
        if options.policy_layers:
            fill = tuple(round(255 * mean) for mean in self.normalise.mean)
            if options.policy_fill >= 0:
                fill = (int(options.policy_fill),) * len(fill)
            steps.append(
                policy.RandAugment(
                    int(options.policy_layers), float(options.policy_strength), float(options.policy_deviation),
                    float(options.policy_probability), tuple(options.policy_operations), fill,
                )
            )  # fmt: skip
        if options.crop == "shift":
            steps.append(transforms.Shift(int(options.shift)))
        # Grey images stay grey until here: a third of the work.
        steps += [transforms.Channels(channels), self.normalise]
        if options.erase:
            steps.append(transforms.RandomErasing(float(options.erase)))
        return transforms.Pipeline(tuple(steps))


class FewerImages:
    """`count` images of a reader, spread evenly over it: of a set that is sorted by class, some of every class."""

    def __init__(self, reader: Reader, count: int):
        self._reader, self._count = reader, count

    def __len__(self) -> int:
        return self._count

    def _place(self, index: int) -> int:
        return index * len(self._reader) // self._count

    def read(self, index: int) -> Example:
        """Returns an image."""
        return self._reader.read(self._place(index))

    def name(self, index: int) -> str:
        """Returns how messages call an image."""
        return self._reader.name(self._place(index))


class ImageRows:
    """Batches of images by record (see `attnlab.data.loader.Rows`); picklable.

    Args:
        reader: the images.
        pipeline: image and generator to float32 [H, W, C]; a record's generator is seeded with (seed, record), so an image is
            drawn anew in every epoch, and again the same in a run that goes on.
        image_shape: of the result.
        num_classes: labels outside of it are refused.
        seed: of the generators.
        mix: of pairs, or None.
        skip: an image that cannot be decoded becomes a row of mask False instead of an error.
    """

    def __init__(
        self, reader: Reader, pipeline: transforms.Pipeline, image_shape: tuple[int, ...], num_classes: int, *, seed: int,
        mix: Mix | None, skip: bool,
    ):  # fmt: skip
        self._reader, self._pipeline, self._shape, self._num_classes = reader, pipeline, tuple(image_shape), num_classes
        self._seed, self._mix, self._skip = seed % 2**63, mix, skip

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of the records int64 [b]; negative = padding."""
        count = len(records)
        batch = {
            "images": np.zeros((count, *self._shape), np.float32),
            "labels": np.zeros(count, np.int32),
            "other_labels": np.zeros(count, np.int32),
            "mix": np.ones(count, np.float32),
            "mask": np.zeros(count, bool),
        }
        for row, record in enumerate(records.tolist()):
            if record >= 0:
                self._fill(batch, row, record)
        if self._mix is not None:
            self._mix(batch, [(self._seed, 1, max(record, 0)) for record in records[::2].tolist()])
        return batch

    def _fill(self, batch: dict[str, np.ndarray], row: int, record: int) -> None:
        try:
            image, label = self._reader.read(record % len(self))
        except UnreadableImage as error:
            if self._skip:
                return
            raise ConfigError(f'{error}. Remove it, or leave such images out with config.data.errors="skip".') from error
        if not 0 <= label < self._num_classes:
            raise ConfigError(
                f"{self._reader.name(record % len(self))} has class {label}, and there are {self._num_classes} classes. "
                "Use a split that has labels."
            )
        batch["images"][row] = self._pipeline(image, np.random.default_rng([self._seed, record]))
        batch["labels"][row] = batch["other_labels"][row] = label
        batch["mask"][row] = True


def open_images(config) -> ImageData:
    """Opens `config.data`, preparing what is not yet in the cache (once per machine).

    Raises:
        ConfigError: any bad field of config.data, missing data, another number of classes than `data.num_classes`.
    """
    source = open_source(config)
    wanted, found = config.data.num_classes, len(source.class_names)
    if wanted and wanted != found:
        raise field_error("config.data.num_classes", wanted, f"{source.name} has {found} classes", "Set 0 to take the data's")
    return ImageData(source, config)


def image_shape(config) -> tuple[int, ...]:
    """Returns (H, W, C) of `config.data`, or (frames, H, W, C)."""
    data = config.data
    frames = (int(data.frames),) if data.frames else ()
    return (*frames, int(data.image_size), int(data.image_width or data.image_size), int(data.channels))


def normalisation(config) -> transforms.Normalise:
    """Returns the normalisation of `config.data`: its mean and std, by default ImageNet's (grey: their averages)."""
    channels = config.data.channels
    values = []
    for name, default in (("mean", transforms.IMAGENET_MEAN), ("std", transforms.IMAGENET_STD)):
        given = tuple(float(value) for value in storage.option(config, name, ()))
        default = default if channels == 3 else (round(sum(default) / 3, 4),) * channels
        values.append(given * channels if len(given) == 1 else given or default)
        if len(values[-1]) != channels or (name == "std" and min(values[-1]) <= 0):
            problem = f"it needs one number, or one for each of {channels} channels" + ("" if name == "mean" else ", above 0")
            raise field_error(f"config.data.{name}", given, problem, "Set (), or such numbers")
    return transforms.Normalise(*values)


def mixing(augment: Mapping[str, Any]) -> Mix | None:
    """Returns the mixing of `config.data.augment`, or None where it is off."""
    if not augment["mixup"] and not augment["cutmix"]:
        return None
    return Mix(*(float(augment[name]) for name in ("mixup", "cutmix", "mix_probability", "cutmix_share")))

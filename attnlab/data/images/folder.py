"""A folder of class folders: PATH/CLASS/image, or with its own splits PATH/train/CLASS/image, PATH/validation/..., PATH/test/..."""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attnlab.data import storage
from attnlab.data.images.sources import Example, UnreadableImage
from attnlab.data.images.transforms import from_pillow, pillow
from attnlab.data.sources import checked_errors
from attnlab.data.splitting import HELD_OUT, SPLITS
from attnlab.errors import field_error

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
_FIELD = "config.data.name"
_ALIASES = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
_COLOUR = {"RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB", "PA", "RGBX", "RGBa"}
_GREY = {"1", "L", "LA", "La"}


class Item(NamedTuple):
    """A file below the folder, its class, and what checking it found: `problem` is "" where it can be decoded."""

    path: str
    label: int
    sha256: str
    grey: bool
    problem: str


class FolderSource:
    """An `ImageSource` over files; every file is decoded once and the result kept in the cache, by names, sizes and times.

    Without folders for splits, of every class 5 % are held out for validation and 5 % (at least one image each) for test, by
    the hash of the file's content, so that equal files lie on the same side.

    Raises:
        ConfigError: no such folder, fewer than two classes, a class without images, splits of other classes, images that
            cannot be decoded (unless config.data.errors is "skip": then they are left out and counted in `notes`).
    """

    def __init__(self, config, path: str):
        self.name = f"folder:{path}"
        self._root = Path(os.path.expanduser(path))
        if not self._root.is_dir():
            raise field_error(_FIELD, self.name, "there is no such folder", "Name a folder that has one folder for each class")
        layout = self._layout()
        self.class_names = tuple(sorted(layout["train"]))
        self._check_classes(layout)
        files = [
            (split, self.class_names.index(name), path)
            for split, classes in layout.items()
            for name, paths in classes.items()
            for path in paths
        ]
        items = self._checked(config, [(path, label) for _, label, path in files])
        broken = [item for item in items if item.problem]
        if broken and checked_errors(config) != "skip":
            first = "; ".join(f"{item.path} ({item.problem})" for item in broken[:3]) + ("; ..." if len(broken) > 3 else "")
            raise field_error(
                _FIELD, self.name, f"{len(broken)} of {len(items)} images cannot be decoded: {first}",
                'Mend or remove them, or leave them out with config.data.errors="skip"',
            )  # fmt: skip
        split_of = {path: split for split, _, path in files}
        good = [item for item in items if not item.problem]
        self._items = _by_split(good, split_of) if set(layout) != {"train"} else _held_out(good)
        self._complete(layout)
        self.splits = {split: len(self._items[split]) for split in SPLITS}
        empty = [split for split, size in self.splits.items() if not size]
        if empty:
            raise field_error(_FIELD, self.name, f"no image is left for {' and '.join(empty)}", "Name a folder with more images")
        grey = sum(item.grey for item in good)
        self.channels = 1 if grey == len(good) else 3
        self.notes = tuple(self._notes(layout, len(broken), len(items), grey))
        self.fingerprint = self._fingerprint()

    def reader(self, split: str) -> FolderReader:
        """Returns random access to the images of a split."""
        return FolderReader(self._root, self._items[split], self.channels)

    def _layout(self) -> dict[str, dict[str, list[str]]]:
        """Returns split -> class -> paths below the root; one split "train" where the folder has no splits."""
        folders = sorted(entry.name for entry in self._root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        splits = {_ALIASES[name]: name for name in folders if name in _ALIASES} if "train" in folders else {}
        if not splits:
            return {"train": {name: self._files(name) for name in folders}}
        found = {}
        for split, folder in splits.items():
            entries = sorted(e.name for e in (self._root / folder).iterdir() if e.is_dir() and not e.name.startswith("."))
            found[split] = {name: self._files(f"{folder}/{name}") for name in entries}
        return found

    def _files(self, folder: str) -> list[str]:
        paths = (Path(at) / name for at, _, names in os.walk(self._root / folder) for name in names)
        relative = (path.relative_to(self._root).as_posix() for path in paths if path.suffix.lower() in SUFFIXES)
        return sorted(path for path in relative if not any(part.startswith(".") for part in path.split("/")))

    def _check_classes(self, layout: dict[str, dict[str, list[str]]]) -> None:
        if len(self.class_names) < 2:
            problem = f"it has {len(self.class_names)} class folders ({', '.join(self.class_names) or 'none'})"
            raise field_error(_FIELD, self.name, problem, "Give each of two or more classes a folder with its images")
        for split, classes in layout.items():
            strange = sorted(set(classes) ^ set(self.class_names))
            if strange and not (split != "train" and set(classes) < set(self.class_names)):
                problem = f"the classes of its {split} split differ from those of train ({', '.join(strange[:5])})"
                raise field_error(_FIELD, self.name, problem, "Give all splits the same class folders")
            for name, paths in classes.items():
                if not paths and split == "train":
                    fix = f"Put images there ({', '.join(SUFFIXES[:4])}, ...) or remove the folder"
                    raise field_error(_FIELD, self.name, f"the class folder {name} holds no images", fix)

    def _checked(self, config, files: list[tuple[str, int]]) -> list[Item]:
        """Decodes every file once; later calls read what was found."""
        key = hashlib.sha256(json.dumps([os.fspath(self._root.resolve()), _STAMP]).encode())
        for path, label in files:
            stat = (self._root / path).stat()
            key.update(json.dumps([path, label, stat.st_size, stat.st_mtime_ns]).encode("utf-8", "surrogateescape"))

        def build(folder: Path) -> None:
            pillow()
            with concurrent.futures.ThreadPoolExecutor() as pool:
                items = list(pool.map(lambda file: _check(self._root, *file), files))
            with storage.writing_to(folder):
                (folder / "items.json").write_text(json.dumps(items), "utf-8")

        folder = storage.prepare_once(storage.cache_dir(config) / "image_folders" / key.hexdigest()[:32], build)
        return [Item(*item) for item in json.loads((folder / "items.json").read_text("utf-8"))]

    def _complete(self, layout: dict) -> None:
        """Fills the splits that a folder with splits lacks: test by validation, validation by a part of train."""
        if set(layout) == {"train"}:
            return
        if "validation" not in layout:
            kept = _held_out(self._items["train"], parts=("validation",))
            self._items |= {"train": kept["train"], "validation": kept["validation"]}
        if "test" not in layout:
            self._items["test"] = self._items["validation"]

    def _notes(self, layout: dict, broken: int, total: int, grey: int) -> Iterator[str]:
        if set(layout) == {"train"}:
            yield f"{self.name} has no splits: {self.splits['validation']} and {self.splits['test']} images are held out by hash"
        elif "validation" not in layout:
            yield f"{self.name} has no validation split: {self.splits['validation']} images of train are held out for it"
        elif "test" not in layout:
            yield f"{self.name} has no test split: the figures of `test` are those of its validation split"
        if broken:
            yield f"{broken} of {total} images cannot be decoded and are left out (config.data.errors)"
        if grey and self.channels == 3:
            yield f"{grey} of {total - broken} images are grey and repeated over three channels"

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(["folder images 1", self.class_names]).encode())
        for split in SPLITS:
            for item in self._items[split]:
                digest.update(f"{split} {item.label} {item.sha256}\n".encode())
        return digest.hexdigest()


class FolderReader:
    """Random access to the files of one split.

    Args:
        root: the folder.
        items: its files.
        channels: 1 or 3, of what `read` returns.
    """

    def __init__(self, root: Path, items: list[Item], channels: int):
        self._root, self._items, self._channels = root, items, channels

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        """Returns the file's path below the folder."""
        return self._items[index].path

    def read(self, index: int) -> Example:
        """Returns an image; see `Reader`."""
        item = self._items[index]
        try:
            with pillow().open(self._root / item.path) as image:
                return Example(from_pillow(image.convert("L" if self._channels == 1 else "RGB")), item.label)
        except Exception as error:  # Pillow's decoders have no error class in common
            raise UnreadableImage(f"{item.path} cannot be decoded ({_said(error)})") from error


_STAMP = "checked images 1"


def _check(root: Path, path: str, label: int) -> tuple:
    """Reads and decodes a file: the fields of `Item`."""
    try:
        content = (root / path).read_bytes()
        with pillow().open(io.BytesIO(content)) as image:
            if image.mode not in _COLOUR | _GREY:
                return path, label, "", False, f"pixels of kind {image.mode}, only 8 bits per channel are read"
            np.asarray(image.convert("RGB"))
            grey = image.mode in _GREY
    except Exception as error:  # Pillow's decoders have no error class in common
        return path, label, "", False, _said(error)
    return path, label, hashlib.sha256(content).hexdigest(), grey, ""


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].partition(" <")[0] or type(error).__name__


def _by_split(items: list[Item], split_of: dict[str, str]) -> dict[str, list[Item]]:
    parts: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        parts[split_of[item.path]].append(item)
    return parts


def _held_out(items: list[Item], parts: tuple[str, ...] = ("test", "validation")) -> dict[str, list[Item]]:
    """Gives each of `parts` a share of every class in the order of the contents' hashes; the rest is train."""
    counts = Counter(item.label for item in items)
    given: dict[tuple[int, str], str] = {}
    taken: dict[tuple[int, str], int] = defaultdict(int)
    for item in sorted(items, key=lambda item: item.sha256):
        if (item.label, item.sha256) in given:
            continue
        # A class of one or two images has none to spare.
        wanted = max(1, round(HELD_OUT * counts[item.label])) if counts[item.label] > len(parts) else 0
        free = (part for part in parts if taken[item.label, part] < wanted)
        split = next(free, "train")
        given[item.label, item.sha256] = split
        taken[item.label, split] += 1
    found: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        found[given[item.label, item.sha256]].append(item)
    return found

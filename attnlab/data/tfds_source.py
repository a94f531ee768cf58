"""Any prepared TensorFlow Datasets set with a text feature, read from its array_record files without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from attnlab.data import splitting, storage
from attnlab.data.sources import Document, SplitInfo, checked_errors, is_text
from attnlab.errors import ConfigError, field_error, nearest

STREAM_ABOVE_BYTES = 1 << 30  # larger sets are read on demand; the tokens of smaller ones are written to the cache once
_HELD_OUT = round(100 * splitting.HELD_OUT)
_FIELD = "config.data.name"


class TfdsSource:
    """`tfds:NAME`, `tfds:NAME/CONFIG` or `tfds:NAME/CONFIG:VERSION`.

    The set is looked for in config.data.dir, or else in $TFDS_DATA_DIR (~/tensorflow_datasets when unset) and below the
    cache folder.
    A set without a validation (or test) split gives the last 5 % of its train split for it, stated in `notes`: by
    position, so whether near-identical documents lie on both sides is the set's own matter.
    """

    def __init__(self, config, argument: str):
        self.name = f"tfds:{argument}"
        self._feature = str(storage.option(config, "feature", "text"))
        self._skip = checked_errors(config) == "skip"
        builder = find_builder(config, self.name, argument)
        self._folder = os.fspath(builder.data_dir)
        self._check_features(builder)
        self._instructions, self.notes = split_instructions(builder, self.name)
        info = builder.info
        self.splits = {
            split: SplitInfo(info.splits[instruction].num_examples, None)
            for split, instruction in self._instructions.items()
        }
        for split, instruction in self._instructions.items():
            if not self.splits[split].documents:
                fix = "Use a larger set"
                raise field_error(_FIELD, self.name, f"its {split} split ({instruction}) holds no documents", fix)
        self.streamed = sum(info.splits[name].num_bytes for name in self._whole_splits()) > STREAM_ABOVE_BYTES
        self.fingerprint = self._fingerprint(builder)

    def _whole_splits(self) -> list[str]:
        return sorted({instruction.partition("[")[0] for instruction in self._instructions.values()})

    def _check_features(self, builder) -> None:
        features = builder.info.features
        if not hasattr(features, "keys") or self._feature not in features:
            known = list(features.keys()) if hasattr(features, "keys") else []
            problem = f"{self.name} has no such feature, {nearest(self._feature, known)}"
            raise field_error("config.data.feature", self._feature, problem, "Name its text feature")

    def _fingerprint(self, builder) -> str:
        """Hashes name, version, sizes of the shards and a few documents: reading a large set whole would take hours."""
        info = builder.info
        digest = hashlib.sha256(b"tfds 1 ")
        sizes = ((name, info.splits[name]) for name in self._whole_splits())
        shards = {name: [split.num_bytes, *split.shard_lengths] for name, split in sizes}
        digest.update(json.dumps([info.full_name, self._feature, self._instructions, shards], sort_keys=True).encode())
        for split in sorted(self._instructions):
            reader = self.reader(split)
            for text in reader.read(sorted({0, len(reader) // 2, len(reader) - 1})):
                digest.update(hashlib.sha256(text).digest())
        return digest.hexdigest()

    def reader(self, split: str) -> TfdsReader:
        """Returns random access to the documents of a split."""
        return TfdsReader(self.name, self._folder, self._instructions[split], self._feature, self._skip)

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of a split, named by their index."""
        reader = self.reader(split)
        for start in range(0, len(reader), 256):
            for offset, text in enumerate(reader.read(range(start, min(start + 256, len(reader))))):
                if text:
                    yield Document(reader.document_name(start + offset), 0, text)


class TfdsReader:
    """Random access to one split; opens the files where it is used (worker processes get the folder's name).

    Args:
        name: the data set's name, for messages.
        folder: the prepared version's folder.
        instruction: a TFDS split, possibly sliced.
        feature: the text feature.
        skip: give empty text for documents that are not UTF-8, instead of an error.
    """

    def __init__(self, name: str, folder: str, instruction: str, feature: str, skip: bool):
        self._arguments = (name, folder, instruction, feature, skip)
        self._name, self._folder, self._instruction, self._feature, self._skip = self._arguments
        self._opened = None

    def __getstate__(self):
        return self._arguments

    def __setstate__(self, state):
        self.__init__(*state)

    @property
    def _source(self) -> Sequence:
        if self._opened is None:
            from tensorflow_datasets.core import read_only_builder

            try:
                builder = read_only_builder.builder_from_directory(self._folder)
                self._opened = builder.as_data_source(self._instruction)
            except (NotImplementedError, ValueError) as error:
                raise field_error(
                    _FIELD,
                    self._name,
                    f"the set in {self._folder} is not in a random-access format",
                    'Prepare it again with download_and_prepare(file_format="array_record")',
                ) from error
        return self._opened

    def __len__(self) -> int:
        return len(self._source)

    def document_name(self, index: int) -> str:
        """Returns how messages call a document."""
        return f"{self._name} {self._instruction} #{index}"

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the texts of some documents.

        Raises:
            ConfigError: a feature that holds no text, or a document that is not UTF-8.
        """
        texts = []
        for index, example in zip(indices, self._source.__getitems__(list(indices)), strict=True):
            text = example[self._feature]
            text = text.encode("utf-8") if isinstance(text, str) else text
            if not isinstance(text, bytes):
                problem = f"it holds {type(text).__name__}, not one text per example"
                raise field_error("config.data.feature", self._feature, problem, "Name a text feature of the set")
            if not is_text(text):
                if not self._skip:
                    fix = 'Leave such documents out with config.data.errors="skip"'
                    raise field_error(_FIELD, self._name, f"{self.document_name(index)} is not UTF-8 text", fix)
                text = b""
            texts.append(text)
        return texts


def find_builder(config, name: str, argument: str):
    """Returns the prepared, read-only builder of NAME/CONFIG:VERSION.

    Raises:
        ConfigError: it is not prepared in any of the places, or cannot be opened.
    """
    from tensorflow_datasets.core import read_only_builder, registered

    given = storage.option(config, "dir", "")
    own = os.fspath(storage.cache_dir(config) / "tfds")
    folders = [given] if given else [os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets"), own]
    folders = [os.path.expanduser(folder) for folder in folders]
    problem = "it is not prepared"
    for folder in folders:
        try:
            return read_only_builder.builder_from_files(argument, data_dir=folder)
        except (registered.DatasetNotFoundError, OSError):
            continue
        except (ValueError, RuntimeError) as error:
            problem = f"it cannot be opened ({str(error).splitlines()[0]})"
    plain = argument.partition(":")[0]
    raise ConfigError(
        f"{_FIELD} = {name!r}: {problem} in {' or '.join(folders)}{_prepared_there(folders, argument)}. Prepare it "
        f'with tfds.builder("{plain}", data_dir=DIR).download_and_prepare(file_format="array_record") and set '
        "config.data.dir to DIR."
    )


def _prepared_there(folders: Sequence[str], argument: str) -> str:
    names: set[str] = set()
    for folder in map(Path, folders):
        if folder.is_dir():
            infos = folder.glob("*/**/dataset_info.json")
            names |= {info.parent.parent.relative_to(folder).as_posix() for info in infos}
    return f" ({nearest(argument.partition(':')[0], names)})" if names else ""


def split_instructions(builder, name: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns our split names to TFDS instructions, and what was chosen."""
    present = set(builder.info.splits)
    if "train" not in present:
        raise field_error(_FIELD, name, f"it has no train split (only {', '.join(sorted(present))})", "Use another set")
    missing = [split for split in ("validation", "test") if split not in present]
    instructions = {split: split for split in splitting.SPLITS if split in present}
    notes = []
    if missing:
        edge = 100 - _HELD_OUT * len(missing)
        instructions["train"] = f"train[:{edge}%]"
        for split in missing:
            instructions[split] = f"train[{edge}%:{edge + _HELD_OUT}%]"
            notes.append(f"{name} has no {split} split: {instructions[split]} is held out for it")
            edge += _HELD_OUT
    return {split: instructions[split] for split in splitting.SPLITS}, tuple(notes)

"""Where documents come from: the standard library's sources, a prepared TFDS set, or text files on disk.

A source lists splits, yields documents in a fixed order and has a fingerprint of content and split.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from attnlab import registry
from attnlab.data import splitting, storage
from attnlab.errors import field_error, nearest

_FIELD = "config.data.name"
_FORMS = ("stdlib", "tfds:NAME/CONFIG", "text:PATH")


class Document(NamedTuple):
    """One text: a name for people, the byte of the file at which it starts, and the bytes."""

    name: str
    start: int
    text: bytes


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Size of a split: number of documents and, where it is known without reading, of bytes (else None)."""

    documents: int
    bytes: int | None


class Source(Protocol):
    """What the pipeline needs of a data set; an outside package may register its own as kind "data".

    A registered target is called with the config and returns an object with these attributes.

    Attributes:
        name: as in config.data.name.
        fingerprint: sha256 hex over content and split.
        splits: split name to SplitInfo, for the splits that have text.
        notes: sentences about choices that the user should know (held-out parts, dropped files).
        streamed: read documents on demand instead of holding the tokens.
    """

    name: str
    fingerprint: str
    splits: Mapping[str, SplitInfo]
    notes: tuple[str, ...]
    streamed: bool

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of a split in a fixed order."""


def open_source(config) -> Source:
    """Returns the source that `config.data.name` names.

    Raises:
        ConfigError: unknown name, missing or unprepared data, undecodable files, unwritable cache.
    """
    name = str(storage.option(config, "name", "stdlib"))
    kind, _, argument = name.partition(":")
    if name == "stdlib":
        return StdlibSource(config)
    if kind == "text" and argument:
        return FileSource(config, argument)
    if kind == "tfds" and argument:
        from attnlab.data.tfds_source import TfdsSource

        return TfdsSource(config, argument)
    if name in registry.names("data"):
        return registry.get("data", name)(config)
    if kind in ("text", "tfds"):
        form = _FORMS[1] if kind == "tfds" else _FORMS[2]
        raise field_error(_FIELD, name, f"nothing follows {kind!r}", f'Write it as "{form}"')
    hint = nearest(kind, ("stdlib", "tfds", "text", *registry.names("data")))
    raise field_error(_FIELD, name, f"unknown data set, {hint}", "Use " + ", ".join(f'"{form}"' for form in _FORMS))


def _nonempty(plan: splitting.SplitPlan) -> dict[str, SplitInfo]:
    return {split: SplitInfo(len(parts), plan.bytes(split)) for split, parts in plan.parts.items() if parts}


class StdlibSource:
    """The standard library through its TFDS builder."""

    streamed = False
    notes: tuple[str, ...] = ()

    def __init__(self, config):
        from attnlab.data import stdlib_code

        self.name = "stdlib"
        plan = stdlib_code.split_plan()
        self._tfds_dir = tfds_dir(config)
        self.fingerprint = _fingerprint("stdlib_code", stdlib_code.StdlibCode.VERSION, plan)
        self.splits = _nonempty(plan)

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the files of a split, read from the prepared builder."""
        from attnlab.data import stdlib_code

        for example in stdlib_code.prepared_builder(self._tfds_dir).as_data_source(split):
            yield Document(example["path"].decode("utf-8"), 0, example["text"])


def tfds_dir(config) -> Path:
    """Returns where our own builders are prepared: config.data.dir, else $TFDS_DATA_DIR, else below the cache."""
    given = storage.option(config, "dir", "") or os.environ.get("TFDS_DATA_DIR")
    return Path(os.path.expanduser(given)) if given else storage.cache_dir(config) / "tfds"


class FileSource:
    """A text file, all files below a folder (hidden ones excepted), or the files of a glob pattern."""

    streamed = False

    def __init__(self, config, path: str):
        self.name = f"text:{path}"
        self._files = _text_files(path)
        skip = checked_errors(config) == "skip"
        undecodable: list[str] = []

        def read(relative: str) -> bytes | None:
            content = self._content(relative)
            if not is_text(content):
                undecodable.append(relative)
                return None
            return content

        plan = splitting.split_files(self._files, read)
        if undecodable and not skip:
            first = ", ".join(undecodable[:3]) + (", ..." if len(undecodable) > 3 else "")
            raise field_error(
                _FIELD,
                self.name,
                f"{len(undecodable)} of {len(self._files)} files are not UTF-8 text: {first}",
                'Convert or remove them, or leave them out with config.data.errors="skip"',
            )
        self.splits = _nonempty(plan)
        if set(self.splits) != set(splitting.SPLITS):
            raise field_error(
                _FIELD,
                self.name,
                f"there is not enough text in {len(self._files)} files for train, validation and test",
                "Name a folder with more text",
            )
        self.fingerprint = _fingerprint("text", "1", plan)
        self._parts = plan.parts
        self.notes = tuple(self._notes(plan, len(undecodable)))

    @staticmethod
    def _notes(plan: splitting.SplitPlan, undecodable: int) -> Iterator[str]:
        if plan.by_range:
            yield (
                f"fewer than {splitting.MIN_GROUPS} distinct files: each is cut into contiguous ranges, "
                "90 % train, 5 % validation, 5 % test"
            )
        if plan.duplicates:
            yield f"{plan.duplicates} duplicate files left out"
        if plan.empty:
            yield f"{plan.empty} empty files left out"
        if undecodable:
            yield f"{undecodable} files that are not UTF-8 text left out (config.data.errors)"

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the parts of the files that belong to a split."""
        for part in self._parts[split]:
            yield Document(part.path, part.start, self._content(part.path)[part.start : part.stop])

    def _content(self, relative: str) -> bytes:
        try:
            return self._files[relative].read_bytes()
        except OSError as error:
            problem = f"{relative} cannot be read ({error.strerror or error})"
            raise field_error(_FIELD, self.name, problem, "Give this user read access, or remove the file") from error


def checked_errors(config) -> str:
    """Returns config.data.errors: "strict" (text that is not UTF-8 is an error) or "skip" (it is left out)."""
    errors = storage.option(config, "errors", "strict")
    if errors not in ("strict", "skip"):
        hint = nearest(str(errors), ("strict", "skip"))
        raise field_error("config.data.errors", errors, f"unknown, {hint}", 'Use "strict" or "skip"')
    return errors


def is_text(content: bytes) -> bool:
    """Returns whether the bytes are UTF-8 text (no NUL bytes, which mark binary files)."""
    if b"\0" in content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _text_files(path: str) -> dict[str, Path]:
    """Returns relative name to file.

    Raises:
        ConfigError: nothing is there.
    """
    expanded = os.path.expanduser(path)
    root = Path(expanded)
    if root.is_file():
        return {root.name: root}
    if root.is_dir():
        found = (Path(folder) / name for folder, _, names in os.walk(root, followlinks=False) for name in names)
        relative = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
        files = {name: file for name, file in relative.items() if not any(p.startswith(".") for p in name.split("/"))}
        missing = "the folder holds no files"
    else:
        matches = [Path(match) for match in glob.glob(expanded, recursive=True)]
        matches = [match for match in matches if match.is_file()]
        parent = Path(os.path.commonpath([match.parent for match in matches])) if matches else None
        files = {match.relative_to(parent).as_posix(): match for match in matches}
        missing = "no such file or folder" if not glob.has_magic(expanded) else "no file matches the pattern"
    if not files:
        raise field_error(_FIELD, f"text:{path}", missing, "Name an existing text file, folder or glob pattern")
    return files


def _fingerprint(kind: str, version: object, plan: splitting.SplitPlan) -> str:
    digest = hashlib.sha256(f"{kind} {version} {plan.content_sha256}".encode())
    for split in splitting.SPLITS:
        for part in plan.parts[split]:
            digest.update(f"{split} {part.path} {part.start} {part.stop}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()

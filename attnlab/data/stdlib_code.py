"""TFDS builder over the sources of CPython's own standard library: real text that every machine already has.

Licence of the text: PSF. The bytes differ between Python versions, so the builder's config name carries the version and
the content hash, and two Pythons prepare two sets side by side.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import sysconfig
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from attnlab.data.splitting import SPLITS, SplitPlan, split_files
from attnlab.data.storage import locked, writing_to
from attnlab.errors import field_error

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_DESCRIPTION = (
    "Source files of the Python standard library without its tests, split by file into train, validation and test; "
    "identical files are kept once and near-identical files lie in one split."
)


def standard_library() -> Path:
    """Returns the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(root: Path) -> list[str]:
    """Returns the relative paths of the library's own sources: no tests, no installed packages, no build records."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            found.append(relative.as_posix())
    return sorted(found)


@functools.cache
def split_plan() -> SplitPlan:
    """Reads the library once and returns which file belongs to which split.

    Raises:
        ConfigError: this Python has no readable library sources (a zipped or stripped installation).
    """
    root = standard_library()

    def read(relative: str) -> bytes | None:
        content = (root / relative).read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            return None  # the few files in another encoding
        return content

    plan = split_files(source_files(root), read)
    if plan.by_range:
        raise field_error(
            "config.data.name",
            "stdlib",
            f"this Python's standard library has too few source files below {root}",
            "Use a full Python installation, or text:PATH",
        )
    return plan


def config_name(plan: SplitPlan) -> str:
    """Returns the builder config of a plan, for example "py3.11-1a2b3c4d5e6f7a8b"."""
    return f"py{sys.version_info.major}.{sys.version_info.minor}-{plan.content_sha256[:16]}"


class StdlibCode(tfds.core.GeneratorBasedBuilder):
    """Byte-level sources of the standard library; `text` and the `path` relative to the library's folder."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Split by file, near-identical files together."}  # noqa: RUF012 (the base class's form)
    url_infos = {}  # noqa: RUF012 (nothing is downloaded; the inherited look-up needs a package TFDS does not install)

    def _info(self) -> tfds.core.DatasetInfo:
        plan = split_plan()
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
            homepage="https://docs.python.org/3/library/",
            license="PSF-2.0",
            metadata=tfds.core.MetadataDict(
                content_sha256=plan.content_sha256,
                python=sys.version.split()[0],
                files={split: len(plan.parts[split]) for split in SPLITS},
                bytes={split: plan.bytes(split) for split in SPLITS},
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        root = standard_library()
        for index, part in enumerate(split_plan().parts[split]):
            yield index, {"text": (root / part.path).read_bytes(), "path": part.path}


def prepared_builder(data_dir: Path) -> tfds.core.DatasetBuilder:
    """Returns the builder, prepared in array_record format below `data_dir` (by one process at a time)."""
    plan = split_plan()
    with quiet():
        builder = StdlibCode(
            data_dir=data_dir,
            config=tfds.core.BuilderConfig(name=config_name(plan), description=_DESCRIPTION),
            file_format="array_record",
        )
        if not builder.is_prepared():
            with writing_to(data_dir), locked(data_dir / f".{builder.name}-{config_name(plan)}.lock"):
                if not builder.is_prepared():
                    builder.download_and_prepare(file_format="array_record")
    return builder


@contextlib.contextmanager
def quiet():
    """Keeps TFDS' progress bars, prints and notices off the terminal; errors still raise."""
    bars = tfds.core.utils.tqdm_utils
    before = bars._active, logging.get_verbosity()
    bars.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        bars._active = before[0]
        logging.set_verbosity(before[1])

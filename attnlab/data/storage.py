"""Where prepared data lies, and how several processes prepare it once.

Everything derived (tokens, trained tokenizers, prepared TFDS builders) is keyed by a content hash and written into a
temporary folder that is renamed when complete: a folder that exists is whole, and nothing is ever changed in place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from attnlab.errors import field_error

try:
    import fcntl
except ImportError:  # not a POSIX system: the rename alone keeps the result whole, the work may be done twice
    fcntl = None


def option(config, field: str, default):
    """Returns `config.data.<field>`, or the default where the config (of whatever kind) has no such field."""
    value = getattr(config.data, field, default)
    return default if value is None else value


def cache_dir(config) -> Path:
    """Returns the folder of derived data.

    `config.data.dir` when it is set, except for `tfds:` sets, where that field says where the (often read-only)
    prepared sets lie; else `$XDG_CACHE_HOME/attnlab`, else `~/.cache/attnlab`.
    """
    given = option(config, "dir", "")
    if given and not str(option(config, "name", "stdlib")).startswith("tfds:"):
        return Path(os.path.expanduser(given))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "attnlab"


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns a failure to write below `folder` into the one message that says what to change."""
    try:
        yield
    except OSError as error:
        raise field_error(
            "config.data.dir",
            str(folder),
            f"prepared data cannot be written there ({error.strerror or error})",
            "Set config.data.dir to a folder on a local disk that you may write to and that has room",
        ) from error


@contextlib.contextmanager
def locked(lock_path: Path) -> Iterator[None]:
    """Holds an exclusive lock between the processes of this machine; released also when the process dies."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_path, "a") as handle:
        if fcntl is not None:
            # A file system without locks (some network mounts) still gets a whole result from the rename.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _remove_abandoned(target: Path) -> None:
    """Removes what killed preparations left; only day-old folders, another machine may be at work on a shared mount."""
    for folder in target.parent.glob(f".{target.name}.incomplete-*"):
        if time.time() - folder.stat().st_mtime > 86400:
            shutil.rmtree(folder, ignore_errors=True)


def prepare_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Makes sure that the folder `target` exists, building it at most once among the processes of this machine.

    Args:
        target: the final folder. Its existence means that it is complete.
        build: writes the content into the empty temporary folder it is given.

    Returns:
        target.

    Raises:
        ConfigError: the place cannot be written (names config.data.dir).
    """
    if target.is_dir():
        return target
    with writing_to(target.parent), locked(target.parent / f".{target.name}.lock"):
        if target.is_dir():
            return target
        _remove_abandoned(target)
        scratch = target.parent / f".{target.name}.incomplete-{uuid.uuid4().hex[:12]}"
        scratch.mkdir(parents=True)
        try:
            build(scratch)
            try:
                os.rename(scratch, target)
            except OSError:
                if not target.is_dir():  # otherwise another machine on the same mount was faster: same content
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target

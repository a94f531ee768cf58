"""The folder of a run: made once, checked at every start."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from typing import Any

import ml_collections

from attnlab.errors import ConfigError
from attnlab.training import config as config_lib

CONFIG_FILE = "config.json"
RUN_FILE = "run.json"


def prepare(workdir: str, config: ml_collections.ConfigDict, *, write: bool) -> list[str]:
    """Makes the folder and checks that it can be written and that it holds this config's run, or none.

    Args:
        write: whether this process writes (process 0).

    Returns:
        Notes on fields that changed since the run began and may change.

    Raises:
        ConfigError: it cannot be written, or it holds a run of another config.
    """
    if "://" in workdir:
        raise ConfigError(
            f"--workdir={workdir} is an address, and a run writes to a folder. Mount the bucket (gcsfuse, NFS) on every host "
            "and give the folder."
        )
    path = pathlib.Path(workdir)
    notes = []
    if (path / CONFIG_FILE).exists():
        saved = read_config(workdir)
        different = config_lib.differences(saved, config)
        if different:
            lines = [f"  config.{field}: the run has {old!r}, now {new!r}" for field, old, new in different]
            raise ConfigError(
                f"--workdir={workdir} holds a run of another config. Use the same values, or another --workdir.\n"
                + "\n".join(lines[:8])
                + (f"\n  and {len(lines) - 8} more" if len(lines) > 8 else "")
            )
        old, new = dict(config_lib.flatten(saved)), dict(config_lib.flatten(config))
        notes = [f"config.{field}: {old.get(field)!r} -> {new[field]!r}" for field in sorted(new) if old.get(field) != new[field]]
    if write:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ConfigError(
                f"--workdir={workdir} cannot be written ({error.strerror}). Choose a folder that you may write to."
            ) from error
    return notes


def record(workdir: str, config: ml_collections.ConfigDict, facts: dict[str, Any]) -> None:
    """Writes `config.json`, and `run.json`: what the run is made of (data hash, versions, devices, parameters).

    Called when all checks have passed: a start that failed leaves no config behind that the next one would have to match.
    """
    write_atomic(pathlib.Path(workdir) / CONFIG_FILE, config_lib.to_json(config))
    write_atomic(pathlib.Path(workdir) / RUN_FILE, json.dumps(facts, indent=1, sort_keys=True) + "\n")


def facts(workdir: str | os.PathLike) -> dict[str, Any]:
    """What training recorded of the run in `run.json`; nothing when the file is missing or damaged."""
    try:
        recorded = json.loads((pathlib.Path(workdir) / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def read_config(workdir: str) -> ml_collections.ConfigDict:
    """Reads `<workdir>/config.json`; fields that are younger than the run get their defaults.

    Raises:
        ConfigError: there is no run in the folder.
    """
    file = pathlib.Path(workdir) / CONFIG_FILE
    try:
        return config_lib.complete(config_lib.from_json(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"--workdir={workdir} holds no run ({CONFIG_FILE} is missing). Train one first.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged ({error}). Restore it, or start over in another --workdir.") from None


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a reader or a kill never meets half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise

"""The command line shared by train.py and eval.py: flags, configs, and errors as one message."""

from __future__ import annotations

import importlib.util
import logging
import os
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from attnlab.errors import ConfigError, nearest
from attnlab.training.config import flatten


def define_config_flag() -> Any:
    """Declares `--config=FILE[:PRESET]` and returns its holder."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file and preset, for example configs/lm.py:small. Any of its fields is a flag of its own: "
        "--config.model.num_layers=6 --config.model.pattern=\"('sigmoid','softmax')\".",
        lock_config=True,
    )


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags and calls `main`, whose return value is the exit code.

    Bad input ends with one message on stderr and exit code 2; a run that failed (it diverged, a checkpoint could not be
    written) with one message and exit code 1. Other exceptions are bugs and keep their traceback.
    """

    def guarded(_argv: list[str]) -> None:
        # The libraries report their internals at INFO; errors reach the user as messages of ours.
        logging.disable(logging.ERROR)
        threading.excepthook = _thread_failed
        sys.unraisablehook = _callback_failed
        from attnlab.training.checkpoint import CheckpointError
        from attnlab.training.loop import NonFiniteLoss

        try:
            sys.exit(main() or 0)
        except ConfigError as error:
            _fail(str(error), 2)
        except (CheckpointError, NonFiniteLoss) as error:
            _fail(str(error), 1)

    app.run(guarded, flags_parser=_parse)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """The checkpoint threads' failures come back as CheckpointError in the main thread; others are bugs."""
    if not type(failure.thread).__module__.startswith("orbax."):
        threading.__excepthook__(failure)


def _callback_failed(failure: Any) -> None:
    """After a failed write the storage library still calls back into the checkpoint library's closed event loop."""
    if "Event loop is closed" not in str(failure.exc_value):
        sys.__unraisablehook__(failure)


def _fail(message: str, code: int) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    try:
        _check_config_arguments(argv[1:])
        rest = flags.FLAGS(argv)
    except ConfigError as error:
        _fail(str(error), 2)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(f"{error}. See --help.", 2)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: write flags as --name=value. See --help.", 2)
    return rest


def _check_config_arguments(arguments: list[str]) -> None:
    """Finds a missing file, an unknown preset and misspelt fields before the flag library meets them."""
    target, fields = None, []
    for position, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if name == "config":
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            target = value if equals else following
        elif name.startswith("config."):
            fields.append(name.removeprefix("config."))
    if target is None:
        if fields:
            raise ConfigError(f"--config.{fields[0]} needs --config=FILE[:PRESET] beside it.")
        return
    config = load_config(target)
    known = dict(flatten(config))
    branches = {".".join(field.split(".")[:depth]) for field in known for depth in range(1, field.count(".") + 1)}
    for field in fields:
        field = field.split("[")[0]
        if field in branches:
            inside = [name for name in known if name.startswith(field + ".")]
            raise ConfigError(f"--config.{field} is a group of fields. Set one of them: {', '.join(inside[:8])}.")
        if field not in known:
            raise ConfigError(f"--config.{field}: no such field; {_nearest_field(field, known)}")


def _nearest_field(field: str, known: dict[str, Any]) -> str:
    """Compares with fields of the same group first, then by the last name alone."""
    parent, _, leaf = field.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    hint = nearest(leaf, siblings) if siblings else ""
    if hint.startswith("did you mean"):
        return f"did you mean --config.{siblings[hint.split(chr(39))[1]]}?"
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"did you mean --config.{elsewhere[0]}?"
    return nearest(field, known)


def load_config(target: str) -> Any:
    """Loads FILE[:ARG] as the flag does.

    Raises:
        ConfigError: no such file (with the nearest one in its folder), or the file's own complaint.
    """
    file, _, arg = target.partition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
        found = [os.fspath(other) for other in folder.glob("*.py")]
        raise ConfigError(f"--config={target}: there is no file {file!r}; {nearest(file, found)}")
    spec = importlib.util.spec_from_file_location(f"attnlab_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={target}: {file} has no get_config function. Name a file of configs/.")
    return module.get_config(arg) if arg else module.get_config()

"""`python -m attnlab.data.recall mqar --dir=DIR num_pairs=16 num_keys=64`: prepares a recall task as a TFDS set."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import types

from attnlab.data import storage
from attnlab.data.recall.dataset import TASKS
from attnlab.data.recall.rows import PreparedRows
from attnlab.data.recall.tasks import SPLITS, from_options
from attnlab.errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Prepares, prints what was made and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnlab.data.recall", description=__doc__)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("options", nargs="*", help="NAME=VALUE, options of the task (rows: train_rows=10000 eval_rows=512)")
    parser.add_argument("--dir", default="", help="where TFDS keeps prepared sets; by default below the user's cache")
    parser.add_argument("--seq_len", type=int, default=128, help="T, tokens of a row")
    given = parser.parse_intermixed_args(arguments)
    try:
        task = from_options(TASKS[given.task], {"train_rows": 10_000, **_parsed(TASKS[given.task], given.options)})
        task.check(given.seq_len)
        from attnlab.data.recall.builders import prepared_folder

        config = types.SimpleNamespace(data=types.SimpleNamespace(name=given.task, dir=given.dir))
        root = pathlib.Path(given.dir) if given.dir else storage.cache_dir(config) / "tfds"
        folder = prepared_folder(task, given.seq_len, root)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    sizes = ", ".join(f"{split} {len(PreparedRows(folder, split, given.seq_len))}" for split in SPLITS)
    print(f"{folder}: rows {sizes}; {task.vocab_size} ids; {task.describe()}")
    return 0


def _parsed(kind: type, pairs: list[str]) -> dict[str, object]:
    """Options as typed, in the types of their defaults; what has no such field is left for the task to refuse."""
    types_of = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    options = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            options[name] = types_of.get(name, str)(value)
        except ValueError:
            raise ConfigError(f"{pair}: {value!r} is not a {types_of[name].__name__}. Write NAME=VALUE.") from None
    return options


if __name__ == "__main__":
    sys.exit(main())

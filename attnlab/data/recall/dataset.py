"""The recall tasks as data sets of the training loop: `open_recall(config)`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from attnlab.data import storage
from attnlab.data.loader import Loader
from attnlab.data.recall.needle import Needle
from attnlab.data.recall.rows import GeneratedRows, PreparedRows, make_row, num_rows
from attnlab.data.recall.tasks import SPLITS, LongRange, Mqar, RecallTask, SelectiveCopy, from_options
from attnlab.data.sources import SplitInfo
from attnlab.errors import field_error, nearest

TASKS: dict[str, type[RecallTask]] = {task.name: task for task in (Mqar, Needle, SelectiveCopy, LongRange)}
_VERSION = 1  # of the rows: another one, other rows
_SAMPLED = 4  # rows of each split that go into the fingerprint: numpy may change what its generators draw


def defaults(*names: str) -> dict[str, dict[str, Any]]:
    """Options of the named tasks (all when none is named) with their defaults, for `config.data`."""
    return {name: dataclasses.asdict(TASKS[name]()) for name in names or TASKS}


def task_of(config) -> RecallTask:
    """Returns the task that `config.data.name` names, with the options `config.data.<name>`.

    Raises:
        ConfigError: unknown task, unknown option, bad value.
    """
    name = str(config.data.name)
    if name not in TASKS:
        names = ", ".join(f'"{known}"' for known in TASKS)
        raise field_error("config.data.name", name, f"not a recall task, {nearest(name, TASKS)}", f"Use one of {names}")
    return from_options(TASKS[name], storage.option(config, name, {}))


def vocab_size(config) -> int:
    """Number of token ids of a config's task, without touching data."""
    return task_of(config).vocab_size


class RecallData:
    """A recall task as a data set.

    Attributes:
        task: with its options.
        name: config.data.name.
        seq_len: T of training.
        fingerprint: sha256 hex over the options, the haystack and some rows.
        splits: split name to `SplitInfo(rows, None)`; an endless train split counts as many rows as its epoch.
        notes: none.
        outputs: V, number of token ids.
        evaluation: by distance and length; see `attnlab.training.evaluate_recall`.
    """

    notes: tuple[str, ...] = ()
    evaluation = "recall"

    def __init__(self, task: RecallTask, seq_len: int, *, data_dir: str = "", cache: pathlib.Path, workers: int = 0):
        task.check(seq_len)
        self.task, self.name, self.seq_len, self.outputs = task, task.name, seq_len, task.vocab_size
        self._data_dir, self._cache, self._workers = data_dir, cache, workers
        self.splits = {split: SplitInfo(num_rows(task, split), None) for split in SPLITS}

    @functools.cached_property
    def _texts(self) -> tuple[str, Mapping[str, Any]]:
        """Fingerprint and tokens of the haystack, opened when first needed: the size of a model does not need them."""
        return self.task.texts(self._data_dir) if isinstance(self.task, Needle) else ("", {})

    @functools.cached_property
    def fingerprint(self) -> str:
        """Opens the haystack, where there is one."""
        haystack, tokens = self._texts
        options = {name: value for name, value in dataclasses.asdict(self.task).items() if name != "prepared"}
        digest = hashlib.sha256(json.dumps([_VERSION, self.name, options, haystack], sort_keys=True).encode())
        for split in SPLITS:
            text = (tokens[split].stream,) if tokens else ()
            for index in range(_SAMPLED):
                digest.update(make_row(self.task, split, index, self.seq_len, *text).inputs.tobytes())
        return digest.hexdigest()

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        repeat: bool,
        shard_index: int = 0,
        shard_count: int = 1,
        seq_len: int | None = None,
    ) -> Loader:
        """Returns the batches of a split; the arguments are those of `Loader`. `seq_len` None = that of training.

        Batches have `inputs`, `targets`, `distance` int32 [b, T], `mask` bool [b, T] and `record` int64 [b].

        Raises:
            ConfigError: unknown split, or rows too short for the task.
        """
        if split not in SPLITS:
            raise field_error("split", split, f"unknown split of {self.name}, {nearest(split, SPLITS)}", "Name one of them")
        length = seq_len or self.seq_len
        identity = {"data": self.name, "split": split, "content": self.fingerprint}
        return Loader(
            self.rows(split, length),
            identity,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            repeat=repeat,
            shard_index=shard_index,
            shard_count=shard_count,
            workers=self._workers if repeat else 0,
        )

    def rows(self, split: str, seq_len: int) -> GeneratedRows | PreparedRows:
        """Random access to the rows of a split at any length."""
        if not self.task.prepared:
            return GeneratedRows(self.task, split, seq_len, self._texts[1].get(split))
        from attnlab.data.recall.builders import prepared_folder

        return PreparedRows(prepared_folder(self.task, seq_len, self._cache / "tfds", self._data_dir), split, seq_len)

    def save(self, folder: str) -> None:
        """Writes what the ids mean."""
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        about = {"task": self.name, "options": dataclasses.asdict(self.task), "vocab_size": self.outputs}
        (path / "recall.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")

    def describe(self) -> str:
        """One line for the run's header: the options that are not the defaults."""
        usual = type(self.task)()
        chosen = [
            f"{field} {value}" for field, value in dataclasses.asdict(self.task).items() if value != getattr(usual, field)
        ]
        return ", ".join([self.name, f"{self.outputs} ids", *chosen, f"sha256 {self.fingerprint[:12]}"])


def open_recall(config) -> RecallData:
    """Opens the recall task of a config: `config.data.{name, dir, workers, <name>}` and `config.seq_len`.

    Raises:
        ConfigError: any bad field of it, rows too short for the task.
    """
    if storage.option(config, "packing", "windows") != "windows":
        problem = f"rows of {config.data.name} are whole"
        raise field_error("config.data.packing", config.data.packing, problem, 'Set "windows"')
    return RecallData(
        task_of(config),
        int(config.seq_len),
        data_dir=os.fspath(storage.option(config, "dir", "")),
        cache=storage.cache_dir(config),
        workers=int(storage.option(config, "workers", 0)),
    )

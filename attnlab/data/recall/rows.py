"""Rows of a recall task by random access: made on the fly, or read from the prepared builder; the same rows either way.

Row i of a split comes from a random stream of its own, seeded by (seed, split, i). Streams of different splits may draw the
same row where a task has few of them; so every possible row belongs to one split, by a hash of its inputs, and a stream goes
on until it draws a row of its split. No row of one split is ever in another.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from attnlab.data.recall.tasks import SPLITS, RecallTask, Row
from attnlab.errors import ConfigError, field_error

ENDLESS = 1 << 20  # rows that count as an epoch where training rows never repeat
_SHARES = 8  # of all rows, one share each is of the validation and the test split
_TRIES = 500


def split_of(inputs: np.ndarray) -> str:
    """The split to which a row belongs, int32 [T]."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(np.ascontiguousarray(inputs, np.int32).tobytes()) % _SHARES, "train")


def make_row(task: RecallTask, split: str, index: int, length: int, *text: np.ndarray) -> Row:
    """Makes row `index` of a split.

    Args:
        task: with its options.
        split: of `SPLITS`.
        index: 0 or more.
        length: T.
        text: the haystack of the split, for tasks over text.

    Raises:
        ConfigError: the task has so few different rows that none of the split was found.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((task.seed, SPLITS.index(split), index))))
    for _ in range(_TRIES):
        row = task.row(rng, length, *text)
        if split_of(row.inputs) == split:
            return row
    raise ConfigError(
        f"config.data.name = {task.name!r}: with these options nearly all rows are alike ({task.describe()}), and none of "
        f"{_TRIES} is of the {split} split. Use more keys, values or tokens."
    )


def num_rows(task: RecallTask, split: str) -> int:
    """Rows in an epoch of a split."""
    return (task.train_rows or ENDLESS) if split == "train" else task.eval_rows


class GeneratedRows:
    """Rows made where they are needed (see `attnlab.data.packing.Rows`); an endless train split has new ones in every epoch.

    Args:
        task: with its options.
        split: of `SPLITS`.
        seq_len: T.
        tokens: TokenArray of the haystack, for tasks over text.

    Raises:
        ConfigError: T is too short for the task, or the haystack too short for T.
    """

    keys = ("inputs", "targets", "mask", "distance")

    def __init__(self, task: RecallTask, split: str, seq_len: int, tokens=None):
        task.check(seq_len)
        if tokens is not None and len(tokens) <= seq_len + 1:
            problem = f"the {split} text of config.data.{task.name}.haystack has {len(tokens)} tokens"
            raise field_error("config.seq_len", seq_len, problem, "Set a shorter length, or name more text")
        self._task, self._split, self.seq_len, self._tokens = task, split, seq_len, tokens

    def __len__(self) -> int:
        return num_rows(self._task, self._split)

    def row(self, record: int) -> Row:
        """Returns the row of a record."""
        endless = self._split == "train" and not self._task.train_rows
        text = () if self._tokens is None else (self._tokens.stream,)
        return make_row(self._task, self._split, record if endless else record % len(self), self.seq_len, *text)

    def read(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns inputs, targets, distance int32 and mask bool, each [b, T]; a negative record is an empty row."""
        return _stack([self.row(record) if record >= 0 else None for record in records.tolist()], self.seq_len)


class PreparedRows:
    """The rows of a prepared builder's split; opens the files where it is used (worker processes get the folder's name).

    Args:
        folder: the prepared version's folder.
        split: of `SPLITS`.
        seq_len: T of its rows.
    """

    keys = GeneratedRows.keys

    def __init__(self, folder: str, split: str, seq_len: int):
        self._arguments = (folder, split, seq_len)
        self._folder, self._split, self.seq_len = self._arguments
        self._opened: Sequence[Mapping[str, np.ndarray]] | None = None

    def __getstate__(self):
        return self._arguments

    def __setstate__(self, state):
        self.__init__(*state)

    @property
    def _source(self) -> Sequence[Mapping[str, np.ndarray]]:
        if self._opened is None:
            from tensorflow_datasets.core import read_only_builder

            self._opened = read_only_builder.builder_from_directory(self._folder).as_data_source(self._split)
        return self._opened

    def __len__(self) -> int:
        return len(self._source)

    def read(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns inputs, targets, distance int32 and mask bool, each [b, T]; a negative record is an empty row."""
        rows = [None] * len(records)
        real = np.flatnonzero(records >= 0)
        for i, example in zip(real, self._source.__getitems__((records[real] % len(self)).tolist()), strict=True):
            rows[i] = Row(**example)
        return _stack(rows, self.seq_len)


def _stack(rows: list[Row | None], length: int) -> dict[str, np.ndarray]:
    batch = {name: np.zeros((len(rows), length), bool if name == "mask" else np.int32) for name in Row._fields}
    for i, row in enumerate(rows):
        if row is not None:
            for name, array in row._asdict().items():
                batch[name][i] = array
    return batch

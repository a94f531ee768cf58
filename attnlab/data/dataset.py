"""What the training loop asks of data, whether it is text or images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class Batches(Protocol):
    """Batches of one split, for one process of several.

    Batch s is a function of (data, seed, s), whatever the number of processes, so that a run that stopped goes on with the same
    numbers. Every batch has `record` int64 [b], which says where its rows came from.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position, JSON-able."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` returned."""

    def describe(self, batch: Batch) -> str:
        """Names the sources of a batch's rows, for error messages."""

    def close(self) -> None:
        """Stops what prepares batches."""


class Dataset(Protocol):
    """A data set, opened; `Task.open_data` returns one.

    Attributes:
        name: of the config.
        fingerprint: sha256 hex over the content and its split.
        splits: names of splits ("train", "validation", "test") to facts about them.
        notes: sentences about choices that the user should know, for the run header.
        outputs: what a model has to tell apart: ids of the vocabulary, or classes.
        evaluation: name in the registry of how `eval.py` looks at a run on such data.
    """

    name: str
    fingerprint: str
    splits: Mapping[str, Any]
    notes: tuple[str, ...]
    outputs: int
    evaluation: str

    def loader(
        self, split: str, *, batch_size: int, seed: int, shuffle: bool, repeat: bool, shard_index: int = 0, shard_count: int = 1
    ) -> Batches:
        """Returns the batches of a split; `batch_size` is global, the rows of a batch are those of one shard."""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what later uses of a trained model need: its tokenizer, or the names of its classes."""

    def describe(self) -> str:
        """A line for the run header."""

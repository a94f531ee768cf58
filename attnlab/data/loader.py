"""Batches by Grain: seeded shuffling per epoch, the rows of this process, workers, and a state of a few numbers.

Batch s of a run is a function of (data, seed, s): row j of it is row `order(s * batch_size + j)`, whatever the number
of processes or workers. So the state is the number of the next batch, resuming reads nothing again, and a run may go on
with another number of processes or workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from attnlab.errors import ConfigError, field_error

_STATE_VERSION = 1
_PREFETCH = 4  # batches ready ahead of the step


class Rows(Protocol):
    """Random access to the rows of one split, for example those of `attnlab.data.packing`; picklable."""

    def __len__(self) -> int:
        """Number of rows in an epoch."""

    def read(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays [b, ...] of the records int64 [b]; record = epoch * len(self) + row, negative = padding."""


class Loader:
    """Iterator over the batches of one split, for one process of `shard_count`.

    Yields dicts of numpy arrays of the local batch b = batch_size // shard_count: what the rows give (of text: `inputs`,
    `targets` int32 [b, T], `mask` bool [b, T] (True = counts in the loss) and, when packed, `segment_ids` (0 = padding)
    and `positions` int32 [b, T]), and `record` int64 [b] (epoch * rows per epoch + row, -1 = padding row).

    Args:
        rows: random access to the rows of the split.
        identity: what defines the sequence of batches besides the rows: it is compared on `set_state`.
        batch_size: global number of rows per batch.
        seed: seed of the order.
        shuffle: a new order per epoch, or the order of the data.
        repeat: endless epochs, a batch may span two; else one epoch whose last batch is filled up with rows of mask
            False.
        shard_index, shard_count: this process and the number of processes.
        workers: processes that prepare batches; 0 = threads.
        threads: that prepare batches, where there are no workers (more than one where rows are dear, as photographs).
        describe_row: names the text or image of a record.
        content: the array whose hash `describe` gives.

    Raises:
        ConfigError: the batch size does not divide by the number of processes, or bad seed or workers.
    """

    def __init__(
        self,
        rows: Rows,
        identity: Mapping[str, Any],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        repeat: bool,
        shard_index: int = 0,
        shard_count: int = 1,
        workers: int = 0,
        threads: int = 1,
        describe_row: Callable[[int], str] | None = None,
        content: str = "inputs",
    ):
        if not 0 <= shard_index < shard_count:
            raise ValueError(f"shard_index must be in 0..{shard_count - 1}, got {shard_index}")
        if batch_size < 1 or batch_size % shard_count:
            fix = f"Use a positive multiple of {shard_count}"
            raise field_error("config.batch_size", batch_size, f"it does not divide over {shard_count} processes", fix)
        if workers < 0:
            raise field_error(
                "config.data.workers", workers, "negative", "Use 0 for threads only, or a number of processes"
            )
        self._identity = {
            **identity,
            "batch_size": int(batch_size),
            "seed": int(seed),
            "shuffle": bool(shuffle),
            "repeat": bool(repeat),
        }
        self._batches = _Batches(
            rows, batch_size, seed, shuffle, repeat, shard_index, shard_count, str(identity["split"])
        )
        self._workers, self._threads = workers, threads
        self._describe_row, self._content = describe_row, content
        self._step = 0
        self._iterator: Any = None

    @property
    def num_batches(self) -> int | None:
        """Number of batches in all, None when endless."""
        return self._batches.total

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows in one epoch, over all processes."""
        return len(self._batches.rows)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._step += 1
        return batch

    def _start(self) -> Iterator[dict[str, np.ndarray]]:
        import grain

        batches = grain.MapDataset.source(_From(self._batches, self._step))
        if self._workers == 0:
            return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=_PREFETCH)))
        _mark_flags_as_parsed()
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=_PREFETCH),
            worker_init_fn=_keep_off_accelerators,
        )
        return iter(dataset)

    def close(self) -> None:
        """Ends threads and worker processes; the loader can go on afterwards and starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def get_state(self) -> dict[str, Any]:
        """Returns what `set_state` takes: JSON-able, the same in every process, independent of workers."""
        return {
            "version": _STATE_VERSION,
            "step": self._step,
            "fingerprint": self.fingerprint,
            "of": dict(self._identity),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was called; the next batch is the one that would have followed.

        Raises:
            ConfigError: the state belongs to other data or another order (names what differs).
        """
        if (
            not isinstance(state, Mapping)
            or state.get("version") != _STATE_VERSION
            or not isinstance(state.get("step"), int)
        ):
            raise ConfigError(
                "the data iterator's state in the checkpoint is not of this version. Start a new workdir."
            )
        if state.get("fingerprint") != self.fingerprint:
            theirs = state.get("of", {})
            changed = [
                f"{field} was {theirs.get(field)!r}, is {value!r}"
                for field, value in self._identity.items()
                if theirs.get(field) != value
            ]
            raise ConfigError(
                "the checkpoint was made with other data: "
                + "; ".join(changed or ["the state is damaged"])
                + ". Restore these values in the config, or start a new workdir."
            )
        self.close()
        self._step = state["step"]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the sequence of batches; the name of the data may change (a moved folder)."""
        decisive = {field: value for field, value in self._identity.items() if field != "data"}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def describe(self, batch: Mapping[str, Any]) -> str:
        """Returns one sentence that identifies a batch: data, epoch, records, first texts, hash of the content."""
        records = np.asarray(batch["record"]).tolist()
        real = [record for record in records if record >= 0]
        content = np.ascontiguousarray(batch[self._content])
        epochs = sorted({record // self.rows_per_epoch for record in real})
        shown = ", ".join(map(str, records[:8])) + (", ..." if len(records) > 8 else "")
        places = [self._describe_row(record) for record in real[:2]] if self._describe_row else []
        return (
            f"{self._identity['data']} {self._identity['split']}, epoch {' and '.join(map(str, epochs)) or '-'}, "
            f"records {shown}"
            + (f" (the first: {' | '.join(places)})" if places else "")
            + f", {self._content} sha256 {hashlib.sha256(content.tobytes()).hexdigest()[:12]}"
        )


class _Batches:
    """Batch number -> arrays; pickled into the workers."""

    def __init__(self, rows, batch_size, seed, shuffle, repeat, shard_index, shard_count, split):
        self.rows, self._batch_size, self._repeat = rows, batch_size, repeat
        local = batch_size // shard_count
        self._local = np.arange(shard_index * local, (shard_index + 1) * local)
        self._order = None
        if shuffle:
            import grain

            # Grain adds the epoch to its seed; hashing keeps epoch 1 of seed 0 apart from epoch 0 of seed 1.
            mixed = int.from_bytes(hashlib.sha256(f"{seed} {split}".encode()).digest()[:4], "big")
            self._order = grain.MapDataset.range(len(rows)).shuffle(seed=mixed).repeat()
        self.total = None if repeat else -(-len(rows) // batch_size)

    def records(self, step: int) -> np.ndarray:
        """Returns the records int64 [b] of a batch, in this process."""
        size = len(self.rows)
        places = step * self._batch_size + self._local
        if not self._repeat:
            places = np.where(places < size, places, -1)
        if self._order is None:
            return places
        rows = np.fromiter((self._order[p] if p >= 0 else -1 for p in places.tolist()), np.int64, len(places))
        return np.where(places >= 0, places // size * size + rows, -1)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        records = self.records(step)
        return {**self.rows.read(records), "record": records}


class _From:
    """The batches from a first one on, as a Grain source."""

    def __init__(self, batches: _Batches, first: int):
        self._batches, self._first = batches, first

    def __len__(self) -> int:
        total = self._batches.total
        return sys.maxsize // 2 if total is None else max(total - self._first, 0)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._batches[self._first + int(index)]


def _keep_off_accelerators(worker: int, workers: int) -> None:
    """Runs first in a worker process: JAX, which Grain imports, must not open the device that the step runs on."""
    del worker, workers
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read the environment already, but opened no device yet
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _mark_flags_as_parsed() -> None:
    """Grain's workers read absl flags; outside absl.app (notebooks, pytest) nobody has parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

"""Rows of a set that is too large to tokenize ahead: documents are read and encoded when their row is asked for.

Row r is still a function of r alone, so shuffling, sharding and resuming work as for small sets, and nothing but the
rows asked for is ever read. The price: an epoch is a sample of the set, not a partition of its tokens. Where documents
are shorter than a row, a row joins `group` neighbouring documents and what does not fit is cut off; where they are
longer, a document gives `crops` rows, each a random stretch of it (another one in each epoch). Both numbers follow from
the mean length of a few dozen documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from attnlab.data.packing import empty_packed, place
from attnlab.data.tokenizers import Tokenizer

_SAMPLED_DOCUMENTS = 64


class Reader(Protocol):
    """Random access to documents; picklable."""

    def __len__(self) -> int:
        """Number of documents."""

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the texts of some documents."""

    def document_name(self, index: int) -> str:
        """Returns how messages call a document."""


class StreamedRows:
    """Rows over a `Reader`; see the module's description.

    Args:
        reader: the documents.
        tokenizer: encodes them.
        seq_len: T.
        packed: segments per document instead of one plain window.
        random_crops: seed of the stretches, or None for the same evenly spaced ones in every epoch (evaluation).
        keep_partial: whether the last, smaller group of documents is a row too.
    """

    def __init__(
        self,
        reader: Reader,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        packed: bool,
        random_crops: int | None,
        keep_partial: bool,
    ):
        self._reader, self._tokenizer, self.seq_len = reader, tokenizer, seq_len
        self._packed, self._seed = packed, random_crops
        self.keys = ("inputs", "targets", "mask") + (("segment_ids", "positions") if packed else ())
        documents = len(reader)
        sample = np.unique(np.linspace(0, documents - 1, _SAMPLED_DOCUMENTS).astype(int)).tolist()
        mean = np.mean([len(tokenizer.encode(text)) + 1 for text in reader.read(sample)])
        self._group = int(min(max(1, round(seq_len / mean)), documents))
        self._crops = int(max(1, round(mean / seq_len)))
        self._groups = -(-documents // self._group) if keep_partial else documents // self._group

    def __len__(self) -> int:
        return self._groups * self._crops

    def _documents(self, record: int) -> range:
        first = record % len(self) // self._crops * self._group
        return range(first, min(first + self._group, len(self._reader)))

    def read(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays [b, T] of the records int64 [b]; negative = padding."""
        batch = empty_packed(len(records), self.seq_len, self._tokenizer.eos_id)
        for i, record in enumerate(records.tolist()):
            if record >= 0:
                self._fill(batch, i, record)
        return {key: batch[key] for key in self.keys}

    def _fill(self, batch: dict[str, np.ndarray], row: int, record: int) -> None:
        eos = np.array([self._tokenizer.eos_id], np.int32)
        encoded = [self._tokenizer.encode(text) for text in self._reader.read(self._documents(record))]
        if self._packed:
            sequences = [np.concatenate([eos, ids, eos]) for ids in encoded if len(ids)]
        else:
            sequences = [np.concatenate([eos, *(part for ids in encoded if len(ids) for part in (ids, eos))])]
        at = 0
        for segment, sequence in enumerate(sequences, 1):
            room = self.seq_len - at
            if room == 0:
                break
            slack = len(sequence) - (room + 1)
            # Only a row's first text is cut at a random place: the later ones are what still fits.
            start = self._stretch(record, slack) if slack > 0 and segment == 1 else 0
            piece = sequence[start : start + room + 1]
            if len(piece) > 1:
                place(batch, row, at, segment, piece)
                at += len(piece) - 1

    def _stretch(self, record: int, slack: int) -> int:
        """Returns the start, 0..slack, of the record's stretch: each crop has its own part of the document."""
        crop = record % len(self) % self._crops
        if self._seed is None:
            return slack * crop // max(self._crops - 1, 1)
        within = np.random.default_rng([self._seed % 2**63, record]).random()
        return min(int((crop + within) / self._crops * (slack + 1)), slack)

    def describe(self, record: int) -> str:
        """Returns the names of the record's documents."""
        documents = self._documents(record)
        return ", ".join(self._reader.document_name(i) for i in documents[:3]) + (", ..." if len(documents) > 3 else "")

"""Cuts a token stream into rows of fixed length, by random access: row r is a function of r alone.

Both ways predict every token of the split exactly once per epoch (in training, plain windows leave out the last,
incomplete one) and neither lets a row cross a split, because each split has a stream of its own.
"""

from __future__ import annotations

import bisect
from typing import Protocol

import numpy as np

from attnlab.data.corpus import TokenArray

PACKINGS = ("windows", "packed")


class Rows(Protocol):
    """Rows of one split.

    Attributes:
        seq_len: T.
        keys: names of the arrays that `read` returns.
    """

    seq_len: int
    keys: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows in an epoch."""

    def read(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays [b, T] of the records int64 [b]; record = epoch * len(self) + row, negative = padding."""

    def spans(self, record: int) -> list[tuple[int, int, int]]:
        """Returns (document, first token, last token + 1) of what a record holds, tokens counted in the document."""


class WindowRows:
    """Windows of seq_len + 1 tokens with stride seq_len over the concatenated stream; documents may share a window.

    Args:
        tokens: the stream.
        seq_len: T.
        eos_id: fills the end of an incomplete window, where the mask is False.
        keep_partial: whether the last, incomplete window is a row (evaluation) or left out (training).
    """

    keys = ("inputs", "targets", "mask")

    def __init__(self, tokens: TokenArray, seq_len: int, eos_id: int, keep_partial: bool):
        self._tokens, self.seq_len, self._eos_id = tokens, seq_len, eos_id
        pairs = len(tokens) - 1
        self._rows = -(-pairs // seq_len) if keep_partial else pairs // seq_len

    def __len__(self) -> int:
        return self._rows

    def read(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns inputs, targets int32 and mask bool, each [b, T]."""
        width = self.seq_len + 1
        window = np.full((len(records), width), self._eos_id, np.int32)
        mask = np.zeros((len(records), self.seq_len), np.bool_)
        for i, record in enumerate(records.tolist()):
            if record >= 0:
                start = record % self._rows * self.seq_len
                chunk = self._tokens.stream[start : start + width]
                window[i, : len(chunk)] = chunk
                mask[i, : len(chunk) - 1] = True
        return {
            "inputs": np.ascontiguousarray(window[:, :-1]),
            "targets": np.ascontiguousarray(window[:, 1:]),
            "mask": mask,
        }

    def spans(self, record: int) -> list[tuple[int, int, int]]:
        """Returns (document, first token, last token + 1) of each document in the window."""
        start = record % self._rows * self.seq_len
        return _spans(self._tokens, start, min(start + self.seq_len + 1, len(self._tokens)))


class PackedRows:
    """Whole documents side by side, told apart by `segment_ids`; `positions` restart at 0 with every segment.

    A document is the sequence `eos document eos`: the separator before it is its first input, the one after it its last
    target, so no target belongs to another document than its input. Documents longer than a row are cut into pieces of
    seq_len and only the last piece shares a row; a piece knows nothing of the one before. Pieces are placed best-fit
    decreasing, once and for all epochs (the epochs shuffle rows).
    """

    keys = ("inputs", "targets", "mask", "segment_ids", "positions")

    def __init__(self, tokens: TokenArray, seq_len: int, eos_id: int):
        self._tokens, self.seq_len, self._eos_id = tokens, seq_len, eos_id
        offsets = np.asarray(tokens.offsets)
        self._piece_start, self._piece_len, self._row_start = plan_rows(offsets[:-1] - 1, np.diff(offsets), seq_len)

    def __len__(self) -> int:
        return len(self._row_start) - 1

    def _pieces(self, record: int) -> list[tuple[int, int]]:
        row = record % len(self)
        pieces = slice(self._row_start[row], self._row_start[row + 1])
        return list(zip(self._piece_start[pieces].tolist(), self._piece_len[pieces].tolist(), strict=True))

    def read(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns inputs, targets, segment_ids (0 = padding), positions int32 and mask bool, each [b, T]."""
        batch = empty_packed(len(records), self.seq_len, self._eos_id)
        for i, record in enumerate(records.tolist()):
            if record >= 0:
                at = 0
                for segment, (start, length) in enumerate(self._pieces(record), 1):
                    place(batch, i, at, segment, self._tokens.stream[start : start + length + 1])
                    at += length
        return batch

    def spans(self, record: int) -> list[tuple[int, int, int]]:
        """Returns (document, first token, last token + 1) of each piece of the row."""
        spans = []
        for start, length in self._pieces(record):
            # from start + 1: the separator before a document stands on its first input, not in it
            spans += _spans(self._tokens, start + 1, start + length + 1)
        return spans


def empty_packed(rows: int, seq_len: int, eos_id: int) -> dict[str, np.ndarray]:
    """Returns arrays [rows, seq_len] of padding for `place`."""
    shape = (rows, seq_len)
    return {
        "inputs": np.full(shape, eos_id, np.int32),
        "targets": np.full(shape, eos_id, np.int32),
        "mask": np.zeros(shape, np.bool_),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }


def place(batch: dict[str, np.ndarray], row: int, at: int, segment: int, sequence: np.ndarray) -> None:
    """Writes a sequence of n + 1 tokens as n (input, target) pairs of one segment, from column `at`."""
    span = slice(at, at + len(sequence) - 1)
    batch["inputs"][row, span] = sequence[:-1]
    batch["targets"][row, span] = sequence[1:]
    batch["mask"][row, span] = True
    batch["segment_ids"][row, span] = segment
    batch["positions"][row, span] = np.arange(len(sequence) - 1, dtype=np.int32)


def plan_rows(starts: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs sequences into rows.

    Args:
        starts, lengths: int64 [n], where each sequence lies in a stream; sequences longer than `capacity` are cut.
        capacity: length of a row.

    Returns:
        piece_start, piece_len int64 [pieces] in row order, and row_start int64 [rows + 1] (indices of pieces). Rows are
        ordered by their first piece's place in the stream.
    """
    whole = lengths // capacity
    owner = np.repeat(np.arange(len(lengths)), whole)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(whole) - whole, whole)
    rows = [[(start, capacity)] for start in (starts[owner] + nth * capacity).tolist()]

    rest = lengths % capacity
    rest_start = starts + whole * capacity
    order = np.argsort(-rest, kind="stable")
    open_rows: dict[int, list[int]] = {}  # free space -> rows
    spaces: list[int] = []  # the keys of open_rows, sorted
    for i in order.tolist():
        length = int(rest[i])
        if length == 0:
            break
        k = bisect.bisect_left(spaces, length)
        if k == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[k]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[k]
        rows[row].append((int(rest_start[i]), length))
        if space > length:
            if space - length not in open_rows:
                bisect.insort(spaces, space - length)
            open_rows.setdefault(space - length, []).append(row)
    for row in rows:
        row.sort()
    rows.sort()
    pieces = np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 2)
    row_start = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.ascontiguousarray(pieces[:, 0]), np.ascontiguousarray(pieces[:, 1]), row_start


def _spans(tokens: TokenArray, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Returns the parts of documents in stream[start:stop]; the separator after a document counts as its last token."""
    spans = []
    document = max(int(np.searchsorted(tokens.offsets, start, side="right")) - 1, 0)
    while document < tokens.num_documents and tokens.offsets[document] < stop:
        first, last = int(tokens.offsets[document]), int(tokens.offsets[document + 1])
        spans.append((document, max(start, first) - first, min(stop, last) - first))
        document += 1
    return spans

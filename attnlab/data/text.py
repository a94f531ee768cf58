"""Text for language models: `open_text(config)` joins source, tokenizer and packing into loaders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from attnlab.data import corpus, storage
from attnlab.data.loader import Loader
from attnlab.data.packing import PACKINGS, PackedRows, Rows, WindowRows
from attnlab.data.sources import Source, SplitInfo, open_source
from attnlab.data.streaming import StreamedRows
from attnlab.data.tokenizers import Tokenizer, vocab_size_of
from attnlab.errors import field_error, nearest


class TextData:
    """A tokenized text data set.

    Attributes:
        name: config.data.name.
        tokenizer: see `attnlab.data.tokenizers.Tokenizer`.
        fingerprint: sha256 hex over the content and its split.
        splits: split name ("train", "validation", "test") to `SplitInfo(documents, bytes)`.
        notes: sentences about choices that the user should know, for the run header.
        outputs: ids of the tokenizer.
        evaluation: see `attnlab.data.dataset.Dataset`.
    """

    evaluation = "text"

    def __init__(self, source: Source, tokenizer: Tokenizer, packing: str, workers: int, tokens, seq_len: int | None = None):
        self._source, self._packing, self._workers, self._tokens, self._seq_len = source, packing, workers, tokens, seq_len
        self.name: str = source.name
        self.tokenizer = tokenizer
        self.outputs: int = tokenizer.vocab_size
        self.fingerprint: str = source.fingerprint
        self.splits: Mapping[str, SplitInfo] = source.splits
        self.notes: tuple[str, ...] = source.notes

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
        """Returns the batches of a split; the arguments are those of `Loader`, and T (by default the config's `seq_len`).

        With repeat=False every token of the split is predicted exactly once (streamed sets: every row is read once).

        Raises:
            ConfigError: unknown split, bad sizes, or a split too small for one row.
        """
        if split not in self.splits:
            raise field_error(
                "split", split, f"unknown split of {self.name}, {nearest(split, self.splits)}", "Name one of them"
            )
        seq_len = self._seq_len if seq_len is None else seq_len
        if seq_len is None or seq_len < 1:
            raise field_error("config.seq_len", seq_len, "a row needs at least one token", "Use a positive length")
        rows = self._rows(split, seq_len, keep_partial=not repeat, shuffle=shuffle, seed=seed)
        if len(rows) == 0:
            raise field_error(
                "config.seq_len",
                seq_len,
                f"the {split} split of {self.name} holds fewer tokens than one row",
                "Use a shorter sequence or more text",
            )
        identity = {
            "data": self.name,
            "split": split,
            "content": self.fingerprint,
            "tokenizer": self.tokenizer.spec,
            "packing": self._packing,
            "seq_len": seq_len,
        }
        return Loader(
            rows,
            identity,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            repeat=repeat,
            shard_index=shard_index,
            shard_count=shard_count,
            # An evaluation is over before worker processes would have started.
            workers=self._workers if repeat else 0,
            describe_row=lambda record: self._describe(split, rows, record),
        )

    def _rows(self, split: str, seq_len: int, *, keep_partial: bool, shuffle: bool, seed: int) -> Rows:
        eos = self.tokenizer.eos_id
        if self._source.streamed:
            return StreamedRows(
                self._source.reader(split),
                self.tokenizer,
                seq_len,
                packed=self._packing == "packed",
                random_crops=seed if shuffle else None,
                keep_partial=keep_partial,
            )
        if self._packing == "packed":
            return PackedRows(self._tokens[split], seq_len, eos)
        return WindowRows(self._tokens[split], seq_len, eos, keep_partial)

    def _describe(self, split: str, rows: Rows, record: int) -> str:
        if isinstance(rows, StreamedRows):
            return rows.describe(record)
        tokens, places = self._tokens[split], []
        for document, first, last in rows.spans(record)[:3]:
            name, start = tokens.name(document)
            begin = tokens.offsets[document]
            before, inside = tokens.stream[begin : begin + first], tokens.stream[begin + first : begin + last]
            at = start + int(self.tokenizer.token_bytes[before].sum())
            places.append(f"{name} bytes {at}:{at + int(self.tokenizer.token_bytes[inside].sum())}")
        return ", ".join(places)

    def raw_bytes(self, split: str) -> Iterator[bytes]:
        """Yields the text of a split, document by document, without separators."""
        for document in self._source.documents(split):
            yield document.text

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer to `folder/tokenizer`."""
        self.tokenizer.save(os.path.join(folder, "tokenizer"))

    def describe(self) -> str:
        """Name, tokenizer and hash."""
        return f"{self.name}, {self.tokenizer.spec}, sha256 {self.fingerprint[:12]}"

    def summary(self) -> dict[str, Any]:
        """Returns what a run records about its data (JSON-able)."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.spec,
            "packing": self._packing,
            "splits": {name: {"documents": info.documents, "bytes": info.bytes} for name, info in self.splits.items()},
            "notes": list(self.notes),
        }


def _checked_packing(config) -> str:
    packing = str(storage.option(config, "packing", "windows"))
    if packing not in PACKINGS:
        names = ", ".join(f'"{name}"' for name in PACKINGS)
        raise field_error(
            "config.data.packing", packing, f"unknown, {nearest(packing, PACKINGS)}", f"Use one of {names}"
        )
    return packing


def open_text(config) -> TextData:
    """Opens `config.data`, preparing what is not yet in the cache (once per machine; see `attnlab.data.storage`).

    Raises:
        ConfigError: any bad field of config.data, missing or undecodable data, an unwritable cache.
    """
    packing = _checked_packing(config)
    spec = str(storage.option(config, "tokenizer", "bytes"))
    vocab_size_of(spec)  # a bad spec is reported before any data is read
    source = open_source(config)
    cache = storage.cache_dir(config)
    tokenizer = corpus.open_tokenizer(spec, source, cache)
    tokens = None if source.streamed else corpus.open_tokens(source, tokenizer, cache)
    return TextData(source, tokenizer, packing, int(storage.option(config, "workers", 0)), tokens, getattr(config, "seq_len", None))


def batch_spec(config) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns name -> (shape, dtype) of the global batch of a config, without touching data.

    Raises:
        ConfigError: unknown config.data.packing.
    """
    shape = (int(config.batch_size), int(config.seq_len))
    spec = {
        "inputs": (shape, np.dtype(np.int32)),
        "targets": (shape, np.dtype(np.int32)),
        "mask": (shape, np.dtype(bool)),
    }
    if _checked_packing(config) == "packed":
        spec |= {"segment_ids": (shape, np.dtype(np.int32)), "positions": (shape, np.dtype(np.int32))}
    return {**spec, "record": (shape[:1], np.dtype(np.int64))}

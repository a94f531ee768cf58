"""Tokens of a data set on disk, memory-mapped: written once per (content, tokenizer), shared by all processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from attnlab.data.sources import Document, Source
from attnlab.data.storage import prepare_once, writing_to
from attnlab.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe, vocab_size_of

BPE_TRAINING_BYTES = 1 << 28  # of a streamed set, only the first documents up to this size train the tokenizer


class TokenArray:
    """The token stream of one split: `eos document eos document eos ... eos`, with one separator between documents.

    Attributes:
        offsets: int64 [documents + 1]; document i is `stream[offsets[i]:offsets[i + 1] - 1]`.
    """

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._open()

    def _open(self) -> None:
        self.offsets = np.load(self._folder / f"{self._split}.offsets.npy", mmap_mode="r")
        self._stream = np.load(self._folder / f"{self._split}.tokens.npy", mmap_mode="r")
        self._names: list | None = None

    def __getstate__(self):  # worker processes map the file themselves
        return {"folder": self._folder, "split": self._split}

    def __setstate__(self, state):
        self.__init__(state["folder"], state["split"])

    def __len__(self) -> int:
        return len(self._stream)

    @property
    def stream(self) -> np.ndarray:
        """The whole stream, memory-mapped, uint16 or int32 [len(self)]."""
        return self._stream

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def name(self, document: int) -> tuple[str, int]:
        """Returns the name of a document and the byte of the file at which it starts."""
        if self._names is None:
            self._names = json.loads((self._folder / f"{self._split}.names.json").read_text("utf-8"))
        name, start = self._names[document]
        return name, start


def open_tokenizer(spec: str, source: Source, cache: Path) -> Tokenizer:
    """Returns the tokenizer of a spec, training it on the train split when no process has done so yet."""
    vocab_size = vocab_size_of(spec)
    if spec == ByteTokenizer.spec:
        return ByteTokenizer()

    def train(folder: Path) -> None:
        train_bpe(_training_texts(source), vocab_size).save(folder)

    return load_tokenizer(prepare_once(cache / "tokenizers" / f"{source.fingerprint[:32]}-bpe{vocab_size}", train))


def _training_texts(source: Source) -> Iterator[bytes]:
    size = 0
    for document in source.documents("train"):
        yield document.text
        size += len(document.text)
        if source.streamed and size >= BPE_TRAINING_BYTES:
            return


def open_tokens(source: Source, tokenizer: Tokenizer, cache: Path) -> dict[str, TokenArray]:
    """Returns the token stream of every split, writing them when no process has done so yet."""
    key = f"{source.fingerprint[:32]}-{tokenizer.spec.replace(':', '')}"

    def build(folder: Path) -> None:
        for split in source.splits:
            _write(folder, split, source.documents(split), tokenizer)

    folder = prepare_once(cache / "tokens" / key, build)
    return {split: TokenArray(folder, split) for split in source.splits}


def _write(folder: Path, split: str, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    separator = np.array([tokenizer.eos_id], dtype).tobytes()
    offsets, names = [1], []
    raw = folder / f"{split}.raw"
    with writing_to(folder), open(raw, "wb") as out:
        out.write(separator)
        for document in documents:
            size = 0
            for ids in tokenizer.blocks(document.text):
                out.write(ids.astype(dtype).tobytes())
                size += len(ids)
            out.write(separator)
            offsets.append(offsets[-1] + size + 1)
            names.append((document.name, document.start))
        out.flush()
    # The .npy header needs the length, known only now; the payload is appended block by block.
    with open(folder / f"{split}.tokens.npy", "wb") as out, open(raw, "rb") as payload:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (offsets[-1],)}
        np.lib.format.write_array_header_2_0(out, header)
        while block := payload.read(1 << 24):
            out.write(block)
    raw.unlink()
    np.save(folder / f"{split}.offsets.npy", np.asarray(offsets, np.int64))
    (folder / f"{split}.names.json").write_text(json.dumps(names), "utf-8")

"""Tokenizers: plain bytes, or byte-level BPE trained on the data set's own train split.

Both are lossless on every UTF-8 text and put the document separator `eos_id` last. `eos` stands for no byte of the text
(`token_bytes[eos_id] == 0`), so in bits per byte the cost of predicting separators is charged to the text's bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from attnlab.errors import ConfigError, field_error, nearest

_FIELD = "config.data.tokenizer"
_KIND_FILE = "attnlab_tokenizer.json"
_BPE_FILE = "tokenizer.json"
_PIECE = 1 << 20  # longer texts are encoded in pieces cut after a newline
_BLOCK = 16  # pieces encoded together


class Tokenizer(Protocol):
    """What the data pipeline and the evaluation need of a tokenizer.

    Attributes:
        spec: the name that `config.data.tokenizer` takes.
        vocab_size: number of ids.
        eos_id: the document separator, vocab_size - 1.
        token_bytes: int32 [vocab_size], the number of bytes that each id stands for (eos: 0).
    """

    spec: str
    vocab_size: int
    eos_id: int
    token_bytes: np.ndarray

    def encode(self, text: bytes | str) -> np.ndarray:
        """Returns the ids, int32 [n]; never contains eos_id."""

    def blocks(self, text: bytes | str) -> Iterator[np.ndarray]:
        """Yields the ids of `encode` in blocks, for texts whose ids would fill the memory."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of the ids; separators stand for nothing."""

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer` reads."""


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 separates documents."""

    spec = "bytes"
    vocab_size = 257
    eos_id = 256

    def __init__(self):
        self.token_bytes = np.ones(self.vocab_size, np.int32)
        self.token_bytes[self.eos_id] = 0

    def encode(self, text: bytes | str) -> np.ndarray:
        """Returns the bytes as int32 [n]; any bytes, also invalid UTF-8."""
        return np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32)

    def blocks(self, text: bytes | str) -> Iterator[np.ndarray]:
        """Yields the ids of `encode` in blocks."""
        view = memoryview(_as_bytes(text))
        for start in range(0, len(view), _BLOCK * _PIECE):
            yield self.encode(view[start : start + _BLOCK * _PIECE])

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of the ids; separators stand for nothing."""
        ids = _checked(ids, self.vocab_size)
        return ids[ids != self.eos_id].astype(np.uint8).tobytes()

    def save(self, folder: str | Path) -> None:
        """Writes the one small file that names this tokenizer."""
        _save_kind(folder, self)


class BpeTokenizer:
    """Byte-level BPE (the `tokenizers` library); ids 0..N-2 are its tokens, N-1 separates documents.

    The separator is no special token of the library's model, so text that spells one is encoded like any other text.
    """

    def __init__(self, model_json: str):
        self._json = model_json
        self._model = _library().Tokenizer.from_str(model_json)
        vocabulary = self._model.get_vocab(with_added_tokens=False)
        self.vocab_size = len(vocabulary) + 1
        self.eos_id = self.vocab_size - 1
        self.spec = f"bpe:{self.vocab_size}"
        to_byte = {character: byte for byte, character in _byte_characters().items()}
        self._pieces: list[bytes] = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            self._pieces[index] = bytes(to_byte[character] for character in token)
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)

    def encode(self, text: bytes | str) -> np.ndarray:
        """Returns the ids, int32 [n].

        Raises:
            ConfigError: the bytes are not valid UTF-8.
        """
        return np.concatenate([np.zeros(0, np.int32), *self.blocks(text)])

    def blocks(self, text: bytes | str) -> Iterator[np.ndarray]:
        """Yields the ids of `encode` in blocks."""
        try:
            text = text if isinstance(text, str) else bytes(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise field_error(_FIELD, self.spec, f"the text is not valid UTF-8 ({error})", 'Use "bytes"') from error
        pieces = iter(_pieces_of(text))
        while batch := list(itertools.islice(pieces, _BLOCK)):
            for encoding in self._model.encode_batch(batch, add_special_tokens=False):
                yield np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of the ids; separators stand for nothing."""
        return b"".join([self._pieces[i] for i in _checked(ids, self.vocab_size).tolist()])

    def save(self, folder: str | Path) -> None:
        """Writes the library's own `tokenizer.json` and the small file that names the kind."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        _replace(Path(folder) / _BPE_FILE, self._json)
        _save_kind(folder, self)

    def __getstate__(self):
        return self._json

    def __setstate__(self, state):
        self.__init__(state)


def vocab_size_of(spec: str) -> int:
    """Returns the number of ids of a tokenizer spec, without any data: "bytes" -> 257, "bpe:4096" -> 4096.

    Raises:
        ConfigError: unknown spec, or a vocabulary that cannot hold the 256 bytes and the separator.
    """
    if spec == ByteTokenizer.spec:
        return ByteTokenizer.vocab_size
    kind, _, size = str(spec).partition(":")
    if kind != "bpe" or not size.isdecimal():
        hint = nearest(kind, ("bytes", "bpe")) if kind != "bpe" else "the vocabulary size is missing"
        raise field_error(
            _FIELD, spec, f"unknown tokenizer, {hint}", 'Use "bytes" or "bpe:VOCAB", for example "bpe:4096"'
        )
    if int(size) < 257:
        raise field_error(_FIELD, spec, "256 bytes and a separator do not fit", "Use a vocabulary of at least 257")
    return int(size)


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> BpeTokenizer:
    """Trains byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: UTF-8 documents.
        vocab_size: exact number of ids, the separator included.

    Raises:
        ConfigError: the `tokenizers` library is missing, or the texts are too few for that many tokens.
    """
    library = _library()
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[],
        initial_alphabet=sorted(_byte_characters().values()),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _pieces_of(bytes(text).decode("utf-8")))
    model.train_from_iterator(pieces, trainer)
    tokenizer = BpeTokenizer(model.to_str())
    if tokenizer.vocab_size != vocab_size:
        raise field_error(
            _FIELD,
            f"bpe:{vocab_size}",
            f"the train split is too small, it yields only {tokenizer.vocab_size} tokens",
            f'Use "bpe:{tokenizer.vocab_size}" or less, or more text',
        )
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote.

    Raises:
        ConfigError: the folder holds no tokenizer.
    """
    try:
        kind = json.loads((Path(folder) / _KIND_FILE).read_text("utf-8"))["kind"]
        if kind == "bytes":
            return ByteTokenizer()
        return BpeTokenizer((Path(folder) / _BPE_FILE).read_text("utf-8"))
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f"no tokenizer in {folder} ({error}). Name a folder that a run wrote.") from error


def _save_kind(folder: str | Path, tokenizer: Tokenizer) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    kind = tokenizer.spec.partition(":")[0]
    _replace(Path(folder) / _KIND_FILE, json.dumps({"kind": kind, "vocab_size": tokenizer.vocab_size}))


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.incomplete")
    scratch.write_text(text, "utf-8")
    scratch.replace(path)


def _as_bytes(text: bytes | str) -> bytes:
    return text.encode("utf-8") if isinstance(text, str) else text


def _checked(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"token ids must be in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    return ids


def _pieces_of(text: str) -> Iterable[str]:
    start = 0
    while start < len(text):
        stop = start + _PIECE
        newline = text.find("\n", stop) if stop < len(text) else -1
        # A text without newlines is cut anywhere between two characters: bounded work matters more than one merge.
        stop = newline + 1 if 0 <= newline < stop + _PIECE else stop
        yield text[start:stop]
        start = stop


def _byte_characters() -> dict[int, str]:
    """Returns the printable character that byte-level BPE (GPT-2) writes for each byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in visible}
    hidden = (byte for byte in range(256) if byte not in table)
    return {**table, **{byte: chr(256 + n) for n, byte in enumerate(hidden)}}


def _library():
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f'{_FIELD} = "bpe:...": the tokenizers library is not installed. '
            'Install it with pip install "attnlab[data]", or use "bytes".'
        ) from error
    return tokenizers

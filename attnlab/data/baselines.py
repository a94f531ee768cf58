"""What cheap models of the same bytes achieve, in bits per byte: the figures to print beside a language model's.

All functions take the text as bytes or as an iterable of chunks.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable

import numpy as np

Text = bytes | bytearray | memoryview | Iterable[bytes]


def byte_counts(text: Text) -> np.ndarray:
    """Returns how often each byte occurs, int64 [256]."""
    counts = np.zeros(256, np.int64)
    for chunk in [text] if isinstance(text, bytes | bytearray | memoryview) else text:
        counts += np.bincount(np.frombuffer(chunk, np.uint8), minlength=256)
    return counts


def entropy(text: Text) -> float:
    """Returns the empirical unigram entropy of the text itself: no model that ignores context can do better."""
    counts = byte_counts(text)
    share = counts[counts > 0] / _total(counts)
    return float(-(share * np.log2(share)).sum())


def unigram(train: Text, test: Text) -> float:
    """Returns the cross-entropy on `test` of the byte frequencies of `train`, with add-one smoothing."""
    fitted = byte_counts(train) + 1
    counts = byte_counts(test)
    return float(-(counts * np.log2(fitted / fitted.sum())).sum() / _total(counts))


def gzip_bits(test: Text) -> float:
    """Returns the size of `gzip -9` of the text, header included."""
    whole = _joined(test)
    return 8 * len(gzip.compress(whole, 9, mtime=0)) / len(whole)


def xz_bits(test: Text) -> float:
    """Returns the size of `xz -9e` of the text, header included."""
    whole = _joined(test)
    return 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / len(whole)


def baselines(train: Text, test: Text) -> dict[str, float]:
    """Returns `unigram` (fitted on train), `entropy` (of test itself), `gzip` and `xz`, in bits per byte."""
    whole = _joined(test)
    return {"unigram": unigram(train, whole), "entropy": entropy(whole), "gzip": gzip_bits(whole), "xz": xz_bits(whole)}


def _joined(text: Text) -> bytes:
    whole = bytes(text) if isinstance(text, bytes | bytearray | memoryview) else b"".join(text)
    if not whole:
        raise ValueError("bits per byte of an empty text are not defined")
    return whole


def _total(counts: np.ndarray) -> int:
    total = int(counts.sum())
    if not total:
        raise ValueError("bits per byte of an empty text are not defined")
    return total

"""A needle in a haystack of real text: a sentence with a number somewhere in a long text, and the question for it at the end."""

from __future__ import annotations

import dataclasses
import types
from typing import ClassVar

import numpy as np

from attnlab.data import corpus, storage
from attnlab.data.recall.tasks import RecallTask, Row, ask, empty
from attnlab.data.sources import open_source
from attnlab.data.tokenizers import ByteTokenizer

NAMES = (
    "amber", "basil", "cedar", "daisy", "ember", "fern", "garnet", "hazel", "iris", "jade", "kelp", "lotus", "maple", "nettle",
    "olive", "pearl", "quartz", "rowan", "sage", "topaz", "umber", "violet", "willow", "yarrow",
)  # fmt: skip
_LONGEST = max(map(len, NAMES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(RecallTask):
    """Single and multiple needles over text (Kamradt's test; S-NIAH of "RULER", Hsieh et al., 2024, arXiv 2404.06654), in bytes.

    A needle is a line `The secret number of NAME is DIGITS.`, put at the start of a line of the text, or where the depth says if
    no line begins after it. The row ends with the same words about one of the names, on a new line, and the digits, which are
    asked for one by one, each with those before it given. Text of each split is of files of its own.

    Attributes:
        num_needles: needles in a row, each with another name; one is asked for.
        num_digits: digits of a number.
        shallowest, deepest: where needles lie, as shares of the text: 0 is its start, 1 its end.
        haystack: config.data.name of the text.
    """

    name: ClassVar[str] = "needle"
    num_needles: int = 1
    num_digits: int = 4
    shallowest: float = 0.0
    deepest: float = 1.0
    haystack: str = "stdlib"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.shallowest <= self.deepest <= 1:
            raise self.error("shallowest", f"not a share up to deepest = {self.deepest}", "Set 0 <= shallowest <= deepest <= 1")
        if self.num_needles > len(NAMES):
            raise self.error("num_needles", f"there are {len(NAMES)} names", f"Set at most {len(NAMES)}")

    @property
    def vocab_size(self) -> int:
        """Bytes and the separator of documents."""
        return ByteTokenizer().vocab_size

    @property
    def needed(self) -> int:
        """Needles and question around no text."""
        return (self.num_needles + 1) * len(_sentence("x" * _LONGEST, "0" * self.num_digits))

    def row(self, rng: np.random.Generator, length: int, text: np.ndarray | None = None) -> Row:
        """Makes one row of `length` tokens.

        Args:
            rng: draws text, names, numbers and depths.
            length: T.
            text: token stream of the split (ids of the byte tokenizer).
        """
        names = [NAMES[i] for i in rng.permutation(len(NAMES))[: self.num_needles]]
        numbers = ["".join(map(str, rng.integers(10, size=self.num_digits))) for _ in names]
        needles = [_ids(_sentence(name, number)) for name, number in zip(names, numbers, strict=True)]
        asked = int(rng.integers(self.num_needles))
        question = _ids("\n" + _sentence(names[asked], numbers[asked])[:-2])  # without the full stop and the end of the line
        # One token more than the row: the last digit is a target only.
        size = length + 1 - sum(map(len, needles)) - len(question)
        start = int(rng.integers(len(text) - size))
        hay = np.asarray(text[start : start + size], np.int32)
        lines = np.flatnonzero(hay == 10) + 1
        wanted = np.sort(rng.uniform(self.shallowest, self.deepest, self.num_needles)) * size
        places = [int(next(iter(lines[lines >= depth]), depth)) for depth in wanted]
        parts, at, before, stands = [], 0, 0, 0
        for i, (needle, place) in enumerate(zip(needles, places, strict=True)):
            parts += [hay[before:place], needle]
            at += place - before + len(needle)
            before = place
            if i == asked:
                stands = at - 2 - self.num_digits
        tokens = np.concatenate([*parts, hay[before:], question]).astype(np.int32)
        row = empty(tokens[:-1])
        row.targets[:] = tokens[1:]
        ask(row, length - self.num_digits + np.arange(self.num_digits), stands + np.arange(self.num_digits))
        return row

    def texts(self, directory: str) -> tuple[str, dict[str, np.ndarray]]:
        """Opens the haystack: its fingerprint, and the token stream of each split, memory-mapped."""
        fields = {"name": self.haystack, "dir": directory}
        config = types.SimpleNamespace(data=types.SimpleNamespace(**fields))
        source = open_source(config)
        if source.streamed:
            raise self.error("haystack", "a set of this size is read piece by piece", "Use a smaller set, or text:PATH")
        return source.fingerprint, corpus.open_tokens(source, ByteTokenizer(), storage.cache_dir(config))


def _sentence(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}.\n"


def _ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)

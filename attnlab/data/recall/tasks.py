"""Recall tasks: rows of facts, noise and questions whose answers stand in the row.

A task is a frozen dataclass of its options; `row(rng, length)` makes one row. In every task the answer of a question at
position t stands in the inputs `distance[t]` tokens earlier:

    inputs[t - distance[t]] == targets[t]    wherever mask[t]

`needle` (attnlab.data.recall.needle) is over real text, the others over small vocabularies: noise ids come first, then keys,
then values.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np

from attnlab.errors import ConfigError, field_error, nearest

SPLITS = ("train", "validation", "test")


class Row(NamedTuple):
    """One example.

    Attributes:
        inputs: int32 [T].
        targets: int32 [T]; counts where mask is True.
        mask: bool [T], True at the answers alone.
        distance: int32 [T], tokens from where the answer stands to where it is asked for; 0 where mask is False.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    distance: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallTask:
    """What all tasks share.

    Attributes:
        seed: of the rows; the order in which a run sees them is the run's own seed's matter.
        train_rows: rows in an epoch of training; 0 = new rows for ever.
        eval_rows: rows of the validation split, and of the test split.
        prepared: read the rows from the TFDS builder, prepared once, instead of making them on the fly: the same rows.
    """

    name: ClassVar[str]
    seed: int = 0
    train_rows: int = 0
    eval_rows: int = 512
    prepared: bool = False

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value < self._least(name):
                raise self.error(name, f"must be at least {self._least(name)}", f"Set {self._least(name)} or more")
        if self.prepared and not self.train_rows:
            raise self.error("train_rows", "a prepared set has an end", "Set a number of rows, or prepared=False")

    @staticmethod
    def _least(name: str) -> int:
        return 0 if name in ("seed", "train_rows", "prepared", "num_updates", "gap") else 1

    def error(self, option: str, problem: str, fix: str) -> ConfigError:
        """The one message of a bad option."""
        return field_error(f"config.data.{self.name}.{option}", getattr(self, option), problem, fix)

    def too_short(self, length: int, needed: int) -> ConfigError:
        """The message of rows that do not hold the task."""
        problem = f"a row of {self.name} with these options takes {needed} tokens"
        return field_error("config.seq_len", length, problem, f"Set at least {needed}, or make config.data.{self.name} easier")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    def check(self, length: int) -> None:
        """Raises ConfigError when rows of `length` tokens cannot hold the task."""
        if length < self.needed:
            raise self.too_short(length, self.needed)

    @property
    def needed(self) -> int:
        """Tokens of the shortest row."""
        raise NotImplementedError

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """Makes one row of `length` tokens."""
        raise NotImplementedError

    def describe(self) -> str:
        """The options in one line."""
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items() if name != "prepared")


def empty(inputs: np.ndarray) -> Row:
    """A row without questions."""
    length = len(inputs)
    return Row(inputs, np.zeros(length, np.int32), np.zeros(length, bool), np.zeros(length, np.int32))


def ask(row: Row, at: np.ndarray, stands: np.ndarray) -> None:
    """Asks at positions `at` for the inputs at positions `stands`, in place."""
    row.targets[at] = row.inputs[stands]
    row.mask[at] = True
    row.distance[at] = at - stands


def scatter(rng: np.random.Generator, count: int, width: int, region: int) -> np.ndarray:
    """First positions, ascending int64 [count], of blocks of `width` tokens that do not overlap, uniform over a region."""
    slots = rng.choice(region - count * (width - 1), count, replace=False)
    return np.sort(slots) + np.arange(count) * (width - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValueTask(RecallTask):
    """Facts are pairs of a key and its value; a question is a key alone, and its answer the key's newest value.

    Attributes:
        num_pairs: different keys in a row.
        num_keys, num_values, num_noise: ids of each kind.
        num_questions: questions per row; 0 = one per key.
        value_first: facts are (value, key). A fact is then found at its key's own token, as a question is, and what has to be
            fetched is the token before: far easier to learn, as hard to remember.
    """

    num_pairs: int = 8
    num_keys: int = 32
    num_values: int = 32
    num_noise: int = 1
    num_questions: int = 0
    value_first: bool = False

    @staticmethod
    def _least(name: str) -> int:
        return 0 if name in ("num_questions", "value_first") else RecallTask._least(name)

    def __post_init__(self):
        super().__post_init__()
        if self.num_keys < self.num_pairs:
            raise self.error("num_keys", f"fewer than num_pairs = {self.num_pairs}", f"Set at least {self.num_pairs}")

    @property
    def vocab_size(self) -> int:
        """Noise, keys and values."""
        return self.num_noise + self.num_keys + self.num_values

    @property
    def questions(self) -> int:
        """Questions per row."""
        return self.num_questions or self.num_pairs

    def fill(self, rng: np.random.Generator, length: int, shown: np.ndarray, values: np.ndarray, facts, at: np.ndarray) -> Row:
        """A row of noise with facts and questions in it.

        Args:
            rng: draws the keys, the noise and what is asked.
            length: T.
            shown: which of the row's keys each fact is about, 0..num_pairs - 1.
            values: the facts' values, 0..num_values - 1.
            facts: first positions of the facts, ascending.
            at: positions of the questions.
        """
        keys = self.num_noise + rng.permutation(self.num_keys)[: self.num_pairs]
        row = empty(rng.integers(self.num_noise, size=length, dtype=np.int32))
        value_at = facts + (not self.value_first)
        row.inputs[facts + self.value_first], row.inputs[value_at] = keys[shown], self.num_noise + self.num_keys + values
        newest = np.zeros(self.num_pairs, np.int64)
        newest[shown] = value_at  # in numpy the last of equal indices stays
        asked = np.concatenate([rng.permutation(self.num_pairs), rng.integers(self.num_pairs, size=len(at))])[: len(at)]
        row.inputs[at] = keys[asked]
        ask(row, at, newest[asked])
        return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mqar(KeyValueTask):
    """Multi-query associative recall (Arora et al., "Zoology", 2023, arXiv 2312.04927): facts first, questions among noise after.

    Attributes:
        num_updates: facts that give a key of the row a new value; they come in any order, the newest value is asked for.
        spread: share of the noise that lies between the facts instead of among the questions.
        power: a question at the i-th place after the facts has a probability in proportion to i ** (power - 1): 1 is
            uniform, 0.01 the source's (most questions come soon).
    """

    name: ClassVar[str] = "mqar"
    num_updates: int = 0
    spread: float = 0.0
    power: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.spread <= 1:
            raise self.error("spread", "is a share", "Set a number from 0 to 1")
        if self.power <= 0:
            raise self.error("power", "must be positive", "Set 1 for questions anywhere, or 0.01 for mostly near ones")

    @property
    def needed(self) -> int:
        """Facts and questions without noise."""
        return 2 * (self.num_pairs + self.num_updates) + self.questions

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """Makes one row of `length` tokens."""
        shown = rng.permutation(np.concatenate([np.arange(self.num_pairs), rng.integers(self.num_pairs, size=self.num_updates)]))
        region = 2 * len(shown) + int(self.spread * (length - self.needed))
        facts = scatter(rng, len(shown), 2, region)
        weights = np.arange(1, length - region + 1) ** (self.power - 1.0)
        at = region + rng.choice(length - region, self.questions, replace=False, p=weights / weights.sum())
        return self.fill(rng, length, shown, rng.integers(self.num_values, size=len(shown)), facts, at)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRange(KeyValueTask):
    """Retrieval beyond a window: facts among noise, then noise alone for `gap` tokens, then the questions side by side.

    Attributes:
        gap: at least so many tokens lie between any fact and any question. A stack of L layers that each see the last w
            tokens reaches L w back: with a larger gap it can only guess (1 / num_values).
        shown: times that each key is shown with its value.
    """

    name: ClassVar[str] = "long_range"
    num_keys: int = 8
    num_values: int = 8
    num_questions: int = 16
    gap: int = 64
    shown: int = 1

    @property
    def needed(self) -> int:
        """Facts, gap and questions."""
        return 2 * self.num_pairs * self.shown + self.gap + self.questions

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """Makes one row of `length` tokens."""
        shown = rng.permutation(np.repeat(np.arange(self.num_pairs), self.shown))
        facts = scatter(rng, len(shown), 2, length - self.gap - self.questions)
        values = rng.integers(self.num_values, size=self.num_pairs)[shown]
        return self.fill(rng, length, shown, values, facts, np.arange(length - self.questions, length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(RecallTask):
    """Selective copying (Gu and Dao, "Mamba", 2023, arXiv 2312.00752): values among noise, to be repeated in order at the end.

    The row ends with one mark per value; at the i-th mark the i-th value is asked for. Id 0 is noise, 1 the mark, values follow.

    Attributes:
        num_items: values to copy.
        num_values: ids of values.
    """

    name: ClassVar[str] = "selective_copy"
    num_items: int = 8
    num_values: int = 16

    @property
    def vocab_size(self) -> int:
        """Noise, mark and values."""
        return 2 + self.num_values

    @property
    def needed(self) -> int:
        """Values and marks."""
        return 2 * self.num_items

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """Makes one row of `length` tokens."""
        row = empty(np.zeros(length, np.int32))
        items = scatter(rng, self.num_items, 1, length - self.num_items)
        marks = np.arange(length - self.num_items, length)
        row.inputs[items] = 2 + rng.integers(self.num_values, size=self.num_items)
        row.inputs[marks] = 1
        ask(row, marks, items)
        return row


def from_options(kind: type[RecallTask], options) -> RecallTask:
    """Builds a task from a mapping of its options.

    Raises:
        ConfigError: an unknown option or a bad value.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for option, value in dict(options).items():
        if option not in fields:
            raise field_error(f"config.data.{kind.name}.{option}", value, "no such option", nearest(option, fields).capitalize())
        default = fields[option].default
        if isinstance(default, int) and not isinstance(default, bool) and value != int(value):
            raise field_error(f"config.data.{kind.name}.{option}", value, "not a whole number", "Set a whole number")
        values[option] = type(default)(value)
    return kind(**values)

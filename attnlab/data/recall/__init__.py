"""The recall laboratory's data: multi-query recall, a needle in real text, selective copy, retrieval beyond a window.

    data = open_recall(config)                 # config.data.name = "mqar" | "needle" | "selective_copy" | "long_range"
    batch = next(data.loader("train", batch_size=32, seed=0, shuffle=True, repeat=True))
    batch["inputs"], batch["targets"], batch["mask"], batch["distance"]          # [b, T]

`tasks` makes the rows, `rows` gives random access to them, `builders` publishes them as TFDS sets.
"""

from __future__ import annotations

from attnlab.data.recall.dataset import TASKS, RecallData, defaults, open_recall, task_of, vocab_size
from attnlab.data.recall.needle import Needle
from attnlab.data.recall.rows import GeneratedRows, make_row, split_of
from attnlab.data.recall.tasks import LongRange, Mqar, RecallTask, Row, SelectiveCopy

__all__ = [
    "TASKS",
    "GeneratedRows",
    "LongRange",
    "Mqar",
    "Needle",
    "RecallData",
    "RecallTask",
    "Row",
    "SelectiveCopy",
    "defaults",
    "make_row",
    "open_recall",
    "split_of",
    "task_of",
    "vocab_size",
]

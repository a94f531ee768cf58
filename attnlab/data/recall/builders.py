"""TFDS builders of the recall tasks: array_record files that any loader can read, with no TensorFlow.

    import tensorflow_datasets as tfds
    import attnlab.data.recall.builders                    # registers them
    tfds.builder("recall_mqar/t128", data_dir=DIR, file_format="array_record").download_and_prepare()

or, with any options, `python -m attnlab.data.recall mqar --dir=DIR --seq_len=256 num_pairs=16 num_keys=64`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from attnlab.data.recall.needle import Needle
from attnlab.data.recall.rows import make_row, num_rows
from attnlab.data.recall.tasks import SPLITS, LongRange, Mqar, RecallTask, SelectiveCopy
from attnlab.data.stdlib_code import quiet
from attnlab.data.storage import locked, writing_to

_ROWS = 10_000  # of training, in the configs that have a name


@dataclasses.dataclass(eq=False)
class RecallConfig(tfds.core.BuilderConfig):
    """One difficulty: a task with its options, the length of its rows, and where derived text is kept ("" = the user's cache)."""

    task: RecallTask = dataclasses.field(default_factory=Mqar)
    seq_len: int = 128
    text_dir: str = ""


def recall_config(task: RecallTask, seq_len: int, *, name: str = "", text_dir: str = "") -> RecallConfig:
    """Returns the builder config of a task; by default its name says the length and a hash of all options."""
    decisive = {field: value for field, value in dataclasses.asdict(task).items() if field != "prepared"}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return RecallConfig(
        name=name or f"t{seq_len}-{digest}", description=task.describe(), task=task, seq_len=seq_len, text_dir=text_dir
    )


class _RecallBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders share: one example per row, `inputs`, `targets`, `distance` int32 [T] and `mask` bool [T]."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "A split owns its rows by a hash of their inputs."}  # noqa: RUF012 (the base class's form)
    url_infos = {}  # noqa: RUF012 (nothing is downloaded)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        integers = tfds.features.Tensor(shape=(config.seq_len,), dtype=np.int32)
        features = dict.fromkeys(("inputs", "targets", "distance"), integers)
        features["mask"] = tfds.features.Tensor(shape=(config.seq_len,), dtype=np.bool_)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{type(self).__doc__} {config.task.describe()}",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(
                task=config.task.name,
                options=json.dumps(dataclasses.asdict(config.task)),
                vocab_size=config.task.vocab_size,
                numpy=np.__version__,
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        config = self.builder_config
        config.task.check(config.seq_len)
        text = (config.task.texts(config.text_dir)[1][split].stream,) if isinstance(config.task, Needle) else ()
        for index in range(num_rows(config.task, split)):
            yield index, make_row(config.task, split, index, config.seq_len, *text)._asdict()


class RecallMqar(_RecallBuilder):
    """Multi-query associative recall: pairs (key, value), then keys whose newest values are asked for."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        recall_config(Mqar(train_rows=_ROWS), 128, name="t128"),
        recall_config(Mqar(train_rows=_ROWS, num_pairs=64, num_keys=256, num_values=256, power=0.01), 512, name="t512-p64"),
    ]


class RecallNeedle(_RecallBuilder):
    """A needle in a haystack of real text, in bytes."""

    BUILDER_CONFIGS = [recall_config(Needle(train_rows=_ROWS), 512, name="t512")]  # noqa: RUF012


class RecallSelectiveCopy(_RecallBuilder):
    """Selective copying: values among noise, repeated in order at the end."""

    BUILDER_CONFIGS = [recall_config(SelectiveCopy(train_rows=_ROWS), 128, name="t128")]  # noqa: RUF012


class RecallLongRange(_RecallBuilder):
    """Retrieval beyond a window: facts, a long gap, questions."""

    BUILDER_CONFIGS = [recall_config(LongRange(train_rows=_ROWS), 128, name="t128")]  # noqa: RUF012


BUILDERS = {Mqar: RecallMqar, Needle: RecallNeedle, SelectiveCopy: RecallSelectiveCopy, LongRange: RecallLongRange}


def prepared_folder(task: RecallTask, seq_len: int, data_dir: Path, text_dir: str = "") -> str:
    """Prepares the builder of a task below `data_dir` (once, by one process at a time) and returns its version's folder."""
    config = recall_config(task, seq_len, text_dir=text_dir)
    with quiet():
        builder = BUILDERS[type(task)](data_dir=data_dir, config=config, file_format="array_record")
        if not builder.is_prepared():
            with writing_to(data_dir), locked(data_dir / f".{builder.name}-{config.name}.lock"):
                if not builder.is_prepared():
                    builder.download_and_prepare(file_format="array_record")
    return os.fspath(builder.data_dir)

"""Evaluation on a fixed part of a split, used by the loop and by eval.py."""

from __future__ import annotations

import itertools
from typing import Any

from attnlab.data import Dataset
from attnlab.training.build import Run
from attnlab.training.mesh import data_shard, global_batch


def evaluate(run: Run, state: Any, dataset: Dataset, split: str, num_batches: int | None, *, step_fn=None) -> dict[str, float]:
    """Evaluates a state on a split.

    The batches are the same at every call: the whole split in order when `num_batches` is None, else that many batches
    of rows drawn over the whole split with a fixed seed.

    Returns:
        The task's figures, `loss` among them.
    """
    config = run.config
    shardings = {name: spec.sharding for name, spec in run.eval_batch_spec.items()}
    index, count = data_shard(next(iter(shardings.values())), config.batch_size)
    loader = dataset.loader(
        split,
        batch_size=config.batch_size,
        seed=0,
        shuffle=num_batches is not None,
        repeat=False,
        shard_index=index,
        shard_count=count,
    )
    sums = []
    with run.context():
        for batch in itertools.islice(loader, num_batches):
            batch = global_batch(run.task.eval_batch(batch, dataset), shardings, config.batch_size)
            sums.append((step_fn or run.eval_step)(state, batch))
    return run.task.figures({name: sum(float(value[name]) for value in sums) for name in sums[0]} if sums else {})

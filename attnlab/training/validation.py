"""Evaluation on a fixed part of a split, used by the loop and by eval.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from attnlab.data import TextData
from attnlab.training.build import Run
from attnlab.training.mesh import data_shard, global_batch


def evaluate(run: Run, state: Any, text: TextData, split: str, num_batches: int | None, *, step_fn=None) -> dict[str, float]:
    """Evaluates a state on a split.

    The batches are the same at every call: the whole split in order when `num_batches` is None, else that many batches
    of windows drawn over the whole split with a fixed seed.

    Returns:
        `loss` (nats per token), `bits_per_byte`, `accuracy`, `tokens`, `bytes`.
    """
    config = run.config
    shardings = {name: spec.sharding for name, spec in run.eval_batch_spec.items()}
    index, count = data_shard(shardings["inputs"], config.batch_size)
    loader = text.loader(
        split,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=0,
        shuffle=num_batches is not None,
        repeat=False,
        shard_index=index,
        shard_count=count,
    )
    sums = []
    with run.context():
        for batch in itertools.islice(loader, num_batches):
            batch["target_bytes"] = target_bytes(batch, text.tokenizer.token_bytes)
            batch = global_batch(batch, shardings, config.batch_size)
            sums.append((step_fn or run.eval_step)(state, batch))
    totals = {name: sum(float(value[name]) for value in sums) for name in sums[0]} if sums else {}
    tokens = totals.get("weight", 0.0)
    loss = totals["loss"] / tokens if tokens else math.nan
    text_bytes = totals.get("bytes", 0.0)
    return {
        "loss": loss,
        "bits_per_byte": totals["loss"] / math.log(2) / text_bytes if text_bytes else math.nan,
        "accuracy": totals["correct"] / tokens if tokens else math.nan,
        "tokens": int(tokens),
        "bytes": int(text_bytes),
    }


def target_bytes(batch: dict[str, np.ndarray], token_bytes: np.ndarray) -> np.ndarray:
    """Bytes of text that each counted target stands for, [b, T] int32."""
    return (np.asarray(token_bytes)[batch["targets"]] * batch["mask"]).astype(np.int32)



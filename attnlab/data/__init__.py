"""Data: sources, tokenizers, packing and resumable loaders. `open_text(config)` is the way in.

    data = open_text(config)
    loader = data.loader("train", batch_size=32, seq_len=512, seed=0, shuffle=True, repeat=True)
    batch = next(loader)                 # inputs, targets, mask, record (and segment_ids, positions when packed)
    loader.set_state(loader.get_state())

`config` needs `data.name` and, as wanted, `data.{dir, tokenizer, packing, workers, feature, errors}`.
"""

from __future__ import annotations

from attnlab.data.dataset import Batches, Dataset
from attnlab.data.text import TextData, batch_spec, open_text
from attnlab.data.tokenizers import load_tokenizer, vocab_size_of

__all__ = ["Batches", "Dataset", "TextData", "batch_spec", "load_tokenizer", "open_text", "vocab_size_of"]

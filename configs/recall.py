"""The recall laboratory: can a mixer find a fact again, how far back, and beyond the length that it was trained on?

    python train.py --config=configs/recall.py:mqar --config.model.mixer=gla --workdir=runs/gla
    python eval.py  --config=configs/recall.py:mqar --config.model.mixer=gla --workdir=runs/gla --report

eval.py prints the accuracy by distance between a fact and its question, at the trained length and at 2, 4 and 8 times as many
tokens, writes it to `eval.json`, and with --report draws it in `report.html`.

Presets (`--config=configs/recall.py:NAME`):
    mqar            multi-query associative recall: 4 pairs of 8 keys and 8 values, asked for anywhere in the rest of 64 tokens.
    long_range      4 such pairs among the first 24 of 64 tokens, asked for at the end, at least 24 tokens later.
    selective_copy  8 of 16 values among 64 tokens, to be repeated in order.
    needle          a line `The secret number of NAME is DIGITS.` in 256 bytes of the standard library's source text.
    reader          16 of 32 keys, each after its value, in 80 tokens; two layers of width 32, the first of which only brings every
                    token the one before it, so that the second alone has to remember. What the claims are tried with.
    smoke           mqar, a few steps: does everything work? Under a minute on two CPU cores, offline.

Two layers of width 64, but for `reader`; the presets run for minutes on two CPU cores. With softmax attention mqar ends near an
accuracy of 1 (chance is 1/8); a state of fixed size holds fewer pairs, a window reaches less far. Another difficulty is one
field, as in --config.data.mqar.num_pairs=8 or --config.data.long_range.gap=32; `attnlab/data/recall/tasks.py` says what each means.

Parts: tasks and TFDS builders `attnlab/data/recall`, task `language_modeling` (loss at the answers alone), model `lm` with any mixer
(the linear ones with their short convolutions, without which one layer cannot join a key with the value after it), evaluation
`attnlab/training/evaluate_recall.py`. `benchmarks/claims_recall.py` compares mixers.
"""

import ml_collections

from attnlab.data import recall
from attnlab.training.config import base, preset


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {
        "mqar": mqar, "long_range": long_range, "selective_copy": selective_copy, "needle": needle, "reader": reader, "smoke": smoke,
    }  # fmt: skip
    return preset(presets, arg, "configs/recall.py")().lock()


def small(name: str, seq_len: int, steps: int, **options):
    """Two layers for two CPU cores."""
    config = base()
    config.data.name = name
    config.data.update(ml_collections.ConfigDict(recall.defaults()))
    config.data[name].update(options)
    config.seq_len, config.batch_size, config.num_train_steps = seq_len, 32, steps
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, steps // 4, steps // 4
    config.eval_batches = 4
    model = config.model
    model.num_layers, model.dim, model.num_heads, model.mlp_dim = 2, 64, 2, 64
    model.dtype, model.scan_layers, model.tie_embeddings = "float32", False, False
    for mixer in ("gla", "gdn", "sse"):
        model.mixer_options[mixer].use_short_conv = True
    for mixer in ("titans_lmm", "titans_mag", "titans_mal"):
        model.mixer_options[mixer].conv_width = 4
    for mixer in ("titans_lmm", "titans_mac", "titans_mag", "titans_mal"):
        # Smaller steps than by default, where one trial of MAG diverged (perhaps many like tokens in a chunk).
        model.mixer_options[mixer].update({"chunk_size": 16, "theta_max": 0.05})
    for mixer in ("titans_mag", "titans_mal"):
        model.mixer_options[mixer].window = 16
    config.optimizer.learning_rate, config.optimizer.weight_decay = 1e-3, 0.0  # at 3e-3 little is learned
    return config


def mqar():
    """Multi-query associative recall."""
    return small("mqar", 64, 800, num_pairs=4, num_keys=8, num_values=8, num_noise=8, num_questions=16)


def long_range():
    """Beyond a window."""
    return small("long_range", 64, 800, num_pairs=4, num_noise=8, gap=24)


def selective_copy():
    """In order, among noise."""
    return small("selective_copy", 64, 800)


def needle():
    """In real text."""
    return small("needle", 256, 800)


def reader():
    """A first layer that brings every token the one before it, and a second that has to remember."""
    config = small("mqar", 80, 1000, num_pairs=16, num_keys=32, num_values=8, num_questions=16, value_first=True)
    model = config.model
    model.dim, model.mlp_dim, model.num_heads, model.pattern = 32, 32, 1, ("shift", "softmax")
    model.mixer_options.shift = ml_collections.ConfigDict({"mixer": "softmax", "window": 1, "head_dim": 32})
    model.mixer_options.softmax.rope = False
    for mixer in ("gla", "gdn", "sse"):
        model.mixer_options[mixer].update({"use_short_conv": False, "use_output_gate": False, "chunk_size": 16})
    for mixer in ("titans_lmm", "titans_mag", "titans_mal"):
        model.mixer_options[mixer].conv_width = 0
    config.optimizer.learning_rate, config.optimizer.b2, config.optimizer.warmup_steps = 5e-3, 0.95, 50
    return config


def smoke():
    """The smallest run that still does everything."""
    config = mqar()
    config.data.mqar.update({"num_pairs": 2, "num_keys": 4, "num_values": 4, "num_questions": 4, "eval_rows": 32})
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.batch_size, config.seq_len = 8, 16
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.model.dim, config.model.scan_layers = 32, True
    return config

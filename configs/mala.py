"""Magnitude-aware linear attention (arXiv 2507.00698) in a language model, beside softmax and plain linear attention.

    python train.py --config=configs/mala.py:small --workdir=runs/mala
    python eval.py  --workdir=runs/mala --report
    python train.py --config=configs/mala.py:0.3b --aot=tpu:v5e:4x4

The causal form is attnlab's extension: the paper reports a language model of 0.3 billion parameters, trained on 15 billion tokens,
on par with a Transformer, and released none of it. The published vision backbones are `attnlab.models.mavit`.

Parts: `attnlab/ops/magnitude_aware.py` (the operator), `nn/magnitude_aware.py` (mixer; module over maps), `models/lm.py`,
`models/mavit.py` (the image backbone).

Presets (`--config=configs/mala.py:NAME`):
    small            bytes, T = 256, width 128, 3 layers; minutes on two CPU cores.
    small_softmax    the same with softmax attention.       small_divided   with plain normalised linear attention.
    0.3b             24 layers of width 1024, T = 2048, 15 billion tokens: 16 chips.
    smoke            two layers, a few steps: does everything work? Under a minute on two CPU cores, offline.
"""

from attnlab.training.config import base, preset


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {
        "small": small, "small_softmax": softmax, "small_divided": divided, "0.3b": language_model, "smoke": smoke,
    }  # fmt: skip
    return preset(presets, arg, "configs/mala.py")().lock()


def small():
    """A byte-level model for two CPU cores."""
    config = base()
    config.num_train_steps = 600
    config.batch_size, config.seq_len = 8, 256
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 20, 200, 200
    config.model.num_layers, config.model.dim, config.model.num_heads = 3, 128, 4
    config.model.mixer = "magnitude_aware"
    config.model.dtype = "float32"  # a CPU has no fast bfloat16
    config.optimizer.learning_rate = 2e-3
    return config


def softmax():
    """The same with softmax attention."""
    config = small()
    config.model.mixer = "softmax"
    return config


def divided():
    """The same with rows that are divided by their sum, whatever the query's length."""
    config = small()
    config.model.mixer_options.magnitude_aware.variant = "divided"
    return config


def smoke():
    """The smallest run that still does everything."""
    config = small()
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.seq_len = 128
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.num_layers, config.model.dim, config.model.num_heads = 2, 64, 2
    return config


def language_model():
    """The size of the paper's language model; its recipe is not published."""
    config = base()
    config.batch_size, config.seq_len = 256, 2048
    config.num_train_steps = 28_600  # 15 billion tokens
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 1000, 1000
    config.data.tokenizer, config.data.packing = "bpe:32768", "packed"
    config.model.num_layers, config.model.dim, config.model.num_heads = 24, 1024, 16
    config.model.mixer, config.model.remat = "magnitude_aware", "full"
    config.loss_chunk = 512
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-4, 1000
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config

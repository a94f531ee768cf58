"""SinkLoRA and LongLoRA: a longer context for a trained decoder, by grouped attention and adapters.

    python train.py --config=configs/sinklora.py --config.init_from=runs/base --workdir=runs/sinklora
    python eval.py  --workdir=runs/sinklora

"SinkLoRA" (2024, arXiv 2406.05678) on "LongLoRA" (ICLR 2024, arXiv 2309.12307). `init_from` is the workdir of a trained run
whose `model.*` fields are these, its mixer "softmax".

Parts: the mixers "sf" and "s2" (`attnlab.nn.shifted`, `attnlab.ops.shifted`: grouped in training, full attention in
evaluation and decoding), position interpolation (`mixer_options.*.rope_scaling`), adapters with trained norms and embeddings
(`attnlab.methods.lora`, `config.lora`), and for decoding the H2O cache (`attnlab.inference.heavy_hitter`).

Presets (`--config=configs/sinklora.py:NAME`):
    sf        the paper's recipe: LLaMA-2 7B from 4096 to 8192 tokens by SF-Attn, 1000 steps of 64 sequences. Eight
              accelerators of 80 GB. The paper has perplexity 7.85 on proof-pile at 8192.
    s2        the same by S2-Attn (LongLoRA).
    smoke     a few steps of a tiny model: under a minute on two CPU cores, offline.
    pretrain  the small experiment's first phase: four layers, 128 tokens. About two minutes on two CPU cores.
    extend    its second: 512 tokens, factor 4, from a run of `pretrain`. About a minute.

`benchmarks/sinklora.py` runs the small experiment on text with long repeats and compares S2, SF, plain groups and full.
"""

from attnlab.training.config import base, preset


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {"sf": lambda: paper("sf"), "s2": lambda: paper("s2"), "smoke": smoke, "pretrain": pretrain, "extend": extend}
    return preset(presets, arg, "configs/sinklora.py")().lock()


def paper(mixer: str):
    """LLaMA-2 7B, 4096 to 8192 tokens."""
    config = base()
    config.seq_len, config.batch_size, config.num_train_steps = 8192, 64, 1000
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 10, 250, 250
    config.loss_chunk = 512
    config.data.tokenizer = "bpe:32000"
    config.model.update({"num_layers": 32, "dim": 4096, "num_heads": 32, "mlp_dim": 11008, "tie_embeddings": False, "remat": "full"})
    config.model.mixer = mixer
    config.model.mixer_options[mixer].rope_scaling = 2.0  # interpolation_factor(8192, 4096)
    config.lora.rank, config.lora.alpha = 8, 16.0
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps = 2e-5, "constant", 20
    optimizer.b1, optimizer.b2, optimizer.weight_decay = 0.9, 0.95, 0.0
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def pretrain():
    """A tiny decoder with a short context."""
    config = base()
    config.seq_len, config.batch_size, config.num_train_steps = 128, 32, 800
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 400, 400
    config.model.update({"num_layers": 4, "dim": 64, "num_heads": 4, "dtype": "float32"})
    config.optimizer.learning_rate = 3e-3
    return config


def extend():
    """The same decoder on four times the length."""
    config = pretrain()
    config.seq_len, config.batch_size, config.num_train_steps = 512, 8, 100
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 10, 100, 100
    config.model.mixer = "sf"
    for mixer in ("softmax", "s2", "sf"):
        config.model.mixer_options[mixer].rope_scaling = 4.0
    config.lora.rank, config.lora.alpha = 8, 16.0
    config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup_steps = 2e-3, "constant", 10
    config.optimizer.weight_decay = 0.0
    return config


def smoke():
    """The smallest run that still does everything but start from another run."""
    config = extend()
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.batch_size, config.seq_len = 4, 128
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.num_layers, config.model.dim, config.model.num_heads = 2, 32, 4
    return config

"""Grassmann mixing against attention: the attention-free language model of arXiv 2512.19428 and its baselines.

    python train.py --config=configs/grassmann.py:small --workdir=runs/grassmann
    python eval.py  --workdir=runs/grassmann --report
    python train.py --config=configs/grassmann.py:12 --aot=tpu:v5e:2x2

Parts: `attnlab/ops/grassmann.py` (Pluecker features), `nn/grassmann.py` (mixing, blocks), `models/grassmann_lm.py` (this model),
`models/grassmann_nli.py` (the sentence-pair head).

Presets (`--config=configs/grassmann.py:NAME`):
    6, 12              the paper's models (6 layers, T = 128; 12 layers, T = 256): width 256, r = 32, 12.6 and 17.4 million
                       parameters, 30 epochs of WikiText-2 (--config.data.name=text:FOLDER; without it Python's own library). One
                       accelerator, some minutes. Paper: validation perplexity 275.7 and 261.1, transformer 248.4 and 235.2;
                       reproductions: 245 to 254, transformer 169 to 182. Recipe of the reproduction, the paper has none.
    transformer6, transformer12   the baselines: the same model with 4 heads of softmax attention.
    small              the small experiment: bytes, T = 128, width 128, 3 layers, r = 16; minutes on two CPU cores.
    small_transformer  its baseline.       small_control   planes replaced by [z_t; z_(t-d)], as many parameters.
    smoke              two layers, a few steps: does everything work? Under a minute on two CPU cores, offline.

One offset per layer, the other reading of the paper's 12 entries: --config.model.offset_schedule=per_layer.
"""

from attnlab.training.config import base, preset

_OFFSETS = {6: (1, 2, 4, 8, 12, 16), 12: (1, 1, 2, 2, 4, 4, 8, 8, 12, 12, 16, 16)}


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {
        "6": lambda: paper(6), "12": lambda: paper(12),
        "transformer6": lambda: attention(paper(6)), "transformer12": lambda: attention(paper(12)),
        "small": small, "small_transformer": lambda: attention(small()), "small_control": lambda: control(small()),
        "smoke": smoke,
    }  # fmt: skip
    return preset(presets, arg, "configs/grassmann.py")().lock()


def _model():
    config = base()
    model = config.model
    model.name, model.mixer, model.norm, model.mlp = "grassmann_lm", "grassmann", "layernorm", "gelu"
    model.max_len = 0  # learned positions; 0 = seq_len
    model.offset_schedule = "all"  # or per_layer
    model.norm_style = "pre"  # or post, as the paper's text
    model.use_final_norm = True
    model.num_heads = 4
    model.mixer_options.softmax.rope, model.mixer_options.softmax.proj_bias = False, True
    return config


def paper(layers: int):
    """The paper's sizes with the reproduction's recipe."""
    config = _model()
    config.seq_len, config.batch_size = (128, 32) if layers == 6 else (256, 16)
    config.num_train_steps = 18_000  # 30 epochs of about 600 steps
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 600, 600
    config.data.tokenizer = "bpe:30522"
    model, optimizer = config.model, config.optimizer
    model.num_layers, model.dim, model.mlp_dim, model.dropout = layers, 256, 1024, 0.1
    model.mixer_options.grassmann.offsets = _OFFSETS[layers]
    model.mixer_options.grassmann.dropout = model.mixer_options.softmax.dropout = 0.1
    optimizer.learning_rate, optimizer.weight_decay, optimizer.b2 = 3e-4, 0.01, 0.999
    optimizer.final_fraction, optimizer.warmup_steps = 0.0, 0
    return config


def attention(config):
    """The same with softmax attention."""
    config.model.mixer = "softmax"
    return config


def control(config):
    """The same without geometry: a linear map of both tokens; 3 r' = r + P keeps the number of parameters."""
    options = config.model.mixer_options.grassmann
    width = options.reduced_dim
    options.features, options.reduced_dim = "linear", (width + width * (width - 1) // 2) // 3
    return config


def small():
    """The small experiment."""
    config = _model()
    config.num_train_steps = 600
    config.batch_size, config.seq_len = 16, 128
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 20, 200, 200
    config.model.num_layers, config.model.dim = 3, 128
    config.model.dtype = "float32"  # a CPU has no fast bfloat16
    config.model.mixer_options.grassmann.reduced_dim = 16
    config.optimizer.learning_rate = 2e-3
    return config


def smoke():
    """The smallest run that still does everything."""
    config = small()
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.batch_size, config.seq_len = 8, 64
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.num_layers, config.model.dim = 2, 64
    config.model.mixer_options.grassmann.reduced_dim = 8
    return config

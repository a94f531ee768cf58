"""Sparse state expansion (arXiv 2507.16577): linear attention over P sparse state partitions, and its hybrid SSE-H.

    python train.py --config=configs/sse.py:smoke --workdir=runs/sse_smoke       # two CPU cores, under a minute
    python train.py --config=configs/sse.py:600m --workdir=runs/sse              # the paper's recipe: 15B tokens
    python train.py --config=configs/sse.py:2b-h --aot=tpu:v5p:4x4x4             # does it fit? No hardware needed

Presets (`--config=configs/sse.py:NAME`):
    600m      600M parameters on 15B tokens, n4k1, SSE-GLA; `600m-h`: every 6th layer is softmax; `600m-gdn`: delta rule.
    2b        2B parameters on 100B tokens; `2b-h` the hybrid.
    released  the released model configuration: 24 layers, width 2048, 6 heads of 256, two writers and readers of four.
    small     a byte-level model for two CPU cores, some minutes.
    smoke     two linear layers and a softmax one, a few steps.

Hardware and time: 600m for 15B tokens is about 10^20 FLOPs, a day on 8 H100s or a v5e-32 at 30% utilisation; the paper reports
recall averages of 31.16 (n4k1) and 37.84 (gdn), against 18.63 for gated linear attention, after it.

Parts: mixers `sse` (attnlab.nn.sparse_state), `gla`, `gdn` (attnlab.nn.gated_linear), `softmax`; model `lm`; task
`language_modeling`, which adds the sown load balance loss (0.01). Ops: attnlab.ops.sparse_state, linear_scan, chunk_scan.
Another P or k: --config.model.mixer_options.sse.num_partitions=8 --config.model.mixer_options.sse.num_writers=2 (and readers).
"""

from attnlab.training.config import base, preset

# Layers (18 with three of softmax are the paper's), width and heads of 256 to the paper's parameter counts, tokens.
_SIZES = {
    "600m": {"num_layers": 18, "dim": 1536, "num_heads": 5, "tokens": 15e9},
    "2b": {"num_layers": 24, "dim": 2560, "num_heads": 8, "tokens": 100e9},
    "released": {"num_layers": 24, "dim": 2048, "num_heads": 6, "tokens": 100e9},
}
_LINEAR_TO_FULL = 5


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {
        "600m": lambda: sized("600m"),
        "600m-h": lambda: sized("600m", hybrid=True),
        "600m-gdn": lambda: sized("600m", rule="gdn"),
        "2b": lambda: sized("2b"),
        "2b-h": lambda: sized("2b", hybrid=True),
        "released": lambda: sized("released", choices=2),
        "small": small,
        "smoke": smoke,
    }
    return preset(presets, arg, "configs/sse.py")().lock()


def sse(hybrid: bool = False):
    """What all presets share."""
    config = base()
    config.model.mixer = "sse"
    if hybrid:
        config.model.pattern = ("sse",) * _LINEAR_TO_FULL + ("softmax",)
    options = config.model.mixer_options.sse
    options.num_partitions, options.num_writers, options.num_readers = 4, 1, 1
    options.aux_weight = 0.01
    # As published, the decay rates of the delta rule have no weight decay either.
    config.optimizer.groups.vectors.match = r"(^|/)(scale|bias|gamma|a_log|dt_bias)$"
    return config


def sized(name: str, hybrid: bool = False, rule: str = "gla", choices: int = 1):
    """The paper's sizes: bfloat16 compute, subword vocabulary, sharded over `fsdp`."""
    size = _SIZES[name]
    config = sse(hybrid)
    config.seq_len, config.batch_size = 4096, 256
    config.num_train_steps = int(size["tokens"] // (config.seq_len * config.batch_size))
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 2000, 1000
    config.data.tokenizer, config.data.packing = "bpe:32768", "packed"
    model = config.model
    model.num_layers, model.dim, model.num_heads, model.head_dim = size["num_layers"], size["dim"], size["num_heads"], 256
    model.tie_embeddings = name == "600m"
    model.remat = "full"
    options = model.mixer_options.sse
    options.rule = rule
    options.num_writers = options.num_readers = choices
    options.expand_v = 2.0 if rule == "gdn" else 1.0
    config.loss_chunk = 512
    config.optimizer.learning_rate = 4e-4 if name == "600m" else 3e-4
    config.optimizer.warmup_steps = 1000
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def small():
    """A byte-level hybrid for two CPU cores."""
    config = sse(hybrid=True)
    config.num_train_steps = 400
    config.batch_size, config.seq_len = 16, 256
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 20, 200, 200
    config.model.num_layers, config.model.dim, config.model.num_heads = 6, 128, 2
    config.model.dtype = "float32"  # a CPU has no fast bfloat16
    config.optimizer.learning_rate = 3e-3
    return config


def smoke():
    """The smallest run that still does everything."""
    config = small()
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.batch_size, config.seq_len = 8, 64
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.pattern = ("sse", "sse", "softmax")
    config.model.num_layers, config.model.dim, config.model.num_heads = 3, 64, 2
    config.model.mixer_options.sse.chunk_size = 16
    return config

"""Titans: a memory learned at test time, alone (LMM) or beside attention (MAC, MAG, MAL); arXiv 2501.00663.

    python train.py --config=configs/titans.py:smoke --workdir=runs/titans_smoke
    python train.py --config=configs/titans.py:mac --workdir=runs/titans_mac        # accelerators; see below
    python train.py --config=configs/titans.py:mac-340m --aot=tpu:v5e:8x16          # does it fit? no hardware needed

Presets (`--config=configs/titans.py:NAME`):
    lmm, mac, mag, mal     the paper's recipe at 340M parameters (the default is mac): T = 4096, 0.5M tokens per step, 15B tokens,
                           AdamW 4e-4 with cosine decay, weight decay 0.1, a vocabulary of 32768.
    mac-170m, mac-340m, mac-400m, mac-760m (and lmm-.., mag-.., mal-..)   the paper's sizes. It gives neither depth nor width nor
                           the memory's shape: these are ours (memories of width 64 per head, two layers, inner width 256).
    lucid                  the recipe of lucidrains/titans-pytorch on bytes: 8 layers of width 384, attention in segments of 32, 4
                           persistent tokens, memories with chunks of 4 refreshed every 128 tokens (here as layers in turn).
    small                  MAC of 1.5M parameters on bytes for two CPU cores: about ten minutes.
    smoke                  two layers, a few steps: under a minute on two CPU cores, offline; the loss falls below 5.

The paper's perplexities on WikiText at 340M / 15B tokens: LMM 26.18, MAC 25.43, MAG 25.07, MAL 24.69 (Transformer++ 31.52).

Parts: the update `attnlab.ops.neural_memory` (tiles of chunks: `attnlab.ops.tiles`), windows `attnlab.ops.local_attention`, the
mixers `attnlab.nn.titans` and `attnlab.nn.titans_memory`, the lucidrains variants `attnlab.ops.lucid_memory`,
`attnlab.nn.titans_lucid` and `attnlab.nn.segmented`; tests/ops/test_neural_memory.py, tests/nn/test_titans.py,
tests/golden/adapters/titans.py.
"""

from attnlab.training.config import base, preset

_VARIANTS = ("mac", "mag", "mal", "lmm")
# Parameters with MAC; 64 features per head.
_SIZES = {
    "170m": {"num_layers": 16, "dim": 768, "num_heads": 12},
    "340m": {"num_layers": 20, "dim": 1024, "num_heads": 16},
    "400m": {"num_layers": 24, "dim": 1024, "num_heads": 16},
    "760m": {"num_layers": 20, "dim": 1536, "num_heads": 24},
}
_TOKENS = {"170m": 15e9, "340m": 15e9, "400m": 15e9, "760m": 30e9}


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one, MAC at 340M, when none is named."""
    presets = {variant: lambda variant=variant: paper(variant, "340m") for variant in _VARIANTS}
    presets |= {f"{v}-{size}": lambda v=v, size=size: paper(v, size) for v in _VARIANTS for size in _SIZES}
    presets |= {"lucid": lucid, "small": small, "smoke": smoke}
    return preset(presets, arg, "configs/titans.py")().lock()


def paper(variant: str, size: str):
    """One of the paper's models: bfloat16 outside the memory, sharded over `fsdp`."""
    config = base()
    config.seq_len, config.batch_size = 4096, 128
    config.num_train_steps = round(_TOKENS[size] / (config.seq_len * config.batch_size))
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 1000, 1000
    config.data.tokenizer = "bpe:32768"
    config.data.packing = "packed"
    config.model.update(_SIZES[size])
    config.model.mixer = f"titans_{variant}"
    config.model.remat = "full"
    _memory(config, variant, chunk=128, heads=config.model.num_heads, expansion=4.0, conv=4)
    config.loss_chunk = 512
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 4e-4, 1000
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def lucid():
    """The open implementation's recipe."""
    config = base()
    config.seq_len, config.batch_size, config.num_train_steps = 512, 4, 100_000
    config.grad_accum = 4
    config.data.name = "stdlib"
    config.model.num_layers, config.model.dim, config.model.num_heads = 16, 384, 6
    config.model.pattern = ("segmented", "titans_lucid")
    config.model.mixer_options.segmented.update({"segment_len": 32, "num_longterm": 4, "num_persistent": 4})
    options = {"chunk_size": 4, "batch_size": 128, "max_lr": 0.1, "qk_norm": True}
    config.model.mixer_options.titans_lucid.update(options)
    config.optimizer.learning_rate = 2e-4
    return config


def small():
    """MAC on bytes for two CPU cores."""
    config = base()
    config.num_train_steps = 400
    config.batch_size, config.seq_len = 8, 256
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 20, 200, 200
    config.model.mixer = "titans_mac"
    config.model.num_layers, config.model.dim, config.model.num_heads = 4, 128, 4
    config.model.dtype = "float32"  # a CPU has no fast bfloat16
    _memory(config, "mac", chunk=32, heads=4, expansion=2.0, conv=0)
    config.optimizer.learning_rate = 2e-3
    return config


def smoke():
    """The smallest run that still does everything."""
    config = small()
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.batch_size, config.seq_len = 8, 64
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.num_layers, config.model.dim, config.model.num_heads = 2, 64, 2
    _memory(config, "mac", chunk=16, heads=2, expansion=2.0, conv=0)
    return config


def _memory(config, variant: str, *, chunk: int, heads: int, expansion: float, conv: int):
    """Sets the memory of one variant; MAC's segments are its chunks, and its memory has no convolutions here."""
    options = config.model.mixer_options[f"titans_{variant}"]
    options.update({"chunk_size": chunk, "memory_heads": heads, "memory_expansion": expansion, "num_persistent": 4})
    if variant != "mac":
        options.conv_width = conv
    if variant in ("mag", "mal"):
        options.window = chunk

"""Routing Transformer: block-local heads beside heads that attend inside clusters of online k-means.

Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers" (TACL 2021, arXiv 2003.05997).

    python train.py --config=configs/routing_transformer.py --workdir=runs/routing
    python train.py --config=configs/routing_transformer.py:pg19 --aot=tpu:v5e:4x8
    python train.py --config=configs/routing_transformer.py:small --workdir=runs/routing_small

Presets (`--config=configs/routing_transformer.py:NAME`), the published sizes and recipe (Adafactor, rsqrt schedule):
    enwik8_8k    S = 8192, 12 layers, 4 local + 4 routing heads, 16 clusters of 512. Published: 0.99 bits per byte.
    enwik8_12k   S = 12288, 48 clusters of 256.
    wikitext103  S = 4096, 14 layers, 8 + 8 heads, 8 clusters of 512. Published: test perplexity 15.8 (words).
    pg19         S = 8192, 22 layers, 6 + 2 heads, routing in the last layer alone. Published: perplexity 33.2 (words).
    small        two CPU cores, about 20 minutes, on the built-in text.
    smoke        a few steps of a tiny model: under a minute on two CPU cores, offline.
The published sizes want accelerators: 8 to 64 TPU cores or GPUs for days; ask `--aot` first. enwik8 is read from the folder
`enwik8/` (put the unpacked file there, or set --config.data.name=text:PATH), the others through TFDS.

Parts: attnlab/nn/routing.py (mixer; `--config.model.mixer_options.routing.rule=causal` is strictly causal),
attnlab/ops/{routing,kmeans,block_window,relative}.py, attnlab/models/lm.py. The PyTorch port's attention is the mixer
`kmeans` (attnlab/nn/kmeans_attention.py). The claim is tried by benchmarks/routing_recall.py.

Differences from the published runs: the MLP is gated by SiLU instead of GELU, embeddings are not factorised, targets are
not dropped, and subword vocabularies are our own.
"""

import ml_collections

from attnlab.training.config import base, preset

# seq_len, num_layers, dim, mlp_dim, num_heads, routing heads, clusters, block, layers without routing
_SIZES = {
    "enwik8_8k": (8192, 12, 1024, 3072, 8, 4, 16, 256, 0),
    "enwik8_12k": (12288, 12, 1024, 3072, 8, 4, 48, 128, 0),
    "wikitext103": (4096, 14, 1024, 3072, 16, 8, 8, 256, 0),
    "pg19": (8192, 22, 1032, 4096, 8, 2, 16, 256, 21),
}


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {name: lambda name=name: published(name) for name in _SIZES} | {"small": small, "smoke": smoke}
    return preset(presets, arg, "configs/routing_transformer.py")().lock()


def published(name: str):
    """The sizes and the optimizer of the paper."""
    seq_len, num_layers, dim, mlp_dim, num_heads, routing_heads, clusters, block, skipped = _SIZES[name]
    config = base()
    config.seq_len, config.batch_size, config.num_train_steps = seq_len, 32, 200_000
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 2000, 1000
    config.loss_chunk = 512
    model = config.model
    model.num_layers, model.dim, model.mlp_dim, model.num_heads = num_layers, dim, mlp_dim, num_heads
    model.norm, model.tie_embeddings, model.remat = "layernorm", False, "full"
    _mix(config, routing_heads, clusters, block, skipped)
    _adafactor(config, warmup_steps=10_000)
    config.mesh.data, config.mesh.fsdp = (-1, 8) if name == "pg19" else (1, -1)  # a width of 1032 has few divisors
    if name.startswith("enwik8"):
        config.data.name = "text:enwik8"
    elif name == "wikitext103":
        config.data.name, config.data.tokenizer, model.dropout = "tfds:huggingface:wikitext/wikitext-103-v1", "bpe:32768", 0.4
    else:
        config.data.name, config.data.feature, config.data.tokenizer = "tfds:pg19", "book_text", "bpe:32768"
    return config


def small():
    """A byte-level model for two CPU cores."""
    config = base()
    config.num_train_steps = 600
    config.batch_size, config.seq_len = 8, 512
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 20, 200, 200
    config.model.num_layers, config.model.dim, config.model.num_heads = 4, 192, 4
    config.model.norm = "layernorm"
    config.model.dtype = "float32"  # a CPU has no fast bfloat16
    _mix(config, routing_heads=2, clusters=16, block=32)
    config.optimizer.learning_rate = 3e-3
    return config


def smoke():
    """The smallest run that still does everything; routing in the later layers alone."""
    config = small()
    config.num_train_steps = 20
    config.batch_size, config.seq_len = 8, 128
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.num_layers, config.model.dim = 2, 64
    _mix(config, routing_heads=2, clusters=8, block=16, skipped=1)
    _adafactor(config, warmup_steps=5)
    config.optimizer.learning_rate = 0.02
    return config


def _mix(config, routing_heads: int, clusters: int, block: int, skipped: int = 0) -> None:
    """Sets the mixers; the first `skipped` layers have local heads alone (the published `sparsity_skip_first`)."""
    options = {"routing_heads": routing_heads, "num_clusters": clusters, "block": block}
    config.model.mixer_options.routing.update(options)
    config.model.mixer_options["local"] = ml_collections.ConfigDict({"mixer": "routing", "routing_heads": 0, "block": block})
    config.model.pattern = ("local",) * skipped + ("routing",) * (config.model.num_layers - skipped) if skipped else ("routing",)


def _adafactor(config, warmup_steps: int) -> None:
    """The published optimizer: rate 0.01 / sqrt(step), relative to the size of each parameter, no momentum."""
    optimizer = config.optimizer
    optimizer.name, optimizer.schedule, optimizer.warmup_steps = "adafactor", "rsqrt", warmup_steps
    optimizer.learning_rate = 0.01 * warmup_steps**-0.5
    optimizer.b1, optimizer.weight_decay, optimizer.clip_norm = 0.0, 0.0, 0.0

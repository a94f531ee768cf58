"""Sigmoid self-attention (arXiv 2409.04431): element-wise sigmoid with the bias -ln n in place of the softmax.

    python train.py --config=configs/sigmoid_attention.py:small --workdir=runs/sigmoid      # two CPU cores, some minutes
    python train.py --config=configs/sigmoid_attention.py:1b --aot=tpu:v5e:16x16            # it fits; no hardware needed
    python benchmarks/sigmoid_norm.py                                                       # the bias against none

Presets (`--config=configs/sigmoid_attention.py:NAME`):
    1b           the paper's language model: 1B parameters, n = 2048, 300k steps, hybrid norm. The paper gives no table of its
                 widths, batch or vocabulary; these are ours. Its training loss ends near 2.05, as softmax attention's does.
    flash        the released kernel configuration: 2 layers of width 3072, n = 2048, bias -7.62, RoPE, QK-norm; 65536 steps.
    alibi        the released ALiBi configuration: 1 layer of width 3072, n = 1024, no bias.
    shakespeare  the released small one: 1 layer of width 384, n = 64, bias -10; on the built-in text, or your own
                 (--config.data.name=text:PATH). Some minutes on two CPU cores.
    small        bytes, 4 layers of width 192, n = 256, beside `configs/lm.py:small`, which differs in the mixer alone.
    smoke        two layers, a few steps: under a minute on two CPU cores, offline.

Parts: mixer `sigmoid` (attnlab.nn.sigmoid), op `attnlab.ops.sigmoid_attention` with its kernels in kernels_pallas/attention (TPU)
and kernels_pallas/attention_triton (GPU), LayerScale and hybrid norm in attnlab.nn.block; tests/ops/test_attention.py,
tests/nn/test_mixers.py, tests/kernels, tests/golden/adapters/sigmoid_attention.py.
Other settings: --config.model.mixer_options.sigmoid.bias=0.0, .alibi=True, .temperature, .activation=softmax.
"""

from attnlab.training.config import base, preset


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {"1b": one_billion, "flash": flash, "alibi": alibi, "shakespeare": shakespeare, "small": small, "smoke": smoke}
    return preset(presets, arg, "configs/sigmoid_attention.py")().lock()


def sigmoid(length: int):
    """What all presets share: the mixer, and its bias by the training length n."""
    config = base()
    config.seq_len = length
    config.model.mixer = "sigmoid"
    config.model.mixer_options.sigmoid.train_length = length
    return config


def released(layers: int, dim: int, length: int, batch: int, warmup: int, steps: int):
    """The released language models: GELU, LayerNorm, QK-norm, AdamW(0.9, 0.95) without weight decay, cosine to 1e-5."""
    config = sigmoid(length)
    config.batch_size, config.num_train_steps = batch, steps
    config.model.num_layers, config.model.dim, config.model.num_heads = layers, dim, 12
    config.model.mlp, config.model.mlp_dim, config.model.norm = "gelu", 4 * dim, "layernorm"
    config.model.scan_layers = False
    config.model.mixer_options.sigmoid.qk_norm = "layernorm"
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.warmup_steps, optimizer.final_fraction = 3e-4, warmup, 1e-5 / 3e-4
    optimizer.b1, optimizer.b2, optimizer.weight_decay = 0.9, 0.95, 0.0
    return config


def flash():
    """Two wide layers at n = 2048."""
    config = released(layers=2, dim=3072, length=2048, batch=24, warmup=4096, steps=65536)
    config.data.tokenizer, config.loss_chunk, config.model.remat = "bpe:32000", 512, "full"
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def alibi():
    """One wide layer at n = 1024, kept near softmax by ALiBi instead of a bias."""
    config = released(layers=1, dim=3072, length=1024, batch=24, warmup=4096, steps=65536)
    config.data.tokenizer, config.loss_chunk, config.model.remat = "bpe:32000", 512, "full"
    options = config.model.mixer_options.sigmoid
    options.alibi, options.rope, options.bias = True, False, 0.0
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def shakespeare():
    """One layer on bytes at n = 64."""
    config = released(layers=1, dim=384, length=64, batch=8, warmup=100, steps=1000)
    config.model.mixer_options.sigmoid.bias = -10.0
    config.model.dtype = "float32"
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 500, 500
    return config


def one_billion():
    """The paper's language model with hybrid norm, bfloat16 compute, sharded over `fsdp`."""
    config = sigmoid(2048)
    config.batch_size, config.num_train_steps = 512, 300_000
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 2000, 1000
    config.data.tokenizer, config.data.packing = "bpe:32768", "packed"
    config.model.update({"num_layers": 16, "dim": 2048, "mlp_dim": 8192, "num_heads": 16, "hybrid_norm": True, "remat": "full"})
    config.loss_chunk = 512
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-4, 2000
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def small():
    """A byte-level model for two CPU cores."""
    config = sigmoid(256)
    config.num_train_steps, config.batch_size = 500, 8
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 20, 250, 250
    config.model.num_layers, config.model.dim, config.model.num_heads = 4, 192, 3
    config.model.dtype, config.model.scan_layers = "float32", False
    config.optimizer.learning_rate = 3e-3
    return config


def smoke():
    """The smallest run that still does everything."""
    config = small()
    config.seq_len = config.model.mixer_options.sigmoid.train_length = 128
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.num_layers, config.model.dim, config.model.num_heads = 2, 64, 2
    config.model.scan_layers = True
    return config

"""A modern decoder language model (`attnlab.models.lm`) with any mixer: the house's base config.

    python train.py --config=configs/lm.py:small --workdir=runs/small
    python eval.py  --config=configs/lm.py:small --workdir=runs/small --report

Presets (`--config=configs/lm.py:NAME`):
    smoke  two layers, a few steps: does everything work? Under a minute on two CPU cores, offline.
    small  the README's run.
    124m, 350m, 1b, 7b   sizes for accelerators, T = 1024 to 4096; ask `--aot=tpu:v5e:16x16` before you book them.

Another mixer is one field: --config.model.mixer=sigmoid, or --config.model.pattern="('sigmoid','softmax')".
"""

from attnlab.training.config import base, preset

# Near the sizes that their names say, with a vocabulary of 32768.
_SIZES = {
    "124m": {"num_layers": 12, "dim": 768, "num_heads": 12, "seq_len": 1024, "batch_size": 512},
    "350m": {"num_layers": 24, "dim": 1024, "num_heads": 16, "seq_len": 2048, "batch_size": 256},
    "1b": {"num_layers": 16, "dim": 2048, "mlp_dim": 8192, "num_heads": 16, "num_kv_heads": 8, "seq_len": 4096, "batch_size": 256},
    "7b": {"num_layers": 32, "dim": 4096, "mlp_dim": 14336, "num_heads": 32, "num_kv_heads": 8, "seq_len": 4096, "batch_size": 256},
}


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    return preset({"small": small, "smoke": smoke, **{name: lambda name=name: sized(name) for name in _SIZES}}, arg,
                  "configs/lm.py")().lock()  # fmt: skip


def small():
    """A byte-level model for two CPU cores: some minutes."""
    config = base()
    config.num_train_steps = 500
    config.batch_size, config.seq_len = 8, 256
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 20, 250, 250
    config.model.num_layers, config.model.dim, config.model.num_heads = 4, 192, 3
    config.model.dtype = "float32"  # a CPU has no fast bfloat16
    config.model.scan_layers = False  # four layers compile fast enough, and run faster
    config.optimizer.learning_rate = 3e-3
    return config


def smoke():
    """The smallest run that still does everything."""
    config = small()
    config.num_train_steps, config.optimizer.warmup_steps = 20, 5
    config.batch_size, config.seq_len = 8, 128
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 5, 10, 10
    config.eval_batches = 4
    config.model.num_layers, config.model.dim, config.model.num_heads = 2, 64, 2
    config.model.scan_layers = True
    return config


def sized(name: str):
    """The accelerator sizes: bfloat16 compute, subword vocabulary of 32768, sharded over `fsdp`."""
    size = dict(_SIZES[name])
    config = base()
    config.seq_len, config.batch_size = size.pop("seq_len"), size.pop("batch_size")
    config.num_train_steps = 100_000
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 2000, 1000
    config.data.tokenizer = "bpe:32768"
    config.data.packing = "packed"
    config.model.update(size)
    config.model.tie_embeddings = name in ("124m", "350m")
    config.model.remat = "full"
    config.loss_chunk = 512
    config.optimizer.learning_rate = {"124m": 6e-4, "350m": 3e-4, "1b": 3e-4, "7b": 3e-4}[name]
    config.optimizer.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config

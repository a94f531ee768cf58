"""Names to implementations, without importing them: `get("mixer", "sigmoid")`.

Three sources, in this order: names registered at run time, the table below, and the entry points of installed
packages (group `attnlab.mixer`, `attnlab.model`, ...), so that another package can add a mixer without a change here:

    from attnlab import registry
    registry.register("mixer", "mine", MyMixer)            # or the string "my_package.mixers:MyMixer"
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from attnlab.errors import ConfigError, nearest

_TABLE: dict[str, dict[str, str]] = {
    "mixer": {
        "softmax": "attnlab.nn.softmax:SoftmaxAttention",
        "sigmoid": "attnlab.nn.sigmoid:SigmoidAttention",
        "bilevel_routing": "attnlab.nn.bilevel_routing:BiLevelRoutingAttention",
        "routing": "attnlab.nn.routing:RoutingAttention",
        "kmeans": "attnlab.nn.kmeans_attention:KMeansAttention",
        "s2": "attnlab.nn.shifted:S2Attention",
        "sf": "attnlab.nn.shifted:SFAttention",
        "grassmann": "attnlab.nn.grassmann:GrassmannMixing",
        "gla": "attnlab.nn.gated_linear:GatedLinearAttention",
        "gdn": "attnlab.nn.gated_linear:GatedDeltaNet",
        "sse": "attnlab.nn.sparse_state:SparseStateExpansion",
        "magnitude_aware": "attnlab.nn.magnitude_aware:MagnitudeAwareAttention",
        "titans_lmm": "attnlab.nn.titans:TitansLMM",
        "titans_mac": "attnlab.nn.titans:TitansMAC",
        "titans_mag": "attnlab.nn.titans:TitansMAG",
        "titans_mal": "attnlab.nn.titans:TitansMAL",
        "titans_lucid": "attnlab.nn.titans_lucid:LucidMemory",
        "segmented": "attnlab.nn.segmented:SegmentedAttention",
        "moh": "attnlab.nn.mixture_of_heads:MixtureOfHeads",
    },
    "model": {
        "biformer": "attnlab.models.biformer:BiFormer",
        "dit": "attnlab.models.dit:DiT",
        "gated_vit": "attnlab.models.gated_vit:GatedViT",
        "grassmann_lm": "attnlab.models.grassmann_lm:GrassmannLM",
        "lm": "attnlab.models.lm:LM",
        "mavit": "attnlab.models.mavit:MAViT",
        "moat": "attnlab.models.moat:MOAT",
        "moh_vit": "attnlab.models.moh_vit:MoHViT",
        "multistream": "attnlab.models.multistream:MultiStreamNet",
        "uniformer": "attnlab.models.uniformer:UniFormer",
        "uniformer_light": "attnlab.models.uniformer_light:UniFormerLight",
        "vit": "attnlab.models.vit:ViT",
    },
    "dataset": dict.fromkeys(("mqar", "needle", "selective_copy", "long_range"), "attnlab.data.recall:open_recall"),
    "evaluation": {
        "denoising": "attnlab.training.evaluate_denoising:DenoisingEvaluation",
        "images": "attnlab.training.evaluate_images:ImageEvaluation",
        "recall": "attnlab.training.evaluate_recall:RecallEvaluation",
        "text": "attnlab.training.evaluate_text:TextEvaluation",
    },
    "task": {
        "diffusion": "attnlab.methods.diffusion:Diffusion",
        "gated_image_classification": "attnlab.methods.gradient_routing:GatedImageClassification",
        "image_classification": "attnlab.methods.image_classification:ImageClassification",
        "language_modeling": "attnlab.methods.language_modeling:LanguageModeling",
    },
}
_registered: dict[str, dict[str, Any]] = {}


def register(kind: str, name: str, target: Any = None):
    """Registers `target` (an object or "module:symbol") under `name`; without a target it is a decorator.

    Raises:
        ConfigError: the name is taken by something else.
    """
    if target is None:
        return lambda obj: register(kind, name, obj)
    known = _registered.setdefault(kind, {})
    taken = known.get(name, _TABLE.get(kind, {}).get(name))
    if taken is not None and taken != target:
        raise ConfigError(f"{kind} {name!r} is already registered as {taken!r}. Choose another name.")
    known[name] = target
    return target


def names(kind: str) -> list[str]:
    """Returns all known names of a kind, sorted."""
    return sorted({*_TABLE.get(kind, {}), *_registered.get(kind, {}), *_entry_points(kind)})


def get(kind: str, name: str) -> Any:
    """Returns the object behind a name, importing it on first use.

    Raises:
        ConfigError: unknown kind or name (with the nearest known one).
    """
    target = _registered.get(kind, {}).get(name) or _TABLE.get(kind, {}).get(name)
    if target is None:
        entry_point = _entry_points(kind).get(name)
        if entry_point is None:
            raise ConfigError(f"unknown {kind} {name!r}: {nearest(name, names(kind))}")
        return entry_point.load()
    if isinstance(target, str):
        module, _, symbol = target.partition(":")
        return getattr(importlib.import_module(module), symbol)
    return target


def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=f"attnlab.{kind}")}

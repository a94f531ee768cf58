"""The config: every field with its default (`base`), the checks made before compute starts, and its JSON form.

A config is a `ml_collections.ConfigDict`. `configs/<system>.py:get_config(arg)` starts from `base()`, changes what its
system needs and returns it locked, so that an unknown field on the command line is an error and not a new field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ml_collections

from attnlab import registry
from attnlab.errors import ConfigError, field_error, nearest
from attnlab.methods import fields

# Fields that may differ between a run and its resumption: none of them changes what a step computes.
RESUMABLE = (
    "num_train_steps",
    "log_every_steps",
    "eval_every_steps",
    "eval_batches",
    "checkpoint_every_steps",
    "checkpoint.",
    "mesh.",
    "sharding_rules",
    "grad_accum",
    "loss_chunk",
    "profile_steps",
    "data.workers",
    "data.dir",
    "model.remat",
)
# Logical axis name -> mesh axis (or several, or None). The first five are of parameters, those with `act_` of activations.
SHARDING_RULES = (
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("head_dim", None),
    ("norm", None),
    ("layers", None),
    ("act_batch", ("data", "fsdp")),
    ("act_seq", "context"),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)
MESH_AXES = ("data", "fsdp", "tensor", "context")

def base(task: str = "language_modeling") -> ml_collections.ConfigDict:
    """Returns a config with every field at its default; which fields there are beyond the common ones depends on the task."""
    config = ml_collections.ConfigDict()
    config.task = task
    config.seed = 0
    config.num_train_steps = 1000
    config.batch_size = 16  # rows (sequences, images) per step, over all devices and processes
    config.grad_accum = 1
    config.ema_decay = 0.0
    config.log_every_steps = 10
    config.eval_every_steps = 250
    config.eval_batches = 16
    config.checkpoint_every_steps = 250
    config.checkpoint = ml_collections.ConfigDict({"keep": 3, "keep_every": 0})
    config.init_from = ""  # workdir of a run, or file of published weights, whose parameters this one starts from
    config.profile_steps = ()  # (first, last): write a profiler trace of these steps to <workdir>/profile

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-3
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 50
    optimizer.final_fraction = 0.1  # of the peak learning rate, at the last step
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0
    optimizer.groups = ml_collections.ConfigDict(
        {"vectors": {"match": r"(^|/)(scale|bias|gamma)$", "weight_decay": 0.0, "learning_rate_scale": 1.0, "frozen": False}}
    )

    config.lora = lora = ml_collections.ConfigDict()  # fields of methods.lora.LoRA
    lora.rank = 0  # 0 = no adapters: everything is trained
    lora.alpha = 16.0
    lora.targets = r"(^|/)(query|key|value|out)/kernel$"
    lora.train = "embed|norm"  # what is trained beside the adapters
    lora.two_inputs = r"(^|/)out/kernel$"
    lora.stacked = r"(^|/)layers/"

    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1})
    config.sharding_rules = SHARDING_RULES
    registry.get("task", task).defaults(config)
    return config


def preset(presets: dict[str, Any], arg: str | None, file: str) -> Any:
    """Picks the preset named after the colon of `--config=FILE:ARG`; None picks the first."""
    if arg is None:
        return next(iter(presets.values()))
    if arg not in presets:
        raise ConfigError(f"--config={file}:{arg}: there is no preset {arg!r}; {nearest(arg, presets)}")
    return presets[arg]


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted field, value) of every leaf, in sorted order."""
    for key in sorted(config.keys()):
        value = config[key]
        if hasattr(value, "keys"):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(map(_listed, value)) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    return list(map(_listed, value)) if isinstance(value, list | tuple) else value


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the config as indented JSON with sorted keys."""
    nested: dict[str, Any] = {}
    for field, value in flatten(config):
        *path, leaf = field.split(".")
        node = nested
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return json.dumps(nested, indent=1, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads what `to_json` wrote; lists become tuples again."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return ml_collections.ConfigDict({key: restore(item) for key, item in value.items()})
        return tuple(map(restore, value)) if isinstance(value, list) else value

    return restore(json.loads(text)).lock()


def complete(saved: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Adds fields that are younger than a saved config, with their defaults; those of the model are the model's own."""
    saved = saved.copy_and_resolve_references()

    def fill(node: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict, prefix: str = "") -> None:
        for key, value in defaults.items():
            if prefix + key in ("model", "optimizer.groups"):
                continue
            if key not in node:
                node[key] = value
            elif isinstance(value, ml_collections.ConfigDict):
                fill(node[key], value, f"{prefix}{key}.")

    with saved.unlocked():
        fill(saved, base(saved.task))
    return saved.lock()


def differences(saved: ml_collections.ConfigDict, present: ml_collections.ConfigDict) -> list[tuple[str, Any, Any]]:
    """Returns (field, saved value, present value) of every difference that changes what a step computes.

    Options of mixers that the run does not use do not count, and a field that is younger than the run had its default.
    """
    if saved.task != present.task:
        return [("task", saved.task, present.task)]
    idle = fields.idle_options(present.model)
    old, new = dict(flatten(base(saved.task))) | dict(flatten(saved)), dict(flatten(present))
    return [
        (field, old.get(field), new.get(field))
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and not field.startswith(RESUMABLE + idle)
    ]


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every field that can be checked without data or devices.

    Raises:
        ConfigError: the first bad field, with its value and the fix.
    """
    values = dict(flatten(config))
    fields.one_of("task", config.task, registry.names("task"))
    fields.one_of("model.name", config.model.name, registry.names("model"))
    fields.check(
        values,
        positive=(
            "num_train_steps", "batch_size", "grad_accum", "log_every_steps", "eval_every_steps", "eval_batches",
            "checkpoint_every_steps", "checkpoint.keep",
        ),
        not_negative=(
            "checkpoint.keep_every", "data.workers", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm",
            "optimizer.learning_rate",
        ),
    )  # fmt: skip
    if not 0 <= config.ema_decay < 1:
        raise field_error("config.ema_decay", config.ema_decay, "must be in [0, 1)", "Set 0 to switch it off")
    for field in ("model.dtype", "model.param_dtype"):
        fields.one_of(field, values[field], ("bfloat16", "float32", "float16"))
    if config.profile_steps and (len(config.profile_steps) != 2 or config.profile_steps[0] > config.profile_steps[1]):
        raise field_error("config.profile_steps", config.profile_steps, "is not (first, last)", "Set two steps, or ()")
    if config.batch_size % config.grad_accum:
        raise field_error(
            "config.grad_accum", config.grad_accum, f"does not divide config.batch_size = {config.batch_size}",
            f"Set one of {fields.divisors(config.batch_size)}",
        )  # fmt: skip
    registry.get("task", config.task).validate(config, values)

"""The config: every field with its default (`base`), the checks made before compute starts, and its JSON form.

A config is a `ml_collections.ConfigDict`. `configs/<system>.py:get_config(arg)` starts from `base()`, changes what its
system needs and returns it locked, so that an unknown field on the command line is an error and not a new field.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict

from attnlab import registry
from attnlab.errors import ConfigError, field_error, nearest

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
_COMMON_MIXER_FIELDS = {
    "dim", "num_heads", "num_kv_heads", "head_dim", "dtype", "param_dtype", "parent", "name", "train_length",
    "capture_attention",
}  # fmt: skip


def base() -> ml_collections.ConfigDict:
    """Returns a config with every field at its default: a small byte-level decoder on the standard-library text."""
    config = ml_collections.ConfigDict()
    config.task = "language_modeling"
    config.seed = 0
    config.num_train_steps = 1000
    config.batch_size = 16  # sequences per step, over all devices and processes
    config.seq_len = 256
    config.grad_accum = 1
    config.ema_decay = 0.0
    config.loss_chunk = 0  # tokens of a sequence per cross-entropy chunk; 0 = the whole sequence at once
    config.log_every_steps = 10
    config.eval_every_steps = 250
    config.eval_batches = 16
    config.checkpoint_every_steps = 250
    config.checkpoint = ml_collections.ConfigDict({"keep": 3, "keep_every": 0})
    config.init_from = ""  # workdir of a run whose parameters this one starts from
    config.profile_steps = ()  # (first, last): write a profiler trace of these steps to <workdir>/profile

    config.data = data = ml_collections.ConfigDict()
    data.name = "stdlib"  # or tfds:NAME/CONFIG, or text:PATH
    data.dir = ""  # where prepared data sets live; "" = the user's cache
    data.tokenizer = "bytes"  # or bpe:VOCAB
    data.packing = "windows"  # or packed
    data.workers = 0
    data.feature = "text"
    data.errors = "strict"  # or skip: leave undecodable files out, counted

    config.model = model = ml_collections.ConfigDict()
    model.name = "lm"
    model.mixer = "softmax"
    model.pattern = ()  # mixers (or aliases of mixer_options) that repeat over the layers; wins over `mixer`
    model.num_layers = 4
    model.dim = 256
    model.num_heads = 4
    model.num_kv_heads = 0  # 0 = num_heads
    model.head_dim = 0  # 0 = dim / num_heads
    model.mlp = "gated"
    model.mlp_dim = 0  # 0 = 8/3 dim for gated, 4 dim for gelu
    model.norm = "rmsnorm"
    model.layer_scale = 0.0
    model.hybrid_norm = False
    model.tie_embeddings = True
    model.vocab_size = 0  # 0 = the tokenizer's
    model.dropout = 0.0
    model.scan_layers = True
    model.remat = "none"
    model.dtype = "bfloat16"
    model.param_dtype = "float32"
    model.mixer_options = mixer_options()

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
    return config


def mixer_options() -> ml_collections.ConfigDict:
    """Returns the options of every built-in mixer with their defaults, read off the modules' fields."""
    options = ml_collections.ConfigDict()
    for name in registry.names("mixer"):
        module = registry.get("mixer", name)
        options[name] = ml_collections.ConfigDict()
        for field in dataclasses.fields(module):
            if field.name in _COMMON_MIXER_FIELDS or field.default is dataclasses.MISSING or callable(field.default):
                continue
            default = field.default
            options[name][field.name] = _placeholder(module, field.name) if default is None else default
    return options


def _placeholder(module: type, name: str) -> Any:
    """A field that is None until set: ml_collections wants to know the type that it may take."""
    owner = next(cls for cls in module.__mro__ if name in vars(cls).get("__annotations__", {}))
    hint = owner.__annotations__[name]
    if isinstance(hint, str):
        hint = eval(hint, vars(sys.modules[owner.__module__]))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    hint = typing.get_origin(hint) or hint
    return config_dict.placeholder(hint if isinstance(hint, type) else object)


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


def differences(saved: ml_collections.ConfigDict, present: ml_collections.ConfigDict) -> list[tuple[str, Any, Any]]:
    """Returns (field, saved value, present value) of every difference that changes what a step computes.

    Options of mixers that the run does not use do not count, and a field that is younger than the run had its default.
    """
    idle = tuple(f"model.mixer_options.{name}." for name in present.model.mixer_options if name not in _used(present.model))
    old, new = dict(flatten(base())) | dict(flatten(saved)), dict(flatten(present))
    return [
        (field, old.get(field), new.get(field))
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and not field.startswith(RESUMABLE + idle)
    ]


def _used(model: ml_collections.ConfigDict) -> set[str]:
    """The mixers of the pattern and what they are aliases of."""
    entries = layer_pattern(model)
    return {*entries, *(model.mixer_options.get(entry, {}).get("mixer", entry) for entry in entries)}


def layer_pattern(model: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the mixers that repeat over the layers: `model.pattern`, or just `model.mixer`."""
    return tuple(model.pattern) or (model.mixer,)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every field that can be checked without data or devices.

    Raises:
        ConfigError: the first bad field, with its value and the fix.
    """
    positive = (
        "num_train_steps", "batch_size", "seq_len", "grad_accum", "log_every_steps",
        "eval_every_steps", "eval_batches", "checkpoint_every_steps", "checkpoint.keep",
        "model.num_layers", "model.dim", "model.num_heads",
    )  # fmt: skip
    not_negative = (
        "loss_chunk", "checkpoint.keep_every", "data.workers", "model.num_kv_heads", "model.head_dim", "model.mlp_dim",
        "model.vocab_size", "model.layer_scale", "optimizer.warmup_steps", "optimizer.weight_decay",
        "optimizer.clip_norm", "optimizer.learning_rate",
    )  # fmt: skip
    fields = dict(flatten(config))
    for field in positive:
        if not fields[field] >= 1:
            raise field_error(f"config.{field}", fields[field], "must be at least 1", "Set a positive number")
    for field in not_negative:
        if not fields[field] >= 0:
            raise field_error(f"config.{field}", fields[field], "must not be negative", "Set 0 or more")
    for field in ("ema_decay", "model.dropout"):
        if not 0 <= fields[field] < 1:
            raise field_error(f"config.{field}", fields[field], "must be in [0, 1)", "Set 0 to switch it off")
    _one_of("task", config.task, registry.names("task"))
    _one_of("model.name", config.model.name, registry.names("model"))
    _one_of("data.packing", config.data.packing, ("windows", "packed"))
    _one_of("model.mlp", config.model.mlp, ("gated", "gelu"))
    _one_of("model.norm", config.model.norm, ("rmsnorm", "layernorm"))
    for field in ("model.dtype", "model.param_dtype"):
        _one_of(field, fields[field], ("bfloat16", "float32", "float16"))
    if config.profile_steps and (len(config.profile_steps) != 2 or config.profile_steps[0] > config.profile_steps[1]):
        raise field_error("config.profile_steps", config.profile_steps, "is not (first, last)", "Set two steps, or ()")
    _validate_remat(config.model.remat)
    _validate_heads(config.model)
    for entry in layer_pattern(config.model):
        options = config.model.mixer_options.get(entry, {})
        name = options.get("mixer", entry) if options else entry
        if name not in registry.names("mixer"):
            where = "config.model.pattern" if config.model.pattern else "config.model.mixer"
            known = {*registry.names("mixer"), *config.model.mixer_options.keys()}
            raise field_error(where, entry, "is not a mixer", nearest(entry, known).capitalize().rstrip("?"))
    if config.batch_size % config.grad_accum:
        raise field_error(
            "config.grad_accum", config.grad_accum, f"does not divide config.batch_size = {config.batch_size}",
            f"Set one of {_divisors(config.batch_size)}",
        )  # fmt: skip
    if config.loss_chunk and config.seq_len % config.loss_chunk:
        raise field_error(
            "config.loss_chunk", config.loss_chunk, f"does not divide config.seq_len = {config.seq_len}",
            f"Set 0 (off) or one of {_divisors(config.seq_len)[-6:]}",
        )  # fmt: skip


def _one_of(field: str, value: str, known: Any) -> None:
    if value not in known:
        hint = nearest(str(value), known)
        raise field_error(f"config.{field}", value, "is not known", hint[0].upper() + hint[1:].rstrip("?"))


def _validate_remat(name: str) -> None:
    from attnlab.models.lm import REMAT_POLICIES  # flags are parsed before jax is needed

    _one_of("model.remat", name, REMAT_POLICIES)


def _validate_heads(model: ml_collections.ConfigDict) -> None:
    if not model.head_dim and model.dim % model.num_heads:
        raise field_error(
            "config.model.num_heads", model.num_heads, f"does not divide config.model.dim = {model.dim}",
            f"Set one of {_divisors(model.dim)}, or give config.model.head_dim",
        )  # fmt: skip
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise field_error(
            "config.model.num_kv_heads", model.num_kv_heads,
            f"does not divide config.model.num_heads = {model.num_heads}", f"Set one of {_divisors(model.num_heads)}",
        )  # fmt: skip


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

"""What the config of every task shares: the fields of mixers by name, and checks with one clear message."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from attnlab import registry
from attnlab.errors import field_error, nearest

_COMMON = {
    "dim", "num_heads", "num_kv_heads", "head_dim", "dtype", "param_dtype", "parent", "name", "train_length",
    "capture_attention",
}  # fmt: skip


def mixer_options() -> ml_collections.ConfigDict:
    """Returns the options of every built-in mixer with their defaults, read off the modules' fields."""
    options = ml_collections.ConfigDict()
    for name in registry.names("mixer"):
        module = registry.get("mixer", name)
        options[name] = ml_collections.ConfigDict()
        for field in dataclasses.fields(module):
            if field.name in _COMMON or field.default is dataclasses.MISSING or callable(field.default):
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


def layer_pattern(model: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the mixers that repeat over the layers: `model.pattern`, or just `model.mixer`."""
    return tuple(model.pattern) or (model.mixer,)


def idle_options(model: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Prefixes of the options of mixers that a model does not use (neither themselves nor through an alias)."""
    if "mixer_options" not in model:
        return ()
    entries = layer_pattern(model)
    used = {*entries, *(model.mixer_options.get(entry, {}).get("mixer", entry) for entry in entries)}
    return tuple(f"model.mixer_options.{name}." for name in model.mixer_options if name not in used)


def validate_mixers(model: ml_collections.ConfigDict) -> None:
    """Checks that every mixer of the pattern exists, and the heads.

    Raises:
        ConfigError: the first bad field, with its value and the fix.
    """
    if not model.head_dim and model.dim % model.num_heads:
        raise field_error(
            "config.model.num_heads", model.num_heads, f"does not divide config.model.dim = {model.dim}",
            f"Set one of {divisors(model.dim)}, or give config.model.head_dim",
        )  # fmt: skip
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise field_error(
            "config.model.num_kv_heads", model.num_kv_heads,
            f"does not divide config.model.num_heads = {model.num_heads}", f"Set one of {divisors(model.num_heads)}",
        )  # fmt: skip
    for entry in layer_pattern(model):
        options = model.mixer_options.get(entry, {})
        name = options.get("mixer", entry) if options else entry
        if name not in registry.names("mixer"):
            where = "config.model.pattern" if model.pattern else "config.model.mixer"
            known = {*registry.names("mixer"), *model.mixer_options.keys()}
            raise field_error(where, entry, "is not a mixer", nearest(entry, known).capitalize().rstrip("?"))


def check(fields: dict[str, Any], *, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
    """Checks the signs of fields (by dotted names).

    Raises:
        ConfigError: the first bad one.
    """
    for field in positive:
        if not fields[field] >= 1:
            raise field_error(f"config.{field}", fields[field], "must be at least 1", "Set a positive number")
    for field in not_negative:
        if not fields[field] >= 0:
            raise field_error(f"config.{field}", fields[field], "must not be negative", "Set 0 or more")


def one_of(field: str, value: str, known: Any) -> None:
    """Checks that a field has one of the known values.

    Raises:
        ConfigError: with the nearest known one.
    """
    if value not in known:
        hint = nearest(str(value), known)
        raise field_error(f"config.{field}", value, "is not known", hint[0].upper() + hint[1:].rstrip("?"))


def divisors(n: int) -> list[int]:
    """Returns the divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]

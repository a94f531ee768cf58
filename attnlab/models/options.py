"""Image models in the config: `config.model` holds the fields of the module by their names.

    config.model = options("biformer", **biformer.SIZES["tiny"])       # in configs/
    model = from_options(BiFormer, config.model, num_classes=1000)     # in BiFormer.from_config
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from ml_collections import config_dict

from attnlab import registry
from attnlab.errors import ConfigError, nearest

Module = TypeVar("Module", bound=nn.Module)
_TYPES = ("dtype", "param_dtype")
_LEFT_OUT = {"parent", "name", "num_classes", "image_shape", "capture_attention"}


def options(name: str, **changes: Any) -> ml_collections.ConfigDict:
    """Returns `config.model` of a registered image model: its name, and every field with its default or the changed value.

    A field that holds keyword arguments of a part (a mapping) becomes a config of its own with what it is given here.
    """
    fields = {field.name: field for field in dataclasses.fields(registry.get("model", name)) if field.name not in _LEFT_OUT}
    unknown = set(changes) - set(fields)
    if unknown:
        raise TypeError(f"{name} has no field {', '.join(sorted(unknown))}")
    model = ml_collections.ConfigDict({"name": name})
    for key, field in fields.items():
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value = changes.get(key, default)
        if key in _TYPES:
            value = jnp.dtype(value).name
        model[key] = config_dict.placeholder(object) if value is None else dict(value) if isinstance(value, Mapping) else value
    return model


class ImageModel(nn.Module):
    """Base of the image models: their published sizes, and the way from `config.model`."""

    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def sized(cls, size: str, **changes: Any) -> Self:
        """Returns the published model of that name with some fields changed.

        Raises:
            ConfigError: unknown name.
        """
        if size not in cls.sizes:
            raise ConfigError(f"size = {size!r}: unknown, {nearest(size, cls.sizes)}")
        return cls(**{**cls.sizes[size], **changes})

    @classmethod
    def from_config(cls, model: Any, num_classes: int, image_shape: tuple[int, ...]) -> Self:
        """Builds the module from `config.model`, for images [Y, X, C] (of video: [F, Y, X, C]).

        Raises:
            ConfigError: images that the model cannot take.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        shape = {"image_shape": tuple(image_shape)} if "image_shape" in fields else {}
        return from_options(cls, model, num_classes=num_classes, **shape)


def from_options(cls: type[Module], model: Any, **fields: Any) -> Module:
    """Returns the module of `config.model`; `fields` are those that the data decide."""
    given = {key: _plain(model[key]) for key in model.keys() if key != "name"}  # noqa: SIM118 (ConfigDict)
    return cls(**given | {key: jnp.dtype(given[key]) for key in _TYPES if key in given} | fields)


def _plain(value: Any) -> Any:
    if hasattr(value, "keys"):
        return {key: _plain(value[key]) for key in value.keys()}  # noqa: SIM118 (ConfigDict)
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value

"""Logical axis names on parameters and activations; they do nothing without a mesh and rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec


class Named(nn.LogicallyPartitioned):
    """A parameter with logical axis names that also crosses `flax.nnx.bridge` where no mesh is set."""

    def to_nnx_metadata(self) -> dict[str, Any]:
        """Returns the metadata of an `nnx.Variable`; without a mesh nnx refuses names under its own key."""
        metadata = super().to_nnx_metadata()
        if jax.sharding.get_abstract_mesh().empty:
            metadata["logical_names"] = metadata.pop("out_sharding")
        return metadata

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> Named:
        """Undoes `to_nnx_metadata`."""
        if "logical_names" in metadata:
            metadata = dict(metadata)
            metadata["out_sharding"] = metadata.pop("logical_names")
        return super().from_nnx_metadata(metadata)


def named(init: Callable[..., jax.Array], *names: str | None) -> Callable[..., Named]:
    """Returns the initializer with a logical name for each axis of its result."""
    names = tuple(None if name in names[:place] else name for place, name in enumerate(names))  # one axis each
    return lambda *args, **kwargs: Named(init(*args, **kwargs), names)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lays an activation out on the mesh by the logical names of its dimensions.

    Acts under `jax.set_mesh` and `flax.linen.logical_axis_rules` only. A mesh axis that does not divide the dimension
    is left out (one token of a decode step has no sequence to cut).
    """
    rules = dict(nn.get_logical_axis_rules())
    mesh = jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty or mesh._any_axis_manual:
        return x
    spec = []
    for size, name in zip(x.shape, names, strict=True):
        target = rules.get(name)
        axes = (target,) if isinstance(target, str) else tuple(target or ())
        axes = tuple(axis for axis in axes if axis in mesh.axis_names)
        spec.append(axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

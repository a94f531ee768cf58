"""Logical axis names on activations; they do nothing without a mesh and rules."""

from __future__ import annotations

import math

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec


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

"""From logical axis names to shardings: the rules of the config, applied to parameters, optimizer state and batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.errors import field_error, nearest
from attnlab.training.config import SHARDING_RULES

Rules = Sequence[tuple[str, Any]]


def check_rules(rules: Rules, mesh: Mesh) -> None:
    """Refuses rules that name a mesh axis that does not exist, or a logical name that the house does not use."""
    known = {name for name, _ in SHARDING_RULES}
    for name, target in rules:
        if name not in known:
            raise field_error("config.sharding_rules", name, "is not a logical axis name", nearest(name, known))
        for axis in (target,) if isinstance(target, str) else target or ():
            if axis not in mesh.axis_names:
                raise field_error("config.sharding_rules", (name, target), f"{axis!r} is not a mesh axis",
                                  f"Use one of {mesh.axis_names}")  # fmt: skip


def batch_sharding(mesh: Mesh, rules: Rules, axes: Sequence[str], ndim: int) -> NamedSharding:
    """Sharding of a batch array whose leading axes have the logical names `axes`, as of text: rows, then time."""
    names = (*axes, *(None,) * ndim)[:ndim]
    return NamedSharding(mesh, nn.logical_to_mesh_axes(names, rules))


def variable_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of a variables tree whose leaves carry logical names (`nn.LogicallyPartitioned`), as of `jax.eval_shape`.

    Raises:
        ConfigError: a mesh axis does not divide the dimension that the rules lay on it.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)

    def check(path, leaf, sharding):
        for size, entry in zip(leaf.shape, sharding.spec, strict=False):
            axes = (entry,) if isinstance(entry, str) else entry or ()
            ways = math.prod(mesh.shape[axis] for axis in axes)
            if size % ways:
                raise field_error(
                    "config.mesh." + "/".join(axes), ways,
                    f"does not divide the dimension of {size} of {jax.tree_util.keystr(path, simple=True, separator='/')}"
                    f" {leaf.shape}", "Choose a divisor, or lay that logical axis elsewhere in config.sharding_rules",
                )  # fmt: skip

    jax.tree_util.tree_map_with_path(check, nn.unbox(boxed), shardings)
    return shardings


def optimizer_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of the optimizer state: a moment lies as its parameter does; counters and factored moments are replicated.

    A moment is known by its path, which ends in its parameter's, and by its shape; that also holds inside groups
    (`optax.multi_transform`), where the parameters of other groups are left out.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    places = {
        _keys(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path, leaf):
        keys = _keys(path)
        for start in range(len(keys)):
            shape, sharding = places.get(keys[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

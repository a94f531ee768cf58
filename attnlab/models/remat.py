"""Rematerialisation by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax

from attnlab.errors import ConfigError, nearest

_ALIASES = {"dots": "checkpoint_dots"}


def remat_policy(name: str) -> Callable | None | bool:
    """Returns what `jax.checkpoint` takes as policy: a function, None = recompute everything, False = no remat.

    Args:
        name: "none", "full", "dots", or any policy of `jax.checkpoint_policies` that takes no arguments of its own.

    Raises:
        ConfigError: unknown name.
    """
    if name in ("none", ""):
        return False
    if name == "full":
        return None
    policies = {
        key: value
        for key, value in vars(jax.checkpoint_policies).items()
        if callable(value) and list(inspect.signature(value).parameters)[:1] in (["prim"], ["_"], ["__"])
    }
    policies |= {alias: policies[key] for alias, key in _ALIASES.items() if key in policies}
    if name not in policies:
        known = [*policies, "none", "full"]
        raise ConfigError(f"model.remat = {name!r}: unknown policy, {nearest(name, known)}")
    return policies[name]

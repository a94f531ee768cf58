"""FLOPs of a traced function: of its matrix products and convolutions, two per multiply-add; elementwise work is left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from attnlab.ops import dispatch


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Returns the FLOPs of one call, without running or compiling it.

    Loops count as often as they run; a `while_loop`, whose turns are unknown, once. Ops choose among what runs on every
    platform: plain products and convolutions, nothing padded to a kernel's tiles. A kernel that is named nevertheless counts
    what it states itself (`pl.CostEstimate`).

    Args:
        fn: a function of arrays.
        *args: arrays or `jax.ShapeDtypeStruct`s.
        **kwargs: alike.
    """
    with dispatch.target("tpu"), dispatch.portable():
        # A new function object: jax keeps traces by function, and another platform's may be there.
        return _flops(jax.make_jaxpr(lambda *args, **kwargs: fn(*args, **kwargs))(*args, **kwargs).jaxpr)


def _flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[spec[0]]
        elif name == "pallas_call":
            total += float(params["cost_estimate"].flops) if params.get("cost_estimate") else 0.0
        elif name == "cond":
            total += max(_flops(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            total += times * sum(map(_flops, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """Returns the programs that an equation holds."""
    found = []
    for value in params.values():
        value = getattr(value, "jaxpr", value)
        if hasattr(value, "eqns"):
            found.append(value)
    return found

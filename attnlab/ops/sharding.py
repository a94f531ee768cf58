"""Ops on a mesh: XLA cannot partition a kernel call, so kernels run under `jax.shard_map` over batch and head axes.

Which mesh axes these are is a setting of the surrounding program (`mesh_axes`), not of the op.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


class MeshAxes(NamedTuple):
    """Names of the mesh axes that batch, heads and sequence may be split over."""

    batch: tuple[str, ...] = ("data", "fsdp")
    heads: tuple[str, ...] = ("tensor",)
    sequence: tuple[str, ...] = ("context",)


_DEFAULT = MeshAxes()
_axes: contextvars.ContextVar[MeshAxes] = contextvars.ContextVar("axes", default=_DEFAULT)


@contextlib.contextmanager
def mesh_axes(*, batch: Sequence[str], heads: Sequence[str], sequence: Sequence[str]) -> Iterator[None]:
    """Names the mesh axes for the ops traced inside; the default is ("data", "fsdp"), ("tensor",), ("context",)."""
    token = _axes.set(MeshAxes(tuple(batch), tuple(heads), tuple(sequence)))
    try:
        yield
    finally:
        _axes.reset(token)


def active_axes() -> dict[str, int]:
    """Returns the mesh axes that XLA still has to partition here, with sizes above 1: none inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name: size for name, size in mesh.shape.items() if size > 1 and types[name] != AxisType.Manual}


def shard_count(kind: str) -> int:
    """Returns over how many shards `kind` ("batch", "heads" or "sequence") is split at most."""
    active = active_axes()
    return math.prod(active.get(name, 1) for name in getattr(_axes.get(), kind))


def sequence_reason() -> str | None:
    """Returns why a kernel that needs whole sequences refuses: the mesh splits them. None where it does not."""
    if shard_count("sequence") > 1:
        return f"the mesh splits sequences over {sequence_axes()}; 'ring' passes keys from device to device"
    return None


def sequence_axes() -> tuple[str, ...]:
    """Returns the mesh axes that split sequences here, in order; () where none does."""
    active = active_axes()
    return tuple(name for name in _axes.get().sequence if name in active)


def axes_for(kind: str, size: int) -> tuple[str, ...] | None:
    """Returns the mesh axes to split a dimension of this size over: the longest list that divides it, None = none."""
    active = active_axes()
    chosen: list[str] = []
    for name in getattr(_axes.get(), kind):
        if name in active and size % (math.prod(active[c] for c in chosen) * active[name]) == 0:
            chosen.append(name)
    return tuple(chosen) or None


def shard_over_mesh(
    fn: Callable[..., Any], args: Sequence[Any], layouts: Sequence[str], out_layout: Any, *, sequence: bool = False
) -> Any:
    """Calls `fn(*args)` on each device's part of batch and heads; without a mesh it is just the call.

    Args:
        fn: function of whole sequences that treats batch rows and heads independently. Inside it every array has its
            local size. If key/value heads are fewer than the head axes can split, repeat them first.
        args: arrays; None passes through.
        layouts: one string per argument, a letter per dimension: B is split over the batch axes, N and K over the head
            axes, every other letter is whole. `1` stands for a dimension of size one.
        out_layout: the same for the result, or a pytree of such strings.
        sequence: also split T and S over the sequence axes, which must divide them; `fn` then sees parts of sequences.

    Returns:
        What `fn` returns, with global sizes.
    """
    if not active_axes():
        return fn(*args)
    sizes = {
        letter: size
        for arg, layout in zip(args, layouts, strict=True)
        if arg is not None
        for letter, size in zip(layout, arg.shape, strict=True)
    }
    head_sizes = [sizes[letter] for letter in "NK" if letter in sizes]
    split = {"B": axes_for("batch", sizes["B"])} if "B" in sizes else {}
    if head_sizes:
        heads = axes_for("heads", math.gcd(*head_sizes))
        split |= {"N": heads, "K": heads}
    if sequence:
        split |= dict.fromkeys("TS", sequence_axes())

    def spec(layout: str) -> PartitionSpec:
        return PartitionSpec(*(split.get(letter) for letter in layout))

    given = [i for i, arg in enumerate(args) if arg is not None]

    def local(*arrays):
        whole = [None] * len(args)
        for i, array in zip(given, arrays, strict=True):
            whole[i] = array
        return fn(*whole)

    return jax.shard_map(
        local,
        in_specs=tuple(spec(layouts[i]) for i in given),
        out_specs=jax.tree.map(spec, out_layout),
        check_vma=False,  # pallas_call does not say over which axes its results vary
    )(*(args[i] for i in given))


def shard_rows(fn: Callable[[Any, Any], Any], whole: Any, rows: Any) -> Any:
    """Calls `fn(whole, rows)` on each device's batch rows; other mesh axes stay with XLA.

    For loops whose body uses weights: left to itself, XLA sums the weights' gradients over the devices in every pass of the
    loop; here it does so once, behind it.

    Args:
        fn: function that treats rows independently; every array that it returns begins with B.
        whole: pytree of arrays that every device sees whole, as weights.
        rows: pytree of arrays that begin with B.
    """
    axes = axes_for("batch", jax.tree.leaves(rows)[0].shape[0])
    if axes is None:
        return fn(whole, rows)
    split = PartitionSpec(axes)
    return jax.shard_map(
        fn, in_specs=(PartitionSpec(), split), out_specs=split, axis_names=set(axes), check_vma=False
    )(whole, rows)


def repeat_kv_heads(k: jax.Array, v: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """Repeats key/value heads [B, S, K, H] just so often that they split wherever the `heads` query heads do.

    The result's heads still divide `heads`: both K and the number of shards of the query heads do.
    """
    active, kv_heads = active_axes(), k.shape[2]
    shards = math.prod(active[name] for name in axes_for("heads", heads) or ())
    times = math.lcm(kv_heads, shards) // kv_heads
    if times == 1:
        return k, v
    return jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2)

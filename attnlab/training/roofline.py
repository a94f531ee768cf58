"""From counts to seconds: a roofline of compute, memory and interconnect for one training step.

Every figure is a bound or an idealisation, never a measurement; `ASSUMPTIONS` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from attnlab.training.costs import Collective, Cost
from attnlab.training.topology import GPUS_PER_NODE, Topology

NETWORK_BANDWIDTH = 50e9  # bytes/s each way between nodes of GPUs: one 400 Gb/s adapter for each GPU
ASSUMPTIONS = (
    "peak bfloat16 rate for every matrix product; elementwise arithmetic is free",
    "full HBM bandwidth for every byte that an operation reads or writes, and nothing is shared in caches",
    "ring collectives at full link rate, both directions of a closed ring, no latency, no other traffic on the link",
    "full overlap: compute, memory and interconnect all hide behind the slowest of them",
    "no overlap: operations one after another, each at its own roofline, and all collectives on top",
)
_SHORTEST = 1e-12


def mesh_axes(groups: Sequence[Sequence[int]] | None, mesh: Mesh) -> tuple[str, ...] | None:
    """Names of the mesh axes along which the members of a group differ; None where the groups are unknown."""
    if groups is None:
        return None
    places = np.stack(np.unravel_index(np.array(groups), mesh.devices.shape), -1)  # [groups, members, axes]
    varies = (places != places[:, :1]).any((0, 1)) if places.size else np.zeros(mesh.devices.ndim, bool)
    return tuple(name for name, differs in zip(mesh.axis_names, varies, strict=True) if differs)


def group_bandwidth(kind: str, group: Sequence[int] | None, mesh: Mesh, topology: Topology) -> float:
    """Bytes/s at which one device can send to its group: link rate x directions x torus axes that the group spans."""
    chip, devices = topology.chip, mesh.devices.reshape(-1)
    members = range(devices.size) if group is None else group
    if chip.platform == "cuda":
        nodes = {devices[i].id // GPUS_PER_NODE for i in members}
        return chip.link_bandwidth if len(nodes) == 1 else NETWORK_BANDWIDTH
    if kind == "collective-permute":
        return chip.link_bandwidth  # one neighbour, one link
    coords = np.array([devices[i].coords for i in members])
    links = 0
    for axis in range(chip.dims):
        spanned = len(set(coords[:, axis]))
        if spanned > 1:
            links += 2 if topology.wraps(axis) and spanned == topology.shape[axis] else 1
    return chip.link_bandwidth * max(links, 1)  # two cores of one chip: no slower than a link


def summarise(collectives: Sequence[Collective], mesh: Mesh, topology: Topology) -> list[dict[str, Any]]:
    """Adds up collectives of one kind over the same mesh axes; the most expensive first.

    Returns:
        Dicts with `kind`, `axes` (None = unknown), `group_size`, `count` per step, `bytes` (full arrays) and `wire_bytes`
        (what one device sends) per step and device, and `seconds` at full link rate.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for one in collectives:
        if one.groups is not None and (not one.groups or len(one.groups[0]) < 2):
            continue  # among one device each: nothing moves
        axes = mesh_axes(one.groups, mesh)
        size = mesh.size if one.groups is None else len(one.groups[0])
        row = rows.setdefault((one.kind, axes, size), {
            "kind": one.kind, "axes": None if axes is None else list(axes), "group_size": size,
            "count": 0.0, "bytes": 0.0, "wire_bytes": 0.0, "seconds": 0.0,
        })  # fmt: skip
        first = None if one.groups is None else one.groups[0]
        row["count"] += one.count
        row["bytes"] += one.count * one.payload
        row["wire_bytes"] += one.count * one.wire
        row["seconds"] += one.count * one.wire / group_bandwidth(one.kind, first, mesh, topology)
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def estimate(
    cost: Cost, collectives: Sequence[dict[str, Any]], topology: Topology, *, model_flops: float, units: int
) -> dict[str, Any]:
    """Times of one step on one device.

    Args:
        cost: of the compiled step on one device.
        collectives: as of `summarise`.
        topology: of the run.
        model_flops: of a step over all devices, forward and backward without recomputation.
        units: tokens or images of a step over all devices.

    Returns:
        `compute_seconds`, `memory_seconds`, `collective_seconds`, `step_seconds` = [full overlap, none], `mfu` and
        `units_per_second` likewise, `bound` (what the fully overlapped step waits for), `compiler_seconds` (the
        compiler's own cycle estimates of its operations, where it makes them), `assumptions`.
    """
    chip = topology.chip
    parts = {
        "compute": cost.flops / chip.peak_flops,
        "memory": cost.bytes / chip.hbm_bandwidth,
        "collectives": sum(row["seconds"] for row in collectives),
    }
    bound = max(parts, key=parts.get)
    span = [max(parts[bound], _SHORTEST), max(cost.seconds + parts["collectives"], parts[bound], _SHORTEST)]
    compiler = cost.cycles / chip.clock + cost.kernel_flops / chip.peak_flops if chip.clock and cost.cycles else None
    return {
        "compute_seconds": parts["compute"],
        "memory_seconds": parts["memory"],
        "collective_seconds": parts["collectives"],
        "step_seconds": span,
        "bound": bound,
        "mfu": [model_flops / topology.num_devices / chip.peak_flops / seconds for seconds in span],
        "units_per_second": [units / seconds for seconds in span],
        "compiler_seconds": compiler,
        "peak_flops": chip.peak_flops,
        "hbm_bandwidth": chip.hbm_bandwidth,
        "link_bandwidth": chip.link_bandwidth,
        "assumptions": list(ASSUMPTIONS),
    }

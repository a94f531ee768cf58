"""Device meshes from the config, and which rows of the global batch this process feeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from attnlab.errors import field_error
from attnlab.training.config import MESH_AXES


def mesh_shape(axes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Resolves `config.mesh` for a number of devices; one axis may be -1 and takes what is left.

    Raises:
        ConfigError: an axis of 0 or below -1, two axes of -1, or a product that is not the number of devices.
    """
    shape = {axis: axes[axis] for axis in MESH_AXES}
    for axis, size in shape.items():
        if size == 0 or size < -1:
            raise field_error(f"config.mesh.{axis}", size, "is not a size", "Set 1 or more, or -1 for what is left")
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(free) > 1:
        raise field_error("config.mesh", shape, "has more than one -1", "Leave one axis at -1 and size the others")
    if free and num_devices % fixed == 0:
        shape[free[0]] = num_devices // fixed
    if math.prod(shape.values()) != num_devices:
        raise field_error(
            "config.mesh", shape, f"needs a multiple of {fixed} devices, and there are {num_devices}"
            if free else f"needs {fixed} devices, and there are {num_devices}",
            f"Choose sizes whose product is {num_devices}, or set one axis to -1",
        )  # fmt: skip
    return shape


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh (data, fsdp, tensor, context) over all devices, or over the given ones.

    Axes are in `AxisType.Auto`: the compiler partitions, and the logical rules of the config steer it.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(axes, len(devices))
    return jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices
    )


def data_shard(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """Returns (shard_index, shard_count): which equal part of a global batch this process feeds.

    Processes that hold the same rows (they differ only along the tensor or context axis) get the same index.

    Raises:
        ConfigError: the rows of a process are not one contiguous equal part.
    """
    rows = sharding.addressable_devices_indices_map((batch_size,))
    mine = sorted({(index[0].start or 0, batch_size if index[0].stop is None else index[0].stop) for index in rows.values()})
    start, stop = mine[0][0], mine[-1][1]
    size = stop - start
    covered = sum(end - begin for begin, end in mine)
    if covered != size or batch_size % size or start % size:
        raise field_error(
            "config.mesh", dict(sharding.mesh.shape), "gives this process rows of the batch that are not adjacent",
            "Let the data and fsdp axes vary slowest over the processes",
        )  # fmt: skip
    return start // size, batch_size // size


def global_batch(local: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding], batch_size: int) -> dict:
    """Assembles the global, sharded batch from the rows that each process holds."""
    return {
        name: jax.make_array_from_process_local_data(shardings[name], rows, (batch_size, *rows.shape[1:]))
        for name, rows in local.items()
        if name in shardings
    }

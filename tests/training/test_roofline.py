import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from attnlab.training import costs, roofline, topology


def mesh_of(spec, shape, axes):
    """A mesh of stand-ins with the coordinates of the topology, in row-major order."""
    target = topology.parse(spec)
    chips = np.stack(np.unravel_index(np.arange(np.prod(target.shape)), target.shape), -1)
    devices = [
        types.SimpleNamespace(id=i, coords=[*chips[i // target.chip.devices_per_chip]]) for i in range(target.num_devices)
    ]
    array = np.empty(len(devices), object)
    array[:] = devices
    fake = types.SimpleNamespace(devices=array.reshape(shape), axis_names=axes, size=len(devices))
    return target, fake


def test_mesh_axes_of_groups():
    mesh = Mesh(np.array(jax.devices("cpu") * 8).reshape(2, 2, 2)[:1, :1, :1], ("data", "fsdp", "tensor"))
    mesh = types.SimpleNamespace(devices=np.zeros((2, 2, 2)), axis_names=mesh.axis_names)
    assert roofline.mesh_axes(((0, 1), (2, 3)), mesh) == ("tensor",)
    assert roofline.mesh_axes(((0, 4), (1, 5)), mesh) == ("data",)
    assert roofline.mesh_axes(((0, 2, 4, 6),), mesh) == ("data", "fsdp")
    assert roofline.mesh_axes(((3,),), mesh) == ()
    assert roofline.mesh_axes(None, mesh) is None


@pytest.mark.parametrize(
    ("spec", "shape", "group", "links"),
    [
        ("tpu:v5e:16x16", (16, 16), range(16), 2),  # a closed ring along one axis
        ("tpu:v5e:16x16", (16, 16), range(256), 4),  # both axes closed
        ("tpu:v5e:4x4", (4, 4), range(4), 1),  # a line
        ("tpu:v5e:16x16", (16, 16), range(8), 1),  # half of a ring is a line
        ("tpu:v5p:4x4x4", (64,), range(64), 6),
        ("tpu:tpu7x:2x2x1", (8,), (0, 1), 1),  # two halves of one chip
    ],
)
def test_bandwidth_follows_the_torus(spec, shape, group, links):
    target, mesh = mesh_of(spec, shape, ("a", "b")[: len(shape)])
    rate = roofline.group_bandwidth("all-gather", tuple(group), mesh, target)
    assert rate == links * target.chip.link_bandwidth
    assert roofline.group_bandwidth("collective-permute", tuple(group), mesh, target) == target.chip.link_bandwidth


def test_gpus_of_several_nodes_talk_over_the_network():
    target, mesh = mesh_of("gpu:h100:16", (16,), ("a",))
    assert roofline.group_bandwidth("all-reduce", tuple(range(8)), mesh, target) == 450e9
    assert roofline.group_bandwidth("all-reduce", (0, 8), mesh, target) == roofline.NETWORK_BANDWIDTH


def test_collectives_are_added_up_by_kind_and_axes():
    target, mesh = mesh_of("tpu:v5e:2x2", (2, 2), ("data", "fsdp"))
    rows = roofline.summarise(
        [
            costs.Collective("all-gather", ((0, 1), (2, 3)), 100.0, 50.0, count=3),
            costs.Collective("all-gather", ((0, 1), (2, 3)), 10.0, 5.0),
            costs.Collective("all-reduce", ((0, 2), (1, 3)), 4.0, 4.0),
            costs.Collective("all-reduce", ((0,), (1,)), 4.0, 0.0),
        ],
        mesh,
        target,
    )
    assert [(row["kind"], row["axes"], row["count"]) for row in rows] == [
        ("all-gather", ["fsdp"], 4), ("all-reduce", ["data"], 1)
    ]  # fmt: skip
    assert rows[0]["bytes"] == 310
    assert rows[0]["wire_bytes"] == 155
    assert rows[0]["seconds"] == 155 / 45e9


def test_the_estimate_is_bounded_by_its_parts():
    target = topology.parse("tpu:v5e:2x2")
    cost = costs.Cost(flops=197e12, kernel_flops=19.7e12, bytes=0.0819e12, seconds=1.05, cycles=1.5e9)
    rows = [{"seconds": 0.2}]
    estimate = roofline.estimate(cost, rows, target, model_flops=4 * 0.8 * 197e12, units=1000)
    assert estimate["compute_seconds"] == 1.0
    assert estimate["memory_seconds"] == pytest.approx(0.1)
    assert estimate["step_seconds"] == [1.0, 1.25]
    assert estimate["bound"] == "compute"
    assert estimate["mfu"] == pytest.approx([0.8, 0.64])
    assert estimate["units_per_second"] == pytest.approx([1000, 800])
    assert estimate["compiler_seconds"] == pytest.approx(1.1)
    assert all("," in assumption or " " in assumption for assumption in estimate["assumptions"])

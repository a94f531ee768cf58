"""Accelerators by name: `tpu:v5e:16x16`, `gpu:h100:8`. What one device of them can do, and stand-ins to compile for.

A stand-in comes from the accelerator's own compiler, which runs on any machine: no device is needed, and none is used.
Nothing here imports jax before it must, because the compilers read the environment when jax starts them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from attnlab.errors import ConfigError, nearest

GIB = 2**30
EXAMPLES = "tpu:v5e:16x16, tpu:v5p:4x4x4, gpu:h100:8"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator; every figure is per jax device, which on tpu7x is half a chip.

    Attributes:
        name: as in the specification, `v5e`.
        platform: `tpu` or `cuda`.
        device_kind: what `jax.Device.device_kind` says.
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bytes: memory that a program may use. For TPUs what their compiler allows, for GPUs all there is.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s, one way, of one link to a neighbour (GPU: of all NVLinks of a device together).
        clock: Hz of the matrix units, to turn the compiler's cycle estimates into seconds; 0 where it makes none.
        dims: how many numbers a topology shape has.
        devices_per_chip: jax devices on one chip.
        max_chips: the largest slice sold; beyond it slices are joined over a slower network.
        options: further arguments of the compiler's topology.
    """

    name: str
    platform: str
    device_kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    clock: float
    dims: int
    devices_per_chip: int = 1
    max_chips: int = 0
    options: tuple[tuple[str, Any], ...] = ()


# Peaks, capacities and bandwidths are the vendors' published figures. The usable memory of a TPU is a little less than
# its nominal 32, 16, 95, 32 and 2 x 96 GiB: it is the limit that the compiler names when it refuses a program. Links:
# 45 or 90 GB/s each way, as measured on an ICI link of nominally 50 or 100 GB/s. Clocks follow from the peak and the
# number of matrix units.
CHIPS = {
    chip.name: chip
    for chip in (
        # one jax device for both cores (megacore), as a v4 machine starts by default
        Chip("v4", "tpu", "TPU v4", 275e12, int(30.75 * GIB), 1.228e12, 45e9, 1.05e9, 3, 1, 4096,
             (("chip_config_name", "megacore"),)),
        Chip("v5e", "tpu", "TPU v5 lite", 197e12, int(15.75 * GIB), 0.819e12, 45e9, 1.5e9, 2, 1, 256),
        Chip("v5p", "tpu", "TPU v5", 459e12, int(95.74 * GIB), 2.765e12, 90e9, 1.75e9, 3, 1, 6144),
        Chip("v6e", "tpu", "TPU v6 lite", 918e12, int(31.25 * GIB), 1.638e12, 90e9, 1.75e9, 2, 1, 256),
        Chip("tpu7x", "tpu", "TPU7x", 2307e12 / 2, int(94.75 * GIB), 7.38e12 / 2, 90e9, 2.2e9, 3, 2, 9216),
        # 81559 MiB as the driver reports them; 18 NVLink 4 links of 25 GB/s each way
        Chip("h100", "cuda", "NVIDIA H100 80GB HBM3", 989.4e12, 81559 * 2**20, 3.35e12, 450e9, 0.0, 1, 1, 16384),
    )
}  # fmt: skip
# What XLA's GPU compiler wants to know about the device it compiles for.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 85520809984 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Topology:
    """A parsed specification: so many devices of one kind, in this arrangement."""

    spec: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """How many jax devices there are."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def lowering_platform(self) -> str:
        """The name that jax lowers for."""
        return self.chip.platform

    def memory_per_device(self) -> tuple[int, str]:
        """Returns (bytes that a program may use on one device, why that many)."""
        chip = self.chip
        if chip.platform == "tpu":
            return chip.hbm_bytes, "what the TPU compiler allows a program"
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
        why = f"{fraction:.0%} of {chip.hbm_bytes / GIB:.1f} GiB: XLA_PYTHON_CLIENT_MEM_FRACTION, in jax 0.75 by default"
        return int(chip.hbm_bytes * fraction), why

    def wraps(self, axis: int) -> bool:
        """Whether this axis of the torus is closed: 16 chips on v5e and v6e, whole cubes of 4 elsewhere."""
        if self.chip.dims == 2:
            return self.shape[axis] == 16
        return all(size % 4 == 0 for size in self.shape)

    def devices(self) -> list[Any]:
        """Returns stand-ins for the devices: usable in meshes and shardings, for compilation only.

        Raises:
            ConfigError: the compiler is not installed, or does not know the shape.
        """
        require_compiler(self.chip.platform)
        from jax.experimental import topologies

        chip = self.chip
        if chip.platform == "cuda":
            nodes = max(1, self.num_devices // GPUS_PER_NODE)
            arguments = {
                "topology_name": chip.name,
                "target_config": _H100,
                "topology": f"1x{nodes}x{self.num_devices // nodes}",
            }
        else:
            name = f"{chip.name}:{'x'.join(map(str, self.shape))}"
            arguments = {"topology_name": name, **dict(chip.options)}
            if math.prod(self.shape) == 1:  # a machine holds four chips unless told otherwise
                arguments["chips_per_host_bounds"] = (1, 1, 1)
        try:
            devices = topologies.get_topology_desc(platform=chip.platform, **arguments).devices
        except Exception as error:  # RuntimeError subclasses that differ between the plugins
            shape = "x".join(map(str, self.shape))
            raise ConfigError(
                f"--aot={self.spec}: the compiler knows no {chip.name} of {shape} ({str(error).splitlines()[0]}). "
                f"Slices are {_slices(chip)}."
            ) from error
        if len(devices) != self.num_devices:
            raise ConfigError(
                f"--aot={self.spec}: the compiler made {len(devices)} devices of it and {self.num_devices} were expected. "
                "Install the jax and libtpu versions of `attnlab[test]`."
            )
        return list(devices)


def parse(spec: str) -> Topology:
    """Reads `tpu:CHIP:AxB[xC]` or `gpu:CHIP:N`.

    Raises:
        ConfigError: not of this form, an unknown chip, or a shape that the chip does not come in.
    """
    parts = spec.strip().lower().split(":")
    if len(parts) != 3 or not all(parts):
        raise ConfigError(f"--aot={spec!r} is not PLATFORM:CHIP:SHAPE. Write for example {EXAMPLES}.")
    platform, name, text = parts
    family = {"tpu": "tpu", "gpu": "cuda", "cuda": "cuda"}.get(platform)
    if family is None:
        hint = nearest(platform, ("tpu", "gpu"))
        raise ConfigError(f"--aot={spec!r}: unknown platform {platform!r}; {hint}. Write for example {EXAMPLES}.")
    known = [chip.name for chip in CHIPS.values() if chip.platform == family]
    if name not in known:
        raise ConfigError(
            f"--aot={spec!r}: unknown chip {name!r}; {nearest(name, known)} Chips with a compiler here: {', '.join(known)}."
        )
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ConfigError(f"--aot={spec!r}: {text!r} is not a shape. Slices of {name} are {_slices(chip)}.")
    shape = tuple(int(size) for size in text.split("x"))
    if len(shape) != chip.dims:
        raise ConfigError(
            f"--aot={spec!r}: {name} wants {chip.dims} size{'s' * (chip.dims > 1)} and {text!r} has {len(shape)}. "
            f"Slices are {_slices(chip)}."
        )
    count = math.prod(shape)
    if count > chip.max_chips or (chip.dims == 2 and max(shape) > 16):
        raise ConfigError(
            f"--aot={spec!r}: no slice of {name} has {text} chips. Slices are {_slices(chip)}; larger machines join "
            "slices over a slower network, which is not modelled: size one slice."
        )
    if family == "cuda" and count > GPUS_PER_NODE and count % GPUS_PER_NODE:
        raise ConfigError(f"--aot={spec!r}: nodes have {GPUS_PER_NODE} GPUs. Ask for 1 to 8, or for a multiple of 8.")
    return Topology(spec.strip(), chip, shape)


def _slices(chip: Chip) -> str:
    if chip.platform == "cuda":
        return "1 to 8 GPUs, or a multiple of 8"
    if chip.dims == 2:
        return "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16"
    return "2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4 such as 4x4x4, 4x4x8, 4x8x8, 8x8x8"


def require_compiler(platform: str) -> None:
    """Refuses to go on without the package that compiles for `platform` (`tpu` or `cuda`).

    Raises:
        ConfigError: naming the extra that brings it.
    """
    modules = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")}[platform]
    for module in modules:
        try:
            if importlib.util.find_spec(module) is not None:
                return
        except ModuleNotFoundError:  # the parent package is missing
            continue
    package = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin"}[platform]
    raise ConfigError(
        f"--aot: compiling for {platform} without hardware needs the package {package}, which is not installed. "
        'Run `pip install "attnlab[test]"` (from a checkout: `pip install -e ".[test]"`).'
    )

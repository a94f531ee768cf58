"""Reads the TPU compiler's static schedule of a kernel, with no TPU at hand.

The libtpu wheel holds the whole compiler. Started with `--xla_jf_dump_to=DIR` it writes the scheduled bundles (VLIW
instruction words, one a cycle unless the hardware waits) of every kernel and, per bundle, how many slots of each unit are
used. The regions that push into the MXU are the compute bodies of a Pallas kernel: their bundles are a usable estimate of
the cycles of one visit, and register spills show as such.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
DEVICE_KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:")


@dataclasses.dataclass(frozen=True)
class Region:
    """One compute body of a kernel.

    Attributes:
        kernel: name of the custom call.
        bundles: scheduled bundles of the body.
        spills: stores of spilled vector registers.
        fills: loads of spilled vector registers.
        shares: used share of the slots of each unit ("MXU", "XLU", "VALU", "EUP", ...).
        products: matrix instructions.
        stamp: nanoseconds at which the kernel was compiled: tells kernels of one name apart, and orders them.
    """

    kernel: str
    bundles: int
    spills: int
    fills: int
    shares: dict[str, float]
    products: int
    stamp: int = 0


def environment(dump: str | os.PathLike | None = None) -> dict[str, str]:
    """Environment of a process that compiles for TPU without one (libtpu would else wait for a metadata server)."""
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if dump is not None:
        settings["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump}"
    return {**os.environ, **settings}


def compile_for(topology: str, build: Any) -> Any:
    """Compiles in this process (see `environment`) for a chip.

    Args:
        topology: "v5e", "v5p", "v6e" or "tpu7x".
        build: function of a sharding that returns (function, arguments as `jax.ShapeDtypeStruct` on that sharding).
    """
    import jax
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[topology])
    function, arguments = build(jax.sharding.SingleDeviceSharding(described.devices[0]))
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def measure(command: list[str], kernels: str, timeout: float = 600.0) -> list[Region]:
    """Runs a Python command that calls `compile_for`, and reads the schedules it leaves.

    Args:
        command: arguments after the interpreter.
        kernels: regular expression of the custom calls' names.
        timeout: seconds.

    Returns:
        The compute bodies, kernel by kernel as they were compiled, in the order of the code.

    Raises:
        RuntimeError: the command failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as dump:
        done = subprocess.run(
            [sys.executable, *command], env=environment(dump), capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return read(Path(dump), kernels)


def read(dump: Path, kernels: str) -> list[Region]:
    """Reads the compute bodies of all kernels of a name from a dump directory."""
    regions = []
    for file in sorted(dump.glob("*-final_bundles.txt")):
        matched = re.fullmatch(r"(\d+)-(.*)-\d+-final_bundles", file.stem)
        if "schedule-analysis" in file.name or not matched or not re.search(kernels, matched.group(2)):
            continue
        stamp, name = matched.groups()
        reports = dump.glob(f"{stamp}-*-final_hlo-static-per-bundle-utilization.txt")
        report = next(f for f in reports if f.name.startswith(f"{stamp}-{name}-") and "pre-delay" not in f.name)
        bodies = _bodies(name, file.read_text(), report.read_text())
        regions += [dataclasses.replace(body, stamp=int(stamp)) for body in bodies]
    return regions


def _bodies(name: str, code: str, report: str) -> list[Region]:
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("== UTILIZATION"))
    units = [unit.strip() for unit in lines[start - 2].split(",")]
    capacity = [int(x) for x in lines[start - 1].split()]
    used = [[int(x) for x in line.split()] for line in lines[start + 1 :] if line.strip()]
    bundles = [(int(m.group(1), 16), line) for line in code.splitlines() if (m := _BUNDLE.match(line))]
    edges: dict[str, dict[str, int]] = {}
    for address, line in bundles:
        for edge, region in re.findall(r"(Start|End) region (\d+)", line):
            edges.setdefault(region, {})[edge] = address
    spans = []
    for span in edges.values():
        if len(span) == 2:
            inside = (line for address, line in bundles if span["Start"] <= address <= span["End"])
            products = sum(len(re.findall(r"\bvmatmul", line)) for line in inside)
            if products:
                spans.append((span["Start"], span["End"], products))
    found = []
    for first, last, products in sorted(spans):
        if any((s, e) != (first, last) and first <= s and e <= last for s, e, _ in spans):
            continue  # an outer region: its bodies are listed themselves
        count = last - first + 1
        sums = [sum(row[i] for row in used[first : last + 1]) for i in range(len(units))]
        shares = {u: s / (count * c) for u, s, c in zip(units, sums, capacity, strict=True) if ":" not in u}
        at = dict(zip(units, sums, strict=True))
        found.append(Region(name, count, at["VSTORE:SPILL"], at["VLOAD:FILL"], shares, products))
    return found

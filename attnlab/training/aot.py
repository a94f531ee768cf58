"""Sizing without hardware: `python train.py --config=configs/lm.py:1b --aot=tpu:v5e:16x16`.

Compiles the run's own sharded train step for the topology with the accelerator's own compiler, and reports what it says:
memory of one device, FLOPs, collectives, and a roofline of the step time. See `attnlab.training.topology` for names.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jaxlib
import ml_collections

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.training import aot_environment, aot_report, costs, hlo, roofline, topology
from attnlab.training.build import Run, build
from attnlab.training.config import to_json
from attnlab.training.workdir import write_atomic

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_EXCEEDS = re.compile(r"([\d.]+)([KMGT]?)\)? exceeds available HBM(?: capacity)? \(?([\d.]+)([KMGT]?)", re.IGNORECASE)
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)


def run(config: ml_collections.ConfigDict, spec: str, workdir: str | None = None) -> int:
    """Sizes the run that `config` describes on the topology `spec`; prints the report.

    Args:
        config: as for training.
        spec: `tpu:v5e:16x16`, `gpu:h100:8`, ...
        workdir: where `aot.json` goes; None = nowhere.

    Returns:
        Exit code: 0 when the step fits into the memory of a device, 1 when it does not.

    Raises:
        ConfigError: unknown topology, a mesh or batch that does not fit it, a compiler that is not installed.
    """
    target = topology.parse(spec)
    aot_environment.prepare(spec)
    devices = target.devices()
    built = build(config, devices=devices)
    print(f"compiling {_describe(built)} for {spec} ({len(devices)} x {target.chip.device_kind}) ...", flush=True)
    report = analyse(built, target)
    print(aot_report.render(report))
    if workdir is not None:
        path = pathlib.Path(workdir, "aot.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--workdir={workdir}: {error.strerror}. Name a folder that can be written.") from error
        print(f"written to {path}")
    return 0 if report["fits"] else 1


def analyse(built: Run, target: topology.Topology) -> dict[str, Any]:
    """Compiles the train step of a run built on `target.devices()` and returns the content of `aot.json`.

    Raises:
        ConfigError: the compiler refuses the program for another reason than memory.
    """
    state, batch = built.abstract_state, built.batch_spec
    limit, why = target.memory_per_device()
    parts = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "ema": device_bytes(state.ema),
        "collections": device_bytes(state.collections),
        "batch": device_bytes(batch),
    }
    model_flops = float(built.task.flops_per_step(state.params))
    units = built.task.units_per_step
    visible = visible_pairs(built)
    started = time.perf_counter()
    compiled, decisions, refusal = compile_step(built, target)
    report: dict[str, Any] = {
        "topology": target.spec,
        "device_kind": target.chip.device_kind,
        "num_devices": target.num_devices,
        "mesh": dict(built.mesh.shape.items()),
        "fits": refusal is None,
        "hbm_bytes": limit,
        "hbm_limit": why,
        "num_params": built.num_params(),
        "batch_size": built.config.batch_size,
        "unit": built.task.unit,
        "units_per_step": units,
        "model_flops_per_step": model_flops,
        "compile_seconds": 0.0,
        "attention": sorted({f"{d.op}: {d.chosen}" for d in decisions}),
        "attention_reasons": sorted({f"not {name}: {reason}" for d in decisions for name, reason in d.reasons.items()}),
        "notes": [],
    }
    if compiled is None:
        needed, available = refused_bytes(refusal)
        limit = report["hbm_bytes"] = available or limit
        needed = max(needed or 0, limit + 1, sum(parts.values()))
        # Nothing was compiled: what the model must compute, and once more forward where it is recomputed.
        recomputed = 1.0 if built.config.model.get("remat", "none") in ("none", False) else 4 / 3
        report |= {"flops_per_device": model_flops * recomputed / target.num_devices, "flops_source": "model",
                   "collectives": [], "roofline": None, "compiler_message": refusal.strip().splitlines()[0]}  # fmt: skip
    else:
        needed, memory = compiled_bytes(compiled, target)
        report["memory_analysis"] = memory
        report["fits"] = target.chip.platform == "tpu" or needed <= limit  # the TPU compiler has judged already
        rates = costs.Rates(target.chip.peak_flops, target.chip.hbm_bandwidth)
        cost = costs.program_cost(
            hlo.parse(compiled.as_text()), target.num_devices, rates, visible_pairs=visible
        )
        collectives = roofline.summarise(cost.collectives, built.mesh, target)
        report |= {
            "flops_per_device": cost.flops,
            "flops_source": "compiled program",
            "kernel_flops_per_device": cost.kernel_flops,
            "hbm_traffic_bytes": cost.bytes,
            "collectives": collectives,
            "roofline": roofline.estimate(cost, collectives, target, model_flops=model_flops, units=units),
            "notes": sorted(cost.notes),
        }
    report["compile_seconds"] = time.perf_counter() - started
    parts["temporaries"] = max(0, needed - sum(parts.values()))
    report |= {
        "bytes_per_device": int(needed),
        "breakdown": parts,
        "advice": [] if report["fits"] else aot_report.advise(built.config, report["mesh"], parts, needed, limit, target),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "compiler": _compiler_version(target)},
        "config": json.loads(to_json(built.config)),
    }
    return report


def compile_step(built: Run, target: topology.Topology):
    """Returns (compiled step, kernel decisions, None), or (None, decisions, message) where memory does not suffice."""
    platform = "gpu" if target.chip.platform == "cuda" else target.chip.platform
    with (
        built.context(),
        dispatch.target(platform, device_kind=target.chip.device_kind),
        dispatch.record() as decisions,
        cudnn_without_device() if platform == "gpu" else contextlib.nullcontext(),
    ):
        traced = built.train_step.trace(built.abstract_state, built.batch_spec)
        lowered = traced.lower(lowering_platforms=(target.lowering_platform,))
        try:
            return lowered.compile(), decisions, None
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" in message and re.search("hbm|out of memory", message, re.IGNORECASE):
                return None, decisions, message
            first = message.strip().splitlines()[0][:400]
            raise ConfigError(f"--aot={target.spec}: the compiler refuses the step: {first}") from error


def device_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def compiled_bytes(compiled: Any, target: topology.Topology) -> tuple[int, dict[str, int]]:
    """Returns (peak bytes of one device, the compiler's figures)."""
    stats = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    memory = {f"{name}_bytes": int(getattr(stats, f"{name}_size_in_bytes")) for name in names}
    memory["peak_bytes"] = int(stats.peak_memory_in_bytes)
    if target.chip.platform == "tpu" and memory["peak_bytes"]:
        # The TPU's temp_bytes is what its heap would be without packing, and can exceed the chip.
        return memory["peak_bytes"], memory
    total = memory["argument_bytes"] + memory["output_bytes"] - memory["alias_bytes"] + memory["temp_bytes"]
    return total, memory


def refused_bytes(message: str) -> tuple[int | None, int | None]:
    """Reads (needed, available) bytes out of the TPU compiler's refusal."""
    found = _EXCEEDS.search(message) or _USED.search(message)
    if not found:
        return None, None
    needed, unit, available, available_unit = found.groups()
    return int(float(needed) * _UNITS[unit.upper()]), int(float(available) * _UNITS[available_unit.upper()])


def visible_pairs(built: Run) -> float:
    """Share of the T x T pairs that the mixers' attention computes, averaged over the layers; 1 where they do not say."""
    model, length = built.task.model, built.config.get("seq_len", 0)
    shares = []
    for entry in model.entries() if hasattr(model, "make_mixer") else ():  # of language models; images are seen whole
        mixer = model.make_mixer(entry)
        if hasattr(mixer, "sequence_flops") and hasattr(mixer, "causal"):
            everything = {"causal": False} | ({"window": None} if hasattr(mixer, "window") else {})
            try:
                full = mixer.clone(parent=None, **everything).sequence_flops(length)
            except ConfigError:  # causal by nature: a state computes no pairs that it would hide
                full = mixer.sequence_flops(length)
            shares.append(min(mixer.sequence_flops(length) / full, 1.0))
    return sum(shares) / len(shares) if shares else 1.0


@contextlib.contextmanager
def cudnn_without_device() -> Iterator[None]:
    """Lets jax trace cuDNN attention where there is no GPU: it asks the driver for versions, and here the target knows them."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused
    except ImportError:
        yield
        return
    answers = {"check_cudnn_version": lambda: 90800, "check_compute_capability": lambda capability: True}
    replaced = {name: getattr(fused, name) for name in answers if hasattr(fused, name)}
    try:
        for name in replaced:
            setattr(fused, name, answers[name])
        yield
    finally:
        for name, original in replaced.items():
            setattr(fused, name, original)


def _describe(built: Run) -> str:
    sizes = " x ".join(f"{axis} {size}" for axis, size in built.mesh.shape.items() if size > 1) or "one device"
    return f"{built.num_params() / 1e6:,.0f} M parameters on {sizes}"


def _compiler_version(target: topology.Topology) -> str:
    import importlib.metadata

    for package in {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin")}[target.chip.platform]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return "unknown"

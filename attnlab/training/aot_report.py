"""The report of `attnlab.training.aot` in words: tables for the terminal, and what to change when a step does not fit."""

from __future__ import annotations

import math
from typing import Any

GIB = 2**30
# Float32 logits of a chunk, their gradient and the softmax between them.
_LOGIT_COPIES = 3


def render(report: dict[str, Any]) -> str:
    """Returns the report as text of at most 120 columns."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    lines = [
        "",
        f"topology    {report['topology']}: {report['num_devices']} x {report['device_kind']}",
        f"mesh        {mesh}",
        f"model       {report['num_params']:,} parameters, {report['batch_size']} rows and "
        f"{report['units_per_step']:,} {report['unit']} per step",
        *(f"kernels     {choice}" for choice in report["attention"]),
        *(f"            ({reason})" for reason in report["attention_reasons"]),
        f"compiled    in {report['compile_seconds']:.0f} s by {report['versions']['compiler']}",
        "",
        "memory per device",
        *(f"  {name:<22}{_bytes(size):>12}" for name, size in report["breakdown"].items() if size),
        f"  {'total':<22}{_bytes(report['bytes_per_device']):>12}",
        f"  {'available':<22}{_bytes(report['hbm_bytes']):>12}   {report['hbm_limit']}",
        "",
        "FLOPs per step",
        f"  {'model, all devices':<22}{_count(report['model_flops_per_step']):>12}",
        f"  {'executed, one device':<22}{_count(report['flops_per_device']):>12}   ({report['flops_source']})",
        *(f"  note: {note}" for note in report["notes"]),
    ]
    lines += [*_collectives(report["collectives"]), *_roofline(report["roofline"], report["unit"]), "", *_verdict(report)]
    return "\n".join(lines)


def _collectives(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", f"{'collectives per step':<24}{'over':<16}{'group':>6}{'count':>8}{'bytes':>12}{'sent':>12}{'time':>12}"]
    for row in rows:
        axes = "unknown" if row["axes"] is None else ",".join(row["axes"]) or "-"
        lines.append(
            f"  {row['kind']:<22}{axes:<16}{row['group_size']:>6}{row['count']:>8.0f}{_bytes(row['bytes']):>12}"
            f"{_bytes(row['wire_bytes']):>12}{_seconds(row['seconds']):>12}"
        )
    return lines


def _roofline(estimate: dict[str, Any] | None, unit: str) -> list[str]:
    if estimate is None:
        return []
    fast, slow = estimate["step_seconds"]
    high, low = estimate["mfu"]
    most, least = estimate["units_per_second"]
    lines = [
        "",
        "roofline of a step (an estimate, not a measurement)",
        f"  {'compute':<22}{_seconds(estimate['compute_seconds']):>12}   at {estimate['peak_flops'] / 1e12:,.0f} TFLOP/s",
        f"  {'memory':<22}{_seconds(estimate['memory_seconds']):>12}   at {estimate['hbm_bandwidth'] / 1e12:.2f} TB/s",
        f"  {'collectives':<22}{_seconds(estimate['collective_seconds']):>12}   at "
        f"{estimate['link_bandwidth'] / 1e9:.0f} GB/s per link and direction",
        f"  {'full overlap':<22}{_seconds(fast):>12}   {most:,.0f} {unit}/s, {high:.1%} model FLOP/s utilisation, "
        f"bound by {estimate['bound']}",
        f"  {'no overlap':<22}{_seconds(slow):>12}   {least:,.0f} {unit}/s, {low:.1%} model FLOP/s utilisation",
    ]
    if estimate["compiler_seconds"] is not None:
        lines.append(
            f"  {'compiler':<22}{_seconds(estimate['compiler_seconds']):>12}   "
            "its own cycle estimates of compute and memory, without collectives"
        )
    return [*lines, *(f"  assumes: {assumption}" for assumption in estimate["assumptions"])]


def _verdict(report: dict[str, Any]) -> list[str]:
    spare = report["hbm_bytes"] - report["bytes_per_device"]
    if report["fits"]:
        # the compiler's own verdict counts: its total and its limit are rounded
        return [f"fits: {_bytes(max(spare, 0))} of {_bytes(report['hbm_bytes'])} stay free on each device"]
    lines = [
        f"does not fit: {_bytes(report['bytes_per_device'])} needed, {_bytes(report['hbm_bytes'])} available, "
        f"{_bytes(-spare)} too much on each device"
    ]
    if "compiler_message" in report:
        lines.append(f"  the compiler: {report['compiler_message']}")
    return [*lines, "what to change, most memory first:", *(f"  {item['text']}" for item in report["advice"])]


def advise(config: Any, mesh: dict[str, int], parts: dict[str, int], needed: float, limit: float, target: Any) -> list[dict]:
    """Changes of the config that save memory, the largest estimated saving first.

    Args:
        config: of the run.
        mesh: axis sizes.
        parts: bytes of one device: parameters, optimizer, ema, collections, batch, temporaries.
        needed: bytes of one device in all.
        limit: bytes that there are.
        target: the topology.

    Returns:
        Dicts with `field`, `value`, `saves_bytes` (an estimate) and `text`.
    """
    state = parts["parameters"] + parts["optimizer"] + parts["ema"]
    gradients = parts["parameters"]
    rows = max(1, config.batch_size // (mesh["data"] * mesh["fsdp"]))  # sequences on one device
    micro = max(1, rows // config.grad_accum)
    length = config.get("seq_len", 0)  # 0: images, which have one row of logits
    chunk = config.get("loss_chunk", 0) or length
    logits = _LOGIT_COPIES * 4 * micro * chunk * _vocabulary(config) // (mesh["tensor"] * mesh["context"]) if length else 0
    activations = max(0, parts["temporaries"] - gradients - logits)
    excess = needed - limit
    found = []

    def add(field: str, value: Any, saves: float, why: str) -> None:
        if saves > 0:
            enough = "enough by itself" if saves >= excess else "not enough by itself"
            text = f"--config.{field}={value}   {why}; saves about {_bytes(saves)} ({enough})"
            found.append({"field": field, "value": value, "saves_bytes": int(saves), "text": text})

    remat = config.model.get("remat", "full")  # a model without it cannot recompute
    if remat not in ("full", True):
        # what stays is the input of each layer: D of the some 20 D values that a layer computes for a token
        add("model.remat", True if remat is False else "full", 0.85 * activations, "recomputes each layer in the backward pass")
    if chunk > 512:
        smaller = _divisor_at_most(length, 512)
        add("loss_chunk", smaller, logits * (1 - smaller / chunk), "never holds the logits of whole sequences")
    if micro > 1:
        wanted = next((k for k in _divisors(rows) if k > config.grad_accum and excess <= (activations + logits) * (
            1 - config.grad_accum / k)), rows)  # fmt: skip
        saved = (activations + logits) * (1 - config.grad_accum / wanted)
        if config.grad_accum == 1:
            saved -= gradients  # the sum of the micro-batches' gradients
        add("grad_accum", wanted, saved, "the same batch in smaller pieces, one after another")
        smaller = config.batch_size * config.grad_accum // wanted
        add("batch_size", smaller, (activations + logits) * (1 - config.grad_accum / wanted), "fewer rows per step")
    if mesh["data"] > 1:
        ways = mesh["data"] * mesh["fsdp"]
        add("mesh.data=1 --config.mesh.fsdp", ways, (state + gradients) * (1 - 1 / mesh["data"]),
            "shards parameters, gradients and optimizer over all devices of the batch")  # fmt: skip
    if parts["ema"]:
        add("ema_decay", 0.0, parts["ema"], "keeps no moving average of the parameters")
    heads = config.model.get("num_heads", 1)
    heads = heads if isinstance(heads, int) else math.gcd(*heads)
    if mesh["tensor"] == 1 and heads % 2 == 0 and target.num_devices > 1 and micro == 1:
        add("mesh.tensor", 2, (activations + logits) / 2, "splits heads, MLP and vocabulary of each layer over two devices")
    if mesh["context"] == 1 and length and length % 2 == 0 and target.num_devices > 1 and micro == 1:
        add("mesh.context", 2, (activations + logits) / 2, "splits each sequence over two devices")
    found.sort(key=lambda item: -item["saves_bytes"])
    if target.chip.platform == "cuda" and needed <= 0.95 * target.chip.hbm_bytes:
        text = f"XLA_PYTHON_CLIENT_MEM_FRACTION=0.95   lets jax use {_bytes(0.95 * target.chip.hbm_bytes)} (enough by itself)"
        found.insert(0, {"field": "XLA_PYTHON_CLIENT_MEM_FRACTION", "value": 0.95, "saves_bytes": int(excess), "text": text})
    if state + gradients > limit or not found:
        factor = 2 ** max(1, math.ceil(math.log2(max(needed / limit, 1.01))))
        text = f"a topology of {factor * target.num_devices} devices or more, or one with more memory: parameters, " \
               f"gradients and optimizer alone need {_bytes(state + gradients)} on each device"  # fmt: skip
        found.append({"field": "aot", "value": factor * target.num_devices, "saves_bytes": 0, "text": text})
    return found


def _vocabulary(config: Any) -> int:
    """Ids of a language model, of which the bytes have 320."""
    size = str(config.data.get("tokenizer", "")).rpartition(":")[2]
    return config.model.get("vocab_size", 0) or (int(size) if size.isdigit() else 320)


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _divisor_at_most(number: int, limit: int) -> int:
    return max(i for i in _divisors(number) if i <= limit)


def _bytes(size: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def _count(flops: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= scale:
            return f"{flops / scale:,.2f} {unit}"
    return f"{flops:,.0f} "


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} us"

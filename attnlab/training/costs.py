"""What one device does in one execution of a compiled program: matrix FLOPs, memory traffic, collectives.

Counted from the HLO text with the trip counts of its loops (`attnlab.training.hlo`), because XLA's own analysis counts a
loop body once and knows nothing of hand-written kernels:

- FLOPs are those of dots and convolutions, two per multiply-add; elementwise work is left out. A kernel states its own
  (`pl.CostEstimate`); fused attention is counted from the shapes of q and k and the share of visible pairs.
- Traffic is what top-level instructions read and write in main memory: a fusion reads its operands and writes its result
  once, slices and in-place updates count what they touch, on-chip buffers nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from attnlab.training import hlo

_COLLECTIVES = {
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
}  # fmt: skip
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "opt-barrier", "optimization-barrier", "domain", "add-dependency", "while", "conditional", "call",
}  # fmt: skip
# Dot-like products of size [T, S] x H per kernel of fused attention: forward q k^T and p v; backward q k^T, dO v^T, and
# then p^T dO, ds^T q (dk, dv), ds k (dq).
_ATTENTION_PRODUCTS = (("dkv", 4), ("dq", 3), ("backward", 5), ("bwd", 5), ("", 2))


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation, as one device sees it.

    Attributes:
        kind: all-reduce, all-gather, ...
        groups: [groups, members] places in the flattened mesh, None where unknown.
        payload: bytes of the full array: gathered result, reduced or scattered operand.
        wire: bytes that a device sends (and receives) when the ring algorithm is used.
        count: executions per step.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...] | None
    payload: float
    wire: float
    count: float = 1.0
    channel: str = ""


@dataclasses.dataclass
class Cost:
    """Sums over one execution of a computation on one device; `seconds` is op by op, see `Rates`."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    cycles: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    notes: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: Cost, times: float = 1.0) -> None:
        """Adds `other`, executed `times` times."""
        for field in ("flops", "kernel_flops", "bytes", "seconds", "cycles"):
            setattr(self, field, getattr(self, field) + times * getattr(other, field))
        self.collectives += [dataclasses.replace(c, count=c.count * times) for c in other.collectives]
        self.notes |= other.notes


@dataclasses.dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s of the device; an instruction takes the longer of its arithmetic and its traffic."""

    flops: float
    bandwidth: float


def program_cost(module: hlo.Module, num_devices: int, rates: Rates, *, visible_pairs: float = 1.0) -> Cost:
    """Counts one execution of the program.

    Args:
        module: the parsed program.
        num_devices: of the mesh.
        rates: of the device, for the op-by-op time.
        visible_pairs: share of the T x S pairs that attention kernels compute (0.5 for causal attention).
    """
    return _Counter(module, num_devices, rates, visible_pairs).computation(module.entry)


class _Counter:
    def __init__(self, module: hlo.Module, num_devices: int, rates: Rates, visible_pairs: float):
        self.module, self.num_devices, self.rates, self.visible_pairs = module, num_devices, rates, visible_pairs
        self.done: dict[str, Cost] = {}

    def computation(self, name: str) -> Cost:
        """A computation that runs instruction by instruction (not the inside of a fusion)."""
        if name not in self.done:
            computation, total = self.module.computations[name], Cost()
            for instruction in computation.instructions.values():
                total.add(self.instruction(instruction, computation))
            total.collectives = _once_per_channel(total.collectives)
            self.done[name] = total
        return self.done[name]

    def instruction(self, instruction: hlo.Instruction, computation: hlo.Computation) -> Cost:
        cost, opcode = Cost(), instruction.opcode
        if opcode == "while":
            trips = self.module.trip_count(instruction, computation)
            if trips is None:
                cost.notes.add(f"the trip count of loop {instruction.name} is not in the program: counted once")
            cost.add(self.computation(instruction.called["body"]), 1 if trips is None else trips)
            return cost
        if opcode == "conditional":
            return max(map(self.computation, instruction.branches), key=lambda branch: (branch.flops, branch.bytes))
        if opcode == "call":
            return self.computation(instruction.called["to_apply"])
        cost.flops, cost.kernel_flops, cost.collectives, cost.notes = self.arithmetic(instruction, computation)
        cost.bytes = self.traffic(instruction, computation)
        if not cost.collectives:  # the interconnect's time is the roofline's
            cost.seconds = max(cost.flops / self.rates.flops, cost.bytes / self.rates.bandwidth)
            cost.cycles = _estimated_cycles(instruction)
        return cost

    def arithmetic(self, instruction: hlo.Instruction, computation: hlo.Computation):
        """(FLOPs, those of them in kernels, collectives, notes) of an instruction and what it fuses."""
        opcode, called = instruction.opcode, instruction.called
        if opcode == "dot":
            return dot_flops(instruction, computation), 0.0, [], set()
        if opcode == "convolution":
            return convolution_flops(instruction, computation), 0.0, [], set()
        if opcode.removesuffix("-start") in _COLLECTIVES:
            return 0.0, 0.0, [self.collective(instruction, computation)], set()
        if opcode == "custom-call":
            flops, note = custom_call_flops(instruction, computation, self.visible_pairs)
            return flops, flops, [], {note} if note else set()
        inside = called.get("calls") if opcode in ("fusion", "async-start") else None
        if inside is None:
            return 0.0, 0.0, [], set()
        flops, kernel_flops, collectives, notes = 0.0, 0.0, [], set()
        fused = self.module.computations[inside]
        for inner in fused.instructions.values():
            more = self.arithmetic(inner, fused)
            flops, kernel_flops = flops + more[0], kernel_flops + more[1]
            collectives, notes = collectives + more[2], notes | more[3]
        if inside.startswith("all-reduce-scatter"):  # the TPU compiler's form of a reduce-scatter
            collectives = [
                dataclasses.replace(c, kind="reduce-scatter", wire=c.wire / 2) if c.kind == "all-reduce" else c
                for c in collectives
            ]
        return flops, kernel_flops, collectives, notes

    def collective(self, instruction: hlo.Instruction, computation: hlo.Computation) -> Collective:
        kind = instruction.opcode.removesuffix("-start")
        operands = sum(computation.instructions[name].bytes for name in instruction.operands)
        # A started collective returns its operands too: (operands, results)
        result = instruction.bytes - operands if instruction.opcode == "all-gather-start" else instruction.bytes
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs"))
            groups = tuple((int(a), int(b)) for a, b in pairs if a != b)
            return Collective(kind, groups, operands, operands)
        found = hlo.replica_groups(instruction, self.num_devices)
        groups = None if found is None else tuple(map(tuple, found.tolist()))
        members = self.num_devices if groups is None else len(groups[0])
        share = (members - 1) / members
        payload = result if kind == "all-gather" else operands
        wire = {"all-reduce": 2 * share, "collective-broadcast": 1.0}.get(kind, share) * payload
        # A collective overlapped with several fusions appears in each of them under one channel.
        overlapped = "async_collective_fusion_config" in instruction.attributes
        channel = f"{kind}:{instruction.attribute('channel_id')}" if overlapped else ""
        return Collective(kind, groups, payload, wire, channel=channel)

    def traffic(self, instruction: hlo.Instruction, computation: hlo.Computation) -> float:
        """Bytes read from and written to main memory."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
        if opcode == "custom-call" and not _is_kernel(instruction):
            return 0.0
        if opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
            # the result of a started slice is (operand, slice, context)
            piece = min(instruction.arrays[:2], key=lambda a: a.bytes) if opcode == "slice-start" else instruction.arrays[0]
            return sum(piece.bytes for space in (operands[0].arrays[0].space, piece.space) if space == 0)
        if opcode == "dynamic-update-slice":
            return 2.0 * _main(operands[1].arrays)
        if opcode == "copy-start":
            return _main(operands[0].arrays) + _main(instruction.arrays[:1])
        if opcode == "fusion" and "calls" in instruction.called:
            return self.fusion_traffic(instruction, operands, self.module.computations[instruction.called["calls"]])
        return sum(_main(operand.arrays) for operand in operands) + _main(instruction.arrays)

    def fusion_traffic(self, instruction, operands, fused: hlo.Computation) -> float:
        total, updated = 0.0, set()
        roots = [fused.root]
        if fused.root.opcode == "tuple":
            roots = [fused.instructions[name] for name in fused.root.operands]
        for root, array in zip(roots, instruction.arrays, strict=False):
            inner = _behind(root, fused)
            if inner.opcode == "dynamic-update-slice":  # in place: only the slice is written
                total += fused.instructions[inner.operands[1]].bytes if array.space == 0 else 0
                updated.add(_behind(fused.instructions[inner.operands[0]], fused).name)
            else:
                total += _main((array,))
        for number, operand in enumerate(operands):
            parameter = fused.parameters.get(number)
            if parameter is None or parameter.name in updated:
                continue
            users = _users(parameter, fused)
            if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
                total += sum(user.bytes for user in users) if _main(operand.arrays) else 0
            else:
                total += _main(operand.arrays)
        return total


def _main(arrays: Iterable[hlo.Array]) -> float:
    return float(sum(array.bytes for array in arrays if array.space == 0))


def _behind(instruction: hlo.Instruction, computation: hlo.Computation) -> hlo.Instruction:
    while instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _users(instruction: hlo.Instruction, computation: hlo.Computation) -> list[hlo.Instruction]:
    users = []
    for user in computation.users.get(instruction.name, []):
        users += _users(user, computation) if user.opcode == "bitcast" else [user]
    return users


def _once_per_channel(collectives: Sequence[Collective]) -> list[Collective]:
    seen: set[str] = set()
    kept = []
    for collective in collectives:
        if collective.channel and collective.channel in seen:
            continue
        seen.add(collective.channel)
        kept.append(dataclasses.replace(collective, channel=""))
    return kept


def _estimated_cycles(instruction: hlo.Instruction) -> float:
    if "estimated_cycles" not in instruction.attributes:
        return 0.0
    return float(instruction.backend_config.get("window_config", {}).get("estimated_cycles", 0))


def _dims(text: str) -> list[int]:
    return [int(i) for i in re.findall(r"\d+", text)]


def dot_flops(instruction: hlo.Instruction, computation: hlo.Computation) -> float:
    """2 x elements of the result x contracted elements."""
    left = computation.instructions[instruction.operands[0]].arrays[0]
    contracted = math.prod(left.dims[i] for i in _dims(instruction.attribute("lhs_contracting_dims")))
    return 2.0 * instruction.arrays[0].size * contracted


def convolution_flops(instruction: hlo.Instruction, computation: hlo.Computation) -> float:
    """2 x multiply-adds, without those that meet padding or dilation holes (a TPU writes batched products that way)."""
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    inputs, kernel, outputs = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels")).groups()
    window = {
        key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window"))
    }
    positions = 1
    for spatial in sorted(set(inputs) - {"b", "f"}):
        axis = int(spatial)
        size = left.dims[inputs.index(spatial)]
        base = int(window["lhs_dilate"][axis]) if "lhs_dilate" in window else 1
        spread = int(window["rhs_dilate"][axis]) if "rhs_dilate" in window else 1
        stride = int(window["stride"][axis]) if "stride" in window else 1
        low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
        out = np.arange(instruction.arrays[0].dims[outputs.index(spatial)])[:, None]
        at = out * stride - low + np.arange(right.dims[kernel.index(spatial)])[None] * spread
        positions *= int(((at >= 0) & (at < (size - 1) * base + 1) & (at % base == 0)).sum())
    groups = int(instruction.attribute("batch_group_count") or 1)
    batch = left.dims[inputs.index("b")] // groups
    return 2.0 * batch * positions * right.dims[kernel.index("i")] * right.dims[kernel.index("o")]


def _is_kernel(instruction: hlo.Instruction) -> bool:
    target = instruction.attribute("custom_call_target")
    return any(part in target for part in ("tpu_custom_call", "cudnn", "cublas", "triton", "mosaic"))


def custom_call_flops(instruction: hlo.Instruction, computation: hlo.Computation, visible_pairs: float):
    """(FLOPs, "" or a note that they are unknown) of a call that XLA does not look into."""
    target = instruction.attribute("custom_call_target").strip('"')
    config = instruction.backend_config
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    operands = [arrays[0] for arrays in operands if arrays]
    stated = config.get("custom_call_config", {}).get("cost_estimate", {}).get("flops")
    if stated is not None:
        return float(stated), ""
    if "cublas" in target:
        numbers = config.get("gemm_backend_config", {}).get("dot_dimension_numbers", {})
        contracted = math.prod(operands[0].dims[int(i)] for i in numbers.get("lhs_contracting_dimensions", []))
        return 2.0 * instruction.arrays[0].size * contracted, ""
    described = f"{instruction.name} {instruction.attribute('metadata')}".lower()
    if "fmha" in target:
        batch, queries, heads, width = operands[0].dims  # BTNH
        return _attention_flops(target.lower(), batch * heads, queries, operands[1].dims[1], width, visible_pairs), ""
    if "splash" in described or "flash_attention" in described:
        q, k = [a for a in operands if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16")][:2]  # [..., T, H]
        *batch, queries, width = q.dims
        kernel = "bwd" if '"use_fused_bwd_kernel\\": true' in described and "dkv" in described else instruction.name
        return _attention_flops(kernel, math.prod(batch), queries, k.dims[-2], width, visible_pairs), ""
    if _is_kernel(instruction):
        return 0.0, f"kernel {re.sub(r'[.0-9]+$', '', instruction.name)} states no FLOPs: counted as none"
    return 0.0, ""


def _attention_flops(kernel: str, rows: int, queries: int, keys: int, width: int, visible_pairs: float) -> float:
    products = next(count for name, count in _ATTENTION_PRODUCTS if name in kernel)
    return products * 2.0 * rows * queries * keys * width * visible_pairs

"""Reads compiled HLO text: instructions with shapes, which computations call which, and how often loops run.

XLA's own cost analysis counts the body of a loop once, so that a stack of scanned layers looks like one layer. Here the
module is read as a program: every computation, and for every `while` its trip count.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import cached_property

import numpy as np

_DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f4e2m1fn": 0.5, "f8e4m3": 1, "f8e5m2": 1, "f8e4m3fn": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "f8e4m3b11fnuz": 1,
    "f8e8m0fnu": 1, "f8e3m4": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0,
}  # fmt: skip
_START = re.compile(r"^ {2}(?:ROOT )?%?[\w.\-]+ = ")
_INSTRUCTION = re.compile(r"^ {2}(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_END = re.compile(r"^\}(?:$|, )")  # `}` or `}, execution_thread="..."`; inside an instruction it would be `}}, `
_MESH = re.compile(r"\breplica_groups=@?\w*mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: element type, dimensions, and the memory it lies in (0 = the main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of the layout."""
        return math.ceil(self.size * _DTYPE_BYTES.get(self.dtype, 4))


@dataclasses.dataclass
class Instruction:
    """One line of a computation; `arrays` is its result (several for a tuple), `attributes` the text behind its operands."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @cached_property
    def called(self) -> dict[str, str]:
        """Computations that it calls, by role: `calls`, `body`, `condition`, `to_apply`, ..."""
        return dict(_CALLED.findall(self.attributes))

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        found = _BRANCHES.search(self.attributes)
        if found:
            return tuple(name.strip().lstrip("%") for name in found[1].split(","))
        return tuple(self.called[key] for key in ("true_computation", "false_computation") if key in self.called)

    @cached_property
    def backend_config(self) -> dict:
        """The backend's JSON about this instruction, {} where there is none."""
        start = self.attributes.find("backend_config={")
        if start < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.attributes, start + len("backend_config="))[0]
        except json.JSONDecodeError:
            return {}

    def attribute(self, name: str) -> str:
        """The value of `name=VALUE`, up to the comma at its own level; "" where it is missing."""
        found = re.search(rf"\b{name}=", self.attributes)
        if not found:
            return ""
        depth, start = 0, found.end()
        for position in range(start, len(self.attributes)):
            char = self.attributes[position]
            depth += (char in "{[(") - (char in "}])")
            if depth < 0 or (char == "," and depth == 0):
                return self.attributes[start:position]
        return self.attributes[start:]


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order, and the root."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next((i for i in self.instructions.values() if i.is_root), list(self.instructions.values())[-1])

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.operands[0]): i for i in found}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who uses the result of an instruction, by its name."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass
class Module:
    """A compiled program of one device."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """How often the body of a `while` runs; None where it cannot be told from the text.

        The compiler's annotation where there is one; else, of a counting loop `i < n`, n and the start from the constants
        (also through the initial tuple) and the step from the body.
        """
        known = loop.backend_config.get("known_trip_count", {}).get("n")
        if known is not None:
            return int(known)
        condition = self.computations[loop.called["condition"]]
        compare, frame = self._through_fusion(condition.root, condition)
        if compare.opcode != "compare" or len(compare.operands) != 2:
            return None
        direction = compare.attribute("direction")
        counter, bound = (self._resolve(name, frame) for name in compare.operands)
        if direction in ("GT", "GE"):  # n > i
            counter, bound, direction = bound, counter, {"GT": "LT", "GE": "LE"}[direction]
        if counter[0] != "element" or direction not in ("LT", "LE", "NE"):
            return None
        init = computation.instructions.get(loop.operands[0])
        start = self._element_of(init, counter[1], computation)
        stop = bound[1] if bound[0] == "constant" else self._element_of(init, bound[1], computation)
        step = self._step(self.computations[loop.called["body"]], counter[1])
        if stop is None or not step:
            return None
        return max(0, math.ceil((stop + (direction == "LE") - (start or 0)) / step))

    def _through_fusion(self, instruction: Instruction, frame):
        """The root behind a fusion, with the frame in which its operands are to be read."""
        if instruction.opcode == "fusion":
            inner = self.computations[instruction.called["calls"]]
            return inner.root, (inner, instruction, frame)
        return instruction, (frame, None, None)

    def _resolve(self, name: str, frame) -> tuple[str, int | None]:
        """("constant", value), ("element", index of the loop's tuple) or ("unknown", None)."""
        computation, caller, outer = frame
        instruction = computation.instructions[name]
        if instruction.opcode == "constant":
            return "constant", _integer(instruction)
        if instruction.opcode == "get-tuple-element":
            return "element", int(instruction.attribute("index"))
        if instruction.opcode == "parameter" and caller is not None:
            return self._resolve(caller.operands[int(instruction.operands[0])], (outer, None, None))
        if instruction.opcode in ("copy", "bitcast", "convert"):
            return self._resolve(instruction.operands[0], frame)
        return "unknown", None

    def _element_of(self, init: Instruction | None, index: int | None, computation: Computation) -> int | None:
        if init is None or init.opcode != "tuple" or index is None:
            return None
        instruction = computation.instructions.get(init.operands[index])
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = computation.instructions.get(instruction.operands[0])
        return _integer(instruction) if instruction is not None and instruction.opcode == "constant" else None

    def _step(self, body: Computation, index: int) -> int | None:
        """By how much one run of the body advances element `index`; 1 where the text does not say."""
        if body.root.opcode != "tuple":
            return 1
        step, instruction, frame = 0, body.instructions[body.root.operands[index]], (body, None, None)
        for _ in range(16):
            computation, caller, outer = frame
            if instruction.opcode == "get-tuple-element":
                return step or 1
            if instruction.opcode == "fusion":
                instruction, frame = self._through_fusion(instruction, computation)
            elif instruction.opcode == "parameter" and caller is not None:
                instruction = outer.instructions[caller.operands[int(instruction.operands[0])]]
                frame = (outer, None, None)
            elif instruction.opcode in ("copy", "bitcast"):
                instruction = computation.instructions[instruction.operands[0]]
            elif instruction.opcode == "add":
                left, right = (computation.instructions[name] for name in instruction.operands)
                if left.opcode == "constant":
                    left, right = right, left
                kind, value = self._resolve(right.name, frame)
                if kind != "constant" or value is None:
                    return 1
                step, instruction = step + value, left
            else:
                return 1
        return 1


def _integer(instruction: Instruction) -> int | None:
    try:
        return int(instruction.operands[0])
    except (IndexError, ValueError):
        return None


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = Computation(header[2], {})
                computations[header[2]] = current
                entry = header[2] if header[1] else entry
        elif _END.match(line):
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    return Module(computations, entry or (list(computations)[-1] if computations else ""))


def _logical_lines(text: str):
    """Joins the lines of an instruction whose attributes hold line breaks (JSON of a kernel's metadata does)."""
    pending, inside = None, False
    for line in text.splitlines():
        if pending is not None and not _START.match(line) and not _END.match(line):
            pending += line
            continue
        if pending is not None:
            yield pending
            pending = None
        if inside and _START.match(line):
            pending = line
            continue
        inside = not _END.match(line) and (inside or bool(_COMPUTATION.match(line)))
        yield line
    if pending is not None:
        yield pending


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    body = _COMMENT.sub("", line[head.end() :])
    end = _closing(body, 0) + 1 if body.startswith("(") else _end_of_shape(body)
    shape, rest = body[:end], body[end:].lstrip()
    opcode, _, tail = rest.partition("(")
    close = _closing("(" + tail, 0)
    operands, attributes = tail[: close - 1], tail[close:].lstrip(", ")
    names = [piece.split()[-1].lstrip("%") for piece in _split(operands) if piece.strip()]
    return Instruction(head[2], opcode.strip(), parse_shape(shape), tuple(names), attributes, bool(head[1]))


def _end_of_shape(body: str) -> int:
    space = body.find(" ")
    return len(body) if space < 0 else space


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _split(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    if "(" not in text and "{" not in text and "[" not in text:
        return text.split(",")
    pieces, depth, start = [], 0, 0
    for position, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            pieces.append(text[start:position])
            start = position + 1
    return [*pieces, text[start:]]


def parse_shape(text: str) -> tuple[Array, ...]:
    """`(f32[8,128]{1,0:T(8,128)S(1)}, s32[])` -> its arrays; S(1) and up is memory on the chip."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub("", text)):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        arrays.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(arrays)


def replica_groups(instruction: Instruction, num_devices: int) -> np.ndarray | None:
    """Devices (by their place in the flattened mesh) that take part together, [groups, members]; None = not stated.

    Reads the three notations of XLA: `{{0,2},{1,3}}`, `[2,2]<=[2,2]T(1,0)` and `mesh['a'=2,'b'=2] {'b'}`, the last one also
    with the order of its devices: `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`.
    """
    by_mesh = _MESH.search(instruction.attributes)
    if by_mesh:
        return _mesh_groups(*by_mesh.groups())
    text = instruction.attribute("replica_groups")
    if not text or text == "{}":
        return np.arange(num_devices)[None] if text else None
    if text.startswith("{"):
        groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
        return np.array(groups) if groups and len({len(group) for group in groups}) == 1 else None
    iota = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if not iota:
        return None
    shape = tuple(map(int, iota[1].split(",")))
    return _iota(iota[2]).reshape(shape[0], -1)


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, ... in the shape [2, 4], transposed by (1, 0)."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    sizes = tuple(map(int, dims.split(",")))
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(tuple(map(int, order.split(",")))) if order else ids


def _mesh_groups(axes: str, order: str | None, inside: str) -> np.ndarray | None:
    sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)]
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", inside)
    dims, labels = [], []
    for name, size in sizes:
        part = next(((int(pre), int(n)) for axis, pre, n in wanted if axis == name and n), None)
        if part:  # a slice of an axis: (major part)(this part)(minor part)
            dims += [part[0], part[1], size // (part[0] * part[1])]
            labels += [None, name, None]
        else:
            dims.append(size)
            labels.append(name if any(axis == name for axis, *_ in wanted) else None)
    within = [i for i, label in enumerate(labels) if label]
    across = [i for i, label in enumerate(labels) if not label]
    ids = np.arange(math.prod(dims)) if order is None else _iota(order)
    return ids.reshape(dims).transpose(across + within).reshape(-1, math.prod(dims[i] for i in within))

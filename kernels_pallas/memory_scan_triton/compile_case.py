"""Compiles the Triton memory kernels for a GPU that need not be present: Triton to PTX, ptxas to machine code.

    python -m kernels_pallas.memory_scan_triton.compile_case '{"width": 128}'

prints registers, spilled bytes and shared memory as ptxas and Triton report them.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

from kernels_pallas.attention_triton import launch
from kernels_pallas.attention_triton.compile_case import Report, compile_kernel

DEFAULTS = {"width": 64, "chunk": 64, "tiles": 4, "heads": 2, "resets": False, "columns": {}, "warps": {}, "capability": 90}
KERNELS = ("forward", "states", "backward")


def compile_case(case: dict[str, Any], kernels: tuple[str, ...] = KERNELS) -> dict[str, Report]:
    """Compiles what a call and its gradient run.

    Args:
        case: keys of `DEFAULTS`; `columns` and `warps` = other settings, by kernel.
        kernels: which of them.

    Returns:
        What the compiler says, by kernel.
    """
    from kernels_pallas.memory_scan_triton import kernels as module

    launch.use_assembler_of_cuda()
    case = {**DEFAULTS, **case}
    calls = {call["kernel"].removesuffix("_kernel"): call for call in _calls(case)}
    reports = {}
    for name in kernels:
        function, call = getattr(module, f"{name}_kernel"), calls[name]
        taken = {*function.arg_names, "num_warps", "num_stages", "programs"}
        constants = {key: value for key, value in call.items() if key in taken}
        reports[name] = compile_kernel(function, call["arrays"], constants, case["capability"])
    return reports


def _calls(case: dict[str, Any]) -> list[dict[str, Any]]:
    """What a call and its gradient hand to `launch.call`, traced with abstract arrays."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.memory_scan.chunk import State
    from kernels_pallas.memory_scan_triton import vjp

    array, lead = jax.ShapeDtypeStruct, (2, case["heads"], case["tiles"], case["chunk"])
    token, gate = array((*lead, case["width"]), jnp.float32), array(lead, jnp.float32)
    layer = (array((2, case["heads"], case["width"], case["width"]), jnp.float32),)
    state = State(layer, layer, layer)
    flag = array((2, case["tiles"]), jnp.bool_)
    place = (array((2, case["tiles"], case["chunk"]), jnp.bool_), flag, flag)
    calls: list[dict[str, Any]] = []

    def record(kernel, arrays, out, **settings):
        calls.append({"kernel": kernel, "arrays": [*arrays, *out], **settings})
        return [jnp.zeros(x.shape, x.dtype) for x in out]

    def step(place, *arrays):
        scan = lambda q, k, v, gates, initial, begin: vjp.memory_scan(q, k, v, gates, *place, initial, begin)  # noqa: E731
        results, pullback = jax.vjp(scan, *arrays)
        return pullback(results)

    settings = mock.patch.dict(vjp._COLUMNS, case["columns"]), mock.patch.dict(vjp._WARPS, case["warps"])
    with mock.patch.object(launch, "call", record), settings[0], settings[1]:
        jax.eval_shape(step, place, token, token, token, (gate,) * 3, state, state if case["resets"] else None)
    return calls


if __name__ == "__main__":
    for name, report in compile_case(json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")).items():
        print(f"{name:10} {report}")

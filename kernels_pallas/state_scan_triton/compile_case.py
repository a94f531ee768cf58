"""Compiles the Triton scan kernels for a GPU that need not be present: Triton to PTX, ptxas to machine code.

    python -m kernels_pallas.state_scan_triton.compile_case '{"delta": true, "rows": 64}'

prints registers, spilled bytes and shared memory of each kernel, as ptxas and Triton report them.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

from kernels_pallas.attention_triton import launch
from kernels_pallas.attention_triton.compile_case import Report, compile_kernel

DEFAULTS = {
    "delta": False,
    "channel": False,
    "chains": 0,
    "heads": 4,
    "chunks": 4,
    "chunk": 64,
    "rows": 128,
    "width": 128,
    "dtype": "bfloat16",
    "tiles": {},
    "capability": 90,
}
FORWARD = ("prepare", "states", "output")
BACKWARD = ("state_gradients", "pair_gradients", "token_gradients")


def compile_case(case: dict[str, Any], kernels: tuple[str, ...] = FORWARD + BACKWARD) -> dict[str, Report]:
    """Compiles the kernels that a scan and its gradient would run.

    Args:
        case: keys of `DEFAULTS`; `chains` 0 = each row is one chain, without initial states; `tiles` = other block sizes, by
            kernel, as lists of the fields of `tuning.Tile`.
        kernels: which of them.

    Returns:
        What the compiler says, by kernel.
    """
    from kernels_pallas.state_scan_triton import kernels as functions

    launch.use_assembler_of_cuda()
    case = {**DEFAULTS, **case}
    calls = _calls(case)
    return {name: compile_kernel(getattr(functions, f"{name}_kernel"), *calls[name], case["capability"]) for name in kernels}


def _calls(case: dict[str, Any]) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """The arrays and constants that a scan and its gradient hand to `launch.call`, by kernel, traced with abstract arrays."""
    import jax
    import jax.numpy as jnp

    from attnlab.ops.chunk_scan import Chains
    from kernels_pallas.state_scan_triton import state_scan, tuning

    batch, chains, rows, width = 2, case["chains"], case["rows"], case["width"]
    lead = (batch, case["heads"], case["chunks"], case["chunk"])
    array = jax.ShapeDtypeStruct
    arrays = [array((*lead, size), jnp.float32) for size in (rows, rows, width, rows if case["channel"] else 1)]
    beta = array((*lead, 1), jnp.float32) if case["delta"] else None
    table = initial = None
    if chains:
        table = Chains(*(array((batch, size), jnp.int32) for size in (case["chunks"], case["chunks"], chains)))
        initial = array((batch, chains, case["heads"], rows, width), jnp.float32)
    calls = {}

    def record(kernel, arrays, out, *, interpret, device_kind, module, **constants):
        calls[kernel.removesuffix("_kernel")] = [*arrays, *out], constants
        return [jnp.zeros(x.shape, x.dtype) for x in out]

    def step(table, beta, initial, *arrays):
        precision = jax.lax.Precision.HIGHEST if case["dtype"] == "float32" else None
        scan = lambda beta, initial, *x: state_scan(*x, beta, table, initial, precision, out_dtype=case["dtype"])  # noqa: E731
        results, pullback = jax.vjp(scan, beta, initial, *arrays)
        return pullback(results)

    lookup = tuning.lookup

    def chosen(kernel, **sizes):
        return tuning.Tile(*case["tiles"][kernel]) if kernel in case["tiles"] else lookup(kernel, **sizes)

    with mock.patch.object(launch, "call", record), mock.patch.object(tuning, "lookup", chosen):
        jax.eval_shape(step, table, beta, initial, *arrays)
    return calls


if __name__ == "__main__":
    for name, report in compile_case(json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")).items():
        print(f"{name:16} {report}")

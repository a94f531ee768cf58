"""Compiles one Triton attention kernel for a GPU that need not be present: Triton to PTX, ptxas to machine code.

    python -m kernels_pallas.attention_triton.compile_case '{"kind": "dq", "width": 64}'

prints registers, spilled bytes and shared memory as ptxas and Triton report them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kernels_pallas.attention_triton import launch

DEFAULTS = {
    "kind": "forward",
    "normalization": "softmax",
    "causal": True,
    "window": (None, None),
    "listed": False,
    "vectors": False,
    "alibi": False,
    "length": 4096,
    "keys": 4096,
    "heads": 4,
    "kv_heads": 4,
    "width": 128,
    "dtype": "bfloat16",
    "block_q": 128,
    "block_kv": 128,
    "tile": None,
    "device_kind": None,
    "capability": 90,
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a kernel.

    Attributes:
        registers: per thread.
        spills: bytes stored per thread because registers ran out.
        shared: bytes of shared memory per program.
        ptx: the code.
    """

    registers: int
    spills: int
    shared: int
    ptx: str = dataclasses.field(repr=False)


def compile_case(case: dict[str, Any]) -> Report:
    """Compiles the kernel that a call would run; the keys of `case` are those of `DEFAULTS`."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.attention_triton import kernels, tuning, vjp

    launch.use_assembler_of_cuda()
    case = {**DEFAULTS, **case}
    length, keys, heads = case["length"], case["keys"], case["heads"]
    if case["tile"] is not None:
        lookup = tuning.lookup
        tuning.lookup = lambda *_, **__: tuning.Tile(*case["tile"])

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    q = array((1, length, heads, case["width"]), case["dtype"])
    k = array((1, keys, case["kv_heads"], case["width"]), case["dtype"])
    row, column = array((1, length), jnp.int32), array((1, keys), jnp.int32)
    vectors = (row, column, row, column) if case["vectors"] else (None,) * 4
    index = array((1, 1, -(-length // case["block_q"]), 4), jnp.int32) if case["listed"] else None
    slopes = array((1, heads), jnp.float32) if case["alibi"] else None
    causal = case["causal"]
    spec = vjp.Spec(
        normalization=case["normalization"],
        window=(case["window"][0], 0 if causal else case["window"][1]),
        causal=causal,
        scale=case["width"] ** -0.5,
        bias=-8.0 if case["normalization"] == "sigmoid" else 0.0,
        block_q=case["block_q"] if case["listed"] else None,
        block_kv=case["block_kv"] if case["listed"] else None,
        device_kind=case["device_kind"],
        interpret=False,
    )
    constants: dict[str, Any] = {}

    def arguments(q, k, slopes, indices):
        made, found = vjp.describe(case["kind"], spec, q, k, slopes, indices)
        constants.update(found)
        rest, out = (), (q, jnp.zeros((1,), jnp.float32))
        if case["kind"] != "forward":
            rest, out = (q, *(jnp.zeros((1,), jnp.float32),) * 2), (q,) if case["kind"] == "dq" else (k, k)
        return (q, k, k, *rest, *made, *out)

    arrays = jax.eval_shape(arguments, q, k, slopes, vjp.Indices(*vectors, index))
    if case["tile"] is not None:
        tuning.lookup = lookup
    return compile_kernel(getattr(kernels, f"{case['kind']}_kernel"), arrays, constants, case["capability"])


def compile_kernel(function: Any, arrays: Any, constants: dict[str, Any], capability: int) -> Report:
    """Compiles a Triton kernel.

    Args:
        function: the kernel.
        arrays: its array arguments, only shapes and types of which count.
        constants: its other arguments, with what `launch.call` takes by name.
        capability: compute capability, 90 for Hopper.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    types = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
    signature = {name: types[x.dtype.name] for name, x in zip(function.arg_names, arrays, strict=False)}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants.pop("programs")
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    options["enable_fp_fusion"] = True  # as jax-triton does
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder  # jax-triton, once imported, leaves Triton without a place for what it compiles
        built = triton.compile(source, target=target, options=options)
    return assemble(built.asm["ptx"], built.metadata.shared)


def assemble(ptx: str, shared: int) -> Report:
    """Runs the assembler that jaxlib would run, and reads its report."""
    program = launch.use_assembler_of_cuda()
    if program is None:
        raise RuntimeError("ptxas is missing: pip install nvidia-cuda-nvcc-cu12")
    target = re.search(r"\.target\s+(\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [program, "-v", f"--gpu-name={target}", str(file), "-o", str(file.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas failed:\n{done.stderr[-2000:]}")
    text = done.stdout + done.stderr
    registers = int(re.search(r"Used (\d+) registers", text).group(1))
    spills = int(re.search(r"(\d+) bytes spill stores", text).group(1))
    return Report(registers, spills, shared, ptx)


if __name__ == "__main__":
    print(compile_case(json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")))

"""Calls a Triton kernel from JAX: through jax-triton on a GPU, or in Triton's interpreter on the host.

Both packages are imported here and only when a kernel is called. The interpreter needs no GPU and no PyTorch: it gets host
arrays that show the few methods of a tensor that it asks for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import shutil
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

_KERNELS = "kernels_pallas.attention_triton.kernels"
# The interpreter keeps the present program in globals, and several host devices may call at once.
_one_at_a_time = threading.Lock()
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}
# Compute capability by the names that `jax.Device.device_kind` gives, to compile for a GPU that is not at hand.
_CAPABILITIES = {"A100": 80, "A10": 86, "A6000": 86, "L4": 89, "L40": 89, "H100": 90, "H200": 90, "GH200": 90, "B200": 100}


def missing(interpret: bool) -> str | None:
    """Says which package is missing to run the kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux only)"
    if interpret:
        return None
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed: pip install jax-triton"
    try:
        importlib.import_module("jax_triton")
    except (ImportError, AttributeError) as error:  # a jaxlib without its GPU plugin, or one that does not fit
        return f"jax-triton cannot be imported: {str(error).splitlines()[0]}"
    return None


def call(
    kernel: str,
    arrays: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    device_kind: str | None,
    module: str = _KERNELS,
    **constants: Any,
) -> list[jax.Array]:
    """Calls a kernel with a grid of one dimension.

    Args:
        kernel: its name.
        arrays: its array arguments in order.
        out: shapes and types of its results, which are its last array arguments.
        programs: size of the grid.
        num_warps: warps per program.
        num_stages: depth of its software pipelines.
        interpret: run on the host.
        device_kind: compile for this GPU where none is present.
        module: where the kernel is; of its imports only Triton, and of Triton only builtins (`_interpreted`).
        **constants: its `tl.constexpr` arguments.

    Returns:
        The results in order.
    """
    if interpret:
        run = functools.partial(_interpret, module, kernel, tuple(out), programs, constants)
        return jax.pure_callback(run, list(out), *arrays, vmap_method="sequential")
    use_assembler_of_cuda()
    import jax_triton

    function = getattr(importlib.import_module(module), kernel)
    family = module.split(".")[-2].removesuffix("_triton")
    parameters = inspect.signature(jax_triton.triton_call).parameters
    shapes = {"out_type" if "out_type" in parameters else "out_shape": list(out)}  # renamed in jax-triton 0.4
    if jax.default_backend() != "gpu":
        known = (_CAPABILITIES[word] for word in (device_kind or "").split() if word in _CAPABILITIES)
        shapes["compute_capability"] = next(known, 90)

    # jax-triton has no rule for vmap: one call after the other
    @jax.custom_batching.sequential_vmap
    def launch(*arrays):
        return jax_triton.triton_call(
            *arrays,
            kernel=function,
            name=f"{family}_{kernel}",
            grid=(programs,),
            num_warps=num_warps,
            num_stages=num_stages,
            **shapes,
            **constants,
        )

    return launch(*arrays)


def use_assembler_of_cuda() -> str | None:
    """Tells Triton which ptxas will assemble its code; returns the path, or None where there is none.

    jaxlib assembles it with the ptxas of its own CUDA, and Triton writes PTX of the newest version that the ptxas it
    brings along understands: CUDA 12 refuses what Triton 3.9 writes unless Triton is told.
    """
    assembler = _assembler_of_cuda()
    if assembler is not None:
        for tool in ("PTXAS", "PTXAS_BLACKWELL"):
            os.environ.setdefault(f"TRITON_{tool}_PATH", assembler)
    return assembler


@functools.cache
def _assembler_of_cuda() -> str | None:
    """Path of the ptxas that XLA finds: in CUDA's wheels, CUDA_HOME, the usual folder, PATH."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root) / part for root in (spec.submodule_search_locations if spec else ()) for part in ("cuda_nvcc", "cu13")]
    folders += [Path(root) for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    for folder in folders:
        if (folder / "bin" / "ptxas").is_file():
            return os.fspath(folder / "bin" / "ptxas")
    return shutil.which("ptxas")


class _HostArray:
    """What Triton's interpreter asks of a tensor, around a numpy array."""

    def __init__(self, array: np.ndarray | None = None) -> None:
        self.array = array

    @property
    def dtype(self) -> str:
        return _TYPES[self.array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    # A tensor is its own storage: the interpreter only moves storages between device and host, and there is one host.
    def untyped_storage(self) -> _HostArray:
        return self

    def cpu(self) -> _HostArray:
        return self

    def new_empty(self, *size: int, device: str) -> _HostArray:
        return _HostArray()

    def set_(self, storage: _HostArray, *view: Any) -> None:
        self.array = storage.array

    def copy_(self, other: _HostArray) -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


@functools.cache
def _interpreted(module: str) -> types.ModuleType:
    """A module of kernels once more, its functions made for the interpreter."""
    import triton

    spec = importlib.util.find_spec(module)
    spec = importlib.util.spec_from_file_location(module + "_interpreted", spec.origin)
    twin = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = twin
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(twin)
    return twin


def _interpret(
    module: str, kernel: str, out: tuple[jax.ShapeDtypeStruct, ...], programs: int, constants: dict[str, Any], *arrays: Any
) -> list[np.ndarray]:
    # The interpreter multiplies bfloat16 by its bits: widen on the way in, narrow on the way out.
    given = [np.array(x, np.float32 if x.dtype.name == "bfloat16" else None, order="C") for x in map(np.asarray, arrays)]
    results = [np.zeros(x.shape, np.float32 if x.dtype.name == "bfloat16" else x.dtype) for x in out]
    with _one_at_a_time, np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        function = getattr(_interpreted(module), kernel)  # devices come here in threads of their own, and one imports
        function[(programs,)](*map(_HostArray, [*given, *results]), **constants)
    return [x.astype(like.dtype) for x, like in zip(results, out, strict=True)]

"""Tries every implementation of every op on the local device, forward and backward: `python -m attnlab.doctor`.

Small shapes, some seconds. Each implementation is compared with the reference in float32; one that belongs to another
platform is listed as such, and with `--interpret` our kernels run in their interpreters wherever they cannot run natively. The
exit code is 1 if anything that runs is wrong or breaks, else 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Of the largest value of each result, for inputs of that type.
TOLERANCES = {"float32": 5e-5, "bfloat16": 2e-2}
# Implementations that are kernels of this project: they have an interpreter.
INTERPRETED = ("pallas", "triton")
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-triton", "triton")


@dataclasses.dataclass(frozen=True)
class Case:
    """A small call of an op.

    Attributes:
        op: its name.
        name: what is special about the call.
        shape: (B, T, S, N, K, H).
        options: keyword arguments; a function of (B, T, S) where they hold arrays.
        reference: the implementation to compare with.
        call: (op, q, k, v, **options) to the result, where that is more than `op(q, k, v, **options)`.
    """

    op: str
    name: str
    shape: tuple[int, int, int, int, int, int]
    options: Callable[[int, int, int], dict[str, Any]]
    reference: str = "xla"
    call: Callable[..., Any] = lambda op, *arrays, **options: op(*arrays, **options)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        op: name of the op.
        implementation: name of the implementation.
        case: what was called.
        shape: "BxTxSxNxKxH", or "".
        dtype: of the inputs, or "".
        status: "ok", "WRONG" (differs from the reference), "BROKEN" (an exception), "refused" or "elsewhere".
        error: largest difference to the reference over result and gradients, relative to the largest value; None = not run.
        seconds: compilation and one run; None = not run.
        note: the reason of a refusal, or the first line of an exception.
    """

    op: str
    implementation: str
    case: str = ""
    shape: str = ""
    dtype: str = ""
    status: str = ""
    error: float | None = None
    seconds: float | None = None
    note: str = ""


def _masked(batch: int, length: int, keys: int) -> dict[str, Any]:
    import jax.numpy as jnp

    def documents(count):
        return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32) // 50, (batch, count))

    there = jnp.arange(keys)[None] < keys - 20 * jnp.arange(batch)[:, None]
    return {"causal": True, "q_segment_ids": documents(length), "kv_segment_ids": documents(keys), "kv_mask": there}


def _listed(batch: int, length: int, keys: int) -> dict[str, Any]:
    import jax.numpy as jnp

    rows, columns = -(-length // 128), -(-keys // 128)
    index = jnp.stack([jnp.arange(rows) % columns, jnp.full(rows, -1)], axis=-1).at[-1].set(jnp.array([columns - 1, 0]))
    index = jnp.broadcast_to(index.astype(jnp.int32), (batch, 1, rows, 2))
    return {"block_index": index, "block_q": 128, "block_kv": 128, "causal": True}


def _gates(batch: int, length: int, heads: int, *, width: int | None = None) -> Any:
    """Log decays [B, T, N] or [B, T, N, H] float32, between 0 and -1."""
    import jax.numpy as jnp
    import numpy as np

    shape = (batch, length, heads) if width is None else (batch, length, heads, width)
    return jnp.asarray(-np.random.default_rng(7).random(shape), jnp.float32)


def _linear_scan(op: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    batch, length, heads, width = q.shape
    return op(q, k, v, _gates(batch, length, heads, width=width), **options)[0]


def _delta_scan(op: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    from attnlab.ops.linear_scan import l2_normalize

    gates = _gates(*q.shape[:3])
    return op(q, l2_normalize(k), v, gates, 0.5 - 0.5 * gates, **options)[0]


def _sparse_states(op: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    from attnlab.ops.sparse_state import route

    gates = _gates(*q.shape[:3])
    routing = route(_gates(*q.shape[:2], 4) * 8.0, 1, 1)
    return op(q, 0.5 * q, k, 0.5 * k, v, gates, 0.5 * gates, routing, **options)[0]


def _linear_scan_per_head(op: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    return op(q, k, v, _gates(*q.shape[:3]), **options)[0]


def _some_heads(op: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    from attnlab.ops.head_routing import select_heads

    gates = -_gates(*q.shape[:3])
    return op(q, k, v, gates, select_heads(gates[..., 1:], 1), top_k=1, **options)


def _memory(op: Any, q: Any, k: Any, v: Any, layers: int = 2, **options: Any) -> Any:
    import jax.numpy as jnp

    from attnlab.ops.linear_scan import l2_normalize

    gates = -_gates(*q.shape[:3])
    weights = [0.1 * jnp.broadcast_to(jnp.eye(q.shape[-1]), (q.shape[2], q.shape[-1], q.shape[-1]))] * layers
    return op(q, l2_normalize(k), v, 0.05 * gates, 0.5 * gates, 0.1 * gates, weights, **options).y


def _regions(op: Any, *arrays: Any, **options: Any) -> Any:
    image = [x.reshape(x.shape[0], 8, -1, *x.shape[2:]) for x in arrays]
    return op(*image, n_win=4, topk=3, **options)[0].reshape(arrays[0].shape)


def cases() -> list[Case]:
    """The calls that are tried."""
    plain, grouped = (1, 130, 130, 2, 2, 64), (2, 130, 150, 4, 2, 32)
    ragged, nothing = (2, 70, 70, 2, 2, 16), lambda *_: {}
    return [
        Case("softmax_attention", "causal", plain, lambda *_: {"causal": True}),
        Case("softmax_attention", "segments, padding, groups", grouped, _masked),
        Case("sigmoid_attention", "causal", plain, lambda *_: {"causal": True, "bias": -4.0}),
        Case("sigmoid_attention", "segments, padding, groups", grouped, lambda *s: {**_masked(*s), "bias": -4.0}),
        Case("block_attention", "softmax, causal", (1, 200, 300, 2, 1, 64), _listed, "xla_dense"),
        Case("topk_attention", "16 keys, causal", plain, lambda *_: {"causal": True, "top_k": 16}, "xla_dense"),
        Case("shifted_attention", "sinks", (1, 64, 64, 4, 2, 32), lambda *_: {"group_size": 16, "num_sinks": 4}, "xla_dense"),
        Case("bilevel_routing_attention", "8 x 8 map", (2, 64, 64, 2, 2, 16), nothing, "gather", _regions),
        Case("gated_linear_scan", "decay per channel", ragged, lambda *_: {"chunk_size": 16}, "recurrent", _linear_scan),
        Case("gated_delta_scan", "decay per head", ragged, lambda *_: {"chunk_size": 16}, "recurrent", _delta_scan),
        Case("gated_linear_scan", "decay per head", ragged, lambda *_: {"chunk_size": 16}, "recurrent", _linear_scan_per_head),
        Case("gated_delta_scan", "wide heads", (1, 130, 130, 2, 2, 64), nothing, "recurrent", _delta_scan),
        Case("sparse_state_attention", "1 of 4", ragged, lambda *_: {"chunk_size": 16}, "recurrent", _sparse_states),
        Case("mixture_of_heads_attention", "a shared and 1 of 3", (1, 130, 130, 4, 4, 32), nothing, "all_heads", _some_heads),
        Case("neural_memory", "one layer", ragged, lambda *_: {"chunk_size": 16, "layers": 1}, "xla_recurrent", _memory),
        Case("neural_memory", "two layers", ragged, lambda *_: {"chunk_size": 16}, "xla_recurrent", _memory),
    ]


def examine(*, interpret: bool = False, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Iterator[Row]:
    """Tries everything, and yields the rows of the table as they come.

    Args:
        interpret: run our kernels in their interpreters where the device is not theirs.
        dtypes: types of inputs to try.
    """
    from attnlab import ops
    from attnlab.ops import dispatch

    platform = dispatch.target_platform()
    tried = cases()
    for case in tried:
        for name, platforms in dispatch.implementations(case.op).items():
            foreign = platform not in platforms
            if foreign and not (interpret and name in INTERPRETED):
                if case is next(c for c in tried if c.op == case.op):
                    yield Row(case.op, name, status="elsewhere", note=f"runs on {' and '.join(platforms)}")
                continue
            for dtype in dtypes:
                if name != case.reference or dtype != "float32":
                    yield _try(case, name, dtype, foreign)
    covered = {case.op for case in tried}
    for op in sorted(set(ops.__all__) - covered):
        try:
            names = dispatch.implementations(op)
        except ValueError:  # has no table: plain XLA
            continue
        for name in names:
            yield Row(op, name, status="elsewhere", note="the doctor has no case for this op")


def _op(name: str) -> Callable[..., Any]:
    import importlib

    from attnlab import ops

    if hasattr(ops, name):
        return getattr(ops, name)
    return getattr(importlib.import_module(f"attnlab.ops.{name}"), name)


def _try(case: Case, name: str, dtype: str, foreign: bool) -> Row:
    import contextlib

    import jax
    import jax.numpy as jnp
    import numpy as np

    from attnlab.ops import dispatch

    batch, length, keys, heads, kv_heads, width = case.shape
    row = Row(case.op, name, case.name, "x".join(map(str, case.shape)), dtype)
    begin = time.perf_counter()
    options = case.options(batch, length, keys)

    def run(implementation, *arrays):
        out, pullback = jax.vjp(lambda *x: case.call(_op(case.op), *x, implementation=implementation, **options), *arrays[:3])
        return out, *pullback(arrays[3])

    shapes = [(batch, length, heads, width), *[(batch, keys, kv_heads, width)] * 2, (batch, length, heads, width)]
    arrays = [np.random.default_rng(i).normal(size=s).astype("float32") for i, s in enumerate(shapes)]
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    # these programs run for milliseconds: on a CPU most of the time goes into compiling them
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    compiled = functools.partial(jax.jit, static_argnums=0, compiler_options=quick)
    try:
        with dispatch.interpreted() if foreign else contextlib.nullcontext():
            have = jax.block_until_ready(compiled(run)(name, *arrays))
        want = compiled(run)(case.reference, *(x.astype(jnp.float32) for x in arrays))
    except NotImplementedError as error:
        return dataclasses.replace(row, status="refused", note=str(error).split(": ", 1)[-1].splitlines()[0])
    except Exception as error:  # whatever a compiler raises: it is what the table is for
        note = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        return dataclasses.replace(row, status="BROKEN", note=note[:200])
    error = max(
        float(jnp.max(jnp.abs(one.astype(jnp.float32) - other)) / jnp.maximum(jnp.max(jnp.abs(other)), 1e-6))
        for one, other in zip(have, want, strict=True)
    )
    status = "ok" if error <= TOLERANCES[dtype] else "WRONG"  # a NaN is not below the tolerance either
    note = "in the interpreter" if foreign else ""
    return dataclasses.replace(row, status=status, error=error, seconds=time.perf_counter() - begin, note=note)


def about() -> dict[str, Any]:
    """The device and the versions that matter."""
    import jax

    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    device = jax.local_devices()[0]
    return {"platform": device.platform, "device": device.device_kind, "count": jax.local_device_count(), "packages": found}


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    head = ("op", "implementation", "case", "BxTxSxNxKxH", "type", "status", "error", "s", "")
    lines = [head]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append((row.op, row.implementation, row.case, row.shape, row.dtype, row.status, error, seconds, row.note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)).rstrip() for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m attnlab.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="run our kernels in their interpreters where they are not at home")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--platform", help="which of jax's platforms to try (cpu, gpu, tpu); the default is jax's")
    options = parser.parse_args(arguments)
    import jax

    if options.platform:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(options.platform, options.platform))
    try:
        header = about()
    except RuntimeError as error:
        print(f"no device: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    rows = list(examine(interpret=options.interpret))
    bad = sum(row.status in ("WRONG", "BROKEN") for row in rows)
    if options.json:
        print(json.dumps({**header, "rows": [dataclasses.asdict(row) for row in rows], "bad": bad}))
    else:
        packages = ", ".join(f"{name} {version or 'absent'}" for name, version in header["packages"].items())
        print(f"{header['count']} x {header['device']} ({header['platform']}); {packages}\n")
        print(table(rows))
        ran = sum(row.error is not None for row in rows)
        print(f"\n{ran} runs, {bad} bad" if bad else f"\n{ran} runs, all right")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

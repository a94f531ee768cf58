"""What the benchmarks of sparse attention share: gates, timing, the best dense attention, tables and the crossover plot."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import experiment
import jax
import jax.numpy as jnp
import numpy as np

from attnlab import ops
from attnlab.analysis import charts
from attnlab.ops import dispatch

RESULTS = experiment.RESULTS
# A measurement takes about so long, and one call may take at most so long before longer sequences are left out.
SECONDS, LIMIT = 1.0, 20.0


def arguments(description: str, longest_on_cpu: int) -> argparse.Namespace:
    """Reads the options that both benchmarks have; defaults depend on the device."""
    accelerated = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shortest", type=int, default=1024, help="T to begin with; it doubles")
    parser.add_argument("--longest", type=int, default=131072 if accelerated else longest_on_cpu, help="T to end with")
    parser.add_argument("--heads", type=int, default=16 if accelerated else 2)
    parser.add_argument("--width", type=int, default=128 if accelerated else 64, help="of a head")
    parser.add_argument("--dtype", default="bfloat16" if accelerated else "float32")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the results")
    return parser


def lengths(options: argparse.Namespace) -> list[int]:
    """T, doubling from the shortest to the longest."""
    return [options.shortest << i for i in range(64) if options.shortest << i <= options.longest]


def draw(options: argparse.Namespace, length: int, heads: int | None = None) -> list[jax.Array]:
    """q, k, v and a cotangent of normal numbers, [1, T, N, H]."""
    shape = (1, length, options.heads if heads is None else heads, options.width)
    return [jax.random.normal(key, shape, options.dtype) for key in jax.random.split(jax.random.key(0), 4)]


def both(fn: Any) -> Any:
    """fn and its gradients as one jitted function of (q, k, v, cotangent)."""

    def run(q, k, v, cotangent):
        out, pullback = jax.vjp(fn, q, k, v)
        return out, *pullback(cotangent)

    return jax.jit(run)


def gate(name: str, fn: Any, reference: Any, arrays: list[jax.Array]) -> float:
    """Compares values and gradients with a float32 reference, and ends the program where they differ.

    Returns:
        The largest difference relative to the largest value.
    """
    have = both(fn)(*arrays)
    want = both(reference)(*(x.astype(jnp.float32) for x in arrays))
    pairs = [(np.asarray(a, np.float32), np.asarray(b)) for a, b in zip(have, want, strict=True)]
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    allowed = 1e-4 if arrays[0].dtype == jnp.float32 else 3e-2
    if not error <= allowed:
        raise SystemExit(f"{name} differs from the reference by {error:.1e}, more than {allowed:.0e}: nothing is timed")
    return error


def seconds(run: Any, *inputs: Any) -> float | None:
    """Median time of a call, or None where it does not fit into memory; `run` is jitted."""
    try:
        jax.block_until_ready(run(*inputs))
        begin = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        once = time.perf_counter() - begin
        times = [once]
        # short calls in batches, so that the time of a dispatch does not count
        each = max(1, math.ceil(0.02 / max(once, 1e-6)))
        while sum(times) * each < SECONDS and len(times) < 20 and once < LIMIT:
            begin = time.perf_counter()
            for _ in range(each):
                out = run(*inputs)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - begin) / each)
        return statistics.median(times)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
            return None
        raise


def dense_names(arrays: list[jax.Array], **keywords: Any) -> list[str]:
    """Implementations of dense softmax attention that can do a call here."""
    platform = dispatch.target_platform()
    found = []
    for name, platforms in dispatch.implementations("softmax_attention").items():
        if platform in platforms:
            try:
                ops.explain("softmax_attention", *arrays[:3], implementation=name, **keywords)
                found.append(name)
            except NotImplementedError:
                continue
    return found


def best_dense(arrays: list[jax.Array], slow: set[str], **keywords: Any) -> dict[str, tuple[str, float]]:
    """The fastest dense softmax attention of all that run here, per pass.

    Args:
        arrays: q, k, v, cotangent.
        slow: implementations that are left out; those above the limit are added.
        **keywords: of `softmax_attention`.

    Returns:
        {"forward" | "both": (implementation, seconds)}.
    """
    best: dict[str, tuple[str, float]] = {}
    for name in dense_names(arrays, **keywords):
        if name in slow:
            continue

        def fn(q, k, v, name=name):
            return ops.softmax_attention(q, k, v, implementation=name, **keywords)

        for work, run, inputs in (("forward", jax.jit(fn), arrays[:3]), ("both", both(fn), arrays)):
            took = seconds(run, *inputs)
            if took is None or took > LIMIT:
                slow.add(name)
            if took is not None and (work not in best or took < best[work][1]):
                best[work] = (name, took)
    return best


def show(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; columns: {key: format}."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = ("" if row.get(key) is None else format(row[key], style) for key, style in columns.items())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(
    name: str, options: argparse.Namespace, rows: list[dict[str, Any]], text: str, lines: list[charts.Line], title: str
) -> None:
    """Prints the table and one JSON line; writes both and the plot to the results."""
    device = jax.devices()[0]
    about = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "jax": jax.__version__,
        "heads": options.heads,
        "width": options.width,
        "dtype": options.dtype,
        "rows": rows,
    }
    slug = "".join(c if c.isalnum() else "_" for c in device.device_kind.lower())
    file = options.out / f"{name}_{slug}"
    axes = {"x_label": "log2 of the length T", "y_label": "log2 of the speed-up"}
    experiment.picture(file.with_suffix(".svg"), lines, **axes, title=title, references=[("dense", 0.0)], labels=170)
    file.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    file.with_suffix(".md").write_text(f"{title}, {device.device_kind}, {about['date']}\n\n{text}\n")
    print(text)
    print(json.dumps(about))


def curve(name: str, rows: list[dict[str, Any]], key: str, colour: int) -> charts.Line:
    """The speed-ups `key` of some rows over log2 T."""
    points = [(math.log2(row["T"]), math.log2(row[key])) for row in rows if row.get(key)]
    steps, values = (np.array(column, np.float64) for column in zip(*points, strict=True)) if points else (np.zeros(0),) * 2
    return charts.Line(name, steps, values, colour, points=True)

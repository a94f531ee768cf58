"""Exact top-k attention beside the best dense attention and the masked form: time and memory over lengths.

    python benchmarks/topk_attention.py [--longest 16384]

First the streamed form is compared with the reference (values and gradients); then, in one run and causal throughout, the
fastest dense softmax attention of this device, `ops.topk_attention`, and its masked form (all scores and a mask) are timed:
the op alone, forward and with its gradients, and a whole layer. `memory` is what the compiled step of values and gradients
holds beside its arguments and results. Writes a table, a JSON file and the crossover plot to benchmarks/results.
Some minutes on two cores.
"""

from __future__ import annotations

import functools
from typing import Any

import crossover
import jax
import jax.numpy as jnp

from attnlab import ops
from attnlab.ops.topk_attention import topk_attention

COUNTS = (16, 64, 256)
# The masked form sorts and keeps [T, S] scores: it is timed up to here, its memory is compiled at every length.
LONGEST_MASKED = 2048


def memory(fn: Any, arrays: list[jax.Array]) -> float | None:
    """MiB that the compiled step holds beside its arguments and results, None where it cannot be compiled."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    try:
        return crossover.both(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 2**20
    except jax.errors.JaxRuntimeError:
        return None


def layer(options: Any, attend: Any) -> Any:
    """A whole attention layer of x [1, T, D], and its weights."""

    def run(x, weights):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights[:3])
        return jnp.einsum("btnh,dnh->btd", attend(q, k, v), weights[3])

    dim = options.heads * options.width
    keys = jax.random.split(jax.random.key(1), 4)
    weights = [jax.random.normal(key, (dim, options.heads, options.width), options.dtype) * dim**-0.5 for key in keys]
    return jax.jit(run), weights


def main() -> None:
    options = crossover.arguments(__doc__, 16384).parse_args()
    small = crossover.draw(options, 300)
    form = functools.partial(topk_attention, top_k=16, causal=True)
    error = crossover.gate("xla", form, functools.partial(form, implementation="xla_dense"), small)
    print(f"xla equals the reference within {error:.1e}")
    rows: list[dict[str, Any]] = []
    slow: set[str] = set()
    for length in crossover.lengths(options):
        arrays = crossover.draw(options, length)
        x = jax.random.normal(jax.random.key(2), (1, length, options.heads * options.width), options.dtype)
        dense = crossover.best_dense(arrays, slow, causal=True)
        run, weights = layer(options, functools.partial(ops.softmax_attention, causal=True))
        dense_layer = crossover.seconds(run, x, weights) if dense else None
        for top_k in COUNTS:
            for name in ("xla", "xla_dense"):
                fn = functools.partial(topk_attention, top_k=top_k, causal=True, implementation=name)
                masked = name == "xla_dense"
                if masked and top_k != 64:
                    continue
                row: dict[str, Any] = {"T": length, "k": top_k, "implementation": name}
                row["memory_MiB"] = memory(fn, arrays)
                timed = not masked or length <= LONGEST_MASKED
                for work, call, inputs in (("forward", jax.jit(fn), arrays[:3]), ("both", crossover.both(fn), arrays)):
                    if work in dense:
                        row[f"dense_{work}"], row[f"dense_{work}_ms"] = dense[work][0], 1e3 * dense[work][1]
                    took = crossover.seconds(call, *inputs) if timed else None
                    row[f"{work}_ms"] = None if took is None else 1e3 * took
                    row[f"{work}_speedup"] = dense[work][1] / took if took and work in dense else None
                if not masked:
                    run, weights = layer(options, fn)
                    took = crossover.seconds(run, x, weights)
                    row["layer_ms"] = None if took is None else 1e3 * took
                    row["layer_speedup"] = dense_layer / took if took and dense_layer else None
                rows.append(row)
                print(f"T = {length}, k = {top_k}, {name}: {row['forward_ms']} ms forward, {row['memory_MiB']} MiB", flush=True)
    columns = {"T": "d", "k": "d", "implementation": "", "memory_MiB": ".0f", "dense_forward": ""}
    for work in ("forward", "both"):
        columns |= {f"dense_{work}_ms": ".2f", f"{work}_ms": ".2f", f"{work}_speedup": ".2f"}
    columns |= {"layer_ms": ".2f", "layer_speedup": ".2f"}
    ours = [row for row in rows if row["implementation"] == "xla"]
    chosen = [[row for row in ours if row["k"] == top_k] for top_k in COUNTS]
    lines = [crossover.curve(f"k = {k}", part, "both_speedup", i) for i, (k, part) in enumerate(zip(COUNTS, chosen, strict=True))]
    title = "Exact top-k attention against the best dense attention, forward and backward, causal"
    crossover.save("topk_attention", options, rows, crossover.show(rows, columns), lines, title)


if __name__ == "__main__":
    main()

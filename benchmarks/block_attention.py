"""Block lists beside the best dense attention, over lengths and densities.

    python benchmarks/block_attention.py [--longest 8192]

Each query block attends to its own key block and to random others, T / 128 blocks of 128 tokens; density = listed / all
blocks. First every implementation is compared with the reference (values and gradients); then, in one run, the fastest dense
softmax attention of this device and `ops.block_attention` are timed at every length: the op alone, forward and with its
gradients, and a whole layer (projections, pooled scores, choice of blocks, attention, projection). Writes a table, a
JSON file and the crossover plot to benchmarks/results. Some minutes on two cores.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import crossover
import jax
import jax.numpy as jnp
import numpy as np

from attnlab import ops
from attnlab.ops import dispatch, select

BLOCK = 128
DENSITIES = [Fraction(1, n) for n in (2, 4, 8, 16, 32)]


def lists(length: int, density: Fraction) -> jax.Array | None:
    """Own block and random others, [1, 1, R, J] int32; None where that is less than one block."""
    blocks = length // BLOCK
    count = int(blocks * density)
    if count < 1:
        return None
    scores = np.random.default_rng(0).random((1, 1, blocks, blocks)).astype(np.float32)
    return select.top_blocks(jnp.asarray(scores), count, forced=np.eye(blocks, dtype=bool)[None, None])


def listed(index: jax.Array, implementation: str | None = None) -> Any:
    return lambda q, k, v: ops.block_attention(q, k, v, index, block_q=BLOCK, block_kv=BLOCK, implementation=implementation)


def layer(options: Any, count: int | None) -> Any:
    """A whole attention layer of x [1, T, D] and its weights; count = blocks per query block, None = dense."""

    def run(x, weights):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights[:3])
        if count is None:
            out = ops.softmax_attention(q, k, v)
        else:
            blocks = x.shape[1] // BLOCK
            pooled = select.pool_blocks(q, BLOCK), select.pool_blocks(k, BLOCK)
            index = select.top_blocks(select.block_scores(*pooled, groups="all"), count, forced=np.eye(blocks, dtype=bool))
            out = listed(index)(q, k, v)
        return jnp.einsum("btnh,dnh->btd", out, weights[3])

    dim = options.heads * options.width
    keys = jax.random.split(jax.random.key(1), 4)
    weights = [jax.random.normal(key, (dim, options.heads, options.width), options.dtype) * dim**-0.5 for key in keys]
    return jax.jit(run), weights


def main() -> None:
    options = crossover.arguments(__doc__, 8192).parse_args()
    small = crossover.draw(options, 4 * BLOCK)
    index = lists(4 * BLOCK, Fraction(1, 2))
    platform = dispatch.target_platform()
    for name, platforms in dispatch.implementations("block_attention").items():
        if platform in platforms and name != "xla_dense":
            try:
                error = crossover.gate(name, listed(index, name), listed(index, "xla_dense"), small)
                print(f"{name} equals the reference within {error:.1e}")
            except NotImplementedError as reason:
                print(f"not tried: {reason}")
    rows: list[dict[str, Any]] = []
    slow: set[str] = set()
    slow_densities: set[Fraction] = set()
    for length in crossover.lengths(options):
        arrays = crossover.draw(options, length)
        dense = crossover.best_dense(arrays, slow)
        x = jax.random.normal(jax.random.key(2), (1, length, options.heads * options.width), options.dtype)
        run, weights = layer(options, None)
        dense_layer = crossover.seconds(run, x, weights) if dense else None
        for density in DENSITIES:
            index = lists(length, density)
            if index is None or density in slow_densities:
                continue
            fn = listed(index)
            row: dict[str, Any] = {"T": length, "density": str(density), "blocks": index.shape[-1]}
            row["implementation"] = ops.explain(ops.block_attention, *arrays[:3], index, block_q=BLOCK, block_kv=BLOCK).chosen
            for work, call, inputs in (("forward", jax.jit(fn), arrays[:3]), ("both", crossover.both(fn), arrays)):
                took = crossover.seconds(call, *inputs)
                row[f"{work}_ms"] = None if took is None else 1e3 * took
                if work in dense:
                    row[f"dense_{work}"], row[f"dense_{work}_ms"] = dense[work][0], 1e3 * dense[work][1]
                    row[f"{work}_speedup"] = None if took is None else dense[work][1] / took
                if took is None or took > crossover.LIMIT:
                    slow_densities.add(density)
            run, weights = layer(options, index.shape[-1])
            took = crossover.seconds(run, x, weights)
            row["layer_ms"] = None if took is None else 1e3 * took
            row["layer_speedup"] = dense_layer / took if took and dense_layer else None
            rows.append(row)
            print(f"T = {length}, density {density}: {row['forward_ms']} ms forward", flush=True)
    columns = {"T": "d", "density": "", "implementation": "", "dense_forward": ""}
    for work in ("forward", "both"):
        columns |= {f"dense_{work}_ms": ".2f", f"{work}_ms": ".2f", f"{work}_speedup": ".2f"}
    columns |= {"layer_ms": ".2f", "layer_speedup": ".2f"}
    chosen = [[row for row in rows if row["density"] == str(density)] for density in DENSITIES]
    lines = [crossover.curve(str(d), part, "both_speedup", i % 4) for i, (d, part) in enumerate(zip(DENSITIES, chosen, strict=True))]
    title = "Block lists against the best dense attention, forward and backward"
    crossover.save("block_attention", options, rows, crossover.show(rows, columns), lines, title)


if __name__ == "__main__":
    main()

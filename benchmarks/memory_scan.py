"""What a token of the neural memory costs beside one of the gated linear scan of the same width.

    python benchmarks/memory_scan.py                  # about two minutes on two CPU cores
    python benchmarks/memory_scan.py --length=1024 --runs=1

Microseconds per token, forward and forward + backward, the best of a few runs in one process on this machine; float32, B = 1,
chunks of 64 tokens, the forms that `implementation=None` takes. "products" are the matrix products of the memory alone, chunk
after chunk in the same shapes, without gates and padding. The memory needs more products than the scan whatever it does:
"floor" counts both (`attnlab.ops.neural_memory`), and "extra" is the time of the memory's products times their surplus.
The goal: memory at most 3 times scan + extra.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib

import experiment
import jax
import jax.numpy as jnp
from linear_scan import both_ways

from attnlab.ops.linear_scan import gated_linear_scan
from attnlab.ops.memory_chunk import einsum, surprise
from attnlab.ops.neural_memory import memory_cost, neural_memory, scan_cost

CHUNK = 64
FLAGS = (("length", 4096, "T"), ("heads", 4, "N"), ("width", 64, "H"), ("expansion", 4, "inner width of two layers over H"))
GOAL = 3.0


def arrays(options: argparse.Namespace, depth: int) -> tuple:
    """q, k, v, theta, eta, alpha, weights."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shape = (1, options.length, options.heads, options.width)
    q, k, v = (jax.random.normal(next(keys), shape) for _ in range(3))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    theta, eta, alpha = (jax.random.uniform(next(keys), shape[:3]) for _ in range(3))
    widths = [options.width, *(options.expansion * options.width,) * (depth - 1), options.width]
    weights = [jax.random.normal(next(keys), (options.heads, *pair)) * pair[0] ** -0.5 for pair in itertools.pairwise(widths)]
    return q, k, v, 0.1 * theta, eta, 0.1 * alpha, weights


def memory(*args):
    return neural_memory(*args, chunk_size=CHUNK).y


def scan(q, k, v, log_decay):
    return gated_linear_scan(q, k, v, log_decay, chunk_size=CHUNK)[0]


def products(q, k, v, *weights):
    """The products of `memory_chunk` and nothing else, in its order, from chunk to chunk."""

    @jax.checkpoint
    def chunk(state, tokens):
        weights, momentum = state
        q, k, v = tokens
        inputs, errors, _ = surprise(weights, k, v)
        y = q
        for w, s, a, d in zip(weights, momentum, inputs, errors, strict=True):
            inside = einsum("bnci,bnsi->bncs", y, a)
            y = einsum("bnci,bnio->bnco", y, w) + einsum("bnci,bnio->bnco", y, s) + einsum("bncs,bnso->bnco", inside, d)
        weights = [1e-3 * einsum("bnsi,bnso->bnio", 0.5 * a, d) for a, d in zip(inputs, errors, strict=True)]
        momentum = [1e-3 * einsum("bnsi,bnso->bnio", a, d) for a, d in zip(inputs, errors, strict=True)]
        return (weights, momentum), y

    tokens = [x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).transpose(1, 0, 3, 2, 4) for x in (q, k, v)]
    state = [w[None] for w in weights], [w[None] for w in weights]
    return jax.lax.scan(chunk, state, tokens)[1]


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Microseconds per token by what runs and by way, and the floors."""
    timed = functools.partial(both_ways, runs=options.runs)

    def per_token(result):
        return {way: 1e3 * time / options.length for way, time in result.items()}

    q, k, v, *_, alpha, _ = arrays(options, 1)
    found = {"scan": per_token(timed(scan, (q, k, v, jnp.log1p(-alpha))))}
    scan_flops = scan_cost(options.width, CHUNK)["flops"]
    for depth in (1, 2):
        *inputs, weights = arrays(options, depth)
        widths = [weights[0].shape[1], *(w.shape[2] for w in weights)]
        flops = memory_cost(widths, CHUNK)["flops"]
        row = {"memory": per_token(timed(memory, (*inputs, weights))), "products": per_token(timed(products, (q, k, v, *weights)))}
        for way in ("forward", "both"):
            extra = row["products"][way] * (1.0 - scan_flops / flops)
            bound = found["scan"][way] + extra
            found[f"{depth}, {way}"] = {
                "memory": row["memory"][way],
                "scan": found["scan"][way],
                "products": row["products"][way],
                "extra": extra,
                "memory / scan": row["memory"][way] / found["scan"][way],
                "floor": flops / scan_flops,
                "memory / (scan + extra)": row["memory"][way] / bound,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    experiment.integers(parser, (*FLAGS, ("runs", 3, "runs of which the best counts")))
    parser.add_argument("--results", type=pathlib.Path, default=experiment.RESULTS)
    options = parser.parse_args()
    found = measure(options)
    rows = {name: row for name, row in found.items() if name != "scan"}
    head = ("layers, way", *next(iter(rows.values())))
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join((name, *(f"{x:.2f}" for x in row.values()))) + " |" for name, row in rows.items()]
    worst = max(row["memory / (scan + extra)"] for row in rows.values())
    lines.append(f"\nThe worst ratio to the scan and the extra products is {worst:.2f}; the goal is {GOAL:.0f}.")
    sizes = {name: getattr(options, name) for name, _, _ in FLAGS}
    title = "The cost of a token of the neural memory"
    experiment.save("memory_scan", title, options.results, sizes, {"microseconds": found}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

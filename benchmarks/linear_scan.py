"""What the linear scans cost: chunks beside single tokens, the slope over T, and sparse states over the number of partitions.

    python benchmarks/linear_scan.py                # some minutes on two CPU cores
    python benchmarks/linear_scan.py --quick        # one length, two partition counts

Milliseconds, forward and forward + backward, the best of a few runs in one process on this machine; float32, B = 1, four heads of
64. The goals: chunked at least 5 times faster than token by token at T = 4096; doubling T costs
at most 2.15 times; "varlen" at P = 16 within 1.15 times of P = 4 at one writer and reader.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import experiment
import jax
import jax.numpy as jnp

from attnlab.ops import linear_scan, sparse_state

HEADS, WIDTH = 4, 64


def arrays(length, scalar_decay, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shape = (1, length, HEADS, WIDTH)
    q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
    decay = -0.1 * jax.random.exponential(keys[3], shape[:3] if scalar_decay else shape)
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], shape[:3]))
    return q, linear_scan.l2_normalize(k), v, decay, beta


def milliseconds(fn, args, runs):
    compiled = jax.jit(fn).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def both_ways(fn, args, runs=3):
    """Milliseconds of the forward pass, and of forward and backward."""
    backward = jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), argnums=tuple(range(len(args))))
    return {"forward": milliseconds(fn, args, runs), "both": milliseconds(backward, args, runs)}


def scan(kind, length, implementation, runs=3):
    if kind == "gla":
        fn = lambda q, k, v, g: linear_scan.gated_linear_scan(q, k, v, g, implementation=implementation)[0]  # noqa: E731
        return both_ways(fn, arrays(length, False)[:4], runs)
    fn = lambda *args: linear_scan.gated_delta_scan(*args, implementation=implementation)[0]  # noqa: E731
    return both_ways(fn, arrays(length, True), runs)


def sparse(length, partitions, implementation, runs=3):
    q, k, v, g, _ = arrays(length, False)
    q2, k2, _, g2, _ = arrays(length, False, seed=1)
    logits = jax.random.normal(jax.random.key(2), (1, length, partitions))

    def fn(q, q2, k, k2, v, g, g2, logits):
        routing = sparse_state.route(logits, 1, 1)
        return sparse_state.sparse_state_attention(q, q2, k, k2, v, g, g2, routing, implementation=implementation)[0]

    return both_ways(fn, (q, q2, k, k2, v, g, g2, logits), runs)


def show(rows, name, result):
    rows.append(f"| {name} | {result['forward']:.1f} | {result['both']:.1f} |")
    print(f"{name:34} {result['forward']:10.1f} {result['both']:10.1f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer lengths and partition counts")
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    flags = parser.parse_args()
    quick = flags.quick
    print(f"{jax.devices()[0].device_kind}\n{'':34} {'forward':>10} {'both':>10}  ms")
    results, rows, goals = {}, ["| scan | forward | forward and backward |", "|---|---|---|"], []
    for kind in ("gla", "gdn"):
        token = show(rows, f"{kind}, token by token, T = 4096", scan(kind, 4096, "recurrent", 1 if quick else 2))
        times = {
            length: show(rows, f"{kind}, chunks, T = {length}", scan(kind, length, "chunked"))
            for length in ((4096, 8192) if quick else (2048, 4096, 8192, 16384))
        }
        speedup = {way: token[way] / times[4096][way] for way in token}
        lengths = sorted(times)[-2:]
        doubling = {way: times[lengths[1]][way] / times[lengths[0]][way] for way in token}
        results[kind] = {"speedup": speedup, "doubling": doubling, "chunked": times, "recurrent": token}
        goals += [
            f"| {kind}: chunks against single tokens, T = 4096 | {speedup['forward']:.1f} | {speedup['both']:.1f} | at least 5 |",
            f"| {kind}: T = {lengths[1]} against {lengths[0]} | {doubling['forward']:.2f} | {doubling['both']:.2f} | at most 2.15 |",
        ]
    varlen = {
        partitions: show(rows, f"sse, varlen, T = 8192, P = {partitions}", sparse(8192, partitions, "varlen"))
        for partitions in ((4, 16) if quick else (4, 16, 64))
    }
    results["varlen"] = varlen
    for more in sorted(varlen)[1:]:
        ratio = {way: varlen[more][way] / varlen[4][way] for way in varlen[4]}
        goal = "at most 1.15" if more == 16 else ""
        goals.append(f"| sse: P = {more} against P = 4, one writer | {ratio['forward']:.2f} | {ratio['both']:.2f} | {goal} |")
    if not quick:
        results["mask"] = {4: show(rows, "sse, mask, T = 8192, P = 4", sparse(8192, 4, "mask"))}
    text = "\n".join([*rows, "", "| ratio | forward | forward and backward | goal |", "|---|---|---|---|", *goals])
    sizes = {"B": 1, "N": HEADS, "H": WIDTH, "unit": "ms, best of 3 runs"}
    experiment.save("linear_scan", "Linear scans on this device", flags.out, sizes, results, text)


if __name__ == "__main__":
    main()

"""Every mixer of the house beside softmax: time and memory over T, of a pass, of training, and of a decoded token.

    python benchmarks/mixers.py                                  # about half an hour on one CPU core, most of it compiling
    python benchmarks/mixers.py --mixers gla sse --longest 8192
    python benchmarks/mixers.py --mixers gla sse --part a.json   # measures only, softmax too; so the work can be cut
    python benchmarks/mixers.py --merge a.json b.json            # tables and pictures of parts

One layer's mixer (projections included) of width 128 with four heads, B = 1, float32, in one process on this device:
milliseconds of a forward pass over T tokens (prefill), of a forward and backward pass, the temporary memory of the latter as the
compiler states it, and milliseconds of one token with a cache made for T tokens (decode), with the cache's size; the best of some
repetitions. Then what doubling T costs (linear: 2), and from which T on a mixer is faster than softmax in the same run. A mixer
whose pass at a length takes more than ten seconds is left out at longer ones. Where others use the machine, `--clock cpu` counts
the processor time of this process, all its threads together, instead of the time that passes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import time
from typing import Any

import experiment
import jax
import jax.numpy as jnp
import numpy as np

from attnlab import registry
from attnlab.analysis import charts

DIM, HEADS, LIMIT = 128, 4, 10.0
LINEAR_FROM, LINEAR = 4096, 2.15  # doubling T from here on costs a linear mixer at most so much
# Options beside the defaults: windows, clusters and partitions of usual sizes.
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {},
    "moh": {},
    "local": {"mixer": "softmax", "window": 256},
    "routing": {"block": 128, "rule": "causal"},
    "kmeans": {},
    "sf": {"group_size": 256, "train_only": False},
    "magnitude_aware": {"variant": "divided"},
    "gla": {},
    "gdn": {},
    "sse": {},
    "grassmann": {},
    "titans_lmm": {},
    "titans_mac": {},
    "titans_mag": {"window": 256},
}
FAMILIES = {
    "dense": ("softmax", "sigmoid", "moh"),
    "local": ("local", "routing", "kmeans", "sf"),
    "state": ("magnitude_aware", "gla", "gdn", "sse", "grassmann"),
    "memory": ("titans_lmm", "titans_mac", "titans_mag"),
}
IS_LINEAR = ("local", *FAMILIES["state"], *FAMILIES["memory"])
WAYS = {"forward": "prefill", "both": "training", "decode": "a decoded token"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

# Of a mixer: figures by T.
Figures = dict[int, dict[str, float]]


def make(name: str, length: int) -> Any:
    """The mixer of a name of `MIXERS`, for sequences of a length."""
    options = dict(MIXERS[name])
    module = registry.get("mixer", options.pop("mixer", name))
    if "train_length" in module.__dataclass_fields__:
        options["train_length"] = length
    return module(dim=DIM, num_heads=HEADS, **options)


def timed(clock: Any, fn: Any, *inputs: Any) -> tuple[float, int]:
    """Milliseconds of a call (the best of some), and bytes of temporaries."""
    compiled = jax.jit(fn).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 30):
        begin = clock()
        jax.block_until_ready(compiled(*inputs))
        times.append(clock() - begin)
        if times[-1] > LIMIT / 2:
            break
    return 1e3 * min(times), compiled.memory_analysis().temp_size_in_bytes


def measure(mixer: Any, variables: Any, length: int, clock: Any) -> dict[str, float]:
    """All figures of a mixer at a length; a mixer that cannot decode has none of those."""
    x = jax.random.normal(jax.random.key(0), (1, length, DIM))
    params = {"params": variables["params"]}
    state = {name: tree for name, tree in variables.items() if name not in ("params", "losses", "metrics", "intermediates")}

    def apply(params, x, cache=None):
        return mixer.apply(params | state, x, cache=cache)

    figures = {}
    figures["forward"], _ = timed(clock, lambda params, x: apply(params, x)[0], params, x)
    gradient = jax.grad(lambda params, x: jnp.sum(jnp.sin(apply(params, x)[0])), argnums=(0, 1))
    figures["both"], figures["memory"] = timed(clock, gradient, params, x)
    try:
        cache = jax.tree.map(jnp.copy, mixer.init_cache(1, length))
    except NotImplementedError:
        return figures
    figures["cache"] = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    # donated, as a decoder does it: an update in place
    step = jax.jit(apply, donate_argnums=2).lower(params, x[:, :1], cache).compile()
    times = []
    for _ in range(20):
        begin = clock()
        _, cache = jax.block_until_ready(step(params, x[:, :1], cache))
        times.append(clock() - begin)
    figures["decode"] = 1e3 * min(times)
    return figures


def over_lengths(name: str, shortest: int, longest: int, clock: Any) -> Figures:
    """All figures of a mixer at T = shortest, twice that, .. longest."""
    found: Figures = {}
    x = jnp.zeros((1, shortest, DIM))
    variables = jax.jit(make(name, shortest).init)(jax.random.key(1), x)
    length = shortest
    while length <= longest:
        found[length] = figures = measure(make(name, length), variables, length, clock)
        print(f"{name:18} T = {length:6} " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
        if figures["both"] > 1e3 * LIMIT:
            break
        length *= 2
    jax.clear_caches()
    return found


def doublings(found: Figures, way: str) -> list[float]:
    """What each doubling of T from `LINEAR_FROM` on costs."""
    have = sorted(t for t in found if t >= LINEAR_FROM and way in found[t])
    return [found[after][way] / found[before][way] for before, after in itertools.pairwise(have)]


def faster_from(found: Figures, softmax: Figures, way: str) -> int | None:
    """The T from which on a mixer is faster than softmax at every length measured, or None."""
    both = [t for t in sorted(found) if way in found[t] and way in softmax.get(t, {})]
    slower = [t for t in both if found[t][way] >= softmax[t][way]]
    faster = [t for t in both if not slower or t > slower[-1]]
    return faster[0] if faster else None


def size(number: float) -> str:
    return f"{number / 2**20:.2f}" if number < 100 * 2**20 else f"{number / 2**20:.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def tables(results: dict[str, Figures], references: dict[str, Figures]) -> str:
    """Figures over T, then what doubling T costs and where softmax is overtaken.

    Args:
        results: by mixer.
        references: softmax in the run of each mixer.
    """
    lengths = sorted({length for found in results.values() for length in found})
    over = [f"T = {t}" for t in lengths]
    blocks = []
    columns = [(way, f"ms, {title}", "{:.3g}".format) for way, title in WAYS.items()]
    columns += [("memory", "MiB of temporaries, training", size), ("cache", "MiB of cache", size)]
    for key, title, show in columns:
        rows = [
            [name, *(show(found[t][key]) if key in found.get(t, {}) else "" for t in lengths)] for name, found in results.items()
        ]
        blocks.append(table([title, *over], rows))
    rows = []
    for name, found in results.items():
        costs = {way: doublings(found, way) for way in WAYS}
        worst = max(costs["forward"] + costs["both"], default=0.0)
        linear = "" if name not in IS_LINEAR or not worst else "yes" if worst <= LINEAR else "no"
        cells = [", ".join(f"{cost:.2f}" for cost in costs[way]) for way in WAYS]
        starts = [faster_from(found, references[name], way) for way in WAYS] if name != "softmax" else [None] * len(WAYS)
        rows.append([name, *cells, linear, *("" if t is None else str(t) for t in starts)])
    head = ["each doubling of T", *(f"{title}, from {LINEAR_FROM}" for title in WAYS.values()), f"linear: at most {LINEAR}"]
    blocks.append(table([*head, *(f"{title} faster than softmax from T" for title in WAYS.values())], rows))
    return "\n\n".join(blocks)


def pictures(results: dict[str, Figures], out: pathlib.Path) -> str:
    """Draws time over T, a colour per family; returns the links."""
    links = []
    for way, title in (("both", "forward and backward"), ("forward", "forward")):
        lines = [
            charts.Line(name, np.log2(sorted(results[name])), np.log2([results[name][t][way] for t in sorted(results[name])]),
                        colour=colour, points=True)
            for colour, names in enumerate(FAMILIES.values()) for name in names if name in results
        ]  # fmt: skip
        path = out / f"mixers_{way}.svg"
        experiment.picture(path, lines, x_label="log2 of T", y_label="log2 of milliseconds", title=f"time over T, {title}")
        links.append(f"![{title}, time over T, both as powers of two]({path.name})")
    return "\n" + "\n\n".join(links) + "\n"


def least(found: list[Figures]) -> Figures:
    """The least of each figure over several runs of a mixer."""
    lengths = sorted({length for rows in found for length in rows})
    here = {length: [rows[length] for rows in found if length in rows] for length in lengths}
    return {length: {key: min(row[key] for row in rows) for key in rows[0]} for length, rows in here.items()}


def merged(runs: list[dict[str, Any]]) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """The best of several runs by mixer, and that of softmax in the runs that had the mixer."""
    by_length = [{name: {int(t): row for t, row in rows.items()} for name, rows in run["results"].items()} for run in runs]
    found = {name: least([run[name] for run in by_length if name in run]) for name in MIXERS}
    references = {name: least([run.get("softmax", {}) for run in by_length if name in run]) for name in MIXERS}
    return {name: rows for name, rows in found.items() if rows}, references


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    longest = 16384 if jax.default_backend() == "cpu" else 65536
    experiment.integers(parser, [("shortest", 1024, "T to begin with; it doubles"), ("longest", longest, "T to end with")])
    experiment.integers(parser, [("reference", 8192, "with --part and without softmax in --mixers: longest T of softmax")])
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="time that passes, or processor time")
    parser.add_argument("--part", type=pathlib.Path, help="measure only, softmax too, and write this file for --merge")
    parser.add_argument("--merge", type=pathlib.Path, nargs="+", help="measure nothing: tables and pictures of these parts")
    parser.add_argument("--device", default=jax.devices()[0].device_kind, help="how the results name the machine")
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.part and options.merge:
        parser.error("--part measures and --merge does not: give one of them")
    if options.merge:
        try:
            runs = [json.loads(path.read_text()) for path in options.merge]
        except (OSError, ValueError) as error:
            parser.error(f"--merge: {error}")
        if len({run["clock"] for run in runs}) > 1:
            parser.error("--merge: the parts were timed by different clocks")
    else:
        longest = dict.fromkeys(options.mixers, options.longest)
        if options.part:
            longest = {"softmax": min(options.reference, options.longest)} | longest
        clock = CLOCKS[options.clock]
        results: dict[str, Any] = {}
        runs = [{"clock": options.clock, "results": results}]
        for name, end in longest.items():
            results[name] = over_lengths(name, options.shortest, end, clock)
            if options.part:  # what is measured stays, if the rest is cut off
                options.part.write_text(json.dumps(runs[0]) + "\n")
        if options.part:
            return
    results, references = merged(runs)
    sizes = {
        "device": options.device, "B": 1, "D": DIM, "N": HEADS, "clock": runs[0]["clock"], "runs": len(runs),
        "options": ", ".join(f"{name} {value}" for name, value in MIXERS.items() if value),
    }  # fmt: skip
    softmax = {name: references[name] for name in results}
    experiment.save("mixers", "Every mixer beside softmax", options.out, sizes, {"results": results, "softmax": softmax},
                    tables(results, references), pictures(results, options.out))  # fmt: skip


if __name__ == "__main__":
    main()

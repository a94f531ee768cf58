"""Every mixer of the house beside softmax: time and memory over T, of a pass, of training, and of a decoded token.

    python benchmarks/mixers.py                                  # about a quarter of an hour on two CPU cores
    python benchmarks/mixers.py --mixers gla sse --longest 8192

One layer's mixer (projections included) of width 128 with four heads, B = 1, float32, in one process on this device:
milliseconds of a forward pass over T tokens (prefill), of a forward and backward pass, the temporary memory of the latter as the
compiler states it, and milliseconds of one token with a cache made for T tokens (decode), with the cache's size. Then what
doubling T costs (linear: 2), and from which T on a mixer is faster than softmax. A mixer whose pass at a length takes more than ten
seconds is left out at longer ones.
"""

from __future__ import annotations

import argparse
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
# Options beside the defaults: windows, clusters and partitions of usual sizes.
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {},
    "local": {"mixer": "softmax", "window": 256},
    "moh": {},
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
LINEAR = ("local", "magnitude_aware", "gla", "gdn", "sse", "grassmann", "titans_lmm", "titans_mac", "titans_mag")
WAYS = {"forward": "prefill", "both": "training", "decode": "a decoded token"}


def make(name: str, length: int) -> Any:
    """The mixer of a name of `MIXERS`, for sequences of a length."""
    options = dict(MIXERS[name])
    module = registry.get("mixer", options.pop("mixer", name))
    if "train_length" in module.__dataclass_fields__:
        options["train_length"] = length
    return module(dim=DIM, num_heads=HEADS, **options)


def timed(fn: Any, *inputs: Any) -> tuple[float, int]:
    """Milliseconds of a call (the best of some), and bytes of temporaries."""
    compiled = jax.jit(fn).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 30):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - begin)
        if times[-1] > LIMIT / 2:
            break
    return 1e3 * min(times), compiled.memory_analysis().temp_size_in_bytes


def measure(mixer: Any, length: int) -> dict[str, float]:
    """All figures of a mixer at a length; a mixer that cannot decode has none of those."""
    x = jax.random.normal(jax.random.key(0), (1, length, DIM))
    variables = jax.jit(mixer.init)(jax.random.key(1), x)
    params = {"params": variables.pop("params")}
    state = {name: tree for name, tree in variables.items() if name not in ("losses", "metrics", "intermediates")}

    def apply(params, x, cache=None):
        return mixer.apply(params | state, x, cache=cache)

    figures = {}
    figures["forward"], _ = timed(lambda params, x: apply(params, x)[0], params, x)
    gradient = jax.grad(lambda params, x: jnp.sum(jnp.sin(apply(params, x)[0])), argnums=(0, 1))
    figures["both"], figures["memory"] = timed(gradient, params, x)
    try:
        cache = jax.tree.map(jnp.copy, mixer.init_cache(1, length))
    except NotImplementedError:
        return figures
    figures["cache"] = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    # donated, as a decoder does it: an update in place
    step = jax.jit(apply, donate_argnums=2).lower(params, x[:, :1], cache).compile()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        _, cache = jax.block_until_ready(step(params, x[:, :1], cache))
        times.append(time.perf_counter() - begin)
    figures["decode"] = 1e3 * float(np.median(times))
    return figures


def size(number: float) -> str:
    return f"{number / 2**20:.2f}" if number < 100 * 2**20 else f"{number / 2**20:.0f}"


def tables(results: dict[str, dict[int, dict[str, float]]]) -> str:
    lengths = sorted({length for by_length in results.values() for length in by_length})
    blocks = []
    for way, title in WAYS.items():
        rows = [f"| ms, {title} | " + " | ".join(f"T = {t}" for t in lengths) + " | last doubling | faster than softmax from T |"]
        rows.append("|---" * (len(lengths) + 3) + "|")
        for name, found in results.items():
            cells = [f"{found[t][way]:.3g}" if t in found and way in found[t] else "" for t in lengths]
            have = [t for t in lengths if t in found and way in found[t]]
            ratio = f"{found[have[-1]][way] / found[have[-2]][way]:.2f}" if len(have) > 1 else ""
            softmax = results.get("softmax", {})
            faster = [t for t in have if t in softmax and found[t][way] < softmax[t][way]]
            rows.append(f"| {name} | " + " | ".join(cells) + f" | {ratio} | {faster[0] if faster else ''} |")
        blocks.append("\n".join(rows))
    for key, title in (("memory", "MiB of temporaries, training"), ("cache", "MiB of cache")):
        rows = [f"| {title} | " + " | ".join(f"T = {t}" for t in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
        for name, found in results.items():
            cells = [size(found[t][key]) if t in found and key in found[t] else "" for t in lengths]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    longest = 16384 if jax.default_backend() == "cpu" else 65536
    experiment.integers(parser, [("shortest", 1024, "T to begin with; it doubles"), ("longest", longest, "T to end with")])
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    options = parser.parse_args()
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name in options.mixers:
        results[name], length = {}, options.shortest
        while length <= options.longest:
            results[name][length] = figures = measure(make(name, length), length)
            print(f"{name:18} T = {length:6} " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
            if figures["both"] > 1e3 * LIMIT:
                break
            length *= 2
        jax.clear_caches()
    shown = [name for name in ("softmax", "gla", "sse", "grassmann", "titans_lmm") if name in results]
    links = []
    for way, title in (("both", "forward and backward"), ("forward", "forward")):
        lines = [
            charts.Line(name, np.log2(sorted(results[name])), np.log2([results[name][t][way] for t in sorted(results[name])]),
                        colour=at % 4, points=True)
            for at, name in enumerate(shown)
        ]  # fmt: skip
        path = options.out / f"mixers_{way}.svg"
        experiment.picture(path, lines, x_label="log2 of T", y_label="log2 of milliseconds", title=f"time over T, {title}")
        links.append(f"![{title}, time over T, both as powers of two]({path.name})")
    sizes = {"B": 1, "D": DIM, "N": HEADS, "options": ", ".join(f"{name} {value}" for name, value in MIXERS.items() if value)}
    experiment.save("mixers", "Every mixer beside softmax", options.out, sizes, {"results": results}, tables(results),
                    "\n" + "\n\n".join(links) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()

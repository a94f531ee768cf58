"""Mixture-of-head attention that computes selected heads only ("gathered") beside all heads: time over lengths.

    python benchmarks/mixture_of_heads.py [--longest 2048]

First "gathered" is compared with "all_heads" (values and gradients). Then both are timed in one run with random choices: two
shared heads, and 75 % or 50 % of all heads on. `share` is the cost model: attended pairs of "gathered" over those of all
heads, whose inverse bounds the speed-up of the op. Writes a table, a JSON file and the plot to benchmarks/results.
Two minutes on two cores.
"""

from __future__ import annotations

import functools
from typing import Any

import crossover
import jax
import jax.numpy as jnp

from attnlab.ops import dispatch
from attnlab.ops.head_routing import select_heads
from attnlab.ops.mixture_of_heads import gathered_share, mixture_of_heads_attention

SHARED = 2


def choice(length: int, heads: int, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Gates and selected heads of one row."""
    scores = jax.nn.softmax(jax.random.normal(jax.random.key(3), (1, length, heads - SHARED)))
    return jnp.ones((1, length, heads)), select_heads(scores, top_k)


def form(length: int, heads: int, top_k: int, causal: bool, name: str) -> Any:
    """The op as a function of q, k, v."""
    gates, selected = choice(length, heads, top_k)
    options = {"gates": gates, "selected": selected, "top_k": top_k, "causal": causal, "implementation": name}
    return functools.partial(mixture_of_heads_attention, **options)


def main() -> None:
    parser = crossover.arguments(__doc__, 2048)
    parser.set_defaults(heads=16 if jax.default_backend() != "cpu" else 8, shortest=256)
    options = parser.parse_args()
    heads = options.heads
    small = crossover.draw(options, 300)
    error = crossover.gate("gathered", form(300, heads, 2, True, "gathered"), form(300, heads, 2, True, "all_heads"), small)
    print(f"gathered equals all_heads within {error:.1e}")
    rows: list[dict[str, Any]] = []
    block = 64 if dispatch.target_platform() == "cpu" else 128
    for length in crossover.lengths(options):
        arrays = crossover.draw(options, length)
        for causal in (False, True):
            everything: dict[str, float | None] = {}
            for percent in (100, 75, 50):
                top_k = round(percent / 100 * heads) - SHARED
                name = "all_heads" if percent == 100 else "gathered"
                fn = form(length, heads, top_k, causal, name)
                row: dict[str, Any] = {"T": length, "causal": causal, "on": percent}
                if percent < 100:
                    routed = heads - SHARED
                    row["share"] = (SHARED + routed * gathered_share(length, routed, top_k, block=block)) / heads
                for work, call, inputs in (("forward", jax.jit(fn), arrays[:3]), ("both", crossover.both(fn), arrays)):
                    took = crossover.seconds(call, *inputs)
                    everything.setdefault(work, took)
                    row[f"{work}_ms"] = None if took is None else 1e3 * took
                    row[f"{work}_speedup"] = everything[work] / took if took and everything[work] else None
                rows.append(row)
                print(row, flush=True)
    columns = {"T": "", "causal": "", "on": "", "share": ".2f", "forward_ms": ".1f", "forward_speedup": ".2f", "both_ms": ".1f",
               "both_speedup": ".2f"}  # fmt: skip
    lines = [
        crossover.curve(f"{percent} %{' causal' if causal else ''}", chosen, "forward_speedup", colour)
        for colour, (percent, causal) in enumerate([(75, False), (50, False), (75, True), (50, True)])
        if (chosen := [row for row in rows if row["on"] == percent and row["causal"] == causal])
    ]
    crossover.save("mixture_of_heads", options, rows, crossover.show(rows, columns), lines, "Selected heads against all heads")


if __name__ == "__main__":
    main()

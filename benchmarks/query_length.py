"""Do rows of attention feel how long the query is? Softmax, normalised linear, magnitude-aware linear attention, untrained.

    python benchmarks/query_length.py

"Rectifying Magnitude Neglect in Linear Attention" (Fan et al., 2025, arXiv 2507.00698): where rows are divided by their sum, the
length of phi(q) cancels, so that a longer query cannot sharpen its row, as it does in softmax; with a factor and a subtraction in
place of the division it can, and max_j A_ij - 1 / T grows in proportion to the length.

Queries and keys are normal numbers. phi(q), in softmax q itself, is multiplied by 1, 2, 4, 8; printed and written are the means
over the rows of T max_j A_ij - 1 (0 = flat), of the entropy over ln T where no weight is negative (1 = flat), and of the share of
negative weights.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable

import crossover
import experiment
import jax
import jax.numpy as jnp

from attnlab import ops
from attnlab.ops.magnitude_aware import feature_map, magnitude_aware_weights

SCALES = (1, 2, 4, 8)


def longer(q: jax.Array, scale: float) -> jax.Array:
    """Returns q' with phi(q') = scale phi(q), phi = elu + 1."""
    target = scale * feature_map(q)
    return jnp.where(target > 1, target - 1, jnp.log(target))


def kinds() -> dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]]:
    """Name to (q, k, scale) -> weights [B, N, T, T]."""

    def linear(variant: str) -> Callable[[jax.Array, jax.Array, float], jax.Array]:
        return lambda q, k, scale: magnitude_aware_weights(longer(q, scale), k, variant=variant)[0]

    return {
        "softmax": lambda q, k, scale: ops.attention_weights("softmax", scale * q, k),
        "divided by the sum": linear("divided"),
        "magnitude-aware, paper": linear("paper"),
        "magnitude-aware, official": linear("official"),
    }


def rows(q: jax.Array, k: jax.Array) -> list[dict[str, float | str | None]]:
    """Figures per kind and scale; `proportion` is how peaked a row is against scale 1."""
    length, found = q.shape[1], []
    for name, weigh in kinds().items():
        first = None
        for scale in SCALES:
            weights = weigh(q, k, float(scale))
            peak = float(jnp.mean(length * weights.max(-1) - 1))
            first = peak if first is None else first
            negative = float(jnp.mean(weights < 0))
            nats = -jnp.mean(jnp.sum(jax.scipy.special.xlogy(weights, weights), -1))
            entropy = None if negative else float(nats) / math.log(length)
            row = {"kind": name, "a": scale, "T max A - 1": peak, "times a = 1": peak / first, "entropy / ln T": entropy}
            found.append(row | {"negative": negative, "sum of a row": float(jnp.mean(weights.sum(-1)))})
    return found


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = (("length", 128, "T"), ("heads", 4, "heads"), ("width", 32, "of a head"), ("batch", 8, "sequences"))
    experiment.integers(parser, flags)
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    options = parser.parse_args()
    shape = (options.batch, options.length, options.heads, options.width)
    q, k = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0)))
    found = rows(q, k)
    formats = {"kind": "", "a": "", "T max A - 1": ".3f", "times a = 1": ".3f", "entropy / ln T": ".4f", "negative": ".2f"}
    text = crossover.show(found, formats | {"sum of a row": ".4f"})
    sizes = {key: getattr(options, key) for key, _, _ in flags}
    experiment.save("query_length", "What the length of a query does to its row", options.out, sizes, {"rows": found}, text)


if __name__ == "__main__":
    main()

"""Does routing recall what lies beyond the local window? The small experiment of the Routing Transformer.

    python benchmarks/routing_recall.py                 # some minutes on two CPU cores
    python benchmarks/routing_recall.py --steps=600 --models=routing,local

Rows of 512 tokens. The first half holds pairs (value, key): each of 32 keys has a random value in every row and is shown four
times. Later, at least 64 positions after the last pair, keys appear alone. At every key the model must say its value; in the
first half that is the token before, and only the later keys, the queries, count in the accuracy.
Two layers of four heads; the first has local heads (blocks of 16 and a flange of 16), the second differs:

    local    local heads alone
    routing  2 local heads and 2 routed ones, 16 clusters of 32, centroids learned online
    causal   the same by the strictly causal rule
    random   the same with fixed random members
    full     2 local heads and 2 that see everything (one cluster of 512)

Printed at the end: accuracy on fresh rows (chance is 1/16), and for the routed models the share of full attention's mass (with the
same weights) that lies on keys of a query's own clusters, beside that of its 32 largest keys, the best that so many can do.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from attnlab.methods.task import LossAux
from attnlab.models.lm import LM, attention_maps
from attnlab.training.step import init_state, make_train_step

LENGTH, KEYS, VALUES, SHOWN, QUERIES = 512, 32, 16, 4, 64
FIRST_QUERY = 2 * KEYS * SHOWN + 64
FILLER = KEYS + VALUES
WINDOW, CLUSTERS, BLOCK = 32, 16, 16
ROUTED = {"routing_heads": 2, "num_clusters": CLUSTERS, "cluster_size": WINDOW}
SECOND = {
    "local": {"routing_heads": 0},
    "routing": ROUTED,
    "causal": ROUTED | {"rule": "causal"},
    "random": ROUTED | {"rule": "random"},
    "full": {"routing_heads": 2, "num_clusters": 1, "cluster_size": LENGTH},
}


def draw(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Returns `inputs` and `targets` [rows, 512] int32, `mask`, True at every key, and `query`, True at the queries."""
    inputs = np.full((rows, LENGTH), FILLER, np.int32)
    targets, query = np.zeros((rows, LENGTH), np.int32), np.zeros((rows, LENGTH), bool)
    for row in range(rows):
        values = rng.integers(0, VALUES, KEYS)
        keys = rng.permutation(np.repeat(np.arange(KEYS), SHOWN))
        inputs[row, 0 : 2 * keys.size : 2] = KEYS + values[keys]
        inputs[row, 1 : 2 * keys.size : 2] = keys
        at = rng.choice(np.arange(FIRST_QUERY, LENGTH), QUERIES, replace=False)
        asked = rng.integers(0, KEYS, QUERIES)
        inputs[row, at], query[row, at] = asked, True
        targets[row] = KEYS + values[np.minimum(inputs[row], KEYS - 1)]
    return {"inputs": inputs, "targets": targets, "mask": inputs < KEYS, "query": query}


class Recall:
    """Cross-entropy at the keys."""

    def __init__(self, second: dict, dim: int):
        shared = {"mixer": "routing", "block": BLOCK, "decay": 0.99}
        self.model = LM(
            vocab_size=FILLER + 1,
            num_layers=2,
            dim=dim,
            num_heads=4,
            pattern=("first", "second"),
            mixer_options={"first": shared | {"routing_heads": 0}, "second": shared | second},
            tie_embeddings=False,
        )

    def init(self, rng):
        """Variables without what is sown."""
        variables = self.model.init(rng, jnp.zeros((1, LENGTH), jnp.int32))
        return {name: tree for name, tree in variables.items() if name in ("params", "centroids")}

    def loss(self, params, collections, batch, rng):
        """Mean over the keys, and the commitment losses."""
        del rng
        (logits, _), new = self.model.apply(
            {"params": params, **collections}, batch["inputs"], mutable=[*collections, "losses"], deterministic=False
        )
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weight = jnp.sum(batch["mask"].astype(jnp.float32))
        loss = jnp.sum(nats * batch["mask"]) / weight
        auxiliary = sum((jnp.sum(leaf) for leaf in jax.tree.leaves(new.get("losses", {}))), jnp.float32(0))
        kept = {name: new[name] for name in collections}
        far = jnp.sum(nats * batch["query"]) / jnp.sum(batch["query"])
        return loss + auxiliary, LossAux(weight=weight, metrics={"loss": loss, "query_loss": far}, collections=kept)


def train(name: str, steps: int, batch: int, dim: int, seed: int) -> dict[str, float]:
    """Trains one model and returns its figures."""
    task, rng = Recall(SECOND[name], dim), np.random.default_rng(seed)
    schedule = optax.cosine_onecycle_schedule(steps, 5e-3, pct_start=0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.0))
    state = jax.jit(lambda: init_state(task, tx, jax.random.key(seed), ema=False))()
    step = jax.jit(make_train_step(task, tx, schedule, seed=seed), donate_argnums=0)
    start = time.perf_counter()
    for number in range(steps):
        state, metrics = step(state, draw(rng, batch))
        if number % max(steps // 10, 1) == 0:
            told = f"loss {float(metrics['loss']):.3f}, at queries {float(metrics['query_loss']):.3f}"
            print(f"{name:8} step {number:5} {told} {time.perf_counter() - start:6.1f} s", flush=True)
    variables = {"params": state.params, **state.collections}
    predict = jax.jit(lambda variables, inputs: jnp.argmax(task.model.apply(variables, inputs)[0], -1))
    fresh = [draw(np.random.default_rng(10_000 + i), batch) for i in range(8)]
    right = [(np.asarray(predict(variables, one["inputs"])) == one["targets"])[one["query"]] for one in fresh]
    figures = {"accuracy": float(np.mean(right)), "loss": float(metrics["query_loss"]), "seconds": time.perf_counter() - start}
    return figures if name in ("local", "full") else figures | mass(task, dim, variables, fresh[0])


def mass(task: Recall, dim: int, variables: dict, batch: dict) -> dict[str, float]:
    """Share of full attention at the queries that lies on keys of their clusters, and on their largest keys."""
    full = Recall(SECOND["full"], dim)
    one = {"means": (2, 1, dim // 4), "counts": (2, 1), "sums": (2, 1, dim // 4)}
    empty = {"layers": {"blocks_1": {"mixer": {"routing": {name: jnp.zeros((1, *shape)) for name, shape in one.items()}}}}}

    def weights(model, variables):
        model = model.clone(capture_attention=True)

        def capture(variables, inputs):
            _, sown = model.apply(variables, inputs, mutable=["intermediates"])
            return attention_maps(model, sown["intermediates"])[1][:, :2]  # the routed heads come first

        return np.asarray(jax.jit(capture)(variables, batch["inputs"]))

    dense = weights(full.model, {"params": variables["params"], "centroids": empty})
    routed = weights(task.model, variables)
    at = np.broadcast_to(batch["query"][:, None], dense.shape[:3])
    dense, routed = dense[at] / dense[at].sum(-1, keepdims=True), routed[at]
    largest = np.sort(dense, axis=-1)[:, -WINDOW:].sum(-1)
    return {"mass": float((dense * (routed > 0)).sum(-1).mean()), "best_mass": float(largest.mean())}


def main() -> None:
    """Runs the models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default=",".join(SECOND), help="some of " + ", ".join(SECOND))
    options = parser.parse_args()
    results = {}
    for name in options.models.split(","):
        if name not in SECOND:
            parser.error(f"--models: {name!r} is unknown. Use some of {', '.join(SECOND)}.")
        results[name] = train(name, options.steps, options.batch, options.dim, options.seed)
    print(f"{'':10}{'accuracy':>10}{'loss':>8}{'mass':>8}{'best':>8}{'seconds':>9}")
    for name, figures in results.items():
        cells = [f"{figures[key]:{width}.3f}" if key in figures else " " * width
                 for key, width in (("accuracy", 10), ("loss", 8), ("mass", 8), ("best_mass", 8))]  # fmt: skip
        print(f"{name:10}{''.join(cells)}{figures['seconds']:9.1f}")
    device = jax.devices()[0].device_kind
    print(json.dumps({"experiment": "routing_recall", "device": device, **vars(options), "results": results}))


if __name__ == "__main__":
    main()

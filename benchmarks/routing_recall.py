"""Does routing recall what lies beyond the local window? The small experiment of the Routing Transformer.

    python benchmarks/routing_recall.py                          # five models, three seeds: some five minutes on a free CPU core
    python benchmarks/routing_recall.py --models=routing,local --seeds=1

A row begins with pairs (value, key): every key has a random value in every row and is shown a few times. Then comes a gap
longer than what local heads reach, and after it keys alone, the queries. At every query the model must say the key's value,
which is far beyond the window ("far"); the loss counts these alone. "near" is the accuracy at the keys in pairs, where the value
is the token before: untrained unless --near_weight says so.
Two layers of four heads. In the first every token sees itself and the token before, in all models. The second differs:

    local    local heads alone
    routing  2 local heads and 2 routed ones, their centroids learned online, by the published rule
    causal   the same by the strictly causal rule
    random   the same with fixed random members
    full     2 local heads and 2 that see everything (one cluster of the whole row)

Printed and written at the end: accuracy on fresh rows, and for the routed models the share of full attention's mass (with
the same weights) that lies on keys of a query's own clusters ("mass"), beside that of as many largest keys as a cluster has
places, the best possible ("top W").
"""

from __future__ import annotations

import argparse
import math
import pathlib
import statistics
import time

import crossover
import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab.analysis import charts
from attnlab.methods.task import LossAux
from attnlab.models.lm import LM, attention_maps
from attnlab.training.step import init_state, make_train_step

MODELS = ("local", "routing", "causal", "random", "full")
CHUNK = 25  # steps in one compiled call


class Recall:
    """The rows, the models and the loss: cross-entropy at the keys."""

    def __init__(self, options: argparse.Namespace, second: str):
        routed = {"routing_heads": 2, "num_clusters": options.clusters, "cluster_size": options.window}
        variants = {
            "local": {"routing_heads": 0},
            "routing": routed,
            "causal": routed | {"rule": "causal"},
            "random": routed | {"rule": "random"},
            "full": {"routing_heads": 2, "num_clusters": 1, "cluster_size": options.length},
        }
        # Relative positions in clusters count places, which say nothing here: without them "full" is plain attention.
        shared = {"mixer": "routing", "block": options.block, "decay": options.decay, "cluster_relative": False}
        self.options = options
        self.filler = options.keys + options.values
        self.model = LM(
            vocab_size=self.filler + 1,
            num_layers=2,
            dim=options.dim,
            num_heads=4,
            pattern=("first", "second"),
            mixer_options={"first": {"mixer": "softmax", "window": 1}, "second": shared | variants[second]},
            # Small branches at first: tokens of one key begin alike, which routing needs, as a token also sees itself.
            layer_scale=0.1,
            tie_embeddings=False,
            scan_layers=False,
        )

    def rows(self, rng: jax.Array, count: int) -> dict[str, jax.Array]:
        """Returns `inputs`, `targets` [count, T] int32, and `near`, `far` [count, T] bool: keys in pairs, and queries."""
        options = self.options
        shown = jnp.repeat(jnp.arange(options.keys), options.shown)

        def one(rng):
            of_values, of_keys, of_queries = jax.random.split(rng, 3)
            values = options.keys + jax.random.randint(of_values, (options.keys,), 0, options.values)
            keys = jax.random.permutation(of_keys, shown)
            pairs = jnp.stack([values[keys], keys], axis=1).reshape(-1)
            queries = jax.random.randint(of_queries, (options.queries,), 0, options.keys)
            gap = jnp.full(options.length - pairs.size - options.queries, self.filler)
            inputs = jnp.concatenate([pairs, gap, queries])
            return inputs, values[jnp.minimum(inputs, options.keys - 1)]

        inputs, targets = jax.vmap(one)(jax.random.split(rng, count))
        late = jnp.arange(options.length) >= options.length - options.queries
        return {"inputs": inputs, "targets": targets, "near": (inputs < options.keys) & ~late, "far": (inputs < options.keys) & late}

    def init(self, rng):
        """Variables without what is sown."""
        variables = self.model.init(rng, jnp.zeros((1, self.options.length), jnp.int32))
        return {name: tree for name, tree in variables.items() if name in ("params", "centroids")}

    def loss(self, params, collections, batch, rng):
        """Mean over the keys, and the commitment losses."""
        del rng
        (logits, _), new = self.model.apply(
            {"params": params, **collections}, batch["inputs"], mutable=[*collections, "losses"], deterministic=False
        )
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weight = batch["far"] + self.options.near_weight * batch["near"]
        loss = jnp.sum(nats * weight) / jnp.sum(weight)
        right = jnp.argmax(logits, -1) == batch["targets"]
        accuracy = {name: jnp.sum(right & batch[name]) / jnp.sum(batch[name]) for name in ("near", "far")}
        auxiliary = sum((jnp.sum(leaf) for leaf in jax.tree.leaves(new.get("losses", {}))), jnp.float32(0))
        kept = {name: new[name] for name in collections}
        return loss + auxiliary, LossAux(weight=jnp.sum(weight), metrics={"loss": loss, **accuracy}, collections=kept)


class Trainer:
    """One model: its compiled parts serve all seeds."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options, self.task = name, options, Recall(options, name)
        schedule = optax.warmup_cosine_decay_schedule(0.0, options.rate, max(options.steps // 10, 1), options.steps)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.0))
        step = make_train_step(self.task, tx, schedule, seed=0)

        def chunk(state, rng):
            def one(state, _):
                return step(state, self.task.rows(jax.random.fold_in(rng, state.step), options.batch))

            return jax.lax.scan(one, state, None, length=CHUNK)

        self.init = jax.jit(lambda rng: init_state(self.task, tx, rng, ema=False))
        self.chunk = jax.jit(chunk, donate_argnums=0)
        self.test = jax.jit(lambda params, collections, batch: self.task.loss(params, collections, batch, None)[1].metrics)
        self.fresh = self.task.rows(jax.random.key(12345), 64)

    def run(self, seed: int) -> dict:
        """Trains from one seed; returns its figures and the course of the accuracy at the queries."""
        begin = time.perf_counter()
        state = self.init(jax.random.key(seed))
        course = []
        for first in range(0, self.options.steps, CHUNK):
            state, metrics = self.chunk(state, jax.random.key(1000 + seed))
            course.append((first + CHUNK, float(metrics["far"][-10:].mean())))
            if (first // CHUNK) % 4 == 3 or first + CHUNK >= self.options.steps:
                told = ", ".join(f"{key} {float(metrics[key][-10:].mean()):.3f}" for key in ("loss", "near", "far"))
                print(f"{self.name:8} seed {seed} step {first + CHUNK:5}: {told} ({time.perf_counter() - begin:.0f} s)", flush=True)
        final = self.test(state.params, state.collections, self.fresh)
        figures = {name: float(final[name]) for name in ("near", "far")}
        if self.name not in ("local", "full"):
            figures |= self.mass(state.params, state.collections)
        return figures | {"seconds": time.perf_counter() - begin, "course": course}

    def mass(self, params, collections) -> dict[str, float]:
        """Share of full attention at the queries that lies on keys of their clusters, and on their W largest keys."""
        full = Recall(self.options, "full")
        width = self.options.dim // 4
        empty = {"means": jnp.zeros((2, 1, width)), "counts": jnp.zeros((2, 1)), "sums": jnp.zeros((2, 1, width))}
        centroids = {"layers_0": {"blocks_1": {"mixer": {"routing": empty}}}}
        few = jax.tree.map(lambda leaf: leaf[:8], self.fresh)

        def weights(model, variables):
            model = model.clone(capture_attention=True)
            capture = jax.jit(lambda variables: model.apply(variables, few["inputs"], mutable=["intermediates"])[1])
            sown = capture(variables)["intermediates"]
            return np.asarray(attention_maps(model, sown)[1][:, :2])  # the routed heads come first

        dense = weights(full.model, {"params": params, "centroids": centroids})
        routed = weights(self.task.model, {"params": params, **collections})
        at = np.broadcast_to(np.asarray(few["far"])[:, None], dense.shape[:3])
        dense, routed = dense[at] / dense[at].sum(-1, keepdims=True), routed[at]
        largest = np.sort(dense, axis=-1)[:, -self.options.window :].sum(-1)
        return {"mass": float((dense * (routed > 0)).sum(-1).mean()), "top W": float(largest.mean())}


def report(options: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    """Prints the table and writes it, the figures and the picture beside the other results."""
    chance = 1.0 / options.values
    rows = []
    for name, seeds in results.items():
        row: dict = {"second layer": name}
        for key in ("far", "near", "mass", "top W"):
            if key in seeds[0]:
                row[key] = statistics.mean(one[key] for one in seeds)
        row["far, each seed"] = ", ".join(f"{one['far']:.3f}" for one in seeds)
        row["s / seed"] = statistics.mean(one["seconds"] for one in seeds)
        rows.append(row)
    columns = {"second layer": "", "far": ".3f", "far, each seed": ""}
    columns |= {"near": ".3f", "mass": ".3f", "top W": ".3f", "s / seed": ".0f"}
    table = crossover.show(rows, columns)
    sizes = {key: value for key, value in vars(options).items() if key not in ("out", "models")}
    sizes["seeds"] = len(next(iter(results.values())))
    lines = []
    for colour, name in enumerate(name for name in ("routing", "random", "local", "full") if name in results):
        steps = np.array([step for step, _ in results[name][0]["course"]], np.float64)
        course = np.mean([[value for _, value in one["course"]] for one in results[name]], axis=0)
        lines.append(charts.Line(name, steps, course, colour))
    title = "Recall beyond the local window: accuracy at the queries over the steps, mean of the seeds"
    labels = {"x_label": "step", "y_label": "accuracy", "title": title}
    experiment.picture(options.out / "routing_recall.svg", lines, references=[("chance", chance)], from_zero=True, **labels)
    pictures = "\n![accuracy at the queries over the steps](routing_recall.svg)\n"
    title, text = "Recall beyond the local window (Routing Transformer)", f"Chance is {chance:.3f}.\n\n{table}"
    experiment.save("routing_recall", title, options.out, sizes, {"results": results}, text, pictures)


def main() -> None:
    """Trains the models and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="some of " + ", ".join(MODELS))
    flags = (
        ("seeds", 3, "seeds per model"),
        ("steps", 250, f"training steps, rounded up to {CHUNK}s"),
        ("batch", 16, "rows per step"),
        ("dim", 64, "width of the model; a head has a quarter"),
        ("length", 128, "tokens in a row"),
        ("keys", 8, "different keys"),
        ("values", 8, "different values"),
        ("shown", 2, "times that each key is shown with its value"),
        ("queries", 32, "keys asked at the end of a row"),
        ("clusters", 8, "clusters per routed head"),
        ("window", 16, "W, positions in a cluster"),
        ("block", 8, "block of the local heads, which see one more block before it"),
    )
    experiment.integers(parser, flags)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate (default 0.001; at 0.005 nothing was learned)")
    parser.add_argument("--near_weight", type=float, default=0.0, help="weight of the keys in pairs in the loss (default 0)")
    parser.add_argument("--decay", type=float, default=0.99, help="of the averages that make the centroids (default 0.99)")
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    options = parser.parse_args()
    gap = options.length - 2 * options.keys * options.shown - options.queries
    reach = 2 * options.block  # a token of the first layer, and the local heads of the second
    if gap < reach:
        fit = options.length + reach - gap
        parser.error(f"--length {options.length}: leaves a gap of {gap} tokens, and the local layers reach {reach}. Set {fit}.")
    options.steps = CHUNK * math.ceil(options.steps / CHUNK)
    names = options.models.split(",")
    for name in names:
        if name not in MODELS:
            parser.error(f"--models: {name!r} is unknown. Use some of {', '.join(MODELS)}.")
    trainers = {name: Trainer(name, options) for name in names}
    results: dict[str, list[dict]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name, trainer in trainers.items():
            results[name].append(trainer.run(seed))
        report(options, results)  # after every seed: a run that is stopped leaves what it has


if __name__ == "__main__":
    main()

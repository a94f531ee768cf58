"""Which mixers recall, and how far? The small experiments of SSE, Titans and MALA on the recall tasks of `attnlab.data.recall`.

    python benchmarks/recall.py                                     # everything, three seeds
    python benchmarks/recall.py --tasks=window --seeds=1 --models=window,mag

Every model has two layers. In the first each token sees itself and the token before, in all models: it joins a key with the value
that follows. The second differs, and the loss counts the answers alone. Training rows never repeat, and evaluation rows are of a
split that shares none with them.

    capacity  multi-query associative recall, one head of 16 features in the second layer, so that a state holds few pairs: gated
              linear attention (GLA), sparse state expansion with P = 4, 16, 64 partitions of which each token writes and reads one,
              softmax; MALA beside linear attention that divides by its sum.
    memory    keys that get new values among noise; a neural memory (Titans LMM) with everything, without momentum, without
              forgetting, and with one linear layer; evaluated at 1, 2, 4, 8 times the trained length.
    window    facts farther back than windows of 16 tokens reach: a window alone, MAC, MAG, and softmax that sees everything.

Training begins with at most four pairs per row and doubles them in the second half of the steps: from many pairs at once even
softmax attention stays for long on the plateau where it says any of the row's values.

Printed and written at the end: accuracy on fresh rows, each seed, by length and by distance.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import time
from typing import Any

import crossover
import experiment
import jax
import ml_collections
import numpy as np

from attnlab.analysis import charts
from attnlab.data.recall import defaults, open_recall
from attnlab.training.build import build
from attnlab.training.config import base
from attnlab.training.evaluate_recall import Answers
from attnlab.training.mesh import global_batch
from attnlab.training.step import init_state

SHIFT = {"mixer": "softmax", "window": 1}
FEW = {"num_pairs": 4, "num_keys": 8, "num_values": 8, "num_noise": 8, "num_questions": 16}
WINDOW = 16  # of attention in `window`, and chunks of all neural memories


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A task, the second layers that are compared on it, and at which multiples of the trained length."""

    title: str
    data: str
    options: dict[str, Any]
    length: int
    steps: int
    models: dict[str, dict[str, Any]]
    factors: tuple[int, ...] = (1,)
    dim: int = 64
    heads: int = 1
    head_dim: int = 0


def _sse(partitions: int) -> dict[str, Any]:
    return {"mixer": "sse", "num_partitions": partitions, "num_writers": 1, "num_readers": 1, "chunk_size": 32}


def _memory(mixer: str, **options: Any) -> dict[str, Any]:
    # Smaller steps than by default, where one trial of MAG diverged (perhaps many like tokens in a chunk).
    shared = {"chunk_size": WINDOW, "memory_heads": 2, "memory_expansion": 2.0, "theta_max": 0.05}
    return {"mixer": mixer, **shared, **options}


EXPERIMENTS = {
    "capacity": Experiment(
        title="Multi-query recall with a small state",
        data="mqar",
        options={"num_pairs": 16, "num_keys": 16, "num_values": 8, "num_questions": 32},
        length=64,
        steps=1000,
        head_dim=16,
        models={
            "gla": {"mixer": "gla", "q_activation": "silu", "k_activation": "softmax", "v_activation": "silu", "chunk_size": 32},
            **{f"sse, P = {partitions}": _sse(partitions) for partitions in (4, 16, 64)},
            "divided": {"mixer": "magnitude_aware", "variant": "divided", "rope": False},
            "mala": {"mixer": "magnitude_aware", "variant": "paper", "rope": False},
            "softmax": {"mixer": "softmax", "rope": False},
        },
    ),
    "memory": Experiment(
        title="A memory learned at test time, beyond its training length",
        data="mqar",
        options={**FEW, "num_updates": 4, "spread": 0.7},
        length=64,
        steps=800,
        factors=(1, 2, 4, 8),
        models={
            "full": _memory("titans_lmm"),
            "no momentum": _memory("titans_lmm", momentum=False),
            "no forgetting": _memory("titans_lmm", forgetting=False),
            "linear memory": _memory("titans_lmm", memory_depth=1),
            "softmax": {"mixer": "softmax", "rope": False},
        },
    ),
    "window": Experiment(
        title="Recall beyond the window",
        data="long_range",
        options={**FEW, "gap": WINDOW + 8},
        length=64,
        steps=600,
        factors=(1, 2, 4),
        heads=2,
        models={
            "window": {"mixer": "softmax", "window": WINDOW - 1, "rope": False},
            "mag": _memory("titans_mag", window=WINDOW, num_persistent=4),
            "mac": _memory("titans_mac", num_persistent=4),
            "softmax": {"mixer": "softmax", "rope": False},
        },
    ),
}


def stages(pairs: int) -> tuple[int, ...]:
    """Numbers of pairs in the quarters of training."""
    return tuple(min(max(pairs // share, 4), pairs) for share in (4, 4, 2, 1))


class Trainer:
    """One model on one task: its compiled step serves all seeds."""

    def __init__(self, options: argparse.Namespace, task: str, name: str):
        self.name, self.experiment = f"{task}: {name}", EXPERIMENTS[task]
        given = self.experiment
        self.steps = options.steps or given.steps
        config = base()
        config.data.name, config.data.dir = given.data, options.data_dir
        config.data.update(ml_collections.ConfigDict(defaults(given.data)))
        config.data[given.data].update(given.options)
        config.seq_len, config.batch_size, config.num_train_steps = given.length, options.batch, self.steps
        model = config.model
        model.num_layers, model.dim, model.num_heads, model.head_dim = 2, given.dim, given.heads, given.head_dim
        model.mlp_dim, model.dtype, model.scan_layers, model.tie_embeddings = given.dim, "float32", False, False
        model.pattern = ("first", "second")
        model.mixer_options.first = ml_collections.ConfigDict(SHIFT)
        model.mixer_options.second = ml_collections.ConfigDict(given.models[name])
        optimizer = config.optimizer
        optimizer.learning_rate, optimizer.weight_decay = options.rate, 0.0
        optimizer.warmup_steps = max(self.steps // 20, 1)
        self.data = open_recall(config)
        self.stages = []
        for pairs in stages(given.options["num_pairs"]):
            config.data[given.data].num_pairs = pairs
            self.stages.append(open_recall(config))
        self.run_ = run = build(config, outputs=self.data.outputs)
        self.answers = Answers(run, self.data.outputs)
        self.shardings = {key: spec.sharding for key, spec in run.batch_spec.items()}
        with run.context():
            self.init = jax.jit(lambda rng: init_state(run.task, run.tx, rng, ema=False))
            self.step = run.train_step.lower(run.abstract_state, run.batch_spec).compile()

    def run(self, seed: int) -> dict[str, Any]:
        """Trains from one seed; returns accuracy by length and by distance, and its course."""
        run, size = self.run_, self.run_.config.batch_size
        loaders = [data.loader("train", batch_size=size, seed=seed, shuffle=True, repeat=True) for data in self.stages]
        begin = time.perf_counter()
        course, pending = [], []
        with run.context():
            state = self.init(jax.random.key(seed))
            for step in range(1, self.steps + 1):
                loader = loaders[min(len(loaders) * (step - 1) // self.steps, len(loaders) - 1)]
                state, metrics = self.step(state, global_batch(next(loader), self.shardings, size))
                pending.append(metrics)
                if step % max(self.steps // 20, 1) == 0:
                    loss, accuracy = (float(np.mean([one[key] for one in pending])) for key in ("loss", "accuracy"))
                    course.append((step, accuracy))
                    pending = []
                    told = f"loss {loss:.3f}, accuracy {accuracy:.3f} ({time.perf_counter() - begin:.0f} s)"
                    print(f"{self.name:24} seed {seed} step {step:5}: {told}", flush=True)
        for loader in loaders:
            loader.close()
        seconds = time.perf_counter() - begin
        variables = {"params": state.params, **state.collections}
        recalled = [
            self.answers(variables, self.data, "test", factor * self.experiment.length, batch_size=max(64 // factor, 1))
            for factor in self.experiment.factors
        ]
        return {
            "accuracy": {str(one.length): one.accuracy for one in recalled},
            "distances": {str(one.length): one.by_distance() for one in recalled},
            "parameters": run.num_params(),
            "seconds": seconds,
            "course": course,
        }


def table(task: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """One row per model: mean accuracy by length, each seed at the trained length, and by distance at the longest."""
    rows = []
    for name, seeds in results.items():
        row: dict[str, Any] = {"second layer": name, "parameters": seeds[0]["parameters"]}
        for length in seeds[0]["accuracy"]:
            row[f"T = {length}"] = statistics.mean(one["accuracy"][length] for one in seeds)
            row[f"each seed, {length}"] = ", ".join(f"{one['accuracy'][length]:.3f}" for one in seeds)
        row["s / seed"] = statistics.mean(one["seconds"] for one in seeds)
        rows.append(row)
    columns = {key: ".3f" if key.startswith("T = ") else ".0f" if key == "s / seed" else "" for key in rows[0]}
    given = EXPERIMENTS[task]
    facts = ", ".join(f"{key} {value}" for key, value in given.options.items())
    chance = 1 / given.options["num_values"]
    head = f"## {given.title}\n\n{given.data}: {facts}; trained on {given.length} tokens. Chance is {chance:.3f}."
    return f"{head}\n\n{crossover.show(rows, columns)}\n"


def report(options: argparse.Namespace, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Prints the tables and writes them, the figures and a picture per task."""
    pictures = []
    for task, models in results.items():
        lines = [
            charts.Line(
                name,
                np.array([step for step, _ in seeds[0]["course"]], np.float64),
                np.mean([[accuracy for _, accuracy in one["course"]] for one in seeds], axis=0),
                colour % 4,
            )
            for colour, (name, seeds) in enumerate(models.items())
        ]
        given = EXPERIMENTS[task]
        labels = {"x_label": "step", "y_label": "accuracy", "title": f"{given.title}: accuracy over the steps, mean of the seeds"}
        chance = [("chance", 1 / given.options["num_values"])]
        experiment.picture(options.out / f"recall_{task}.svg", lines, references=chance, from_zero=True, **labels)
        pictures.append(f"![{given.title}](recall_{task}.svg)")
    sizes = {"batch": options.batch, "steps": options.steps or "as in the script", "seeds": options.seeds}
    text = "\n".join(table(task, models) for task, models in results.items())
    experiment.save("recall", "Recall", options.out, sizes, {"results": results}, text, "\n" + "\n\n".join(pictures) + "\n")


def main() -> None:
    """Trains the models and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(EXPERIMENTS), help="some of " + ", ".join(EXPERIMENTS))
    parser.add_argument("--models", default="", help="only these second layers, separated by semicolons")
    flags = (("seeds", 3, "seeds per model"), ("steps", 0, "training steps; 0 = each task's own"), ("batch", 32, "rows per step"))
    experiment.integers(parser, flags)
    rate = "peak learning rate (default 0.001; at 0.003 softmax attention stays where it says any of the row's values)"
    parser.add_argument("--rate", type=float, default=1e-3, help=rate)
    parser.add_argument("--data_dir", default="", help="as config.data.dir")
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    options = parser.parse_args()
    tasks = options.tasks.split(",")
    for task in tasks:
        if task not in EXPERIMENTS:
            parser.error(f"--tasks: {task!r} is unknown. Use some of {', '.join(EXPERIMENTS)}.")
    known = [name for task in tasks for name in EXPERIMENTS[task].models]
    wanted = [name.strip() for name in options.models.split(";")] if options.models else known
    for name in wanted:
        if name not in known:
            parser.error(f"--models: {name!r} is unknown. Use some of {'; '.join(known)}.")
    trainers = {
        task: {name: Trainer(options, task, name) for name in EXPERIMENTS[task].models if name in wanted} for task in tasks
    }
    results: dict[str, dict[str, list[dict[str, Any]]]] = {task: {name: [] for name in trainers[task]} for task in tasks}
    for seed in range(options.seeds):
        for task in tasks:
            for name, trainer in trainers[task].items():
                results[task][name].append(trainer.run(seed))
        report(options, results)  # after every seed: a run that is stopped leaves what it has


if __name__ == "__main__":
    main()

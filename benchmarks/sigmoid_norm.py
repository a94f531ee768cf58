"""Does sigmoid attention need its bias -ln n? The small experiment of "Theory, Analysis, and Best Practices for Sigmoid
Self-Attention": norms of the attention output at initialisation, and what becomes of them in training.

    python benchmarks/sigmoid_norm.py                    # four models, two seeds: some ten minutes on a free CPU core
    python benchmarks/sigmoid_norm.py --steps=2000       # as many steps as the experiment is described with
    python benchmarks/sigmoid_norm.py --steps=0          # norms at initialisation alone: a minute

A byte-level decoder (two layers, pre-norm with LayerNorm, plain MLP) on Python's standard library. Four kinds of attention:

    softmax          with rotary positions
    sigmoid -ln n    sigmoid with the bias -ln n, n the length trained with, rotary positions
    sigmoid 0        no bias, rotary positions
    sigmoid 0 ALiBi  no bias, ALiBi instead of rotary positions

First, untrained: ||a v||_F of layer 1 (weights times values of all heads, before the output projection; per row, mean over rows
and seeds) for several n. Then training with n = --length: the same norm over the first 100 steps, the largest gradient norm
after the first 100 steps (before clipping), and the loss on fixed validation rows at the end.
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

from attnlab import data
from attnlab.analysis import charts
from attnlab.methods.task import LossAux
from attnlab.models.lm import LM
from attnlab.training import config as config_lib
from attnlab.training.step import init_state, make_train_step

ARMS = {
    "softmax": {"activation": "softmax"},
    "sigmoid -ln n": {},
    "sigmoid 0": {"bias": 0.0},
    "sigmoid 0 ALiBi": {"bias": 0.0, "rope": False, "alibi": True},
}
EARLY = 100  # steps of which the norms are looked at closely


class NextByte:
    """Next-byte prediction that also tells ||a v||_F of the first layer."""

    def __init__(self, options: argparse.Namespace, arm: str, length: int, vocab_size: int):
        self.length = length
        self.model = LM(
            vocab_size=vocab_size,
            num_layers=2,
            dim=options.dim,
            num_heads=4,
            mixer="sigmoid",
            mixer_options={"sigmoid": ARMS[arm]},
            train_length=length,
            norm="layernorm",
            mlp="gelu",
            scan_layers=False,
            capture_attention=True,
        )

    def init(self, rng):
        """The parameters."""
        return {"params": self.model.init(rng, jnp.zeros((1, self.length), jnp.int32))["params"]}

    def loss(self, params, collections, rows, rng):
        """Mean over all positions of rows [B, T + 1]."""
        del rng
        (logits, _), sown = self.model.apply({"params": params}, rows[:, :-1], mutable=["intermediates"])
        attended = sown["intermediates"]["layers_0"]["blocks_0"]["mixer"]["attended"][0]  # [B, T, N, H]
        norm = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(attended), axis=(1, 2, 3))))
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]))
        return loss, LossAux(weight=jnp.float32(rows.size), metrics={"loss": loss, "norm": norm}, collections=collections)


def draw(text: data.TextData, split: str, length: int, batch: int, count: int, seed: int) -> jax.Array:
    """Returns `count` batches of rows with one token more: [count, batch, length + 1] int32."""
    loader = text.loader(split, batch_size=batch, seq_len=length, seed=seed, shuffle=True, repeat=True)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return jnp.asarray(np.stack([np.concatenate([one["inputs"], one["targets"][:, -1:]], axis=1) for one in batches]))


def untrained(options: argparse.Namespace, text: data.TextData, lengths: list[int]) -> list[dict]:
    """Norms at initialisation, one row per length."""
    table = []
    for length in lengths:
        rows = draw(text, "train", length, 4, 1, seed=0)[0]
        row: dict = {"n": length}
        for arm in ARMS:
            task = NextByte(options, arm, length, text.tokenizer.vocab_size)

            def norm(rng, rows, task=task):
                return task.loss(task.init(rng)["params"], {}, rows, None)[1].metrics["norm"]

            # flax boxes the parameters with their logical names; `apply` takes them as they are
            row[arm] = float(np.mean([jax.jit(norm)(jax.random.key(seed), rows) for seed in range(options.seeds)]))
        row["0 / softmax"] = row["sigmoid 0"] / row["softmax"]
        row["-ln n / softmax"] = row["sigmoid -ln n"] / row["softmax"]
        row["ALiBi / softmax"] = row["sigmoid 0 ALiBi"] / row["softmax"]
        table.append(row)
        print(f"untrained, n = {length}: " + ", ".join(f"{arm} {row[arm]:.3f}" for arm in ARMS), flush=True)
    return table


def trained(options: argparse.Namespace, text: data.TextData, arm: str) -> list[dict]:
    """Trains one kind of attention from all seeds."""
    task = NextByte(options, arm, options.length, text.tokenizer.vocab_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.rate, EARLY, options.steps, 0.1 * options.rate)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0))
    init = jax.jit(lambda rng: init_state(task, tx, rng, ema=False))
    step = make_train_step(task, tx, schedule, seed=0)
    chunk = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)
    evaluate = jax.jit(lambda params, batches: jax.lax.map(lambda rows: task.loss(params, {}, rows, None)[0], batches).mean())
    validation = draw(text, "validation", options.length, options.batch, 32, seed=1)
    results = []
    for seed in range(options.seeds):
        begin = time.perf_counter()
        state, batches = init(jax.random.key(seed)), draw(text, "train", options.length, options.batch, options.steps, seed)
        course = []
        for first in range(0, options.steps, 50):
            state, metrics = chunk(state, batches[first : first + 50])
            course.append({name: np.asarray(metrics[name]) for name in ("loss", "norm", "grad_norm")})
            if first % 200 == 150 or first + 50 >= options.steps:
                told = f"loss {course[-1]['loss'].mean():.3f}, norm {course[-1]['norm'].mean():.1f}"
                print(f"{arm:15} seed {seed} step {first + 50:5}: {told} ({time.perf_counter() - begin:.0f} s)", flush=True)
        whole = {name: np.concatenate([part[name] for part in course]) for name in course[0]}
        results.append(
            {
                "first norm": float(whole["norm"][0]),
                "largest norm": float(whole["norm"][:EARLY].max()),
                "loss at 100": float(whole["loss"][EARLY - 10 : EARLY].mean()),
                "largest gradient": float(whole["grad_norm"][EARLY:].max(initial=0.0)),
                "loss": float(evaluate(state.params, validation)),
                "seconds": time.perf_counter() - begin,
                "norms": [round(float(x), 4) for x in whole["norm"][:EARLY]],
                "losses": [round(float(x), 4) for x in whole["loss"]],
            }
        )
    return results


def report(options: argparse.Namespace, initial: list[dict], results: dict[str, list[dict]]) -> None:
    """Prints the tables; writes them, the figures and two pictures beside the other results."""
    columns = {"n": "d"} | dict.fromkeys(ARMS, ".3f") | {"-ln n / softmax": ".2f", "0 / softmax": ".1f", "ALiBi / softmax": ".1f"}
    tables = ["||a v||_F of layer 1 before training, by the length n:\n\n" + crossover.show(initial, columns)]
    rows = []
    for arm, seeds in results.items():
        row: dict = {"attention": arm}
        for key in ("first norm", "largest norm", "loss at 100", "largest gradient", "loss"):
            row[key] = statistics.mean(one[key] for one in seeds)
        row["loss, each seed"] = ", ".join(f"{one['loss']:.4f}" for one in seeds)
        if "softmax" in results:
            row["against softmax, %"] = 100 * (row["loss"] / statistics.mean(one["loss"] for one in results["softmax"]) - 1)
        row["s / seed"] = statistics.mean(one["seconds"] for one in seeds)
        rows.append(row)
    sizes = {key: value for key, value in vars(options).items() if key != "out"}
    pictures = ""
    if rows:
        columns = {"attention": "", "first norm": ".2f", "largest norm": ".2f", "loss at 100": ".3f", "largest gradient": ".2f"}
        columns |= {"loss": ".4f", "against softmax, %": "+.2f", "loss, each seed": "", "s / seed": ".0f"}
        tables.append(
            f"Training, n = {options.length} (mean of the seeds; norms of the first {EARLY} steps, the largest gradient after them, "
            "the loss in nats per byte on validation rows at the end):\n\n" + crossover.show(rows, columns)
        )
        norms, losses = [], []
        for colour, (arm, seeds) in enumerate(results.items()):
            course = np.log10(np.mean([one["norms"] for one in seeds], axis=0))
            norms.append(charts.Line(arm, np.arange(1.0, course.size + 1), course, colour))
            smooth = np.mean([one["losses"] for one in seeds], axis=0).reshape(-1, 10).mean(axis=1)
            losses.append(charts.Line(arm, 10.0 * np.arange(1, smooth.size + 1), smooth, colour))
        title = f"Norm of the attention output in the first {EARLY} steps"
        norm = {"x_label": "step", "y_label": "log10 ||a v||_F", "labels": 170}
        experiment.picture(options.out / "sigmoid_norm.svg", norms, **norm, title=title)
        title = "Training loss, mean of 10 steps"
        loss = {"x_label": "step", "y_label": "nats per byte", "labels": 170}
        experiment.picture(options.out / "sigmoid_norm_loss.svg", losses, **loss, title=title)
        pictures = "\n![norms in the first steps](sigmoid_norm.svg)\n\n![training loss](sigmoid_norm_loss.svg)\n"
    figures = {"untrained": initial, "trained": results}
    experiment.save(
        "sigmoid_norm", "Norm of sigmoid attention and its bias", options.out, sizes, figures, "\n\n".join(tables), pictures
    )


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = (
        ("seeds", 2, "seeds per kind of attention"),
        ("steps", 500, f"training steps, a multiple of 50, at least {2 * EARLY}; 0 = norms at initialisation alone"),
        ("length", 256, "n, tokens in a row"),
        ("batch", 4, "rows per step"),
        ("dim", 128, "width of the model"),
    )
    experiment.integers(parser, flags)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default 0.002)")
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.steps % 50 or 0 < options.steps < 2 * EARLY:
        fit = max(2 * EARLY, 50 * math.ceil(options.steps / 50))
        parser.error(f"--steps {options.steps}: is no multiple of 50 from {2 * EARLY} on. Set {fit}, or 0 for no training.")
    text = data.open_text(config_lib.base())
    initial = untrained(options, text, [64, 256, 1024])
    results = {arm: trained(options, text, arm) for arm in ARMS} if options.steps else {}
    report(options, initial, results)


if __name__ == "__main__":
    main()

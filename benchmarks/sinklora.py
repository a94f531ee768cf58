"""The small experiment of LongLoRA and SinkLoRA: which training-time attention extends a context best?

    python benchmarks/sinklora.py                        # some ten minutes on a free core
    python benchmarks/sinklora.py --seeds=1 --variants=groups,SF,full
    python benchmarks/sinklora.py --text=phrases --pretrain_steps=6000 --rate=0.001

A decoder is trained on 128 bytes of Python's standard library (or of rows of random phrases, each seen several times), then
extended to 512 with interpolated positions and adapters, by `configs/sinklora.py:pretrain` and `:extend`: in plain groups of
128, S2 (windows, roll), SF (and SF without trained norms and embeddings) and full attention, for the same steps on the same
rows. All are evaluated with full attention at 512, on files that no step has seen. The paper's claim: full <= SF < S2 < groups
in perplexity.

With phrases the first phase must learn to copy, or there is nothing to compare: its loss then falls far below that of a model that
only knows which tokens a row has (about 4 nats with the default sizes). 600 steps of two layers were too few.

Then the last claim, with the fully extended model: next-token accuracy (inside phrases seen before), read token by token through
an H2O cache of some tokens, half of them heavy hitters, or all of them recent ones.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from typing import Any

import crossover
import experiment
import jax
import jax.numpy as jnp
import numpy as np

from attnlab import data
from attnlab.inference.heavy_hitter import heavy_hitter_model
from attnlab.methods import lora
from attnlab.training import cli
from attnlab.training.build import Run, build
from attnlab.training.step import TrainState

ROOT = pathlib.Path(__file__).resolve().parents[1]
# name -> (mixer, its options, what is trained beside the adapters)
VARIANTS = {
    "full": ("softmax", {}, "embed|norm"),
    "groups": ("s2", {"returned_fraction": 1.0}, "embed|norm"),
    "S2 windows": ("s2", {}, "embed|norm"),
    "SF": ("sf", {}, "embed|norm"),
    "S2 roll": ("s2", {"variant": "roll"}, "embed|norm"),
    "SF LoRA alone": ("sf", {}, ""),
}
UNEXTENDED = "not extended"


class Source:
    """Windows of the standard library's source, as bytes."""

    vocab = 256

    def __init__(self, options: argparse.Namespace):
        text = data.open_text(cli.load_config(f"{ROOT}/configs/sinklora.py:pretrain"))
        self.bytes = {s: np.frombuffer(b"".join(text.raw_bytes(s)), np.uint8) for s in ("train", "validation")}

    def rows(self, count: int, length: int, seed: Any, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Returns bytes [count, length + 1], all of which count."""
        start = np.random.default_rng(seed).integers(0, self.bytes[split].size - length - 1, (count, 1))
        tokens = self.bytes[split][start + np.arange(length + 1)].astype(np.int32)
        return tokens, np.ones(tokens.shape, bool)

    def batch(self, count: int, length: int, seed: Any) -> dict[str, np.ndarray]:
        """A batch of the training step."""
        return batch(self.rows(count, length, seed)[0])


def batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What the training step takes, of rows of one token more."""
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones(tokens[:, 1:].shape, bool)}


class Phrases:
    """Rows of phrases from a row's own pool in random order: `share` as many different ones as there are places."""

    def __init__(self, options: argparse.Namespace):
        self.vocab, self.phrase = options.vocab, options.phrase
        self.share = {128: options.pool_short, 512: options.pool_long}

    def rows(self, count: int, length: int, seed: Any, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens [count, length + 1], and where they continue a phrase that the row has shown before."""
        random = np.random.default_rng(seed)
        places = -(-(length + 1) // self.phrase)
        different = round(places * self.share[length])
        pool = random.integers(0, self.vocab, (count, different, self.phrase))
        order = random.integers(0, different, (count, places))
        shown = np.eye(different, dtype=int)[order]
        seen = np.cumsum(shown, axis=1) - shown
        again = np.take_along_axis(seen, order[..., None], axis=2) > 0  # [count, places, 1]
        known = again & (np.arange(self.phrase) > 0)  # the first token of a phrase cannot be known
        tokens = np.take_along_axis(pool, order[..., None], axis=1).reshape(count, -1)
        return tokens[:, : length + 1].astype(np.int32), known.reshape(count, -1)[:, : length + 1]

    def batch(self, count: int, length: int, seed: Any) -> dict[str, np.ndarray]:
        """A batch of the training step."""
        return batch(self.rows(count, length, seed)[0])


def train(run: Run, state: TrainState, text: Source | Phrases, seed: int, name: str) -> TrainState:
    """Trains for the run's steps."""
    config, begin = run.config, time.perf_counter()
    with run.context():
        for step in range(config.num_train_steps):
            state, metrics = run.train_step(state, text.batch(config.batch_size, config.seq_len, (seed, step)))
            if step % 100 == 99 or step + 1 == config.num_train_steps:
                loss = float(metrics["loss"])
                print(f"{name:16} step {step + 1:5}: loss {loss:.4f} ({time.perf_counter() - begin:.0f} s)", flush=True)
    return state


class Evaluation:
    """Full attention at the new length on fixed rows: nats per token, over all and over those that a row has shown before."""

    def __init__(self, run: Run, text: Source | Phrases, count: int = 32):
        self.run = run
        tokens, known = text.rows(count, run.config.seq_len, (99, 0), "validation")
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "target_bytes": np.ones(tokens[:, 1:].shape, np.int32)}
        self.batches = {"all": batch | {"mask": np.ones_like(known[:, 1:])}, "known": batch | {"mask": known[:, 1:]}}
        self.sums = jax.jit(lambda params, batch: run.task.eval(params, {}, batch))

    def __call__(self, params: Any) -> dict[str, float]:
        """Returns {"all" | "known": nats}."""
        with self.run.context():
            sums = {name: self.sums(params, batch) for name, batch in self.batches.items()}
        return {name: float(part["loss"] / part["weight"]) for name, part in sums.items()}


def extension(options: argparse.Namespace, name: str, vocab: int) -> Run:
    """Builds the second phase of a variant."""
    mixer, fields, trained = VARIANTS[name]
    config = cli.load_config(f"{ROOT}/configs/sinklora.py:extend")
    changes = {f"model.mixer_options.{mixer}.{key}": value for key, value in fields.items()}
    changes |= {"model.mixer": mixer, "lora.train": trained, "num_train_steps": options.extend_steps}
    config.update_from_flattened_dict(changes | {"batch_size": options.batch // 4, "model.num_layers": options.layers})
    return build(config, outputs=vocab)


def recall(model: Any, params: Any, text: Source | Phrases, budgets: dict[str, dict[str, int]], prompt: int) -> dict[str, float]:
    """Accuracy inside phrases seen before, of the rest of rows that are read token by token after the prompt."""
    tokens, known = text.rows(8, 512, (99, 7), "validation")
    results = {}
    for name, options in budgets.items():
        reader = heavy_hitter_model(model, **options)

        @jax.jit
        def read(params, tokens, reader=reader):
            _, cache = reader.apply({"params": params}, tokens[:, :prompt], cache=reader.init_cache(8, 512))

            def step(cache, token):
                logits, cache = reader.apply({"params": params}, token[:, None], cache=cache)
                return cache, logits[:, 0].argmax(-1)

            return jax.lax.scan(step, cache, tokens[:, prompt:512].T)[1].T

        right = np.asarray(read(params, jnp.asarray(tokens))) == tokens[:, prompt + 1 :]
        results[name] = float(right[known[:, prompt + 1 :]].mean())
        print(f"H2O {name}: {results[name]:.3f}", flush=True)
    return results


def report(options: argparse.Namespace, results: dict[str, list[dict[str, float]]], accuracy: dict[str, float]) -> None:
    """Prints the tables; writes them and the figures beside the other results."""
    mean = {name: {key: statistics.mean(one[key] for one in seeds) for key in seeds[0]} for name, seeds in results.items()}
    perplexity = {name: float(np.exp(nats["all"])) for name, nats in mean.items()}
    rows = []
    for name, nats in mean.items():
        row: dict[str, Any] = {"trained with": name, "perplexity": perplexity[name], "nats": nats["all"], "known": nats["known"]}
        row["nats, each seed"] = ", ".join(f"{one['all']:.4f}" for one in results[name])
        if {"groups", "full"} <= set(mean) and name != UNEXTENDED:
            row["gap closed, %"] = 100 * (perplexity["groups"] - perplexity[name]) / (perplexity["groups"] - perplexity["full"])
        rows.append(row)
    columns = {"trained with": "", "perplexity": ".3f", "gap closed, %": ".0f", "nats": ".4f", "known": ".4f", "nats, each seed": ""}
    tables = [
        "Evaluated with full attention at 512 (`known`: nats on tokens inside phrases that the row has shown before; with source "
        "text, all):\n\n" + crossover.show(rows, columns)
    ]
    if accuracy:
        rows = [{"cache": name, "accuracy": value} for name, value in accuracy.items()]
        tables.append(
            f"Accuracy (with phrases: inside those seen before), tokens {options.prompt} to 512 of rows read through an H2O "
            "cache:\n\n"
            + crossover.show(rows, {"cache": "", "accuracy": ".3f"})
        )
    text = "\n\n".join(tables)
    sizes = {key: value for key, value in vars(options).items() if key != "out"}
    title, figures = "Extending a context by grouped attention (LongLoRA, SinkLoRA)", {"nats": results, "h2o_accuracy": accuracy}
    experiment.save("sinklora", title, options.out, sizes, figures, text)


def main() -> None:
    """Trains, extends, evaluates and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of " + ", ".join(VARIANTS))
    flags = (
        ("seeds", 2, "extensions per variant, of other rows, from the one pretrained model"),
        ("pretrain_steps", 800, "steps with 128 tokens"),
        ("extend_steps", 100, "steps with 512 tokens"),
        ("batch", 16, "rows of 128 tokens per step, four times as many as of 512"),
        ("layers", 4, "layers"),
        ("vocab", 128, "different tokens of phrases"),
        ("phrase", 16, "tokens in a phrase"),
        ("prompt", 256, "tokens that are read at once before those that are counted with an H2O cache"),
    )
    experiment.integers(parser, flags)
    parser.add_argument("--text", choices=("source", "phrases"), default="source", help="what is read (default source)")
    parser.add_argument("--pool_short", type=float, default=0.35, help="different phrases / places in 128 tokens (default 0.35)")
    parser.add_argument("--pool_long", type=float, default=0.5, help="the same in 512 tokens (default 0.5)")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of the first phase (default 0.003)")
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    options = parser.parse_args()
    names = [name.strip() for name in options.variants.split(",")]
    for name in names:
        if name not in VARIANTS:
            parser.error(f"--variants: {name!r} is unknown. Use some of {', '.join(VARIANTS)}.")
    if options.batch % 4:
        parser.error(f"--batch {options.batch}: rows of 512 are a quarter of it. Set a multiple of 4.")
    begin, text = time.perf_counter(), {"source": Source, "phrases": Phrases}[options.text](options)
    config = cli.load_config(f"{ROOT}/configs/sinklora.py:pretrain")
    changes = {"num_train_steps": options.pretrain_steps, "batch_size": options.batch, "optimizer.learning_rate": options.rate}
    changes["model.num_layers"] = options.layers
    config.update_from_flattened_dict(changes)
    run = build(config, outputs=text.vocab)
    base = jax.device_get(train(run, run.init_state(), text, 1, "pretraining").params)
    full = extension(options, "full", text.vocab)
    evaluate = Evaluation(full, text)
    unextended = lora.join(base, lora.split(full.init_state().params)[1])
    results = {UNEXTENDED: [evaluate(unextended)]}
    print(f"{UNEXTENDED}: {results[UNEXTENDED][0]}", flush=True)
    for name in names:
        run = full if name == "full" else extension(options, name, text.vocab)
        results[name] = []
        for seed in range(options.seeds):
            state = run.init_state()
            params = jax.tree.map(jnp.array, lora.join(base, lora.split(state.params)[1]))  # copies: the step donates them
            state = train(run, state.replace(params=params), text, 2 + seed, name)
            results[name].append(evaluate(state.params))
            print(f"{name:16} seed {seed}: {results[name][-1]} ({time.perf_counter() - begin:.0f} s)", flush=True)
        if name == "full":
            merged = lora.merge(state.params, run.task.spec)
        report(options, results, {})  # after every variant: a run that is stopped leaves what it has
    if "full" in names:
        budgets = {"everything": {"heavy": 256, "recent": 256}}
        for size in (32, 64, 128):
            budgets[f"{size // 2} heavy + {size // 2} recent"] = {"heavy": size // 2, "recent": size // 2}
            budgets[f"{size} recent"] = {"heavy": 0, "recent": size}
        report(options, results, recall(full.task.model.model, merged, text, budgets, options.prompt))


if __name__ == "__main__":
    main()

"""The small experiment of LongLoRA and SinkLoRA: which training-time attention extends a context best?

    python benchmarks/sinklora.py                    # about three minutes on two free CPU cores
    python benchmarks/sinklora.py --json=result.json

A decoder is trained on 128 tokens of text with repeats (rows of random phrases, each seen several times), then extended to
512 tokens with interpolated positions and adapters, by `configs/sinklora.py:pretrain` and `:extend`: in plain groups of 128,
S2 (windows, roll), SF (and SF without trained norms and embeddings) and full attention, for the same steps on the same rows.
All are evaluated with full attention at 512. The paper's claim: full <= SF < S2 < groups in perplexity.

Then the last claim, with the fully extended model: next-token accuracy inside phrases seen before, read through an H2O cache
of some tokens, half of them heavy hitters, or all of them recent ones.
"""

import argparse
import datetime
import json
import pathlib
import time

import jax
import numpy as np

from attnlab.inference.heavy_hitter import heavy_hitter_model
from attnlab.methods import lora
from attnlab.training import cli
from attnlab.training.build import build

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCAB, PHRASE = 64, 16
# name -> (mixer, its options, what is trained beside the adapters)
VARIANTS = {
    "groups": ("s2", {"returned_fraction": 1.0}, "embed|norm"),
    "S2 roll": ("s2", {"variant": "roll"}, "embed|norm"),
    "S2 windows": ("s2", {}, "embed|norm"),
    "SF": ("sf", {}, "embed|norm"),
    "full": ("softmax", {}, "embed|norm"),
    "SF, LoRA alone": ("sf", {}, ""),
}


def rows(count, length, seed):
    """[count, length + 1] tokens: phrases of a row's own pool in random order, half as many as there are places."""
    random = np.random.default_rng(seed)
    places = length // PHRASE + 1
    pool = random.integers(0, VOCAB, (count, places // 2, PHRASE))
    order = random.integers(0, places // 2, (count, places))
    seen = np.cumsum(np.eye(places // 2, dtype=int)[order], axis=1) - np.eye(places // 2, dtype=int)[order]
    again = np.take_along_axis(seen, order[..., None], axis=2)[..., 0] > 0  # [count, places]
    tokens = np.take_along_axis(pool, order[..., None], axis=1).reshape(count, -1)[:, : length + 1]
    return tokens.astype(np.int32), np.repeat(again, PHRASE, axis=1)[:, : length + 1]


def batch(count, length, seed, evaluate=False):
    tokens, _ = rows(count, length, seed)
    made = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((count, length), bool)}
    return made | ({"target_bytes": np.ones((count, length), np.int32)} if evaluate else {})


def train(run, state, seed):
    config = run.config
    with run.context():
        for step in range(config.num_train_steps):
            state, metrics = run.train_step(state, batch(config.batch_size, config.seq_len, (seed, step)))
    return state, float(metrics["loss"])


def evaluate(run, state):
    totals = np.zeros(2)
    with run.context():
        for number in range(8):
            sums = run.eval_step(state, batch(run.config.batch_size, run.config.seq_len, (99, number), evaluate=True))
            totals += [float(sums["loss"]), float(sums["weight"])]
    return totals[0] / totals[1]


def extended(base, name, steps):
    mixer, options, trained = VARIANTS[name]
    config = cli.load_config(f"{ROOT}/configs/sinklora.py:extend")
    changes = {f"model.mixer_options.{mixer}.{key}": value for key, value in options.items()}
    config.update_from_flattened_dict({"model.mixer": mixer, "lora.train": trained, "num_train_steps": steps} | changes)
    run = build(config, vocab_size=VOCAB)
    state = run.init_state()
    params = lora.join(jax.tree.map(np.copy, base), lora.split(state.params)[1])
    state, _ = train(run, state.replace(params=jax.tree.map(jax.numpy.asarray, params)), 2)
    return run, state, evaluate(run, state)


def recall(model, params, budgets):
    """Accuracy inside phrases seen before, of the second half of rows read token by token after the first."""
    tokens, again = rows(8, 512, 7)
    counted = again[:, 1:] & (np.arange(512)[None] % PHRASE != PHRASE - 1)  # its first token cannot be known
    results = {}
    for name, options in budgets.items():
        reader = heavy_hitter_model(model, **options)

        @jax.jit
        def read(params, tokens, reader=reader):
            _, cache = reader.apply({"params": params}, tokens[:, :256], cache=reader.init_cache(8, 512))

            def step(cache, token):
                logits, cache = reader.apply({"params": params}, token[:, None], cache=cache)
                return cache, logits[:, 0].argmax(-1)

            return jax.lax.scan(step, cache, tokens[:, 256:512].T)[1].T

        right = np.asarray(read(params, tokens)) == tokens[:, 257:513]
        results[name] = float(right[counted[:, 256:]].mean())
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain_steps", type=int, default=800)
    parser.add_argument("--extend_steps", type=int, default=100)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    begin = time.perf_counter()
    config = cli.load_config(f"{ROOT}/configs/sinklora.py:pretrain")
    config.num_train_steps = options.pretrain_steps
    run = build(config, vocab_size=VOCAB)
    state, loss = train(run, run.init_state(), 1)
    base = jax.device_get(state.params)
    print(f"pretrained on 128 tokens: loss {loss:.3f} nats ({time.perf_counter() - begin:.0f} s)", flush=True)
    losses, full = {}, None
    for name in VARIANTS:
        run, state, losses[name] = extended(base, name, options.extend_steps)
        print(f"{name:16s} {losses[name]:.4f} nats ({time.perf_counter() - begin:.0f} s)", flush=True)
        full = (run.task.model.model, lora.merge(state.params, run.task.spec)) if name == "full" else full
    perplexity = {name: float(np.exp(loss)) for name, loss in losses.items()}
    gap = perplexity["groups"] - perplexity["full"]
    closed = {name: (perplexity["groups"] - value) / gap for name, value in perplexity.items()}
    budgets = {"all": {"heavy": 256, "recent": 256}}
    for size in (64, 128, 256):
        budgets[f"{size} heavy + recent"] = {"heavy": size // 2, "recent": size // 2}
        budgets[f"{size} recent"] = {"heavy": 0, "recent": size}
    accuracy = recall(*full, budgets)
    print(f"{'':16s} perplexity at 512   gap closed")
    for name, value in perplexity.items():
        print(f"{name:16s} {value:17.3f}   {100 * closed[name]:8.0f} %")
    for name, value in accuracy.items():
        print(f"H2O {name:22s} accuracy in repeated phrases {100 * value:6.1f} %")
    result = {
        "date": datetime.date.today().isoformat(), "device": jax.devices()[0].device_kind,
        "seconds": round(time.perf_counter() - begin), "nats": losses, "perplexity": perplexity, "gap_closed": closed,
        "h2o_accuracy": accuracy, **{key: value for key, value in vars(options).items() if key != "json"},
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

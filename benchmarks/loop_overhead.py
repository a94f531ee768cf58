"""What the loop costs over the bare jitted step, and how long a start takes.

    python benchmarks/loop_overhead.py

In one run, on the same machine: seconds per step of the whole loop (data, a line of metrics every 10 steps, a checkpoint
every 100) by the wall clock, beside the bare compiled step on one fixed batch; that step beside a plain, hand-written Flax
model of the same size; the time to import attnlab beyond jax and flax. Prints a table and one JSON line.

The floor of the loop is the bare step; the rest is what Python, the data pipeline and the copies for checkpoints cost.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from attnlab import data
from attnlab.training import cli, loop, metrics
from attnlab.training.build import build
from attnlab.training.mesh import global_batch

STEPS = 200
ROOT = pathlib.Path(__file__).resolve().parents[1]


class PlainBlock(nn.Module):
    """A pre-norm block as a Flax tutorial writes it, with the layers of `configs/lm.py:small`."""

    dim: int
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        width = self.dim // self.heads
        y = nn.RMSNorm()(x)
        q, k, v = (nn.DenseGeneral((self.heads, width), use_bias=False)(y) for _ in range(3))
        q, k = rotate(q), rotate(k)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.DenseGeneral(self.dim, axis=(-2, -1), use_bias=False)(y)
        y = nn.RMSNorm()(x)
        y = nn.silu(nn.Dense(self.hidden, use_bias=False)(y)) * nn.Dense(self.hidden, use_bias=False)(y)
        return x + nn.Dense(self.dim, use_bias=False)(y)


def rotate(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)


class PlainLM(nn.Module):
    vocab: int
    dim: int
    heads: int
    hidden: int
    layers: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocab, self.dim)
        x = embed(tokens)
        for _ in range(self.layers):
            x = PlainBlock(self.dim, self.heads, self.hidden)(x)
        return embed.attend(nn.RMSNorm()(x))


def plain_step(config, vocab):
    model = config.model
    hidden = -(-8 * model.dim // 3 // 64) * 64
    lm = PlainLM(vocab, model.dim, model.num_heads, hidden, model.num_layers)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95, weight_decay=0.1))

    def loss(params, batch):
        logits = lm.apply(params, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    @jax.jit
    def init(tokens):
        params = lm.init(jax.random.key(0), tokens)
        return params, tx.init(params)

    def step(state, batch):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return init, jax.jit(step, donate_argnums=0)


def seconds_per_step(step, state, batch, steps):
    """Median of blocks of ten steps."""
    blocks = []
    for _ in range(steps // 10):
        begin = time.perf_counter()
        for _ in range(10):
            state, out = step(state, batch)
        jax.block_until_ready(out)
        blocks.append((time.perf_counter() - begin) / 10)
    return statistics.median(blocks), state


def import_seconds():
    """Import of attnlab and its rooms beyond jax and flax, the median of five fresh processes."""
    code = (
        "import jax, flax.linen, time; t = time.perf_counter(); import attnlab; a = time.perf_counter() - t; "
        "import attnlab.ops, attnlab.nn, attnlab.models.lm; print(a, time.perf_counter() - t)"
    )
    runs = []
    for _ in range(5):
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        runs.append([float(value) for value in out.split()])
    return [statistics.median(column) for column in zip(*runs, strict=True)]


def main():
    config = cli.load_config(f"{ROOT / 'configs' / 'lm.py'}:small")
    config.num_train_steps, config.batch_size = STEPS, 2  # steps of about 100 ms on two cores
    config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps = 10, 10 * STEPS, 100
    text = data.open_text(config)
    run = build(config)
    loader = text.loader("train", batch_size=config.batch_size, seq_len=config.seq_len, seed=0, shuffle=True, repeat=True)
    host = next(loader)
    loader.close()
    batch = global_batch(host, {name: spec.sharding for name, spec in run.batch_spec.items()}, config.batch_size)
    with run.context():
        compiled = run.train_step.lower(run.abstract_state, run.batch_spec).compile()
        _, state = seconds_per_step(compiled, run.init_state(), batch, 10)
        init, step = plain_step(config, run.task.vocab_size)
        _, plain = seconds_per_step(step, init(batch["inputs"]), batch, 10)
        # in turns, so that a change of the machine meets both
        ours, peers = [], []
        for _ in range(5):
            seconds, state = seconds_per_step(compiled, state, batch, STEPS // 5)
            ours.append(seconds)
            seconds, plain = seconds_per_step(step, plain, batch, STEPS // 5)
            peers.append(seconds)
    with tempfile.TemporaryDirectory() as workdir:
        begin = time.perf_counter()
        loop.train(config, workdir)
        whole = time.perf_counter() - begin
        lines = [line for line in metrics.read(pathlib.Path(workdir) / "metrics.jsonl") if "step_seconds" in line]
    with run.context():  # once more: the loop lies between two measurements of the bare step
        ours.append(seconds_per_step(compiled, state, batch, STEPS // 2)[0])
    bare, peer = statistics.median(ours), statistics.median(peers)
    first, last = lines[0], lines[-2]  # the last line comes with the last evaluation
    looped = (last["time"] - first["time"]) / (last["step"] - first["step"])
    first_import, rooms_import = import_seconds()
    figures = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bare_step_ms": round(1e3 * bare, 2),
        "loop_step_ms": round(1e3 * looped, 2),
        "loop_overhead_percent": round(100 * (looped / bare - 1), 2),
        "plain_flax_step_ms": round(1e3 * peer, 2),
        "against_plain_flax": round(peer / bare, 3),
        "start_seconds": round(whole - looped * STEPS, 1),
        "import_attnlab_seconds": round(first_import, 3),
        "import_rooms_seconds": round(rooms_import, 3),
    }
    for name, value in figures.items():
        print(f"{name:24} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

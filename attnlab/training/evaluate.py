"""The evaluation of a trained run: figures on a split beside those of simple codes, a continuation, a report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from attnlab import data
from attnlab.analysis.text import readable
from attnlab.data import baselines
from attnlab.errors import ConfigError, field_error
from attnlab.inference.decode import generate
from attnlab.inference.sampling import make_sampler
from attnlab.training import config as config_lib
from attnlab.training import validation, workdir
from attnlab.training.build import Run, build, padded_vocab
from attnlab.training.checkpoint import Checkpoints
from attnlab.training.progress import si

# What says which model and which text; the rest of a given config (batch size, mesh, ...) may differ from the run's.
IDENTITY = ("task", "seq_len", "model.", "data.name", "data.tokenizer", "data.packing", "data.feature")
_FREE = ("model.remat",)
_TAKEN = ("batch_size", "eval_batches", "loss_chunk", "mesh", "sharding_rules")
BASELINE_BYTES = 64 << 20  # of each split, at most; xz takes about a second per mebibyte


@dataclasses.dataclass(frozen=True)
class Options:
    """What eval.py's flags say.

    step: of the checkpoint, None = the newest good one. eval_batches: None = the whole split. prompt: None = the start
    of the split's first document. max_new_tokens: None = up to the trained length. layers, heads: of the report's
    maps, None = some spread over all.
    """

    split: str = "test"
    step: int | None = None
    eval_batches: int | None = None
    prompt: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    num_samples: int = 1
    seed: int = 0
    report: bool = False
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A restored run with its figures and samples: what a report is made of."""

    run: Run
    text: data.TextData
    variables: dict[str, Any]
    figures: dict[str, Any]
    samples: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def main(folder: str, config: ml_collections.ConfigDict | None, options: Options) -> dict[str, Any]:
    """Evaluates the run in `folder` and prints a table and, as the last line, one JSON object.

    Writes `eval.json` and, when asked, `report.html` there.

    Args:
        folder: the run's workdir.
        config: must describe the same model and data as the run's own; None = the run's own.
        options: see `Options`.

    Returns:
        The JSON object.

    Raises:
        ConfigError: no run or no checkpoint in the folder, another model or data, bad options.
    """
    result = evaluate(folder, config, options)
    figures = {name: _json_number(value) for name, value in result.figures.items()}
    workdir.write_atomic(pathlib.Path(folder) / "eval.json", json.dumps(figures, indent=1) + "\n")
    print(table(result), flush=True)
    if options.report:
        from attnlab.training import run_report

        path = run_report.write(folder, result, options)
        print(f"report: {path} ({path.stat().st_size / 1e6:.2f} MB)", flush=True)
    print(json.dumps(figures), flush=True)
    return figures


def evaluate(folder: str, config: ml_collections.ConfigDict | None, options: Options) -> Evaluated:
    """Restores the run and computes its figures and samples; see `main`."""
    _check(options)
    config = run_config(folder, config)
    text = data.open_text(config)
    if options.split not in text.splits:
        raise field_error(
            "--split", options.split, f"{config.data.name} has no such split", f"Use one of {list(text.splits)}"
        )
    notes = _data_notes(folder, config, text)
    run = build(config, vocab_size=padded_vocab(config, text.tokenizer.vocab_size))
    state, step = _restore(folder, config, run, options.step)
    with run.context():
        compiled = run.eval_step.lower(run.abstract_state, run.eval_batch_spec).compile()
    start = time.perf_counter()
    measured = validation.evaluate(run, state, text, options.split, options.eval_batches, step_fn=compiled)
    seconds = time.perf_counter() - start
    variables = {"params": state.params if state.ema is None else state.ema, **state.collections}
    del state
    samples, decode_rate, sample_notes = _samples(run, text, variables, options)
    figures = {
        "step": step,
        "split": options.split,
        **measured,
        "perplexity": math.exp(min(measured["loss"], 700.0)),
        **_baselines(text, options.split),
        "tokens_per_second": measured["tokens"] / seconds,
        "decode_tokens_per_second": decode_rate,
        "parameters": "ema" if run.abstract_state.ema is not None else "trained",
        "prompt": samples[0][0],
        "sample": samples[0][1],
    }
    if len(samples) > 1:
        figures["samples"] = [new for _, new in samples]
    return Evaluated(run, text, variables, figures, samples, (*notes, *sample_notes))


def run_config(folder: str, given: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
    """Returns the run's own config with the free fields of a given one.

    Raises:
        ConfigError: no run in the folder, or the given config describes another model or other data.
    """
    saved = workdir.read_config(folder)
    config = ml_collections.ConfigDict(saved)
    if given is None:
        return config
    different = [
        (field, old, new)
        for field, old, new in config_lib.differences(saved, given)
        if field.startswith(IDENTITY) and not field.startswith(_FREE)
    ]
    if different:
        lines = [f"  config.{field}: the run has {old!r}, --config has {new!r}" for field, old, new in different]
        raise ConfigError(
            f"--workdir={folder} holds a run of another model or data than --config. Give the run's config, or leave "
            "--config out.\n" + "\n".join(lines[:8]) + (f"\n  and {len(lines) - 8} more" if len(lines) > 8 else "")
        )
    with config.unlocked():
        for field in _TAKEN:
            config[field] = given[field]
        config.data.dir, config.data.workers = given.data.dir, given.data.workers
    return config


def run_facts(folder: str | pathlib.Path) -> dict[str, Any]:
    """What training recorded of the run in `run.json`; nothing when the file is missing or damaged."""
    try:
        facts = json.loads((pathlib.Path(folder) / workdir.RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def table(result: Evaluated) -> str:
    """The figures and samples as text for a terminal."""
    figures, run = result.figures, result.run
    device = run.mesh.devices.flat[0].device_kind
    codes = [("this model", figures["bits_per_byte"])] + [
        (name, figures[f"{name}_bits_per_byte"]) for name in ("unigram", "gzip", "xz")
    ]
    of = " (moving average)" if figures["parameters"] == "ema" else ""
    lines = [
        f"{figures['split']} split, step {figures['step']}{of}: {figures['tokens']:,} tokens, "
        f"{figures['bytes']:,} bytes, {run.mesh.size} x {device}",
        f"  loss            {figures['loss']:9.4f} nats/token",
        f"  perplexity      {figures['perplexity']:9.3f}",
        f"  accuracy        {100 * figures['accuracy']:8.2f} %",
        f"  evaluation      {si(figures['tokens_per_second'], 'tokens/s')}",
        f"  decoding        {si(figures['decode_tokens_per_second'], 'tokens/s')}",
        "  bits per byte",
        *(f"    {name:<13} {value:9.4f}" for name, value in sorted(codes, key=lambda pair: pair[1])),
        *(f"  note: {note}" for note in result.notes),
    ]
    for number, (prompt, new) in enumerate(result.samples):
        if number == 0:
            lines += ["prompt:", _indented(prompt)]
        lines += [f"continuation{f' {number + 1}' if len(result.samples) > 1 else ''}:", _indented(new)]
    return "\n".join(lines)


def document_tokens(text: data.TextData, split: str, count: int, least_bytes: int = 200) -> np.ndarray:
    """The first `count` tokens of the split's first document of some length, [<= count] int32."""
    longest = b""
    for document in itertools.islice(text.raw_bytes(split), 50):
        if len(document) > len(longest):
            longest = document
        if len(longest) >= least_bytes:
            break
    return text.tokenizer.encode(longest[: 16 * count].decode("utf-8", errors="ignore"))[:count]


def numbers(flag: str, values: list[str] | None) -> tuple[int, ...] | None:
    """The whole numbers of a list flag.

    Raises:
        ConfigError: something else is in it.
    """
    try:
        return None if values is None else tuple(map(int, values))
    except ValueError:
        raise ConfigError(f"--{flag}={','.join(values)}: not a list of whole numbers. Write, say, 0,3.") from None


def _check(options: Options) -> None:
    """Everything about the options that needs neither data nor model, under the names of the flags."""
    try:
        make_sampler(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    for name in ("eval_batches", "max_new_tokens", "num_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise field_error(f"--{name}", value, "must be at least 1", "Give a positive number, or leave it out")


def _restore(folder: str, config: ml_collections.ConfigDict, run: Run, step: int | None) -> tuple[Any, int]:
    checkpoints = Checkpoints(folder, config, read_only=True)
    try:
        restored = checkpoints.restore(run.abstract_state, step=step)
    finally:
        checkpoints.close()
    if restored is None:
        raise ConfigError(
            f"--workdir={folder} has no checkpoint. Train until config.checkpoint_every_steps, or to the end."
        )
    return restored[0], restored[1]


def _data_notes(folder: str, config: ml_collections.ConfigDict, text: data.TextData) -> list[str]:
    """The text may have changed since training (another Python has another standard library)."""
    trained_on = run_facts(folder).get("data_fingerprint")
    if trained_on in (None, text.fingerprint):
        return []
    if config.data.tokenizer != "bytes":
        raise ConfigError(
            f"config.data.name = {config.data.name!r}: the text is not the one of the run (sha256 "
            f"{text.fingerprint[:12]}, the run has {trained_on[:12]}), and "
            f"a {config.data.tokenizer} vocabulary depends on it. "
            "Restore the run's text."
        )
    return [
        f"the text differs from the run's (sha256 {text.fingerprint[:12]}, trained on {trained_on[:12]}): "
        "this split may overlap what the model was trained on"
    ]


def _baselines(text: data.TextData, split: str) -> dict[str, float]:
    values = baselines.baselines(_limited(text.raw_bytes("train")), b"".join(_limited(text.raw_bytes(split))))
    return {f"{name}_bits_per_byte": values[name] for name in ("unigram", "gzip", "xz")}


def _limited(chunks):
    left = BASELINE_BYTES
    for chunk in chunks:
        yield bytes(chunk[:left])
        left -= len(chunk)
        if left <= 0:
            return


def _samples(run: Run, text: data.TextData, variables: Any, options: Options):
    """Returns (((prompt, continuation), ...), new tokens per second of a second, compiled call, notes)."""
    tokenizer, trained = text.tokenizer, run.config.seq_len
    if options.prompt is None:
        prompt = document_tokens(text, options.split, max(1, min(trained // 2, 200)))
    else:
        prompt = tokenizer.encode(options.prompt)
    # documents follow a separator in training, and an empty prompt needs a first token
    ids = np.concatenate([[tokenizer.eos_id], prompt]).astype(np.int32)
    wanted = options.max_new_tokens or max(1, min(trained - len(ids), 256))
    notes = []
    if len(ids) + wanted > trained:
        notes.append(f"prompt and continuation have {len(ids) + wanted} tokens, the model was trained on {trained}")

    def decode():
        result = generate(
            run.task.model,
            variables,
            np.repeat(ids[None], options.num_samples, axis=0),
            max_new_tokens=wanted,
            rng=jax.random.key(options.seed),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )
        return jax.device_get(result)

    with run.context():
        decode()  # compiles
        start = time.perf_counter()
        result = decode()
        seconds = time.perf_counter() - start
    shown = readable(tokenizer.decode(prompt))
    new = [readable(tokenizer.decode(row[:length])) for row, length in zip(result.tokens, result.lengths, strict=True)]
    return tuple((shown, one) for one in new), float(result.lengths.sum()) / seconds, notes


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines() or [""])


def _json_number(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The evaluation of a trained run: restores it, evaluates a split, and lets the kind of its data look closer."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from typing import Any, Protocol

import ml_collections

from attnlab import registry
from attnlab.data import Dataset
from attnlab.errors import ConfigError, field_error
from attnlab.inference.sampling import make_sampler
from attnlab.training import config as config_lib
from attnlab.training import validation, workdir
from attnlab.training.build import Run, build
from attnlab.training.checkpoint import Checkpoints

# What says which model and which data; the rest of a given config (batch size, mesh, ...) may differ from the run's.
IDENTITY = ("task", "seq_len", "model.", "data.")
_FREE = ("model.remat", "data.dir", "data.workers", "data.errors")
_TAKEN = ("batch_size", "eval_batches", "loss_chunk", "mesh", "sharding_rules")


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
class Restored:
    """A trained run, and its task's figures on the split.

    Attributes:
        folder: workdir.
        dataset: opened.
        variables: parameters (their moving average where the run keeps one) and collections.
        figures: `step`, `split`, the task's own, `<unit>_per_second`, and which `parameters` they are of.
        notes: sentences for whoever reads the figures.
    """

    folder: str
    run: Run
    dataset: Dataset
    variables: dict[str, Any]
    figures: dict[str, Any]
    notes: tuple[str, ...]


class Evaluation(Protocol):
    """What one kind of data adds; `registry.get("evaluation", dataset.evaluation)(restored, options)`."""

    figures: dict[str, Any]

    def table(self) -> str:
        """Returns the figures as text for a terminal."""

    def write_report(self) -> pathlib.Path:
        """Writes `report.html` into the run's folder and returns its path."""


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
    print(result.table(), flush=True)
    if options.report:
        path = result.write_report()
        print(f"report: {path} ({path.stat().st_size / 1e6:.2f} MB)", flush=True)
    print(json.dumps(figures), flush=True)
    return figures


def evaluate(folder: str, config: ml_collections.ConfigDict | None, options: Options) -> Evaluation:
    """Restores the run and computes its figures; see `main`."""
    _check(options)
    config = run_config(folder, config)
    dataset = registry.get("task", config.task).open_data(config)
    if options.split not in dataset.splits:
        raise field_error(
            "--split", options.split, f"{config.data.name} has no such split", f"Use one of {list(dataset.splits)}"
        )
    notes = _data_notes(folder, config, dataset)
    run = build(config, outputs=dataset.outputs)
    state, step = _restore(folder, config, run, options.step)
    with run.context():
        compiled = run.eval_step.lower(run.abstract_state, run.eval_batch_spec).compile()
    start = time.perf_counter()
    measured = validation.evaluate(run, state, dataset, options.split, options.eval_batches, step_fn=compiled)
    seconds = time.perf_counter() - start
    unit = run.task.unit
    figures = {"step": step, "split": options.split, **measured, f"{unit}_per_second": measured[unit] / seconds}
    figures["parameters"] = "trained" if state.ema is None else "ema"
    variables = {"params": state.params if state.ema is None else state.ema, **state.collections}
    del state
    restored = Restored(folder, run, dataset, variables, figures, tuple(notes))
    return registry.get("evaluation", dataset.evaluation)(restored, options)


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
            if field in config:
                config[field] = given[field]
        config.data.dir, config.data.workers = given.data.dir, given.data.workers
    return config


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


def _data_notes(folder: str, config: ml_collections.ConfigDict, dataset: Dataset) -> list[str]:
    """The data may have changed since training (another Python has another standard library)."""
    trained_on = workdir.facts(folder).get("data_fingerprint")
    if trained_on in (None, dataset.fingerprint):
        return []
    if config.data.get("tokenizer", "bytes") != "bytes":
        raise ConfigError(
            f"config.data.name = {config.data.name!r}: the text is not the one of the run (sha256 "
            f"{dataset.fingerprint[:12]}, the run has {trained_on[:12]}), and "
            f"a {config.data.tokenizer} vocabulary depends on it. "
            "Restore the run's text."
        )
    return [
        f"the data differ from the run's (sha256 {dataset.fingerprint[:12]}, trained on {trained_on[:12]}): "
        "this split may overlap what the model was trained on"
    ]


def _json_number(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

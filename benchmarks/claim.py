"""One arm of a claim: a preset with changes, trained from several seeds by the house's own step, and evaluated.

`benchmarks/claims.py` runs the claims of `benchmarks/claims_*.py`; `claim_records.py` keeps and tabulates what they gave.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import experiment
import jax
import ml_collections
import numpy as np

from attnlab import registry
from attnlab.data.recall import TASKS, defaults
from attnlab.errors import ConfigError, nearest
from attnlab.training import cli, validation
from attnlab.training.build import Run, build
from attnlab.training.config import flatten
from attnlab.training.mesh import global_batch
from attnlab.training.step import TrainState, init_state

CONFIGS = experiment.RESULTS.parents[1]  # the folder that `configs/FILE.py:PRESET` is in
Changes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        name: in the table.
        config: FILE:PRESET, as of `--config`.
        changes: {dotted field: value}, on top of the preset and of the claim's own changes.
        measure: `(trained) -> {name: number}`, further figures of a trained arm; None = the claim's.
    """

    name: str
    config: str
    changes: Changes = dataclasses.field(default_factory=dict)
    measure: Callable[[Trained], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a paper, and the arms that try it.

    Attributes:
        name: of `--claim` and of the files claim_NAME.*.
        title: of the report.
        question: what is claimed and what would confirm or refute it, with the source.
        arms: the first one is the reference unless `reference` names another.
        changes: of all arms.
        figure: of the evaluation, that is compared and drawn: "loss", "perplexity" (text), "accuracy" (images), ...
        shown: {figure: format} of further columns: figures of the evaluation, of `measure`, and "train_" + figure.
        reference: arm that the others are compared with.
        ratio: compare by the ratio of the figures, not by their difference.
        split: of the last evaluation.
        eval_batches: of the last evaluation; None = the whole split.
        train_batches: of training rows, as they are, that are evaluated at the end too; 0 = none, None = all.
        points: of the learning curve.
        course_batches: validation batches of each point.
        measure: see `Arm`.
        start: `(parameters) -> parameters`, of all arms before the first step.
        stages: ((share of the steps up to here, changes of the data's fields), ...) of training that begins with something easier.
    """

    name: str
    title: str
    question: str
    arms: tuple[Arm, ...]
    changes: Changes = dataclasses.field(default_factory=dict)
    figure: str = "loss"
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reference: str = ""
    ratio: bool = False
    split: str = "test"
    eval_batches: int | None = None
    train_batches: int | None = 0
    points: int = 10
    course_batches: int = 8
    measure: Callable[[Trained], dict[str, Any]] | None = None
    start: Callable[[Any], Any] | None = None
    stages: tuple[tuple[float, Changes], ...] = ()


@dataclasses.dataclass
class Trained:
    """A trained arm, for `measure`.

    Attributes:
        arm: the trainer; `arm.run` (task, config, mesh) and `arm.data`.
        state: after the last step.
        seed: of it.
    """

    arm: Trainer
    state: TrainState
    seed: int

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes: the parameters that are evaluated, and the collections."""
        params = self.state.params if self.state.ema is None else self.state.ema
        return {"params": params, **self.state.collections}

    def evaluate(
        self,
        split: str = "",
        batches: int | None = None,
        *,
        change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
        options: Changes | None = None,
    ) -> dict[str, float]:
        """Returns the task's figures on a split (the claim's unless named).

        Args:
            split: name.
            batches: how many, drawn over the split; None = the whole split.
            change: of every batch of numpy arrays before it is evaluated (images moved, tokens replaced).
            options: other fields of the config for the same parameters, {dotted field: value}.
        """
        run, data = self.arm.other(options) if options else (self.arm.run, self.arm.data)
        data = _Changed(data, change) if change else data
        return _figures(run, validation.evaluate(run, self.state, data, split or self.arm.claim.split, batches))


class Trainer:
    """An arm with its data and its compiled step, which serves all seeds.

    Attributes:
        steps: of training.
        given: the config's name and changes, by which records of the same arm are known.
    """

    def __init__(self, claim: Claim, arm: Arm, steps: int = 0):
        self.claim, self.arm = claim, arm
        self.config = configured(claim, arm, steps)
        self.steps: int = self.config.num_train_steps
        self.given = identity(claim, arm, self.steps)
        self.run, self.data = _opened(self.config)
        self._others: dict[str, tuple[Run, Any]] = {}
        run = self.run
        self._shardings = {name: spec.sharding for name, spec in run.batch_spec.items()}
        self._stages = [(share, _data(self._changed(changes))) for share, changes in claim.stages]
        start = claim.start or (lambda params: params)

        def init(rng: jax.Array) -> TrainState:
            state = init_state(run.task, run.tx, rng, ema=self.config.ema_decay > 0)
            return state.replace(params=start(state.params))

        with run.context():
            self._init = jax.jit(init)
            self._step = run.train_step.lower(run.abstract_state, run.batch_spec).compile()

    def other(self, options: Changes) -> tuple[Run, Any]:
        """The run and data of the same config with other fields; kept."""
        key = repr(sorted(options.items()))
        if key not in self._others:
            self._others[key] = _opened(self._changed(options))
        return self._others[key]

    def _changed(self, options: Changes) -> ml_collections.ConfigDict:
        config = self.config.copy_and_resolve_references()
        _apply(config, options, f"arm {self.arm.name}")
        return config

    def train(self, seed: int, tell: Callable[[int, str], None]) -> dict[str, Any]:
        """Trains from a seed (of initialisation and of the order of the data) and evaluates.

        Args:
            seed: number.
            tell: called with (step, words) at every point of the learning curve.

        Returns:
            The record: `figures` of the last evaluation, `course` of the figure on validation rows by step, `training`, the
            means of the step's metrics since the last point, and `seconds_per_step`, the median over the points; on a CPU these
            are seconds of processor time, which other programs on the machine do not lengthen.
        """
        clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
        claim, run, size = self.claim, self.run, self.config.batch_size
        options = {"batch_size": size, "seed": seed, "shuffle": True, "repeat": True}
        loaders = [(share * self.steps, data.loader("train", **options)) for share, data in (*self._stages, (1.0, self.data))]
        every = max(self.steps // claim.points, 1)
        course, training, paces = [], {}, []
        with run.context():
            state = self._init(jax.random.key(seed))
        for first in range(0, self.steps, every):
            loader = next(loader for end, loader in loaders if first < end)
            rows, pending, begin = itertools.islice(loader, min(every, self.steps - first)), [], clock()
            with run.context():
                for batch in rows:
                    state, metrics = self._step(state, global_batch(batch, self._shardings, size))
                    pending.append(metrics)
                jax.block_until_ready(state)
            paces.append((clock() - begin) / len(pending))
            training = {key: float(np.mean([one[key] for one in pending])) for key in pending[0]}
            if not math.isfinite(training["loss"]):
                raise SystemExit(f"{self.arm.name}, seed {seed}: the loss is {training['loss']} before step {first + len(pending)}")
            found = validation.evaluate(run, state, self.data, "validation", claim.course_batches)
            step = first + len(pending)
            course.append((step, _rounded(_figures(run, found)[claim.figure])))
            tell(step, f"{run.task.summary(found)}; training loss {training['loss']:.4f}")
        for _, loader in loaders:
            loader.close()
        trained = Trained(self, state, seed)
        figures = trained.evaluate(claim.split, claim.eval_batches)
        if claim.train_batches != 0:
            seen = trained.evaluate("train", claim.train_batches)
            figures |= {f"train_{name}": value for name, value in seen.items()}
        measure = self.arm.measure or claim.measure
        figures |= measure(trained) if measure else {}
        return {
            "arm": self.arm.name,
            "seed": seed,
            **self.given,
            "parameters": run.num_params(),
            "figures": jax.tree.map(_rounded, figures),
            "course": course,
            "training": jax.tree.map(_rounded, training),
            "seconds_per_step": _rounded(statistics.median(paces)),
        }


def configured(claim: Claim, arm: Arm, steps: int = 0) -> ml_collections.ConfigDict:
    """The arm's config.

    Raises:
        ConfigError: no such file, preset or field.
    """
    config = cli.load_config(str(CONFIGS / arm.config))
    _apply(config, {**claim.changes, **arm.changes}, f"claim {claim.name}, arm {arm.name}")
    if steps:  # a trial
        config.num_train_steps = steps
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 5)
    return config


def identity(claim: Claim, arm: Arm, steps: int) -> dict[str, Any]:
    """What says that a record is of this arm: its config, the changes to it (as text) and the steps."""
    changes = {field: str(value) for field, value in sorted({**claim.changes, **arm.changes}.items())}
    return {"config": arm.config, "changes": changes, "steps": steps}


def _apply(config: ml_collections.ConfigDict, changes: Changes, where: str) -> None:
    """Sets fields by dotted name; a recall set brings its options along."""
    name = changes.get("data.name", "")
    with config.unlocked():
        if name in TASKS and name not in config.data:
            config.data.update(ml_collections.ConfigDict(defaults(name)))
    known = dict(flatten(config))
    for field, value in changes.items():
        if field not in known:
            raise ConfigError(f"{where}: there is no field {field!r}; {nearest(field, known)}")
        config.update_from_flattened_dict({field: value})


def _data(config: ml_collections.ConfigDict) -> Any:
    return registry.get("task", config.task).open_data(config)


def _opened(config: ml_collections.ConfigDict) -> tuple[Run, Any]:
    data = _data(config)
    return build(config, outputs=data.outputs), data


def _figures(run: Run, found: dict[str, float]) -> dict[str, float]:
    """The task's figures; of text also the perplexity per token."""
    return found | ({"perplexity": math.exp(min(found["loss"], 700.0))} if run.task.unit == "tokens" else {})


def _rounded(value: Any) -> Any:
    return float(f"{float(value):.6g}") if isinstance(value, float | np.floating | jax.Array | np.ndarray) else value


class _Changed:
    """A data set whose batches go through a function."""

    def __init__(self, data: Any, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]):
        self._data, self._change = data, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def loader(self, *names: Any, **options: Any) -> Any:
        """The batches, changed."""
        return map(self._change, self._data.loader(*names, **options))

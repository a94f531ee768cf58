"""How eval.py looks at a recall task: accuracy by distance, at the trained length and at multiples of it."""

from __future__ import annotations

import dataclasses
import html
import itertools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.analysis import charts, series
from attnlab.analysis.page import CSS, SCRIPT
from attnlab.data.recall import RecallData
from attnlab.errors import ConfigError
from attnlab.methods.fields import layer_pattern
from attnlab.training import config as config_lib
from attnlab.training.build import Run
from attnlab.training.evaluate import Options, Restored

FACTORS = (1, 2, 4, 8)  # multiples of the trained length
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Recalled:
    """Answers at one length.

    Attributes:
        length: tokens of a row.
        distance: int64 [n], of every question.
        correct: bool [n].
    """

    length: int
    distance: np.ndarray
    correct: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right."""
        return float(self.correct.mean())

    def by_distance(self) -> list[tuple[int, int, float, int]]:
        """(first distance, last distance, accuracy, questions) of each power of two that has questions."""
        powers = np.frexp(self.distance)[1] - 1  # distance in 2^power .. 2^(power + 1) - 1
        return [
            (1 << power, (2 << power) - 1, float(self.correct[powers == power].mean()), int((powers == power).sum()))
            for power in np.unique(powers).tolist()
        ]


class Answers:
    """Asks the model of a run, by one compiled call per length, what it would answer.

    Args:
        run: its model takes tokens [B, T].
        outputs: ids of the data; those beyond, which fill the model's vocabulary up, are no answers.
    """

    def __init__(self, run: Run, outputs: int):
        def correct(variables, inputs, targets):
            logits, _ = run.task.model.apply(variables, inputs)
            return jnp.argmax(logits[..., :outputs], axis=-1) == targets

        self._run, self._correct = run, jax.jit(correct, out_shardings=NamedSharding(run.mesh, PartitionSpec()))

    def __call__(
        self, variables: Any, dataset: RecallData, split: str, length: int, *, batch_size: int, batches: int | None = None
    ) -> Recalled:
        """Evaluates on rows of `length` tokens: on `batches` batches, or the whole split."""
        loader = dataset.loader(split, batch_size=batch_size, seed=0, shuffle=False, repeat=False, seq_len=length)
        distances, corrects = [], []
        with self._run.context():
            for batch in itertools.islice(loader, batches):
                right = np.asarray(self._correct(variables, batch["inputs"], batch["targets"]))
                distances.append(batch["distance"][batch["mask"]])
                corrects.append(right[batch["mask"]])
        loader.close()
        return Recalled(length, np.concatenate(distances).astype(np.int64), np.concatenate(corrects))


class RecallEvaluation:
    """Accuracy over distance and length.

    Attributes:
        figures: those of the task, `lengths` (accuracy by length) and `distances` (by length: first, last, accuracy, questions).
        recalled: one per length at which the model could be run.
    """

    def __init__(self, restored: Restored, options: Options):
        self._restored, run = restored, restored.run
        self.recalled: list[Recalled] = []
        notes = list(restored.notes)
        answers = Answers(run, restored.dataset.outputs)
        for factor in FACTORS:
            length = factor * run.config.seq_len
            rows = run.mesh.size * max(run.config.batch_size // factor // run.mesh.size, 1)  # about as many tokens as in training
            batches = options.eval_batches and options.eval_batches * run.config.batch_size // rows
            try:
                found = answers(restored.variables, restored.dataset, options.split, length, batch_size=rows, batches=batches)
            except ConfigError as error:  # a table of positions that ends, a text that is too short
                notes.append(f"not evaluated at {length} tokens: {error}")
                break
            self.recalled.append(found)
        self.notes = tuple(notes)
        self.figures: dict[str, Any] = {
            **restored.figures,
            "lengths": {str(one.length): one.accuracy for one in self.recalled},
            "distances": {str(one.length): one.by_distance() for one in self.recalled},
        }

    def table(self) -> str:
        """A row per distance, a column per length."""
        figures, run, dataset = self.figures, self._restored.run, self._restored.dataset
        of = " (moving average)" if figures["parameters"] == "ema" else ""
        found = [{bucket[:2]: bucket for bucket in one.by_distance()} for one in self.recalled]
        buckets = sorted({key for one in found for key in one})
        lines = [
            f"{figures['split']} split, step {figures['step']}{of}: {dataset.name}, {figures['tokens']:,} questions, "
            f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
            f"  loss            {figures['loss']:9.4f} nats/question",
            f"  accuracy        {100 * figures['accuracy']:8.2f} %",
            "",
            "  accuracy, %     " + "".join(f"{f'T = {one.length}':>12}" for one in self.recalled),
            "  all questions   " + "".join(f"{100 * one.accuracy:12.1f}" for one in self.recalled),
        ]
        for first, last in buckets:
            cells = [f"{100 * one[first, last][2]:12.1f}" if (first, last) in one else " " * 12 for one in found]
            lines.append(f"  {f'{first} to {last} back':<16}" + "".join(cells))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def write_report(self) -> pathlib.Path:
        """Writes one page that loads nothing: accuracy over distance, over length, and the course of training."""
        restored, config = self._restored, self._restored.run.config
        name, escape = pathlib.Path(restored.folder).resolve().name, html.escape
        facts = "".join(
            f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>"
            for key, value in (
                ("model", f"{', '.join(layer_pattern(config.model))}; {config.model.num_layers} layers, width {config.model.dim}"),
                ("parameters", f"{restored.run.num_params():,}"),
                ("trained", f"{self.figures['step']:,} steps of {config.batch_size} x {config.seq_len} tokens"),
                ("split", f"{self.figures['split']}, {self.figures['tokens']:,} questions"),
                ("accuracy", f"{self.figures['accuracy']:.4f}"),
            )
        )
        body = [
            f'<header><h1>{escape(name)}</h1><p class="lead">{escape(restored.dataset.describe())}</p>',
            f'<dl class="facts">{facts}</dl></header>',
            *(f'<p class="note">{escape(note)}</p>' for note in self.notes),
            '<section><h2>Accuracy over distance</h2><p class="note">Tokens between where an answer stands and where it is asked '
            f"for, in powers of two; one line per length of the rows. The model was trained on {config.seq_len} tokens.</p>"
            f"<figure>{self._over_distance()}</figure></section>",
            f"<section><h2>Accuracy over length</h2><figure>{self._over_length()}</figure></section>",
            self._course(),
            f"<section><h2>Config</h2><details><summary>config.json</summary><pre>{escape(config_lib.to_json(config))}</pre>"
            "</details></section>",
        ]
        path = pathlib.Path(restored.folder) / "report.html"
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{_POLICY}"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(name)} · attnlab'
            f"</title><style>{CSS}</style></head><body><main>{''.join(body)}</main>"
            f'<div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n',
            encoding="utf-8",
        )
        os.replace(temporary, path)
        return path

    def _over_distance(self) -> str:
        lines = []
        for colour, one in enumerate(self.recalled):
            middles = [(np.sqrt(first * last), accuracy) for first, last, accuracy, _ in one.by_distance()]
            lines.append(charts.Line(f"T = {one.length}:", *map(np.array, zip(*middles, strict=True)), colour, points=True))
        return charts.line_chart(
            [line._replace(steps=np.log2(line.steps)) for line in lines], x_label="log2 of the distance, tokens",
            y_label="accuracy", title="Accuracy over the distance between fact and question", from_zero=True,
        )  # fmt: skip

    def _over_length(self) -> str:
        steps = np.log2([one.length for one in self.recalled])
        line = charts.Line("all questions", steps, np.array([one.accuracy for one in self.recalled]), points=True)
        trained = [("trained length", self.recalled[0].accuracy)] if self.recalled else []
        return charts.line_chart(
            [line], x_label="log2 of the length, tokens", y_label="accuracy", title="Accuracy over the length of the rows",
            references=trained, from_zero=True,
        )  # fmt: skip

    def _course(self) -> str:
        metrics = series.read_metrics(pathlib.Path(self._restored.folder) / "metrics.jsonl")
        lines = [
            charts.Line(name, *series.thin(*metrics[key]), colour=colour, points=colour == 1)
            for colour, (key, name) in enumerate((("accuracy", "train"), ("eval/accuracy", "validation")))
            if key in metrics
        ]
        chart = charts.line_chart(lines, x_label="step", y_label="accuracy", title="Accuracy over training steps", from_zero=True)
        return f"<section><h2>Training</h2><figure>{chart}</figure></section>"

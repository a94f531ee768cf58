"""The report page of an image classifier: figures, curves, confusion matrix, mistakes, attention and routes over the images,
gates and loads of heads.

One self-contained HTML page in the style of `analysis.report`.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.analysis import images, selection, series
from attnlab.analysis.charts import Line, escape, line_chart, number
from attnlab.analysis.page import CSS

MAX_CLASSES = 40  # of the confusion matrix; of more classes only the pairs that are confused most are listed
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CSS = """
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(118px,1fr));gap:16px 14px;margin:16px 0}
.pictures img,.over img{width:100%;image-rendering:pixelated;display:block}
.pictures figcaption{font-size:12.5px;color:var(--soft);margin-top:4px;line-height:1.35}
.over{position:relative}.over img+img{position:absolute;inset:0;height:100%;opacity:.62}
"""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A misclassified image: uint8 [H, W, C], names of its class and of the guess, the guess' probability, the image's name."""

    image: np.ndarray
    label: str
    guess: str
    probability: float
    name: str


@dataclasses.dataclass(frozen=True)
class MapView:
    """What one layer sowed about one image: `image` uint8 [H, W, C], `values` >= 0 [y, x] over it, what the layer is called."""

    image: np.ndarray
    values: np.ndarray
    layer: str


@dataclasses.dataclass(frozen=True)
class ImageReport:
    """What the page shows; empty parts are left out.

    title, summary: the run's name and one line about it; facts: (name, value) pairs of the header; figures: (name, value) pairs
    of the evaluation; class_names: C names; confusion: counts [C, C], rows = true classes; metrics: of `series.read_metrics`;
    mistakes, attention, routes: pictures; gates: weights in 0..1 of every feature gate by name; loads: of the heads of every
    layer that chooses among them, over what `loads_of` says; config: JSON; notes: caveats.
    """

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]
    figures: Sequence[tuple[str, str]]
    class_names: Sequence[str]
    confusion: np.ndarray
    metrics: Mapping[str, series.Series]
    mistakes: Sequence[Mistake] = ()
    attention: Sequence[MapView] = ()
    routes: Sequence[MapView] = ()
    gates: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    loads: Sequence[selection.HeadLoads] = ()
    loads_of: str = ""
    config: str = ""
    notes: Sequence[str] = ()


def write(report: ImageReport, path: str | os.PathLike) -> Path:
    """Writes the page atomically; returns its path."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(report), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(report: ImageReport) -> str:
    """Returns the page as one HTML document."""
    body = [
        f'<header><h1>{escape(report.title)}</h1><p class="lead">{escape(report.summary)}</p>{_pairs(report.facts)}</header>',
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        _section("figures", "Figures", "", _pairs(report.figures)),
        _curves(report.metrics),
        _confusion(report.confusion, report.class_names),
        _mistakes(report.mistakes),
        _maps(
            "attention", "Attention over the images", report.attention,
            "How much the positions of an image are attended to, averaged over queries and heads (of models with a class token: "
            "by that token alone). Each map has its own scale. Maps show where a layer looks, not what changed the output.",
        ),
        _maps("routes", "Routed regions", report.routes, "How often each region is chosen by the regions of the image."),
        selection.gates_section(report.gates),
        selection.loads_section(report.loads, report.loads_of, report.metrics),
        f'<section id="config"><h2>Config</h2><details><summary>config.json</summary><pre>{escape(report.config)}</pre></details>'
        "</section>" if report.config else "",
    ]  # fmt: skip
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)} · attnlab</title><style>{CSS}{_CSS}</style></head><body><main>"
        + "\n".join(filter(None, body))
        + f"<footer>attnlab report, written {written}. The page is self-contained.</footer></main></body></html>\n"
    )


def received(weights: np.ndarray, image_size: tuple[int, int]) -> np.ndarray | None:
    """Attention weights [N, T, T] of one image as a map [y, x] of what each position receives; sums to about one.

    T = y x positions in the ratio of the image, or one more: a class token first, whose own row is then taken. None where T
    is neither.
    """
    length = weights.shape[-1]
    for extra in (0, 1):
        grid = grid_of(length - extra, image_size)
        if grid is not None:
            rows = weights[:, 0, 1:] if extra else weights.mean(1)
            return rows.mean(0).reshape(grid)
    return None


def grid_of(count: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Returns (y, x) with y x = count in the ratio of the image, or None."""
    height, width = image_size
    rows = round((count * height / width) ** 0.5) if count > 0 else 0
    fits = rows > 0 and count % rows == 0 and abs(count / rows / rows - width / height) < 0.5 * width / height
    return (rows, count // rows) if fits else None


def _section(key: str, heading: str, note: str, content: str) -> str:
    if not content:
        return ""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section id="{key}"><h2>{escape(heading)}</h2>{said}{content}</section>'


def _pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def _curves(metrics: Mapping[str, series.Series]) -> str:
    charts = []
    for key, heading in (("loss", "Loss, nats per image"), ("accuracy", "Accuracy"), ("learning_rate", "Learning rate")):
        lines = []
        if key in metrics:
            steps, values = metrics[key]
            lines.append(Line("train", *series.thin(steps, series.smooth(values) if len(steps) > 8 else values)))
        if f"eval/{key}" in metrics:
            lines.append(Line("validation", *series.thin(*metrics[f"eval/{key}"]), colour=1, points=True))
        if lines:
            chart = line_chart(lines, x_label="step", y_label=heading, title=f"{heading} over steps", width=440, height=260,
                               labels=96)  # fmt: skip
            charts.append(f"<figure><h3>{escape(heading)}</h3>{chart}</figure>")
    note = "Of the training batches as they are augmented and mixed (moving average), and of the validation split as it is."
    return _section("curves", "Training", note, f'<div class="grid3">{"".join(charts)}</div>' if charts else "")


def _confusion(confusion: np.ndarray, names: Sequence[str]) -> str:
    totals = np.maximum(confusion.sum(1), 1)
    share = confusion / totals[:, None]
    if len(names) > MAX_CLASSES:
        wrong = np.where(np.eye(len(names), dtype=bool), 0, confusion)
        order = np.argsort(wrong, axis=None)[::-1][:MAX_CLASSES]
        pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place]]
        rows = "".join(
            f'<tr><td>{escape(names[i])}</td><td>{escape(names[j])}</td><td class="n">{confusion[i, j]}</td>'
            f'<td class="n">{100 * share[i, j]:.1f} %</td></tr>'
            for i, j in pairs
        )
        head = '<tr><th>class</th><th>taken for</th><th class="n">images</th><th class="n">of the class</th></tr>'
        table = f'<table class="sortable"><thead>{head}</thead><tbody>{rows}</tbody></table>'
        return _section("confusion", "Confused classes", "The pairs that are confused most.", f'<div class="scroll">{table}</div>')
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for i, name in enumerate(names):
        cells = []
        for j, other in enumerate(names):
            colour = "--c0" if i == j else "--c1"
            depth = 75 * share[i, j] ** 0.5
            said = f"{confusion[i, j]} of {totals[i]} {name} taken for {other}"
            cells.append(
                f'<td title="{escape(said)}" style="background:color-mix(in srgb,var({colour}) {depth:.0f}%,transparent)">'
                f"{confusion[i, j] or ''}</td>"
            )
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}<td>{100 * share[i, i]:.1f} %</td></tr>")
    table = f'<table class="cells"><tr><th></th>{head}<th>accuracy</th></tr>{"".join(lines)}</table>'
    note = "Rows are true classes, columns are guesses."
    return _section("confusion", "Confusion matrix", note, f'<div class="scroll">{table}</div>')


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(m.name)}" src="{images.data_uri(m.image)}"><figcaption>{escape(m.label)}, taken for '
        f"<b>{escape(m.guess)}</b> at {100 * m.probability:.0f} %<br>{escape(m.name)}</figcaption></figure>"
        for m in mistakes
    )
    note = "The mistakes that the model is surest of."
    return _section("mistakes", "Misclassified images", note, f'<div class="pictures">{figures}</div>' if figures else "")


def _maps(key: str, heading: str, views: Sequence[MapView], note: str) -> str:
    parts = []
    for view in views:
        peak = float(view.values.max())
        ramp = images.data_uri(images.quantise(view.values, max(peak, 1e-12)))
        parts.append(
            f'<figure><div class="over"><img alt="image" src="{images.data_uri(view.image)}"><img alt="map" src="{ramp}"></div>'
            f"<figcaption>{escape(view.layer)}<br>at most {number(peak)}</figcaption></figure>"
        )
    return _section(key, heading, note, f'<div class="pictures">{"".join(parts)}</div>' if parts else "")

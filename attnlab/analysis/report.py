"""The report: everything worth seeing of one run on one HTML page that needs nothing but itself.

The page loads nothing (its content security policy forbids it), holds the curves as SVG and the attention maps as small
PNGs, and follows the reader's light or dark theme. Build a `Report` from arrays and call `write`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.analysis import images, selection, series
from attnlab.analysis.attention import STATISTICS
from attnlab.analysis.charts import Line, dot_chart, escape, line_chart, number, profile_map, token_heat_map
from attnlab.analysis.page import CSS, SCRIPT

MAX_ROWS = 96  # heads in the distance profile
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_BASELINES = (
    ("unigram", "unigram", "each byte by its frequency"),
    ("gzip", "gzip -9", "DEFLATE, 32 KiB window"),
    ("xz", "xz -9e", "LZMA over the whole split"),
)
_HEAD_CHARTS = (
    ("entropy", "Entropy", "nats", "nats"),
    ("distance", "Mean distance", "tokens back", "tokens"),
    ("effective_keys", "Effective number of keys", "keys", "keys"),
    ("previous_mass", "Share on the previous token", "share", ""),
    ("first_mass", "Share on the first token", "share", ""),
    ("row_mass", "Row mass", "sum of a row", ""),
)


@dataclasses.dataclass
class HeadViews:
    """Attention of one short text.

    labels: T token texts; maps: [L', N', T, T] of the chosen `layers` and `heads`; statistics: name of
    `attention.STATISTICS` -> [L, N] of all layers that have maps (numbers in `all_layers`); mixers: L names; profile:
    [L, N, K] shares of the mass by distance; edges: K distances where a bucket begins.
    """

    labels: Sequence[str]
    maps: np.ndarray
    layers: Sequence[int]
    heads: Sequence[int]
    statistics: Mapping[str, np.ndarray]
    all_layers: Sequence[int]
    mixers: Sequence[str]
    profile: np.ndarray
    edges: Sequence[int]


@dataclasses.dataclass
class Report:
    """What the page shows; empty parts are left out or said to be missing.

    title, summary: the run's name and one line about it; facts: (name, value) pairs of the header; figures: the
    evaluation's JSON object; metrics: of `series.read_metrics`; bits_per_nat: bits per byte for one nat per token;
    loads: of the heads of every layer that chooses among them, over what `loads_of` says; samples: (prompt, continuation)
    texts; decoding: how they were drawn; config: nested fields; notes: caveats.
    """

    title: str
    summary: str
    facts: Sequence[tuple[str, str]] = ()
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, series.Series] = dataclasses.field(default_factory=dict)
    bits_per_nat: float = float("nan")
    attention: HeadViews | None = None
    loads: Sequence[selection.HeadLoads] = ()
    loads_of: str = ""
    samples: Sequence[tuple[str, str]] = ()
    decoding: str = ""
    config: str = ""
    notes: Sequence[str] = ()


def write(report: Report, path: str | os.PathLike) -> Path:
    """Writes the page atomically; returns its path."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(report), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(report: Report) -> str:
    """Returns the page as one HTML document."""
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.facts)
    body = [
        f'<header><h1>{escape(report.title)}</h1><p class="lead">{escape(report.summary)}</p>',
        f'<dl class="facts">{facts}</dl></header>' if facts else "</header>",
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        _figures(report.figures),
        _curves(report),
        _samples(report),
        _attention(report.attention) if report.attention is not None else "",
        selection.loads_section(report.loads, report.loads_of, report.metrics),
        _config(report.config),
    ]
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)} · attnlab</title><style>{CSS}</style></head><body><main>"
        + "\n".join(filter(None, body))
        + f"<footer>attnlab report, written {written}. The page is self-contained.</footer></main>"
        f'<div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def _figures(figures: Mapping[str, Any]) -> str:
    own = figures.get("bits_per_byte")
    if own is None:
        return ""
    rows = [("own", "this model", f"step {figures.get('step', '?'):,}" if "step" in figures else "", own)]
    for key, name, what in _BASELINES:
        if figures.get(f"{key}_bits_per_byte") is not None:
            rows.append(("", name, what, figures[f"{key}_bits_per_byte"]))
    largest = max(row[3] for row in rows)
    lines = []
    for kind, name, what, value in sorted(rows, key=lambda row: row[3]):
        share = 100 * value / largest if largest else 0
        lines.append(
            f'<tr class="{kind}"><td>{escape(name)} <span class="note">{escape(what)}</span></td>'
            f'<td class="n">{value:.3f}</td><td class="bar"><i style="width:{share:.1f}%"></i></td></tr>'
        )
    split = escape(figures.get("split", "test"))
    rest = [
        ("loss", "loss, nats per token", "{:.4f}"),
        ("perplexity", "perplexity per token", "{:.3f}"),
        ("accuracy", "next-token accuracy", "{:.1%}"),
        ("tokens", "tokens evaluated", "{:,}"),
        ("bytes", "bytes evaluated", "{:,}"),
        ("tokens_per_second", "evaluation, tokens/s", "{:,.0f}"),
        ("decode_tokens_per_second", "decoding, tokens/s", "{:,.0f}"),
    ]
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(form.format(figures[key]))}</dd></div>"
        for key, name, form in rest
        if figures.get(key) is not None
    )
    return (
        f'<section id="figures"><h2>Compression of the {split} split</h2>'
        '<p class="note">Bits per byte of the same text, less is better.</p>'
        '<div class="scroll"><table><thead><tr><th>code</th><th class="n">bits/byte</th><th></th></tr></thead><tbody>'
        f'{"".join(lines)}</tbody></table></div><dl class="facts">{facts}</dl></section>'
    )


def _curves(report: Report) -> str:
    metrics = report.metrics
    if not metrics:
        return '<section id="curves"><h2>Training</h2><p class="note">metrics.jsonl is missing or empty.</p></section>'
    lines = []
    in_bits = np.isfinite(report.bits_per_nat)
    factor = report.bits_per_nat if in_bits else 1.0
    if "loss" in metrics:
        steps, values = metrics["loss"]
        if len(steps) > 8:
            lines.append(Line("train (each)", *series.thin(steps, values * factor), faint=True))
            lines.append(Line("train", *series.thin(steps, series.smooth(values) * factor)))
        else:
            lines.append(Line("train", *series.thin(steps, values * factor)))
    key, scale = ("eval/bits_per_byte", 1.0) if in_bits else ("eval/loss", 1.0)
    if key in metrics:
        steps, values = series.thin(*metrics[key])
        lines.append(Line("validation", steps, values * scale, colour=1, points=True))
    references = [
        (name, report.figures[f"{key}_bits_per_byte"])
        for key, name, _ in _BASELINES
        if in_bits and report.figures.get(f"{key}_bits_per_byte") is not None
    ]
    unit = "bits per byte" if in_bits else "nats per token"
    common = {"x_label": "step", "y_label": unit, "title": f"Loss over steps in {unit}", "references": references}
    bad = sum(int((~np.isfinite(values)).sum()) for name, (_, values) in metrics.items() if "loss" in name)
    note = "Thin: every logged step; thick: centred moving average. "
    if references:
        note += f"Dashed: other codes on the {report.figures.get('split', 'test')} split. "
    if bad:
        note += f"{bad} logged losses are not finite and not drawn."
    parts = [
        '<section id="curves"><h2>Training</h2>',
        f'<p class="note">{escape(note)}</p>',
        f'<figure><div class="wide">{line_chart(lines, **common)}</div>'
        f'<div class="narrow">{line_chart(lines, **common, width=440, height=330, labels=108)}</div></figure>',
        '<div class="grid3">',
    ]
    for key, heading, label, from_zero in (
        ("tokens_per_second", "Throughput", "tokens/s", True),
        ("learning_rate", "Learning rate", "rate", True),
        ("grad_norm", "Gradient norm, before clipping", "norm", True),
    ):
        if key in metrics:
            chart = line_chart(
                [Line(heading, *series.thin(*metrics[key]), colour=2)], x_label="step", y_label=label,
                title=f"{heading} over steps", width=340, height=210, labels=0, from_zero=from_zero,
            )  # fmt: skip
            parts.append(f"<figure><h3>{escape(heading)}</h3>{chart}</figure>")
    return "".join(parts) + "</div></section>"


def _samples(report: Report) -> str:
    if not report.samples:
        return ""
    parts = [
        '<section id="sample"><h2>Continuation</h2>',
        f'<p class="note">The prompt is grey, the model\'s continuation is dark. {escape(report.decoding)}</p>',
    ]
    for prompt, text in report.samples:
        parts.append(f'<pre><span class="prompt">{escape(prompt)}</span><span class="new">{escape(text)}</span></pre>')
    return "".join(parts) + "</section>"


def _attention(views: HeadViews) -> str:
    length = len(views.labels)
    visible = np.tril(np.ones((length, length), bool))
    maximum = float(max(views.maps.max(), 1e-6))
    names = dict(zip(views.all_layers, views.mixers, strict=True))
    several = len(set(views.mixers)) > 1
    slots = {layer: i for i, layer in enumerate(views.all_layers)}
    thumbs = []
    for i, layer in enumerate(views.layers):
        for j, head in enumerate(views.heads):
            nats = views.statistics["entropy"][slots[layer], head]
            mixer = f" · {names[layer]}" if several else ""
            title = f"Layer {layer}, head {head}{mixer}: entropy {number(nats)} nats"
            uri = images.data_uri(images.quantise(views.maps[i, j], maximum, visible))
            thumbs.append(
                f'<button class="thumb" type="button" aria-pressed="false" data-title="{escape(title)}">'
                f'<div class="hatch"><img class="map" alt="{escape(title)}" src="{uri}"></div>'
                f"<span>L{layer} H{head}{escape(mixer)}</span></button>"
            )
            if i == j == 0:
                first = (uri, title)
    ramp = images.data_uri(images.quantise(np.linspace(0, 1, 190)[None] ** 2, 1.0))
    data = json.dumps({"tokens": list(views.labels), "maximum": maximum}).replace("<", "\\u003c")
    text = "".join(f"<b>{escape(label)}</b>" + ("<br>" if label == "⏎" else "") for label in views.labels)
    heads = views.statistics["entropy"].shape[1]
    shown = f"{len(views.layers)} of {len(views.all_layers)} layers, {len(views.heads)} of {heads} heads"
    return (
        '<section id="attention"><h2>Attention maps</h2>'
        f'<p class="note">{escape(shown)}, on the first {length} tokens of a document of the split. Rows are queries, '
        "columns are keys; one colour scale for all. Maps show where a head looks, not what changed the output.</p>"
        f'<div class="thumbs" style="--heads:{len(views.heads)}">{"".join(thumbs)}</div>'
        f'<div class="legend"><span>0</span><img class="map" alt="colour scale" src="{ramp}"><span>{number(maximum)}'
        '</span><span>attention weight, square-root scale</span><span class="swatch"></span>'
        "<span>masked (future)</span></div>"
        f'<h3 id="detail-title">{escape(first[1])}</h3>'
        '<p class="note">Choose a map above; point at a cell for its value, at a token to see what it attends to.</p>'
        f'<div class="text mono">{text}</div>'
        f'<div class="scroll">{token_heat_map(first[0], [_short(t) for t in views.labels], first[1])}</div>'
        f'<script type="application/json" id="maps-data">{data}</script></section>' + _heads(views, several)
    )


def _short(label: str) -> str:
    return label if len(label) <= 8 else label[:7] + "…"


def _heads(views: HeadViews, several: bool) -> str:
    layers = [f"L{layer}" for layer in views.all_layers]
    count, heads = views.statistics["entropy"].shape
    charts = []
    for key, heading, label, unit in _HEAD_CHARTS:
        values = np.asarray(views.statistics[key])
        if key == "row_mass" and np.allclose(values, 1.0, atol=1e-3):
            continue  # softmax: always one
        chart = dot_chart(values, layers=layers, heads=range(heads), title=heading, y_label=label, unit=unit)
        charts.append(f"<figure><h3>{escape(heading)}</h3>{chart}</figure>")
    rows = [(i, head) for i in range(count) for head in range(heads)]
    kept = rows[:: -(-len(rows) // MAX_ROWS)]
    ends = [*(edge - 1 for edge in views.edges[1:]), len(views.labels) - 1]
    buckets = [str(a) if a == b else f"{a}\N{EN DASH}{b}" for a, b in zip(views.edges, ends, strict=True)]
    profile = profile_map(
        np.array([views.profile[i, head] for i, head in kept]),
        [f"{layers[i]} H{head}" for i, head in kept],
        buckets,
        "Share of each head's mass by distance",
        "distance from query to key (tokens)",
    )
    header = "".join(f'<th class="n">{escape(name.replace("_", " "))}</th>' for name in STATISTICS)
    table = "".join(
        f'<tr><td data-v="{i * heads + head}">{layers[i]} H{head}</td>'
        + (f"<td>{escape(views.mixers[i])}</td>" if several else "")
        + "".join(f'<td class="n">{number(float(views.statistics[name][i, head]))}</td>' for name in STATISTICS)
        + "</tr>"
        for i, head in rows
    )
    normalised = "Rows are normalised to sum to one, except for the row mass itself. " if len(charts) == 6 else ""
    return (
        f'<section id="heads"><h2>Heads</h2><p class="note">Means over {len(views.labels)} queries, one dot per head, '
        f"the line joins the layers' means. {normalised}</p>"
        f'<div class="grid3">{"".join(charts)}</div>'
        '<h3 style="margin-top:34px">Where the mass goes, by distance</h3>'
        '<p class="note">Stronger colour is more; point at a field for its share.</p>'
        f'<div class="scroll">{profile}</div>'
        '<details><summary>All heads as a table (click a heading to sort)</summary><div class="scroll">'
        f'<table class="sortable"><thead><tr><th>head</th>{"<th>mixer</th>" if several else ""}{header}</tr></thead>'
        f"<tbody>{table}</tbody></table></div></details></section>"
    )


def _config(config: str) -> str:
    if not config:
        return ""
    folded = f"<details><summary>config.json</summary><pre>{escape(config)}</pre></details>"
    return f'<section id="config"><h2>Config</h2>{folded}</section>'

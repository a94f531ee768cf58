"""Charts as inline SVG strings: lines over steps, dots per head, a heat map with text on its axes.

Colours and fonts come from the page's style sheet by class (`c0`..`c3`, `grid`, `axis`, `reference`), so that one
drawing serves the light and the dark theme. Every text is escaped here; callers pass plain strings.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TEXT = 12  # font size in drawing units


class Line(NamedTuple):
    """One curve. `colour` 0..3 picks the class; `faint` draws it thin behind the others and without a label."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: int = 0
    faint: bool = False
    points: bool = False


class Box(NamedTuple):
    """The plotting area: pixel edges and data limits."""

    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data to drawing units."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def escape(text: object) -> str:
    """Escapes text for HTML content and quoted attributes."""
    return html.escape(str(text), quote=True)


def number(value: float, digits: int = 3) -> str:
    """A short readable number: 12,345 / 1.23 / 0.000300 -> 3.0e-4 / 12.3k only on axes (see `ticks`)."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        text = f"{value:.{digits}g}" if abs(value) < 100 else f"{value:,.0f}"
        return text
    if abs(value) < 1e7:
        return f"{value:,.0f}" if abs(value) >= 1 else f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.2e}".replace("e+0", "e").replace("e+", "e")


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten) within [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """Axis numbers: 20k, 1.5M, 0.25, 3e-4."""
    value = float(f"{value:.6g}")
    if value == 0:
        return "0"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    title: str,
    references: Sequence[tuple[str, float]] = (),
    width: int = 1000,
    height: int = 380,
    labels: int = 120,
    from_zero: bool = False,
) -> str:
    """Curves over steps with their last values written at the right edge.

    Args:
        lines: the curves; non-finite values must be left out already.
        x_label: with unit; y_label: with unit; title: read aloud by screen readers.
        references: (name, value) of dashed horizontal lines.
        width: drawing units, as height.
        labels: room for the labels at the right, 0 = none.
        from_zero: the y axis starts at 0.
    """
    lines = [line for line in lines if len(line.steps)]
    if not lines:
        return f'<p class="note">{escape(title)}: nothing logged.</p>'
    values = np.concatenate([line.values for line in lines] + [[value for _, value in references]])
    x = _limits(min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines))
    y = _padded(0.0 if from_zero else values.min(), values.max())
    box = Box(56, width - (labels or 12), 14, height - 44, x, y)
    parts = [_frame(box, x_label, y_label, _x_ticks(box), [(v, tick_label(v)) for v in ticks(*y, 5)])]
    written = []
    for name, value in references:
        _, level = box.at(x[0], value)
        parts.append(f'<path class="reference" d="M{box.left:g} {level:.1f}H{box.right:g}"/>')
        written.append((level, f"{name} {number(value)}", "muted"))
    hover = []
    for line in lines:
        points = [box.at(a, b) for a, b in zip(line.steps, line.values, strict=True)]
        kind = f"line c{line.colour}" + (" faint" if line.faint else "")
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if line.points and len(points) <= 60:
            parts += [f'<circle class="mark c{line.colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in points]
        if not line.faint:
            written.append((points[-1][1], f"{line.name} {number(line.values[-1])}", f"c{line.colour}"))
            rounded = [[round(float(a), 1), float(f"{b:.4g}")] for a, b in zip(line.steps, line.values, strict=True)]
            hover.append({"name": line.name, "points": rounded})
    if labels:
        parts += _edge_labels(written, box)
    meta = {"box": [box.left, box.right, box.top, box.bottom], "x": x, "lines": hover}
    parts.append(f'<path class="cursor" d="M0 {box.top:g}V{box.bottom:g}" visibility="hidden"/>')
    return _svg(width, height, title, parts, "chart lines", f' data-lines="{escape(json.dumps(meta))}"')


def dot_chart(
    values: np.ndarray,
    *,
    layers: Sequence[str],
    heads: Sequence[int],
    title: str,
    y_label: str,
    unit: str = "",
    upper: float | None = None,
    width: int = 340,
    height: int = 220,
) -> str:
    """One dot per head over the layers, and a line through the layers' means.

    Args:
        values: [L, N]; layers: L names; heads: N numbers.
        title: what the values are; y_label: with unit; unit: for the hover text.
        upper: the y axis goes at least to here and a dashed line marks it (a bound), when given.
        width: drawing units, as height.
    """
    count, per_layer = values.shape
    finite = values[np.isfinite(values)]
    if not finite.size:
        return f'<p class="note">{escape(title)}: no values.</p>'
    y = _padded(0.0, max(finite.max(), 0.0 if upper is None else upper, 1e-9))
    box = Box(52, width - 14, 12, height - 42, (-0.5, count - 0.5), y)
    every = math.ceil(count / 7)
    marks = [(i, layers[i]) for i in range(0, count, every)]
    parts = [_frame(box, "layer", y_label, marks, [(v, tick_label(v)) for v in ticks(*y, 4)])]
    if upper is not None:
        parts.append(f'<path class="reference" d="M{box.left:g} {box.at(0, upper)[1]:.1f}H{box.right:g}"/>')
    means = [box.at(i, row[np.isfinite(row)].mean()) for i, row in enumerate(values) if np.isfinite(row).any()]
    parts.append('<polyline class="line c1" points="{}"/>'.format(" ".join(f"{a:.1f},{b:.1f}" for a, b in means)))
    spread = min(0.7, 0.08 * per_layer)
    for layer in range(count):
        for slot, head in enumerate(heads):
            value = values[layer, slot]
            if math.isfinite(value):
                shift = spread * (slot / max(per_layer - 1, 1) - 0.5)
                a, b = box.at(layer + shift, value)
                tip = escape(f"{layers[layer]} · head {head}: {number(value)} {unit}".strip())
                parts.append(f'<circle class="dot c0" cx="{a:.1f}" cy="{b:.1f}" r="3.4" data-tip="{tip}"/>')
    return _svg(width, height, title, parts, "chart")


def histogram(
    counts: np.ndarray, *, title: str, x_label: str = "", y_label: str = "", width: int = 150, height: int = 26
) -> str:
    """Bars of equal bins over 0..1; bare, for the cell of a table, unless it has an `x_label`.

    Args:
        counts: [K], not negative.
        title: read aloud by screen readers; x_label: with unit; y_label: what is counted.
        width: drawing units, as height.
    """
    top = max(float(counts.max()), 1.0)
    edges = np.linspace(0.0, 1.0, len(counts) + 1)
    if x_label:
        box = Box(52, width - 14, 12, height - 42, (0.0, 1.0), (0.0, 1.05 * top))
        marks = [(value, tick_label(value)) for value in ticks(0.0, 1.0, 5)]
        levels = [(value, tick_label(value)) for value in ticks(0.0, top, 4) if value == int(value)]
        parts = [_frame(box, x_label, y_label, marks, levels)]
    else:
        box = Box(0, width, 1, height - 1, (0.0, 1.0), (0.0, top))
        parts = [f'<path class="base" d="M{box.left:g} {box.bottom:g}H{box.right:g}"/>']
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        if count:
            left, up = box.at(low, float(count))
            right, _ = box.at(high, 0.0)
            parts.append(
                f'<rect class="share" x="{left + 0.5:.1f}" y="{up:.1f}" width="{right - left - 1:.1f}" '
                f'height="{box.bottom - up:.1f}"><title>{low:.2f} to {high:.2f}: {count:,}</title></rect>'
            )
    return _svg(width, height, title, parts, "chart")


def token_heat_map(uri: str, labels: Sequence[str], title: str, cell: float = 10.0) -> str:
    """A square map with the token text along both axes; the page's script swaps the image and reads values off it.

    Args:
        uri: `data:` URI of the [T, T] image, rows = queries.
        labels: T token texts; title: read aloud by screen readers; cell: drawing units per token.
    """
    size = cell * len(labels)
    longest = max(map(len, labels), default=1)
    margin = max(26.0, 9.0 + 5.2 * longest) + 16
    font = min(9.5, cell * 0.92)
    rotate = longest > 1
    parts = [
        f'<rect class="masked" x="{margin:g}" y="0" width="{size:g}" height="{size:g}"/>',
        f'<image id="detail-image" class="map" x="{margin:g}" y="0" width="{size:g}" height="{size:g}" '
        f'preserveAspectRatio="none" href="{uri}"/>',
        f'<g class="tokens" font-size="{font:g}">',
    ]
    for i, label in enumerate(labels):
        middle = (i + 0.5) * cell
        shown = escape(label)
        parts.append(f'<text x="{margin - 5:g}" y="{middle + font * 0.34:.1f}" text-anchor="end">{shown}</text>')
        across = margin + middle
        if rotate:
            turn = f"rotate(-90 {across + font * 0.34:.1f} {size + 5:g})"
            parts.append(f'<text x="{across + font * 0.34:.1f}" y="{size + 5:g}" text-anchor="end" transform="{turn}">')
        else:
            parts.append(f'<text x="{across:.1f}" y="{size + font + 2:.1f}" text-anchor="middle">')
        parts.append(f"{shown}</text>")
    bottom = size + margin
    parts += [
        "</g>",
        f'<text class="axis" x="{margin + size / 2:g}" y="{bottom - 3:g}" text-anchor="middle">'
        "key token (attended) →</text>",
        f'<text class="axis" x="11" y="{size / 2:g}" text-anchor="middle" transform="rotate(-90 11 {size / 2:g})">'
        "← query token</text>",
        f'<rect id="detail-cell" class="cell" width="{cell:g}" height="{cell:g}" visibility="hidden"/>',
    ]
    return _svg(
        margin + size + 4, bottom + 4, title, parts, "chart detail", f' data-margin="{margin:g}" data-cell="{cell:g}"'
    )


def profile_map(shares: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, x_label: str) -> str:
    """A table of colours: shares [R, C] in 0..1, one row per head; the opacity of a field is the share's root."""
    left, cell_width, cell_height = 78, 46, 15
    parts = []
    for i, row in enumerate(rows):
        top = i * cell_height
        parts.append(f'<text class="tick" x="{left - 6}" y="{top + 11.5:g}" text-anchor="end">{escape(row)}</text>')
        for j, column in enumerate(columns):
            share = float(shares[i, j])
            tip = escape(f"{row}: {100 * share:.1f} % of the mass at distance {column}")
            parts.append(
                f'<rect class="share" x="{left + j * cell_width}" y="{top}" width="{cell_width - 1}" '
                f'height="{cell_height - 1}" fill-opacity="{math.sqrt(max(share, 0)):.3f}" data-tip="{tip}"/>'
            )
    bottom = len(rows) * cell_height
    for j, column in enumerate(columns):
        middle = left + (j + 0.5) * cell_width
        parts.append(
            f'<text class="tick" x="{middle:g}" y="{bottom + 15}" text-anchor="middle">{escape(column)}</text>'
        )
    width = left + len(columns) * cell_width + 4
    parts.append(
        f'<text class="axis" x="{left + len(columns) * cell_width / 2:g}" y="{bottom + 34}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return _svg(width, bottom + 40, title, parts, "chart profile", f' style="max-width:{1.12 * width:.0f}px"')


def _limits(low: float, high: float) -> tuple[float, float]:
    low, high = float(low), float(high)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(low: float, high: float) -> tuple[float, float]:
    """Limits with a little air; exactly from zero when the values start there."""
    low, high = float(low), float(high)
    span = (high - low) or abs(high) or 1.0
    return (low if low == 0 else low - 0.05 * span), high + 0.05 * span


def _x_ticks(box: Box) -> list[tuple[float, str]]:
    count = max(3, int((box.right - box.left) / 110))
    return [(value, tick_label(value)) for value in ticks(*box.x, count) if value == int(value)]


def _frame(box: Box, x_label: str, y_label: str, x_marks, y_marks) -> str:
    parts = []
    for value, text in y_marks:
        _, level = box.at(box.x[0], value)
        parts.append(f'<path class="grid" d="M{box.left:g} {level:.1f}H{box.right:g}"/>')
        parts.append(
            f'<text class="tick" x="{box.left - 7:g}" y="{level + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        )
    for value, text in x_marks:
        across, _ = box.at(value, box.y[0])
        parts.append(f'<path class="grid" d="M{across:.1f} {box.bottom:g}v4"/>')
        parts.append(
            f'<text class="tick" x="{across:.1f}" y="{box.bottom + 18:g}" text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(f'<path class="base" d="M{box.left:g} {box.bottom:g}H{box.right:g}"/>')
    middle = (box.top + box.bottom) / 2
    across = (box.left + box.right) / 2
    parts.append(
        f'<text class="axis" x="{across:g}" y="{box.bottom + 36:g}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text class="axis" x="13" y="{middle:g}" text-anchor="middle" transform="rotate(-90 13 {middle:g})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _edge_labels(written: list[tuple[float, str, str]], box: Box) -> list[str]:
    """Labels at the right edge, pushed apart so that none covers another."""
    gap = TEXT + 2.5
    written = sorted(written)
    levels = [level for level, _, _ in written]
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], levels[i - 1] + gap)
    overflow = levels[-1] - (box.bottom - 2) if levels else 0
    if overflow > 0:
        levels[-1] -= overflow
        for i in range(len(levels) - 2, -1, -1):
            levels[i] = min(levels[i], levels[i + 1] - gap)
    return [
        f'<text class="label {kind}" x="{box.right + 8:g}" y="{level + 4:.1f}">{escape(text)}</text>'
        for level, (_, text, kind) in zip(levels, written, strict=True)
    ]


def _svg(width: float, height: float, title: str, parts: Sequence[str], kind: str, extra: str = "") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}"{extra}>'
        + "".join(parts)
        + "</svg>"
    )

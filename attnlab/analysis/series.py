"""Scalars over steps: reading `metrics.jsonl`, smoothing, thinning for a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

Series = tuple[np.ndarray, np.ndarray]


def read_metrics(path: str | Path) -> dict[str, Series]:
    """Reads `<workdir>/metrics.jsonl` into name -> (steps [M] int64 ascending, values [M] float64).

    A resumed run may have written a step twice: the last line wins. A line that is not a JSON object with a step (a run
    that was killed while writing) is left out. null is read as NaN; other values that are not numbers are left out. A
    missing file gives no series.
    """
    found: dict[str, dict[int, float]] = {}
    path = Path(path)
    if not path.exists():
        return {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
        for name, value in record.items():
            if value is None:  # how the writer says NaN or infinity
                value = math.nan
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[step] = float(value)
    out = {}
    for name, values in found.items():
        steps = sorted(values)
        out[name] = (np.array(steps, np.int64), np.array([values[step] for step in steps]))
    return out


def smooth(values: np.ndarray, reach: int | None = None) -> np.ndarray:
    """Centred moving average over `reach` values to either side (default: a fiftieth of the series), without lag.

    The window shrinks evenly towards both ends; values that are not finite are left out of their windows, and a window
    without any gives NaN.
    """
    values = np.asarray(values, np.float64)
    reach = max(1, len(values) // 50) if reach is None else reach
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    middle = np.arange(len(values))
    side = np.minimum(reach, np.minimum(middle, len(values) - 1 - middle))
    first, last = middle - side, middle + side + 1
    number = counts[last] - counts[first]
    return np.where(number > 0, (totals[last] - totals[first]) / np.maximum(number, 1), np.nan)


def thin(steps: np.ndarray, values: np.ndarray, limit: int = 400) -> Series:
    """At most `limit` finite points: means of equal runs of neighbours, the last point kept as it is."""
    finite = np.isfinite(values)
    steps, values = np.asarray(steps)[finite], np.asarray(values)[finite]
    if len(steps) <= limit:
        return steps, values
    runs = np.array_split(np.arange(len(steps) - 1), limit - 1)
    return (
        np.array([*(steps[run].mean() for run in runs), steps[-1]]),
        np.array([*(values[run].mean() for run in runs), values[-1]]),
    )

"""Scalars over steps."""

import json

import numpy as np

from attnlab.analysis import series


def test_read_metrics_takes_the_last_of_a_step_and_survives_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 2, "loss": 5.0, "note": "text"},
        {"step": 1, "loss": 6.0},
        {"step": 2, "eval/loss": 4.5},
        {"step": 2, "loss": 4.0},
        {"step": 3, "loss": None},
        {"loss": 1.0},
        ["no", "object"],
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    metrics = series.read_metrics(path)
    assert set(metrics) == {"loss", "eval/loss"}
    np.testing.assert_array_equal(metrics["loss"][0], [1, 2, 3])
    np.testing.assert_array_equal(metrics["loss"][1], [6.0, 4.0, np.nan])
    assert series.read_metrics(tmp_path / "absent.jsonl") == {}


def test_smooth_keeps_lines_and_skips_what_is_not_finite():
    line = np.linspace(3.0, 1.0, 50)
    np.testing.assert_allclose(series.smooth(line, 4), line, rtol=1e-12)
    np.testing.assert_allclose(series.smooth(np.array([1.0, np.nan, 3.0]), 1), [1.0, 2.0, 3.0])
    assert np.isnan(series.smooth(np.array([np.nan]))).all()
    assert len(series.smooth(np.array([]))) == 0


def test_thin_keeps_the_mean_and_the_last_point():
    steps, values = np.arange(10_000), np.random.default_rng(0).normal(size=10_000)
    values[17] = np.inf
    thin_steps, thin_values = series.thin(steps, values, limit=100)
    assert len(thin_steps) == 100 and np.all(np.diff(thin_steps) > 0) and np.isfinite(thin_values).all()
    assert (thin_steps[-1], thin_values[-1]) == (9999, values[-1])
    short = series.thin(steps[:5], values[:5])
    np.testing.assert_array_equal(short[1], values[:5])

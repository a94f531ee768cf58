"""Feature gates and loads of heads: means over the tokens that count, in the layers' order, and what the page says of them."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from attnlab.analysis import image_report, report, selection
from attnlab.analysis.image_report import ImageReport
from attnlab.analysis.selection import HeadLoads, effective_heads
from attnlab.models.lm import LM, attention_maps
from attnlab.nn.feature_gates import GATE, gate_weights

SELECTED = np.array([[[1, 0, 1], [1, 0, 1], [0, 1, 1]], [[1, 0, 1], [0, 1, 1], [0, 1, 1]]], bool)  # [B=2, T=3, R=3]
COUNTED = np.array([[True, True, False], [True, False, False]])


def test_means_leave_padding_and_other_leaves_out():
    gates = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    sown = {"a": {"mixer": {"head_selected": (SELECTED,), "gates": (gates,), "attention": (np.ones((2, 3)),)}}}
    means = jax.jit(selection.head_means)(sown, COUNTED)
    assert len(jax.tree.leaves(means)) == 2
    (found,) = selection.head_loads(means)
    np.testing.assert_allclose(found.shares, [1.0, 0.0, 1.0])
    np.testing.assert_allclose(found.gates, gates[COUNTED].mean(0), rtol=1e-6)
    assert found.layer == "a"
    rows = selection.head_loads(selection.head_means(sown, np.array([[True], [False]])))  # whole images
    np.testing.assert_allclose(rows[0].shares, [2 / 3, 1 / 3, 1.0], rtol=1e-6)


def test_layers_are_in_order_and_scanned_ones_apart():
    sown = {f"block_{i}": {"gates": (np.full(2, i),), "head_selected": (np.full(1, i),)} for i in (10, 2, 1)}
    sown["block_0"] = {"gates": (np.zeros((2, 2)),), "head_selected": (np.zeros((2, 1)),)}
    names = [name for name, _ in selection.by_layer(sown, "gates", 1)]
    assert names == ["block_0 [0]", "block_0 [1]", "block_1", "block_2", "block_10"]
    assert [load.gates[0] for load in selection.head_loads(sown)] == [0, 0, 1, 2, 10]


def test_a_language_model_says_its_layers():
    fields = {"vocab_size": 32, "dim": 16, "num_heads": 4, "num_layers": 3, "pattern": ("softmax", "moh"), "train_length": 8}
    model = LM(**fields, mixer_options={"moh": {"top_k": 1}}, capture_attention=True)
    tokens = np.zeros((2, 8), np.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)

    @jax.jit
    def run(params):
        _, updated = model.apply({"params": params}, tokens, method="features", mutable=["intermediates"])
        return selection.head_means(updated["intermediates"], np.ones((2, 8), bool))

    means = run(params)
    shares = attention_maps(model, means, "head_selected")
    assert shares[0] is None and shares[2] is None
    assert shares[1].shape == (2,) and float(shares[1].sum()) == pytest.approx(1.0)


def test_effective_heads():
    assert effective_heads(np.array([0.5, 0.5, 0.5, 0.5])) == pytest.approx(4.0)
    assert effective_heads(np.array([0.0, 1.0, 0.0])) == pytest.approx(1.0)
    assert effective_heads(np.array([0.25, 0.25, 0.0])) == pytest.approx(2.0)


def logit(weight):
    return np.log(weight / (1.0 - weight)).astype(np.float32)


def test_gates_on_the_page():
    weights = np.array([0.02, 0.03, 0.07, 0.3, 0.52, 0.97])
    gates = gate_weights({"b": {"attention_gate": {GATE: logit(weights)}, "mlp_gate": {GATE: logit(np.full((2, 4), 0.72))}}})
    text = image_report.render(ImageReport("r", "", [], [], ["a"], np.ones((1, 1), int), {}, gates=gates))
    assert "<h2>Feature gates</h2>" in text and "Loads of the heads" not in text
    rows = re.findall(r"<tr class=\"(?:own)?\"><td>(.*?)</td>(.*?)</tr>", text)
    assert [name for name, _ in rows] == ["all gates", "b/attention_gate", "b/mlp_gate [0]", "b/mlp_gate [1]"]
    figures = [re.findall(r'<td class="n">([\d.]+)', row) for _, row in rows]
    assert figures[1] == ["6", "0.318", "50.0", "66.7"] and figures[2] == ["4", "0.720", "0.0", "0.0"]
    assert figures[0] == ["14", f"{(weights.sum() + 8 * 0.72) / 14:.3f}", "21.4", "28.6"]
    bins = [re.findall(r"<title>([\d.]+) to [\d.]+: (\d+)</title>", row) for _, row in rows]
    assert bins[1] == [("0.00", "2"), ("0.05", "1"), ("0.30", "1"), ("0.50", "1"), ("0.95", "1")]
    assert bins[2] == [("0.70", "4")]
    assert dict(bins[0])["0.70"] == "8"


def test_loads_on_the_page():
    balanced = HeadLoads("L0", np.array([0.5, 0.5]), np.array([1.0, 1.0, 0.5]))
    collapsed = HeadLoads("L<1>", np.array([0.995, 0.005]), np.array([1.5, 1.25, 0.5]))
    shared = HeadLoads("L2", np.zeros(0), np.ones(3))
    metrics = {f"L{i}/head_load_max": (np.array([1, 2]), np.array([0.6, 0.5 + 0.2 * i])) for i in range(2)}
    parts = {"loads": [balanced, collapsed, shared], "loads_of": "4,096 tokens", "metrics": metrics}
    text = report.render(report.Report("r", "", **parts))
    assert "<h2>Loads of the heads</h2>" in text and "4,096 tokens" in text and "1 of 4 routed heads are on for less" in text
    rows = re.findall(r"<tr><th>(L.*?)</th>(.*?)</tr>", text)
    assert [name for name, _ in rows] == ["L0", "L&lt;1&gt;"]
    cells = [re.findall(r"<td.*?>(.*?)</td>", row) for _, row in rows]
    assert cells[0] == ["on", "50", "50", "1 of 2", "50.0 %", "50.0 %", "2.0"]
    assert cells[1] == ["on", "100", "0", "1 of 2", "0.5 %", "99.5 %", "1.0"]
    assert "head 1: on for 99.5 % of the tokens, mean gate 1.25" in text and "most 60" in text
    assert "Loads of the heads" not in report.render(report.Report("r", "", loads=[shared], metrics=metrics))

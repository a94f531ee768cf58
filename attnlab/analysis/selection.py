"""What a model keeps: the weights of its feature gates, and how often each routed head is on; as sections of the report pages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis import series
from attnlab.analysis.charts import Line, escape, histogram, line_chart

BINS = 20  # of a histogram of gates, over 0..1
IDLE = 0.01  # a routed head that fewer tokens use does nothing
_HEADS = ("head_selected", "gates")  # what `nn.mixture_of_heads.sow_route` sows


class HeadLoads(NamedTuple):
    """Heads of one layer over many tokens.

    layer: what it is called; shares: [R] of the tokens that use each routed head (they sum to the heads that a token uses);
    gates: [N] mean weight of each head, shared heads first.
    """

    layer: str
    shares: np.ndarray
    gates: np.ndarray


def head_means(intermediates: Any, counted: jax.Array) -> Any:
    """Means over the tokens of what mixtures of heads sowed: [..., B, T, R] -> [..., R]; a tree without all other leaves.

    Args:
        intermediates: the collection of `model.apply(..., mutable=["intermediates"])`.
        counted: [B, T] or [B, 1] bool, False = padding.
    """

    def mean(path: Any, leaf: jax.Array) -> jax.Array | None:
        if _keys(path)[-1] not in _HEADS:
            return None
        weight = jnp.broadcast_to(counted, leaf.shape[-3:-1]).astype(jnp.float32)
        return jnp.einsum("...btn,bt->...n", leaf.astype(jnp.float32), weight) / jnp.maximum(weight.sum(), 1.0)

    return jax.tree_util.tree_map_with_path(mean, intermediates)


def by_layer(intermediates: Any, kind: str, ndim: int) -> list[tuple[str, np.ndarray]]:
    """Returns (name of the layer, values) of all layers that sowed `kind`, in order; stacked ones, of scanned layers, one by one.

    Args:
        intermediates: a tree of arrays.
        kind: the name that was sown.
        ndim: axes of one layer's values.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(intermediates):
        keys = _keys(path)
        if keys[-1] != kind:
            continue
        name = "/".join(key for key in keys[:-1] if key not in ("attention", "mixer"))
        values = np.asarray(leaf)
        stacked = values[None] if values.ndim == ndim else values
        found += [(name if len(stacked) == 1 else f"{name} [{i}]", layer) for i, layer in enumerate(stacked)]
    numbered = lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]  # noqa: E731
    return sorted(found, key=lambda item: numbered(item[0]))


def head_loads(means: Any) -> list[HeadLoads]:
    """The layers of a tree of `head_means`, in order."""
    gates = dict(by_layer(means, "gates", 1))
    return [HeadLoads(name, shares, gates[name]) for name, shares in by_layer(means, "head_selected", 1)]


def gates_section(gates: Mapping[str, np.ndarray]) -> str:
    """The histogram of all gates and a row for each; weights [C], or [L, C] of scanned layers, in 0..1 by name."""
    rows = []
    for name, weights in gates.items():
        stacked = np.atleast_2d(np.asarray(weights, np.float64))
        rows += [(name if len(stacked) == 1 else f"{name} [{i}]", layer) for i, layer in enumerate(stacked)]
    if not rows:
        return ""
    everything = np.concatenate([weights for _, weights in rows])
    big = histogram(
        _counts(everything), title="All gates", x_label="gate", y_label="channels", width=440, height=240
    )
    body = []
    for kind, name, weights in (("own", "all gates", everything), *(("", *row) for row in rows)):
        small = histogram(_counts(weights), title=f"Gates of {name}")
        below = "".join(f'<td class="n">{100 * np.mean(weights < limit):.1f} %</td>' for limit in (0.1, 0.5))
        body.append(
            f'<tr class="{kind}"><td>{escape(name)}</td><td class="n">{len(weights):,}</td><td class="n">{weights.mean():.3f}</td>'
            f'{below}<td class="small">{small}</td></tr>'
        )
    head = "".join(f'<th class="n">{name}</th>' for name in ("channels", "mean", "&lt; 0.1", "&lt; 0.5"))
    return (
        '<section id="gates"><h2>Feature gates</h2><p class="note">A channel is multiplied by its gate, the same for all inputs: '
        "1 keeps it, 0 drops it. Gates start near a half.</p>"
        f'<figure class="one">{big}</figure><div class="scroll"><table><thead><tr><th>gate</th>{head}'
        f'<th>from 0 to 1</th></tr></thead><tbody>{"".join(body)}</tbody></table></div></section>'
    )


def loads_section(loads: Sequence[HeadLoads], seen: str, metrics: Mapping[str, series.Series]) -> str:
    """How many tokens use each head, and how that went over training; `seen` says what was looked at."""
    loads = [load for load in loads if len(load.shares)]
    if not loads:
        return ""
    most = max(len(load.gates) for load in loads)
    idle = sum(int(np.sum(load.shares < IDLE)) for load in loads)
    routed = sum(len(load.shares) for load in loads)
    said = f"{idle} of {routed} routed heads are" if idle else f"None of the {routed} routed heads is"
    lines = []
    for load in loads:
        shared = len(load.gates) - len(load.shares)
        cells = [
            f'<td title="head {head}, shared: always on, mean gate {gate:.2f}">on</td>'
            for head, gate in enumerate(load.gates[:shared])
        ]
        for head, (share, gate) in enumerate(zip(load.shares, load.gates[shared:], strict=True), shared):
            tip = f"head {head}: on for {100 * share:.1f} % of the tokens, mean gate {gate:.2f}"
            colour = f"background:color-mix(in srgb,var(--c0) {75 * share:.0f}%,transparent)"
            cells.append(f'<td title="{tip}" style="{colour}">{100 * share:.0f}</td>')
        cells += ["<td></td>"] * (most - len(load.gates))
        least, most_used = (f"{100 * share:.1f} %" for share in (load.shares.min(), load.shares.max()))
        facts = f"{load.shares.sum():.0f} of {len(load.shares)}", least, most_used, f"{effective_heads(load.shares):.1f}"
        lines.append(f'<tr><th>{escape(load.layer)}</th>{"".join(cells)}{"".join(f"<td>{fact}</td>" for fact in facts)}</tr>')
    numbers = "".join(f"<th>{head}</th>" for head in range(most))
    return (
        '<section id="loads"><h2>Loads of the heads</h2><p class="note">Share of the tokens that use a head, in percent, over '
        f"{escape(seen)} of the split; shared heads are always on. {said} on for less than {100 * IDLE:.0f} % of them. "
        "Effective: the number of equally used heads whose shares have the same entropy; all of them when the load is "
        'balanced.</p><div class="scroll"><table class="cells">'
        f"<tr><th>head</th>{numbers}<th>routed, on</th><th>least</th><th>most</th><th>effective</th></tr>{''.join(lines)}"
        f"</table></div>{_over_training(metrics)}</section>"
    )


def effective_heads(shares: np.ndarray) -> float:
    """exp of the entropy of the loads [R] as shares of their sum: 1 (one head does all) to R (all do the same)."""
    p = np.asarray(shares, np.float64) / max(float(np.sum(shares)), 1e-12)
    return float(np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))))


def _over_training(metrics: Mapping[str, series.Series]) -> str:
    lines = []
    for kind, name, colour in (("head_load_max", "most", 1), ("head_load_min", "least", 0)):
        logged = [values for key, values in metrics.items() if key.rpartition("/")[2] == kind]
        if logged and all(len(values[0]) == len(logged[0][0]) for values in logged):
            mean = np.mean([values for _, values in logged], axis=0)
            lines.append(Line(name, *series.thin(logged[0][0], 100 * mean), colour=colour))
    if not lines:
        return ""
    chart = line_chart(
        lines, x_label="step", y_label="% of the tokens", title="Most and least used head over steps", width=480, height=240,
        labels=90, from_zero=True,
    )  # fmt: skip
    note = "The most and the least used routed head of a training batch, averaged over the layers."
    return f'<figure class="one"><h3>Over training</h3><p class="note">{note}</p>{chart}</figure>'


def _counts(weights: np.ndarray) -> np.ndarray:
    return np.histogram(weights, BINS, (0.0, 1.0))[0]


def _keys(path: Any) -> list[str]:
    return [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]

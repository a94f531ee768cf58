"""FLOPs and bytes of the published image sizes: counted by attnlab, counted by XLA, and as the papers print them.

    python benchmarks/image_costs.py                       # all; about ten minutes of one core
    python benchmarks/image_costs.py --models=vit,mavit    # others stay as they are in the result

Each model is traced for one image in evaluation mode and lowered for the CPU; nothing is compiled or run. Columns:

- counted: products and convolutions by `attnlab.models.flops` from the traced program, two FLOPs per multiply-add. This is what
  the train loop, `--aot` and papers (who print multiply-adds) call the FLOPs of a model.
- HLO: products and convolutions of the lowered program by `attnlab.training.costs`, another parser of another language. It
  leaves out multiplications with the zeros of a padded border, as XLA does.
- XLA: `Lowered.cost_analysis()`; XLA adds every elementwise operation (an exact GELU has some forty) before anything is fused.
- paper: printed multiply-adds, doubled.
- bytes: parameters in float32, what XLA's program reads and writes before fusion.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import time
from typing import Any

import experiment
import jax
import jax.numpy as jnp
import numpy as np

from attnlab import registry
from attnlab.models.flops import count_flops
from attnlab.models.mavit import SIZES as MAVIT_SIZES
from attnlab.models.options import options
from attnlab.ops import dispatch
from attnlab.training import costs, hlo

# Billions of multiply-adds that the papers print, at the side in pixels; None: not printed.
PUBLISHED: dict[str, dict[str, tuple[int, float | None]]] = {
    "vit": {"ti16": (224, 1.3), "s16": (224, 4.6), "b16": (224, 17.6), "l16": (224, 61.6)},
    "biformer": {"tiny": (224, 2.2), "small": (224, 4.5), "base": (224, 9.8), "stl": (224, 4.6)},
    "mavit": {"tiny": (224, 2.5), "small": (224, 4.6), "base": (224, 9.9), "large": (224, 16.1)},
    "moat": {
        "moat_0": (224, 5.7), "moat_1": (224, 9.1), "moat_2": (384, 54.3), "moat_3": (512, 271.0), "moat_4": (512, 648.5),
        "tiny_moat_0": (256, 1.1), "tiny_moat_1": (256, 1.6), "tiny_moat_2": (256, 3.0), "tiny_moat_3": (256, 6.0),
    },
    "uniformer": {"small": (224, 3.6), "small_plus": (224, 4.2), "base": (224, 8.3), "base_ls": (224, 8.3)},
    "uniformer_light": {"xxs": (224, 1.3), "xs": (224, 2.0)},
    "moh_vit": {"small": (224, 10.3), "base": (224, 18.4)},
}  # fmt: skip
_SIZES = {name: f"attnlab.models.{name}" for name in PUBLISHED}


def measure(name: str, size: str, side: int) -> dict[str, float]:
    """Counts one published size for one image of side x side pixels: `params`, FLOPs and bytes by name."""
    cls = registry.get("model", name)
    sizes = importlib.import_module(_SIZES[name]).SIZES
    fields = sizes[size] | ({"scan_layers": False} if hasattr(cls, "scan_layers") else {})  # XLA counts the body of a loop once
    if name == "vit":
        fields["mixer_options"] = {"softmax": {"causal": False, "rope": False, "proj_bias": True}}
    model = cls.from_config(options(name, **fields), 1000, (side, side, 3))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    counted = count_flops(model.apply, variables, image)
    with dispatch.portable():
        lowered = jax.jit(model.apply).lower(variables, image)
    analysis: dict[str, Any] = lowered.cost_analysis()
    module = hlo.parse(lowered.compiler_ir("hlo").as_hlo_text())
    products = costs.program_cost(module, 1, costs.Rates(1.0, 1.0)).flops
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {
        "params": params, "counted": counted, "hlo": products, "xla": analysis["flops"], "bytes": analysis["bytes accessed"],
    }  # fmt: skip


def main() -> None:
    """Counts what the flags name and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PUBLISHED), help="names, separated by commas (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    flags = parser.parse_args()
    names = flags.models.split(",")
    if unknown := sorted(set(names) - set(PUBLISHED)):
        parser.error(f"--models: {', '.join(unknown)} unknown; there are {', '.join(PUBLISHED)}")
    written = flags.out / "image_costs.json"
    rows = json.loads(written.read_text())["rows"] if written.exists() else {}  # of other models, from earlier calls
    for name in names:
        for size, (side, paper) in PUBLISHED[name].items():
            start = time.perf_counter()
            rows[f"{name} {size}"] = measure(name, size, side) | {"side": side, "paper": paper}
            print(f"{name} {size}: {time.perf_counter() - start:.0f} s", flush=True)
    rows = {key: rows[key] for key in (f"{name} {size}" for name in PUBLISHED for size in PUBLISHED[name]) if key in rows}
    title = "FLOPs and bytes of the published image sizes"
    said = {"sizes": f"{len(rows)}, of this and earlier calls"}
    experiment.save("image_costs", title, flags.out, said, {"rows": rows}, tables(rows))


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the figures as Markdown; ratios are to what attnlab counts."""
    lines = [
        "One image, forward, in units of 1e9 FLOPs; in brackets over what attnlab counts.",
        "",
        "| model | pixels | parameters | counted | HLO products | XLA, all operations | paper x 2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [_beside(row["hlo"] / 1e9, row["counted"] / 1e9), _beside(row["xla"] / 1e9, row["counted"] / 1e9)]
        cells.append("" if row["paper"] is None else _beside(2 * row["paper"], row["counted"] / 1e9))
        lines.append(
            f"| {name} | {row['side']} | {row['params'] / 1e6:.2f} M | {row['counted'] / 1e9:.2f} | {' | '.join(cells)} |"
        )
    ratio = np.array([row["hlo"] / row["counted"] for row in rows.values()])
    lines += [
        "",
        f"HLO products over the count: {ratio.min():.3f} to {ratio.max():.3f}; "
        f"{int(np.sum(np.abs(ratio - 1) <= 0.05))} of {len(ratio)} within 5 %.",
        *_mavit(rows),
        "",
        "| model | parameters, MB | program before fusion, MB | FLOPs per byte before fusion |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {4 * row['params'] / 1e6:.1f} | {row['bytes'] / 1e6:,.0f} | {row['counted'] / row['bytes']:.1f} |"
        )
    return "\n".join(lines)


def _mavit(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What the counts of MAViT are without the products among queries, keys and values, which its table seems to leave out."""
    found = []
    for size, fields in MAVIT_SIZES.items():
        if (row := rows.get(f"mavit {size}")) is None:
            continue
        left = row["counted"]
        for stage, (dim, depth, heads) in enumerate(zip(fields["dims"], fields["depths"], fields["num_heads"], strict=True)):
            tokens = (row["side"] // 4 >> stage) ** 2
            left -= depth * 4.0 * tokens * dim * (dim // heads if stage < 2 else tokens)  # stages 0, 1 are linear
        found.append(f"{size} {_beside(left / 1e9, 2 * row['paper'])}")
    note = "MAViT without the products among queries, keys and values, in brackets over the paper's: "
    return ["", note + ", ".join(found) + "."] if found else []


def _beside(value: float, base: float) -> str:
    return f"{value:.2f} ({value / base:.3f})"


if __name__ == "__main__":
    main()

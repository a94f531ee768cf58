"""Static TPU schedule of our attention kernels beside JAX's splash attention; no TPU needed.

    python benchmarks/tpu_schedule.py [--devices v5e v6e]

Same work for all: bfloat16, H = 128, causal, blocks of 512 x 512, T = 1024 (the schedule of a block does not depend on T).
Every kernel is compiled by the compiler in the libtpu wheel, and the bundles of its compute bodies are counted, per
128 x 128 tile of scores. A body without a mask serves blocks whose pairs are all visible (all but the diagonal of a causal
call: the inner loop), a body with a mask the others; splash has one body that always masks. Softmax takes a running maximum
only in heads whose scores are not certified to stay small (kernels_pallas/attention/tpu.py). "x MXU peak" divides by the
cycles that the matrix products alone take at the chip's published rate; a static schedule that is below 1 there cannot be
kept by the hardware.

Writes benchmarks/results/tpu_schedule.json and .md. About two minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from kernels_pallas.attention import compile_case
from kernels_pallas.common import static_schedule

BLOCK = 512
TILES = (BLOCK // 128) ** 2
RESULTS = pathlib.Path(__file__).resolve().parent / "results"
PASSES = ("forward", "dq", "dkv")
# Products of a pass with H = 128, and the cycles that one 128 x 128 x 128 product takes at the peak rate of all MXUs.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
PEAK = {"v5e": 32, "v5p": 32}  # four MXUs of 128 x 128, a row a cycle each


def compile_splash(topology: str) -> None:
    """Compiles JAX's splash attention in this process, forward and backward."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    length, heads, width = 4096, 4, 128
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": BLOCK for name in names})
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length)) for _ in range(heads)])
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def build(backward, sharding):
        x = jax.ShapeDtypeStruct((heads, length, width), jnp.bfloat16, sharding=sharding)
        if backward:
            return lambda q, k, v, do: jax.vjp(kernel, q, k, v)[1](do), (x, x, x, x)
        return kernel, (x, x, x)

    for backward in (False, True):
        static_schedule.compile_for(topology, lambda sharding, backward=backward: build(backward, sharding))


def rows_for(topology: str) -> list[dict[str, Any]]:
    """Measures everything for one device."""
    rows = []

    def add(kernel: str, work: str, body: str, region: static_schedule.Region) -> None:
        row = {"device": topology, "kernel": kernel, "pass": work, "body": body, "tile": region.bundles / TILES}
        rows.append({**row, **{k: v for k, v in dataclasses.asdict(region).items() if k not in ("kernel", "stamp")}})

    splash = static_schedule.measure([str(pathlib.Path(__file__).resolve()), "--splash", topology], "splash_mha")
    for work, name in (("forward", "fwd_no_residuals"), ("dq", "_dq_"), ("dkv", "_dkv_")):
        add("splash", work, "always masks", next(region for region in splash if name in region.kernel))
    cases = [
        (f"{normalization}{', block lists' if listed else ''}", {"normalization": normalization, "listed": listed, "backward": b})
        for normalization in ("softmax", "sigmoid")
        for listed in (False, True)
        for b in (False, True)
    ]
    measured = compile_case.measure([{"topology": topology, **case} for _, case in cases])
    for (name, case), by_pass in zip(cases, measured, strict=True):
        for work, bodies in by_pass.items():
            if (work == "forward") != case["backward"]:
                for body, region in bodies.items():
                    add(name, work, body, region)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, with the ratio to splash and to the peak rate of the MXUs."""
    base = {(row["device"], row["pass"]): row["tile"] for row in rows if row["kernel"] == "splash"}
    head = ("device", "pass", "kernel", "body", "bundles/tile", "x splash", "x MXU peak", "MXU slots", "VALU slots", "spills")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in sorted(rows, key=lambda r: (r["device"], PASSES.index(r["pass"]))):
        device, work, tile = row["device"], row["pass"], row["tile"]
        peak = f"{tile / (PRODUCTS[work] * PEAK[device]):.2f}" if device in PEAK else ""
        cells = (device, work, row["kernel"], row["body"], f"{tile:.1f}", f"{tile / base[device, work]:.2f}", peak)
        cells += (f"{row['shares']['MXU']:.0%}", f"{row['shares']['VALU']:.0%}", str(row["spills"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["v5e", "v6e"], choices=sorted(static_schedule.TOPOLOGIES))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--splash", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.splash:
        compile_splash(options.splash)
        return
    rows = [row for device in options.devices for row in rows_for(device)]
    print(table(rows))
    about = {
        "date": datetime.date.today().isoformat(),
        **{package: importlib.metadata.version(package) for package in ("jax", "libtpu")},
        "work": {"dtype": "bfloat16", "width": 128, "causal": True, "block": BLOCK},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "tpu_schedule.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    title = f"Static TPU schedule, {about['date']}, jax {about['jax']}, libtpu {about['libtpu']}"
    text = __doc__.split("\n\n")[2]
    (options.results / "tpu_schedule.md").write_text(f"# {title}\n\n{text}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()

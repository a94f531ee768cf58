"""Static TPU schedule of our attention kernels beside JAX's splash attention; no TPU needed.

    python benchmarks/tpu_schedule.py [--devices v5e v6e] [--json benchmarks/results/tpu_schedule.json]

Same work for all: bfloat16, H = 128, causal, blocks of 512 x 512. Every kernel is compiled by the compiler in the libtpu wheel,
and the bundles of its compute bodies are counted, per 128 x 128 tile of scores. A body without a mask serves blocks
whose pairs are all visible (all but the diagonal of a causal call), a body with a mask the others; splash has one body that
always masks. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from kernels_pallas.common import static_schedule

BLOCK = 512
TILES = (BLOCK // 128) ** 2
WORKER = str(pathlib.Path(__file__).resolve())
# The bodies of our forward softmax kernel in the order of its code.
SOFTMAX_BODIES = ("no mask", "no mask, running maximum", "mask", "mask, running maximum")


def compile_splash(topology: str, backward: bool) -> None:
    """Compiles JAX's splash attention in this process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    length, heads, width = 4096, 4, 128
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": BLOCK for name in names})
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length)) for _ in range(heads)])
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def build(sharding):
        x = jax.ShapeDtypeStruct((heads, length, width), jnp.bfloat16, sharding=sharding)
        if backward:
            return lambda q, k, v, do: jax.vjp(kernel, q, k, v)[1](do), (x, x, x, x)
        return kernel, (x, x, x)

    static_schedule.compile_for(topology, build)


def rows_for(topology: str) -> list[dict[str, Any]]:
    """Measures everything for one device."""
    rows = []

    def add(kernel: str, work: str, bodies: tuple[str, ...], regions: list[static_schedule.Region]) -> None:
        for body, region in zip(bodies, regions, strict=True):
            row = {"device": topology, "kernel": kernel, "pass": work, "body": body}
            rows.append({**row, "tile": region.bundles / TILES, **dataclasses.asdict(region)})

    def ours(name: str, **case: Any) -> None:
        case = {"topology": topology, "block_q": BLOCK, "block_kv": BLOCK, **case}
        softmax = case["normalization"] == "softmax"
        command = ["-m", "kernels_pallas.attention.compile_case", json.dumps(case)]
        regions = static_schedule.measure(command, "attention_")
        by_pass = {p: [r for r in regions if p in r.kernel] for p in ("forward", "_dq", "_dkv")}
        if not case.get("backward"):
            add(name, "forward", SOFTMAX_BODIES if softmax else ("no mask", "mask"), by_pass["forward"])
            return
        for work in ("_dq", "_dkv"):
            add(name, work.strip("_"), ("no mask", "mask"), by_pass[work])

    for backward in (False, True):
        regions = static_schedule.measure([WORKER, "--splash", topology, str(int(backward))], "splash_mha")
        if not backward:
            add("splash", "forward", ("always masks",), regions)
        else:
            for work in ("dq", "dkv"):
                add("splash", work, ("always masks",), [r for r in regions if f"_{work}_" in r.kernel])
        for normalization in ("softmax", "sigmoid"):
            ours(normalization, normalization=normalization, backward=backward)
            ours(f"{normalization}, block lists", normalization=normalization, backward=backward, listed=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with the ratio to splash."""
    base = {(row["device"], row["pass"]): row["tile"] for row in rows if row["kernel"] == "splash"}
    head = ("device", "pass", "kernel", "body", "bundles/tile", "x splash", "MXU", "VALU", "spills")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in sorted(rows, key=lambda r: (r["device"], ("forward", "dq", "dkv").index(r["pass"]))):
        ratio = row["tile"] / base[row["device"], row["pass"]]
        cells = (row["device"], row["pass"], row["kernel"], row["body"], f"{row['tile']:.1f}", f"{ratio:.2f}")
        cells += (f"{row['shares']['MXU']:.0%}", f"{row['shares']['VALU']:.0%}", str(row["spills"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["v5e", "v6e"], choices=sorted(static_schedule.TOPOLOGIES))
    results = pathlib.Path(__file__).resolve().parent / "results" / "tpu_schedule.json"
    parser.add_argument("--json", type=pathlib.Path, default=results)
    parser.add_argument("--splash", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.splash:
        compile_splash(options.splash[0], options.splash[1] == "1")
        return
    import importlib.metadata

    import jax

    rows = [row for device in options.devices for row in rows_for(device)]
    print(table(rows))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "work": {"dtype": "bfloat16", "width": 128, "causal": True, "block": BLOCK},
    }
    options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

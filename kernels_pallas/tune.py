"""Refills the tables of tile sizes: `python -m kernels_pallas.tune v5e v6e`.

Every candidate is compiled by libtpu's compiler and its static schedule is read (common/static_schedule.py), so no TPU is
needed; some minutes per device and kernel. The fewest bundles win, a spilled register counting as a quarter of one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
from typing import Any

from kernels_pallas.attention import tuning
from kernels_pallas.common import static_schedule

BLOCK = 512
FORMS = {"softmax": ("softmax", -9.0), "tanh": ("sigmoid", -9.0), "logistic": ("sigmoid", -20.0)}
# kernel -> (is it in the backward pass, name in the dump, bodies: index of FULL and of PARTIAL)
KERNELS = {
    "forward": (False, "forward", (0, -1)),
    "online": (False, "forward", (1, 3)),
    "dq": (True, "_dq", (0, 1)),
    "dkv": (True, "_dkv", (0, 1)),
}


def candidates(kernel: str) -> list[list[Any]]:
    """Tiles to try: [rows, columns, depth, column_major]."""
    if kernel == "online":
        return [[rows, BLOCK, depth, False] for rows in (512, 256, 128) for depth in (0, 1, 2) if depth < BLOCK // rows]
    by_rows = [[rows, BLOCK, depth, False] for rows in (512, 304, 256, 176, 128) for depth in (0, 1) if depth < BLOCK // rows]
    sizes = ((512, 256, 1), (512, 128, 1), (256, 256, 1), (256, 128, 1), (128, 128, 4))
    return by_rows + [[rows, columns, depth, True] for rows, columns, depth in sizes]


def cost(region: static_schedule.Region) -> float:
    """Bundles, and a quarter for each spill: it takes a store slot and a load slot, of which there are more."""
    return region.bundles + 0.25 * region.spills


def best(topology: str, form: str, kernel: str, jobs: int) -> list[list[Any]]:
    """Returns the tiles with the lowest cost for FULL and for PARTIAL blocks."""
    backward, name, bodies = KERNELS[kernel]
    normalization, bias = FORMS[form]

    def attempt(tiles: list[Any]) -> list[static_schedule.Region] | None:
        case = {"topology": topology, "normalization": normalization, "bias": bias, "backward": backward}
        case["tiles"] = {kernel: tiles}
        try:
            return static_schedule.measure(["-m", "kernels_pallas.attention.compile_case", json.dumps(case)], name)
        except RuntimeError:  # more registers or memory than there are
            return None

    tried = candidates(kernel)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        results = [(tiles, regions) for tiles, regions in zip(tried, pool.map(attempt, tried), strict=True) if regions]
    chosen = []
    for body in bodies:
        if kernel == "forward" and form == "softmax":
            body = {0: 0, -1: 2}[body]  # the bodies with a running maximum stand between
        tiles, regions = min(results, key=lambda result: cost(result[1][body]))
        print(f"{topology} {form} {kernel}: {tiles} {regions[body].bundles} bundles, {regions[body].spills} spills", flush=True)
        chosen.append(tiles)
    return chosen


def main() -> None:
    """Searches and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("devices", nargs="+", choices=sorted(static_schedule.TOPOLOGIES))
    parser.add_argument("--forms", nargs="+", choices=sorted(FORMS), default=sorted(FORMS))
    parser.add_argument("--kernels", nargs="+", choices=sorted(KERNELS), default=sorted(KERNELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    for topology in options.devices:
        file = tuning.tuned_file(tuning.DEVICES[static_schedule.DEVICE_KINDS[topology]])
        for form, kernel in itertools.product(options.forms, options.kernels):
            if kernel == "online" and form != "softmax":
                continue
            tiles = best(topology, form, kernel, options.jobs)
            table = json.loads(file.read_text()) if file.is_file() else {}
            table.setdefault(form, {"block": BLOCK})[kernel] = tiles
            lines = (
                f'  "{name}": {{\n' + ",\n".join(f'    "{key}": {json.dumps(value)}' for key, value in entry.items()) + "\n  }"
                for name, entry in sorted(table.items())
            )
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

"""Refills the tables of tile sizes: `python -m kernels_pallas.tune v5e v6e`.

Every candidate is compiled by libtpu's compiler and its static schedule is read (common/static_schedule.py), so no TPU is
needed; about two minutes per device and kernel. The fewest bundles win, a spilled register counting as one bundle.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

from kernels_pallas.attention import compile_case, tuning
from kernels_pallas.common import static_schedule

BLOCK = 512
FORMS = {"softmax": ("softmax", -9.0), "tanh": ("sigmoid", -9.0), "logistic": ("sigmoid", -20.0)}
# kernel -> (pass, what to append to the names of the bodies)
KERNELS = {"forward": ("forward", ""), "online": ("forward", ", running maximum"), "dq": ("dq", ""), "dkv": ("dkv", "")}


def candidates(kernel: str) -> list[list[Any]]:
    """Tiles to try; the fields of `Tiles`."""
    rows = [[512, BLOCK, 0, False], [256, BLOCK, 1, False], [128, BLOCK, 2, False]]
    if kernel == "online":  # always staged, and whole rows before the first product: few rows at a time
        return [[rows, columns, depth, False] for rows in (96, 128) for columns in (128, 256) for depth in (1, 2, 3)]
    columns = [[512, 256, 1, True], [512, 128, 1, True]]
    return [[*tiles, staged] for tiles in rows + columns for staged in (False, True)]


def cost(region: static_schedule.Region) -> float:
    """Bundles, and one for each spill."""
    return region.bundles + region.spills


def best(topology: str, form: str, kernel: str) -> list[list[Any]]:
    """Returns the tiles with the lowest cost for FULL and for PARTIAL blocks."""
    by_pass, suffix = KERNELS[kernel]
    normalization, bias = FORMS[form]
    case = {"topology": topology, "normalization": normalization, "bias": bias, "backward": by_pass != "forward"}
    tried = candidates(kernel)
    measured = compile_case.measure([{**case, "tuning": {kernel: tiles}} for tiles in tried])
    chosen = []
    for body in compile_case.BODIES:
        results = [(tiles, found[by_pass][body + suffix]) for tiles, found in zip(tried, measured, strict=True)]
        tiles, region = min(results, key=lambda result: cost(result[1]))
        print(f"{topology} {form} {kernel} {body}: {tiles} {region.bundles} bundles, {region.spills} spills", flush=True)
        chosen.append(tiles)
    return chosen


def main() -> None:
    """Searches and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("devices", nargs="+", choices=sorted(static_schedule.TOPOLOGIES))
    parser.add_argument("--forms", nargs="+", choices=sorted(FORMS), default=sorted(FORMS))
    parser.add_argument("--kernels", nargs="+", choices=sorted(KERNELS), default=sorted(KERNELS))
    options = parser.parse_args()
    for topology in options.devices:
        file = tuning.tuned_file(tuning.DEVICES[static_schedule.DEVICE_KINDS[topology]])
        for form, kernel in itertools.product(options.forms, options.kernels):
            if kernel == "online" and form != "softmax":
                continue
            tiles = best(topology, form, kernel)
            table = json.loads(file.read_text()) if file.is_file() else {}
            table.setdefault(form, {"block": BLOCK})[kernel] = tiles
            lines = (
                f'  "{name}": {{\n' + ",\n".join(f'    "{key}": {json.dumps(value)}' for key, value in entry.items()) + "\n  }"
                for name, entry in sorted(table.items())
            )
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

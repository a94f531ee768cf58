"""Compiles memory kernels for one TPU in this process: `python -m kernels_pallas.memory_scan.compile_case JSON...`.

A process of its own, because the compiler reads its dump flags once. `measure` runs it and reads the schedules.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

from kernels_pallas.common.static_schedule import Region, compile_for
from kernels_pallas.common.static_schedule import measure as measure_process

DEFAULTS = {
    "topology": "v5e",
    "before": False,
    "resets": False,
    "heads": 2,
    "tiles": 3,
    "chunk": 64,
    "widths": (64, 256, 64),
}
PASSES = ("forward", "states", "backward")


def build(case: dict[str, Any], sharding: Any) -> tuple[Any, tuple]:
    """Returns a scan with its gradients, to compile, and its abstract arguments.

    Args:
        case: keys of `DEFAULTS`.
        sharding: of the arguments.
    """
    import jax
    import jax.numpy as jnp

    from kernels_pallas.memory_scan import memory_scan
    from kernels_pallas.memory_scan.chunk import State

    case = {**DEFAULTS, **case}
    batch, heads, tiles, size, widths = 2, case["heads"], case["tiles"], case["chunk"], case["widths"]

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    token, gate = array(batch, heads, tiles, size, widths[0]), array(batch, heads, tiles, size)
    state = State(*(tuple(array(batch, heads, *pair) for pair in itertools.pairwise(widths)) for _ in range(3)))
    flag = array(batch, tiles, dtype=jnp.bool_)
    place = (array(batch, tiles, size, dtype=jnp.bool_), flag, flag)
    arrays = (token, token, token, (gate,) * 3, state, state if case["resets"] else None)

    def step(place, *arrays):
        scan = lambda q, k, v, gates, initial, begin: memory_scan(  # noqa: E731
            q, k, v, gates, *place, initial, begin, before=case["before"]
        )
        results, pullback = jax.vjp(scan, *arrays)
        return results, pullback(jax.tree.map(jnp.ones_like, results))

    return step, (place, *arrays)


def measure(cases: list[dict[str, Any]], timeout: float = 600.0) -> list[dict[str, Region]]:
    """Compiles the cases in one process and reads their schedules.

    Args:
        cases: see `build`; all for one topology.
        timeout: seconds for all of them.

    Returns:
        For every case "forward", "states" and "backward": what one chunk of a head runs.

    Raises:
        RuntimeError: a case does not compile.
    """
    command = ["-m", "kernels_pallas.memory_scan.compile_case", *map(json.dumps, cases)]
    regions = measure_process(command, "memory_scan_", timeout)
    kernels = [list(bodies) for _, bodies in itertools.groupby(regions, key=lambda region: (region.stamp, region.kernel))]
    found = []
    for _ in cases:
        by_pass = {}
        for bodies in (kernels.pop(0) for _ in PASSES):
            name = next(name for name in PASSES if f"_{name}" in bodies[0].kernel)
            by_pass[name] = max(bodies, key=lambda region: region.bundles)
        found.append(by_pass)
    return found


if __name__ == "__main__":
    for given in map(json.loads, sys.argv[1:]):
        compile_for(given.get("topology", "v5e"), lambda sharding, given=given: build(given, sharding))

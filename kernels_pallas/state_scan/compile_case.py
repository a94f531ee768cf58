"""Compiles scan kernels for one TPU in this process: `python -m kernels_pallas.state_scan.compile_case JSON...`.

A process of its own, because the compiler reads its dump flags once. `measure` runs it and reads the schedules. Used by
`benchmarks/tpu_schedule.py` and the tests.
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
    "delta": False,
    "channel": False,
    "backward": False,
    "chains": 0,
    "heads": 4,
    "group": None,
    "chunks": 4,
    "chunk": 64,
    "rows": 128,
    "width": 128,
    "dtype": "bfloat16",
}
PASSES = ("forward", "states", "backward")


def build(case: dict[str, Any], sharding: Any) -> tuple[Any, tuple]:
    """Returns the function to compile and its abstract arguments.

    Args:
        case: keys of `DEFAULTS`; `chains` 0 = each row is one chain, without initial states.
        sharding: of the arguments.
    """
    import jax
    import jax.numpy as jnp

    from attnlab.ops.chunk_scan import Chains
    from kernels_pallas.state_scan import state_scan

    case = {**DEFAULTS, **case}
    batch, chains = 2, case["chains"]
    lead = (batch, case["heads"], case["chunks"], case["chunk"])

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, v = array(*lead, case["rows"], dtype=case["dtype"]), array(*lead, case["width"], dtype=case["dtype"])
    arrays = [q, q, v, array(*lead, case["rows"] if case["channel"] else 1), array(*lead, 1) if case["delta"] else None]
    table = initial = None
    if chains:
        table = Chains(*(array(batch, size, dtype=jnp.int32) for size in (case["chunks"], case["chunks"], chains)))
        initial = array(batch, chains, case["heads"], case["rows"], case["width"])
    precision = jax.lax.Precision.HIGHEST if case["dtype"] == "float32" else None

    def run(table, initial, *arrays):
        return state_scan(*arrays, table, initial, precision, out_dtype=case["dtype"], group=case["group"])

    if not case["backward"]:
        return run, (table, initial, *arrays)

    def gradients(table, dout, initial, *arrays):
        (out, final), pullback = jax.vjp(lambda *x: run(table, *x), initial, *arrays)
        return pullback((dout.astype(out.dtype), jnp.ones_like(final)))

    return gradients, (table, v, initial, *arrays)


def measure(cases: list[dict[str, Any]], timeout: float = 600.0) -> list[dict[str, Region]]:
    """Compiles the cases in one process and reads their schedules.

    Args:
        cases: see `build`; all for one topology.
        timeout: seconds for all of them.

    Returns:
        For every case the bodies by pass: "forward", or for a case with `backward` "states" and "backward". A body is what one
        step of the grid runs, for `group` heads.

    Raises:
        RuntimeError: a case does not compile.
    """
    command = ["-m", "kernels_pallas.state_scan.compile_case", *map(json.dumps, cases)]
    regions = measure_process(command, "state_scan_", timeout)
    kernels = [list(bodies) for _, bodies in itertools.groupby(regions, key=lambda region: (region.stamp, region.kernel))]
    found = []
    for case in cases:
        by_pass = {}
        for bodies in (kernels.pop(0) for _ in range(2 if case.get("backward") else 1)):
            name = next(name for name in PASSES if f"_{name}" in bodies[0].kernel)
            by_pass[name] = max(bodies, key=lambda region: region.bundles)
        found.append(by_pass)
    return found


if __name__ == "__main__":
    for given in map(json.loads, sys.argv[1:]):
        compile_for(given.get("topology", "v5e"), lambda sharding, given=given: build(given, sharding))

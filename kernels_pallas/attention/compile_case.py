"""Compiles attention kernels for one TPU in this process: `python -m kernels_pallas.attention.compile_case JSON...`.

A process of its own, because the compiler reads its dump flags once; one for many cases, because its start costs more than a
case. `measure` runs it and reads the schedules. Used by `benchmarks/tpu_schedule.py`, `kernels_pallas.tune` and the tests.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

from kernels_pallas.common.static_schedule import DEVICE_KINDS, Region, compile_for
from kernels_pallas.common.static_schedule import measure as measure_process

DEFAULTS = {
    "topology": "v5e",
    "normalization": "sigmoid",
    "backward": False,
    "listed": False,
    "vectors": False,
    "causal": True,
    "length": 1024,
    "heads": 4,
    "kv_heads": 4,
    "width": 128,
    "dtype": "bfloat16",
    "bias": -9.0,
    "block_q": 512,
    "block_kv": 512,
    "list_width": 2,
    "tuning": {},
}
# Names of the compute bodies in the order of the code: blocks without and with a hidden pair, and for the softmax each for
# heads whose scores are certified small and for those that need a running maximum.
BODIES = ("full", "partial")
SOFTMAX_BODIES = ("full", "full, running maximum", "partial", "partial, running maximum")


def build(case: dict[str, Any], sharding: Any) -> tuple[Any, tuple]:
    """Returns the function to compile and its abstract arguments.

    Args:
        case: keys of `DEFAULTS`; `tuning` has fields of `tuning.Tuning`, tiles as lists that serve both kinds of blocks.
        sharding: of the arguments.
    """
    import jax
    import jax.numpy as jnp

    from kernels_pallas.attention import attention, tuning

    case = {**DEFAULTS, **case}
    tuned = {name: (tuning.Tiles(*x),) * 2 if isinstance(x, list) else x for name, x in case["tuning"].items()}
    length = case["length"]

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q = array((1, length, case["heads"], case["width"]), case["dtype"])
    kv = array((1, length, case["kv_heads"], case["width"]), case["dtype"])
    names, extra = [], []
    if case["listed"]:
        names.append("block_index")
        extra.append(array((1, 1, -(-length // case["block_q"]), case["list_width"]), jnp.int32))
    if case["vectors"]:
        names += ["q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids", "alibi_slopes"]
        extra += [array((1, length), jnp.int32)] * 4 + [array((1, case["heads"]), jnp.float32)]
    bias = {"bias": case["bias"]} if case["normalization"] == "sigmoid" else {}

    def run(q, k, v, *rest):
        with tuning.using(**tuned):
            return attention(
                q,
                k,
                v,
                normalization=case["normalization"],
                causal=case["causal"],
                block_q=case["block_q"],
                block_kv=case["block_kv"],
                device_kind=DEVICE_KINDS[case["topology"]],
                **bias,
                **dict(zip(names, rest, strict=True)),
            )

    if not case["backward"]:
        return run, (q, kv, kv, *extra)

    def gradients(q, k, v, do, *rest):
        return jax.vjp(lambda *x: run(*x, *rest), q, k, v)[1](do)

    return gradients, (q, kv, kv, q, *extra)


def measure(cases: list[dict[str, Any]], timeout: float = 600.0) -> list[dict[str, dict[str, Region]]]:
    """Compiles the cases in one process and reads their schedules.

    Args:
        cases: see `build`; all for one topology.
        timeout: seconds for all of them.

    Returns:
        For every case the bodies by pass ("forward", "dq", "dkv") and name (`BODIES`, `SOFTMAX_BODIES`). The forward pass
        of a sigmoid leaves nothing that its backward pass needs, so a backward case of it has none.

    Raises:
        RuntimeError: a case does not compile.
    """
    command = ["-m", "kernels_pallas.attention.compile_case", *map(json.dumps, cases)]
    regions = measure_process(command, "attention_", timeout)
    kernels = [list(bodies) for _, bodies in itertools.groupby(regions, key=lambda region: (region.stamp, region.kernel))]
    found = []
    for case in cases:
        case = {**DEFAULTS, **case}
        softmax = case["normalization"] == "softmax"
        wanted = ("forward",) * (softmax or not case["backward"]) + ("dq", "dkv") * case["backward"]
        by_pass = {}
        for bodies in (kernels.pop(0) for _ in wanted):
            name = next(name for name in wanted if f"_{name}" in bodies[0].kernel)
            names = SOFTMAX_BODIES if softmax and name == "forward" else BODIES
            by_pass[name] = dict(zip(names, bodies, strict=True))
        found.append(by_pass)
    return found


if __name__ == "__main__":
    for given in map(json.loads, sys.argv[1:]):
        compile_for(given.get("topology", "v5e"), lambda sharding, given=given: build(given, sharding))

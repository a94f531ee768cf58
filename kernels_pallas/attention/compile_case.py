"""Compiles one attention kernel for one TPU in this process: `python -m kernels_pallas.attention.compile_case JSON`.

A process of its own, because the compiler reads its dump flags once. Used by `benchmarks/tpu_schedule.py` and `kernels_pallas.tune`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from kernels_pallas.common.static_schedule import DEVICE_KINDS, compile_for

DEFAULTS = {
    "topology": "v5e",
    "normalization": "sigmoid",
    "backward": False,
    "listed": False,
    "vectors": False,
    "causal": True,
    "length": 4096,
    "heads": 4,
    "kv_heads": 4,
    "width": 128,
    "dtype": "bfloat16",
    "bias": -9.0,
    "block_q": 512,
    "block_kv": 512,
    "list_width": 4,
    "tiles": {},
}


def build(case: dict[str, Any], sharding: Any) -> tuple[Any, tuple]:
    """Returns the function to compile and its abstract arguments; the keys of `case` are those of `DEFAULTS`."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.attention import attention, tuning

    case = {**DEFAULTS, **case}
    if case["tiles"]:
        chosen = {name: (tuning.Tiles(*tiles),) * 2 for name, tiles in case["tiles"].items()}
        plain = tuning.lookup
        tuning.lookup = lambda *args: plain(*args)._replace(**chosen)
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


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    compile_for(chosen["topology"], lambda sharding: build(chosen, sharding))

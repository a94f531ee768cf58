"""Every attention kernel passes the real TPU compiler, forward and backward, for every TPU; no hardware needed."""

import re

import pytest

from kernels_pallas.attention import compile_case
from kernels_pallas.common import static_schedule

KINDS = {
    "dense": {},
    "listed": {"listed": True},
    "segments, positions, ALiBi": {"vectors": True},
}


@pytest.mark.parametrize("topology", static_schedule.TOPOLOGIES)
@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles(topology, normalization, kind):
    case = {"topology": topology, "normalization": normalization, "length": 250}
    case |= {"block_q": 128, "block_kv": 128, "kv_heads": 2, "width": 64 if kind == "dense" else 128, **KINDS[kind]}
    found = set()
    # the forward pass of a sigmoid leaves nothing that its backward pass needs: it is compiled by itself
    for backward in (False, True) if normalization == "sigmoid" else (True,):
        wanted = {**case, "backward": backward}
        compiled = static_schedule.compile_for(topology, lambda sharding, wanted=wanted: compile_case.build(wanted, sharding))
        found |= set(re.findall(r"attention_\w+?_(forward|dq|dkv)", compiled.as_text()))
    assert found == {"forward", "dq", "dkv"}


def test_float32_in_full_precision_compiles():
    case = {"topology": "v5e", "backward": True, "length": 250, "block_q": 128, "block_kv": 128, "dtype": "float32"}
    static_schedule.compile_for("v5e", lambda sharding: compile_case.build(case, sharding))


# Bundles of splash attention for a block of 512 x 512, and what ours may need of them without a mask in the block, by pass
# (benchmarks/results/tpu_schedule.md; on v5e the products alone take 1024, 1536 and 2048 cycles).
SPLASH = {"v5e": {"forward": 1167, "dq": 1489, "dkv": 1892}, "v6e": {"forward": 899, "dq": 1011, "dkv": 1279}}
LIMITS = {
    ("v5e", "softmax"): {"forward": 0.90, "dq": 1.0, "dkv": 0.98},
    ("v5e", "sigmoid"): {"forward": 0.91, "dq": 1.06, "dkv": 1.03},
    ("v6e", "softmax"): {"forward": 0.75, "dq": 0.92, "dkv": 0.92},
    ("v6e", "sigmoid"): {"forward": 0.75, "dq": 0.92, "dkv": 0.92},
}


@pytest.mark.parametrize("topology", SPLASH)
def test_inner_loops_do_not_spill_and_stay_lean(topology):
    kinds = [(n, b, False) for n in ("softmax", "sigmoid") for b in (False, True)] + [("sigmoid", False, True)]
    cases = [{"topology": topology, "normalization": n, "backward": b, "listed": listed} for n, b, listed in kinds]
    measured = compile_case.measure(cases)
    for (normalization, backward, _), found in zip(kinds, measured, strict=True):
        for work in ("dq", "dkv") if backward else ("forward",):
            region = found[work]["full"]
            assert region.spills == 0, (normalization, work)
            assert region.bundles <= LIMITS[topology, normalization][work] * SPLASH[topology][work], (normalization, work)
    dense, listed = (found["forward"]["full"].bundles for found in (measured[2], measured[4]))
    assert listed <= 1.05 * dense

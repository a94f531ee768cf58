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


# Bundles of splash attention for a block of 512 x 512 by pass (benchmarks/results/tpu_schedule.md).
SPLASH = {"v5e": {"forward": 1167, "dq": 1489, "dkv": 1892}, "v6e": {"forward": 899, "dq": 1011, "dkv": 1279}}


@pytest.mark.parametrize("topology", SPLASH)
def test_inner_loops_do_not_spill_and_need_no_more_bundles_than_splash(topology):
    cases = [
        {"topology": topology, "normalization": normalization, "backward": backward, "listed": listed, "length": 1024}
        for normalization, backward, listed in (
            ("softmax", False, False),
            ("sigmoid", False, False),
            ("sigmoid", False, True),
            ("softmax", True, False),
            ("sigmoid", True, False),
        )
    ]
    softmax, sigmoid, listed, *backward = compile_case.measure(cases)
    forward = [found["forward"]["full"] for found in (softmax, sigmoid, listed)]
    for region in forward:
        assert region.spills == 0
        assert region.bundles <= LIMIT[topology] * SPLASH[topology]["forward"]
    assert forward[2].bundles <= 1.05 * forward[1].bundles
    for found in backward:
        for work in ("dq", "dkv"):
            assert found[work]["full"].spills == 0
            assert found[work]["full"].bundles <= SPLASH[topology][work]


LIMIT = {"v5e": 0.91, "v6e": 0.76}

"""The scan kernels pass the real TPU compiler, forward and backward, for every TPU; no hardware needed."""

import re

import pytest

from kernels_pallas.common import static_schedule
from kernels_pallas.state_scan import compile_case

CASES = [
    {"chains": 3, "heads": 2, "rows": 64},
    {"chains": 3, "channel": True, "heads": 1},
    {"delta": True, "heads": 3, "chunk": 32, "dtype": "float32"},
]


@pytest.mark.parametrize("topology", static_schedule.TOPOLOGIES)
def test_compiles(topology):
    def build(sharding):
        both = [{"backward": backward, "chunks": 3, **case} for case in CASES for backward in (False, True)]
        pairs = [compile_case.build(case, sharding) for case in both]
        functions, arguments = zip(*pairs, strict=True)
        return lambda *given: [f(*x) for f, x in zip(functions, given, strict=True)], arguments

    compiled = static_schedule.compile_for(topology, build)
    assert set(re.findall(r"state_scan_(forward|states|backward)", compiled.as_text())) == {"forward", "states", "backward"}


# Bundles and spills of two heads with a chunk of 64 tokens and states of 128 x 128; bundles as measured, and 10 %.
LIMITS = {
    "v5e": {"forward": (430, 0), "states": (260, 0)},
    "v6e": {"forward": (388, 4), "states": (260, 0)},
}


@pytest.mark.parametrize("topology", LIMITS)
def test_inner_loops_stay_lean(topology):
    base = {"topology": topology, "group": 2, "heads": 2}
    forward, backward = compile_case.measure([base, {**base, "backward": True}])
    for name, region in (("forward", forward["forward"]), ("states", backward["states"])):
        bundles, spills = LIMITS[topology][name]
        assert region.bundles <= bundles and region.spills <= spills, (name, region)

"""The memory kernels pass the real TPU compiler, forward and backward, for every TPU; no hardware needed."""

import re

import pytest

from kernels_pallas.common import static_schedule
from kernels_pallas.memory_scan import compile_case

CASES = [{"widths": (128, 128), "before": True}, {"widths": (64, 128, 64), "resets": True}]


@pytest.mark.parametrize("topology", static_schedule.TOPOLOGIES)
def test_compiles(topology):
    def build(sharding):
        functions, arguments = zip(*(compile_case.build(case, sharding) for case in CASES), strict=True)
        return lambda *given: [f(*x) for f, x in zip(functions, given, strict=True)], arguments

    compiled = static_schedule.compile_for(topology, build)
    assert set(re.findall(r"memory_scan_(forward|states|backward)", compiled.as_text())) == {"forward", "states", "backward"}

"""Every attention kernel passes the real TPU compiler, forward and backward, for every TPU; no hardware needed."""

import json
import re

import pytest

from kernels_pallas.attention.compile_case import build
from kernels_pallas.common import static_schedule

KINDS = {
    "dense": {},
    "listed": {"listed": True, "list_width": 2},
    "segments, positions, ALiBi": {"vectors": True},
}


@pytest.mark.parametrize("topology", static_schedule.TOPOLOGIES)
@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles(topology, normalization, kind):
    case = {"topology": topology, "normalization": normalization, "backward": True, "length": 500}
    case |= {"block_q": 128, "block_kv": 128, "kv_heads": 2, "width": 64 if kind == "dense" else 128, **KINDS[kind]}
    compiled = static_schedule.compile_for(topology, lambda sharding: build(case, sharding))
    kernels = set(re.findall(r"attention_\w+_(forward|dq|dkv)", compiled.as_text()))
    # the forward pass of a sigmoid leaves nothing that its backward pass needs
    assert kernels >= ({"forward", "dq", "dkv"} if normalization == "softmax" else {"dq", "dkv"})


def test_float32_in_full_precision_compiles():
    case = {"topology": "v5e", "backward": True, "length": 256, "block_q": 128, "block_kv": 128, "dtype": "float32"}
    static_schedule.compile_for("v5e", lambda sharding: build(case, sharding))


@pytest.mark.parametrize(
    ("topology", "normalization", "bundles"),
    # of the body without a mask per 512 x 512 block; splash attention needs 1167 on v5e and 899 on v6e
    [("v5e", "softmax", 1167), ("v6e", "sigmoid", 674)],
)
def test_static_schedule(topology, normalization, bundles, monkeypatch):
    case = {"topology": topology, "normalization": normalization, "length": 1024}
    command = ["-m", "kernels_pallas.attention.compile_case", json.dumps(case)]
    region = static_schedule.measure(command, "attention_")[0]
    assert region.bundles <= bundles
    assert region.spills <= 8

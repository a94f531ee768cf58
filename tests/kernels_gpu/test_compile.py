"""Every Triton kernel passes Triton's compiler and ptxas for H100, and the whole op lowers through jax-triton; no GPU needed."""

import jax
import jax.numpy as jnp
import pytest

from attnlab import ops
from attnlab.ops import dispatch
from kernels_pallas.attention_triton.compile_case import compile_case

LISTED = {"listed": True, "vectors": True, "alibi": True}
RAGGED = {"causal": False, "window": (700, 600), "length": 4000, "keys": 4001, "kv_heads": 2}
FORWARD = {
    "softmax, H = 128": {},
    "sigmoid, H = 128": {"normalization": "sigmoid"},
    "softmax, H = 64": {"width": 64},
    "sigmoid, H = 64, lists, segments, positions, ALiBi": {"width": 64, "normalization": "sigmoid", **LISTED},
    "softmax, H = 128, lists, segments, positions, ALiBi": LISTED,
    "softmax, H = 80, window of both sides, ragged": {"width": 80, **RAGGED},
    "sigmoid, H = 256": {"width": 256, "normalization": "sigmoid"},
    "softmax, H = 128, float32": {"dtype": "float32"},
}
BACKWARD = {
    "dq": {"kind": "dq"},
    "dkv": {"kind": "dkv"},
    "dq, sigmoid, H = 64, lists": {"kind": "dq", "width": 64, "normalization": "sigmoid", **LISTED},
    "dkv, sigmoid, H = 64, lists": {"kind": "dkv", "width": 64, "normalization": "sigmoid", **LISTED},
    "dkv, window of both sides, ragged": {"kind": "dkv", **RAGGED},
}
SHARED_OF_H100 = 232448


@pytest.mark.parametrize("name", FORWARD)
def test_forward_kernels_do_not_spill(name):
    report = compile_case(FORWARD[name])
    assert report.spills == 0
    assert report.shared <= SHARED_OF_H100
    if "float32" not in name:
        assert "wgmma.mma_async" in report.ptx  # on Hopper's tensor cores


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_kernels_compile(name):
    report = compile_case(BACKWARD[name])
    assert report.spills <= (256 if "window" in name else 0)  # bytes; the masks of both sides cost the dkv kernel some
    assert report.shared <= SHARED_OF_H100
    assert "wgmma.mma_async" in report.ptx


@pytest.mark.parametrize("kind", ["forward", "dkv"])
def test_small_shared_memory(kind):
    """An Ada GPU gives a program 99 KiB."""
    report = compile_case({"kind": kind, "capability": 89, "device_kind": "NVIDIA L4", **RAGGED})
    assert report.shared <= 99 * 1024


def test_a_step_lowers_through_jax_triton():
    def step(q, k, v, do, index):
        out, pullback = jax.vjp(lambda *x: ops.block_attention(*x, index, block_q=128, block_kv=128, causal=True), q, k, v)
        return out, pullback(do)

    q, kv = (jax.ShapeDtypeStruct((2, 512, heads, 64), jnp.bfloat16) for heads in (4, 2))
    index = jax.ShapeDtypeStruct((2, 2, 4, 2), jnp.int32)
    with dispatch.target("gpu", "NVIDIA H100 80GB HBM3"), dispatch.record() as decisions:
        lowered = jax.jit(step).trace(q, kv, kv, q, index).lower(lowering_platforms=("cuda",))
    assert [decision.chosen for decision in decisions] == ["triton"]
    assert lowered.as_text().count("@triton_kernel_call") == 3

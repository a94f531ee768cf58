"""The Triton scan kernels pass Triton's compiler and ptxas for H100, and a step lowers through jax-triton; no GPU needed."""

import jax
import jax.numpy as jnp
import pytest

from attnlab import ops
from attnlab.ops import dispatch
from kernels_pallas.state_scan_triton.compile_case import BACKWARD, FORWARD, compile_case

CASES = {
    "linear": {},
    "delta, H = 64": {"delta": True, "rows": 64, "width": 64},
    "delta, H = 128": {"delta": True},
    "linear, channels, chains, H = 128": {"channel": True, "chains": 3},
}
SHARED_OF_H100 = 232448


@pytest.mark.parametrize("name", CASES)
def test_forward_kernels_do_not_spill(name):
    for kernel, report in compile_case(CASES[name], FORWARD).items():
        assert report.spills == 0, (kernel, report)
        assert report.shared <= SHARED_OF_H100, (kernel, report)
        assert "wgmma.mma_async" in report.ptx, kernel  # on Hopper's tensor cores


@pytest.mark.parametrize("name", ["delta, H = 128", "linear, channels, chains, H = 128"])
def test_backward_kernels_compile(name):
    for kernel, report in compile_case(CASES[name], BACKWARD).items():
        assert report.spills == 0, (kernel, report)
        assert report.shared <= SHARED_OF_H100, (kernel, report)


def test_a_step_lowers_through_jax_triton():
    def step(q, k, v, log_decay, beta):
        scan = lambda *x: ops.gated_delta_scan(*x, implementation="triton")  # noqa: E731
        results, pullback = jax.vjp(scan, q, k, v, log_decay, beta)
        return results, pullback(results)

    qkv = [jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)] * 3
    gates = [jax.ShapeDtypeStruct((2, 256, 4), jnp.float32)] * 2
    with dispatch.target("gpu", "NVIDIA H100 80GB HBM3"), dispatch.record() as decisions:
        lowered = jax.jit(step).trace(*qkv, *gates).lower(lowering_platforms=("cuda",))
    assert [decision.chosen for decision in decisions] == ["triton"]
    assert lowered.as_text().count("@triton_kernel_call") == 8  # three forward; two of them again, and three

"""The Triton memory kernels pass Triton's compiler and ptxas for H100, and the op lowers through jax-triton; no GPU needed."""

import jax
import jax.numpy as jnp

from attnlab.ops import dispatch, neural_memory
from kernels_pallas.memory_scan_triton.compile_case import compile_case

SHARED_OF_H100 = 232448


def test_forward_kernels_do_not_spill():
    reports = compile_case({"width": 64, "resets": True})
    assert reports["forward"].spills == reports["states"].spills == 0
    assert reports["backward"].spills <= 512  # bytes a thread
    assert all(report.shared <= SHARED_OF_H100 for report in reports.values())


def test_a_step_lowers_through_jax_triton():
    def step(dy, *inputs):
        y, pullback = jax.vjp(lambda *x: neural_memory(*x[:6], x[6], implementation="triton").y, *inputs)
        return y, pullback(dy)

    token, gate = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32), jax.ShapeDtypeStruct((1, 128, 2), jnp.float32)
    weights = [jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)]
    with dispatch.target("gpu", "NVIDIA H100 80GB HBM3"):
        lowered = jax.jit(step).trace(token, token, token, token, gate, gate, gate, weights).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@triton_kernel_call") == 3

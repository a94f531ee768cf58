"""The scan kernels in Triton for NVIDIA GPUs, called through jax-triton; their siblings for TPU are in `state_scan`."""

from kernels_pallas.state_scan_triton.vjp import refusal, state_scan

__all__ = ["refusal", "state_scan"]

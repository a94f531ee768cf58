"""Kernels in Triton for the neural memory of Titans with one layer, for NVIDIA GPUs."""

from kernels_pallas.memory_scan_triton.vjp import memory_scan, refusal

__all__ = ["memory_scan", "refusal"]

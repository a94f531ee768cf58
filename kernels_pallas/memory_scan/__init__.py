"""Kernels for the neural memory of Titans: an MLP of one or two layers that is written chunk by chunk, with momentum."""

from kernels_pallas.memory_scan.vjp import memory_scan, refusal

__all__ = ["memory_scan", "refusal"]

"""Attention kernels with a pluggable normalisation of the scores and a list of key blocks per query block."""

from kernels_pallas.attention.vjp import attention, refusal

__all__ = ["attention", "refusal"]

"""The attention kernels in Triton for NVIDIA GPUs, called through jax-triton; their siblings for TPU are in `attention`."""

from kernels_pallas.attention_triton.vjp import attention, refusal

__all__ = ["attention", "refusal"]

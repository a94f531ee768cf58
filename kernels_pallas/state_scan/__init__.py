"""Kernels for the chunked scan of a decaying state: gated linear attention and the gated delta rule, over chains of chunks."""

from kernels_pallas.state_scan.vjp import refusal, state_scan

__all__ = ["refusal", "state_scan"]

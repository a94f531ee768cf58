"""Kernels in Pallas behind the ops of `attnlab`; nothing here imports anything above `attnlab.ops`."""

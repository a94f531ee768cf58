"""The environment that compiling without hardware needs; imports no jax, so that it can be set before jax reads it."""

from __future__ import annotations

import os
import sys

_VALUES = {
    "JAX_PLATFORMS": "cpu",  # compute on the CPU; an accelerator in this machine stays free
    "TPU_SKIP_MDS_QUERY": "1",  # do not wait for the metadata server of a cloud machine
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling does not take the TPU: no lock is needed
}
_DEFAULTS = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # only ends the search for one; the topology is named explicitly
    # the report says what matters of the compilers' logs
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def prepare(spec: str) -> None:
    """Makes this a process that compiles for the topology `spec` and computes on the CPU, whatever hardware it finds.

    To be called before jax starts a backend, whatever `JAX_PLATFORMS` says; best before jax is imported. A bad
    specification is not refused here: `topology.parse` does that where errors are reported.
    """
    os.environ.update(_VALUES)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if spec.strip().lower().startswith(("gpu", "cuda")) and "xla_gpu_autotune_level" not in flags:
        # autotuning measures candidates on the device, and there is none
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    if "jax" in sys.modules:  # then JAX_PLATFORMS has been read already
        sys.modules["jax"].config.update("jax_platforms", "cpu")

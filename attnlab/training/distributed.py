"""Start of a run with several processes: TPU pods, SLURM, Kubernetes, MPI, or an address given by hand."""

from __future__ import annotations

import os

from attnlab.errors import ConfigError


def detected() -> str | None:
    """Names the launcher that started this process as one of several, or None."""
    env = os.environ
    if int(env.get("SLURM_NTASKS", "1") or 1) > 1 and "SLURM_PROCID" in env:
        return "SLURM"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1") or 1) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "TPU pod"
    return None


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, multihost: bool = False
) -> None:
    """Joins the processes of a run when flags or environment say that there are several; else does nothing.

    Must come before anything asks JAX for its devices.

    Args:
        coordinator: `host:port` of process 0; then the next two are needed as well.
        num_processes: how many processes there are.
        process_id: which one this is, from 0.
        multihost: let JAX find the above by itself (a TPU VM without an environment that tells).

    Raises:
        ConfigError: flags that contradict one another, or a start that failed.
    """
    import jax

    if coordinator is None and (num_processes is not None or process_id is not None):
        raise ConfigError("--num_processes and --process_id need --coordinator=HOST:PORT. Add it, or leave all three out.")
    if coordinator is not None:
        if num_processes is None or process_id is None:
            raise ConfigError(f"--coordinator={coordinator} needs --num_processes and --process_id. Add them.")
        if ":" not in coordinator:
            raise ConfigError(f"--coordinator={coordinator}: no port. Write HOST:PORT, for example {coordinator}:8476.")
        if not 0 <= process_id < num_processes:
            raise ConfigError(f"--process_id={process_id}: not in 0..{num_processes - 1} of --num_processes={num_processes}.")
    launcher = detected()
    if coordinator is None and launcher is None and not multihost:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if coordinator is not None:
            jax.distributed.initialize(coordinator, num_processes, process_id)
        else:
            jax.distributed.initialize()
    except Exception as error:
        how = f"--coordinator={coordinator}" if coordinator else f"the environment of {launcher or 'this machine'}"
        raise ConfigError(
            f"could not join the other processes by {how}: {error}. Check that process 0 is reachable and that all "
            "processes were started, or give --coordinator, --num_processes and --process_id."
        ) from error

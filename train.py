"""Trains the model that a config describes.

python train.py --config=configs/lm.py:small --workdir=runs/small
    trains, evaluates and checkpoints; the same command goes on where it stopped.

python train.py --config=configs/lm.py:1b --aot=tpu:v5e:16x16
    compiles the same step for hardware that is not here: does it fit, how much memory, how fast?
"""

import sys

from absl import flags

from attnlab.training import cli

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, config. Made when missing.")
_AOT = flags.DEFINE_string(
    "aot", None, "Do not train: size the run for tpu:{v4,v5e,v5p,v6e,tpu7x}:SHAPE or gpu:h100:COUNT, on this machine."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, when the environment does not tell.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "One of several processes that JAX can find by itself (TPU VM).")


def main() -> int:
    """Returns the exit code."""
    from attnlab.errors import ConfigError

    if _CONFIG.value is None:
        raise ConfigError("--config is missing. Try --config=configs/lm.py:small, or --help.")
    if _AOT.value:
        from attnlab.training import aot

        return aot.run(_CONFIG.value, _AOT.value, _WORKDIR.value)
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is missing. Name a folder for the run, for example --workdir=runs/first.")
    from attnlab.training import distributed, loop

    distributed.initialize(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, multihost=_MULTIHOST.value
    )
    loop.train(_CONFIG.value, _WORKDIR.value)
    return 0


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument.startswith("--aot="):  # the compilers read the environment when jax starts
            from attnlab.training import aot_environment

            aot_environment.prepare(argument.removeprefix("--aot="))
    cli.run(main)

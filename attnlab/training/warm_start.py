"""Starting a run from the parameters of another one: fine-tuning, context extension, adapters."""

from __future__ import annotations

import os
from typing import Any

import jax
import ml_collections
from flax import traverse_util

from attnlab.errors import ConfigError, field_error
from attnlab.methods import lora
from attnlab.models import safetensors, torch_weights
from attnlab.training import workdir
from attnlab.training.build import Run, build
from attnlab.training.checkpoint import Checkpoints
from attnlab.training.step import TrainState


def load(run: Run, state: TrainState, source: str) -> TrainState:
    """Puts the parameters of another run, or of a file of published weights, into a fresh state.

    Args:
        run: the new run.
        state: its initial state.
        source: workdir of a run (see `load_run`), or a .safetensors or .npz file (see `models.torch_weights`).

    Raises:
        ConfigError: neither of them, or parameters that do not fit the model: the first that do not are named.
    """
    if os.path.isfile(source):
        return load_file(run, state, source)
    return load_run(run, state, source)


def load_file(run: Run, state: TrainState, path: str) -> TrainState:
    """Puts a state dict by its published names into a fresh state: parameters, batch statistics, and the moving average."""
    own = {"params": state.params, **state.collections}
    try:
        loaded = torch_weights.load_weights(run.task.model, safetensors.read_arrays(path), own)
    except ConfigError as error:
        raise ConfigError(f"config.init_from = {path!r}: {error}") from None
    loaded = jax.tree.map(
        lambda array, leaf: jax.device_put(jax.numpy.asarray(array, leaf.dtype), leaf.sharding),
        loaded, {name: own[name] for name in loaded},
    )  # fmt: skip
    params = loaded.pop("params")
    ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, params)
    return state.replace(params=params, ema=ema, collections=state.collections | loaded)


def load_run(run: Run, state: TrainState, folder: str) -> TrainState:
    """Puts the newest parameters of the run in `folder` (their moving average where it keeps one) into a fresh state.

    Parameters of adapters stay as initialised where the other run has none; all others must agree in name and shape. The
    other run's optimizer state is read and dropped.

    Args:
        run: the new run.
        state: its initial state.
        folder: workdir of the other run; its mixers may differ where their parameters do not.

    Raises:
        ConfigError: no run or checkpoint there, or parameters that do not agree.
    """
    if not os.path.isdir(folder):
        fix = "Give the --workdir of a run, or a .safetensors or .npz file"
        raise field_error("config.init_from", folder, "is neither a folder nor a file", fix)
    config = ml_collections.ConfigDict(workdir.read_config(folder))
    with config.unlocked():
        config.mesh, config.sharding_rules, config.batch_size = run.config.mesh, run.config.sharding_rules, run.config.batch_size
        config.grad_accum = run.config.grad_accum
    outputs = workdir.facts(folder).get("outputs")
    other = build(config, devices=list(run.mesh.devices.flat), outputs=outputs)
    checkpoints = Checkpoints(folder, config, read_only=True)
    try:
        restored = checkpoints.restore(other.abstract_state)
    finally:
        checkpoints.close()
    if restored is None:
        raise field_error("config.init_from", folder, "has no checkpoint", "Train that run until one is written")
    params = restored[0].params if restored[0].ema is None else restored[0].ema
    params = _fitted(params, state.params, folder)
    ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, params)
    return state.replace(params=params, ema=ema)


def _fitted(given: Any, wanted: Any, folder: str) -> Any:
    """The given parameters on the shardings of the wanted ones; adapters of the latter where there are none."""
    given, wanted = traverse_util.flatten_dict(given), traverse_util.flatten_dict(wanted)
    merged = {path: leaf for path, leaf in wanted.items() if lora.is_adapter(path)} | given
    different = [
        f"  {'/'.join(path)}: {_shape(merged, path)} there, {_shape(wanted, path)} here"
        for path in sorted(merged.keys() | wanted.keys())
        if _shape(merged, path) != _shape(wanted, path)
    ]
    if different:
        raise ConfigError(
            f"config.init_from = {folder!r}: that run has another model. Use its model.* fields.\n" + "\n".join(different[:8])
        )
    placed = {path: jax.device_put(leaf.astype(wanted[path].dtype), wanted[path].sharding) for path, leaf in merged.items()}
    return traverse_util.unflatten_dict(placed)


def _shape(tree: dict[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    return tree[path].shape if path in tree else "absent"

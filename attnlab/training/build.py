"""Builds a run from its config: mesh, task, optimizer, shardings and the jitted steps, without allocating anything."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab import registry
from attnlab.errors import field_error
from attnlab.methods import lora
from attnlab.methods.task import Task
from attnlab.training import sharding
from attnlab.training.config import validate
from attnlab.training.mesh import make_mesh
from attnlab.training.optim import make_optimizer
from attnlab.training.step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """What `build` returns.

    Attributes:
        abstract_state: `TrainState` of `jax.ShapeDtypeStruct`s that carry their shardings.
        batch_spec: shapes and shardings of the global training batch.
        eval_batch_spec: the same of an evaluation batch.
        train_step: jitted `(state, batch) -> (state, metrics)`, the state donated.
        eval_step: jitted `(state, batch) -> sums`, on the moving average of the parameters where the run keeps one.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    task: Task
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    abstract_state: TrainState
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    eval_batch_spec: dict[str, jax.ShapeDtypeStruct]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    _init: Callable[[jax.Array], TrainState]

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The mesh and the logical rules; tracing, lowering and calling the steps happen inside."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.config.sharding_rules):
            yield

    def init_state(self) -> TrainState:
        """Initialises the state on the mesh, each shard where it belongs."""
        with self.context():
            return self._init(jax.random.key(self.config.seed))

    def num_params(self) -> int:
        """Number of trainable and frozen parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))


def build(
    config: ml_collections.ConfigDict,
    *,
    devices: Sequence[jax.Device] | None = None,
    outputs: int | None = None,
) -> Run:
    """Checks the config against the devices and builds the run.

    Args:
        config: as of `configs/`.
        devices: of the mesh; all devices when None. Devices of a topology description (no hardware) do as well.
        outputs: of the data (`Dataset.outputs`); None = what the config says of them, without data.

    Raises:
        ConfigError: a field is out of range, or does not fit the mesh.
    """
    validate(config)
    mesh = make_mesh(config.mesh, devices)
    rules = config.sharding_rules
    sharding.check_rules(rules, mesh)
    task_class = registry.get("task", config.task)
    task: Task = task_class(config, task_class.outputs(config, outputs))
    task = lora.from_config(config, task)

    replicated = NamedSharding(mesh, PartitionSpec())
    def placed(specs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(
                spec.shape, spec.dtype, sharding=sharding.batch_sharding(mesh, rules, task.batch_axes, len(spec.shape))
            )
            for name, spec in specs.items()
        }

    batch_spec, eval_batch_spec = placed(task.batch_spec()), placed(task.eval_batch_spec())
    _check_batch(config, mesh, batch_spec)

    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(task.init, key)
    shardings = sharding.variable_shardings(boxed, mesh, rules)
    params = nn.unbox(boxed)["params"]
    tx, schedule = make_optimizer(config.optimizer, params, config.num_train_steps)
    if hasattr(task, "optimizer"):  # a task may train a part of its parameters
        tx = task.optimizer(tx, params)
    init = functools.partial(init_state, task, tx, ema=config.ema_decay > 0)
    state_shardings = TrainState(
        step=replicated,
        params=shardings["params"],
        opt_state=sharding.optimizer_shardings(tx, params, shardings["params"], mesh),
        collections={name: tree for name, tree in shardings.items() if name != "params"},
        ema=shardings["params"] if config.ema_decay > 0 else None,
    )
    abstract_state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(init, key),
        state_shardings,
    )
    train_step = make_train_step(
        task, tx, schedule, seed=config.seed, grad_accum=config.grad_accum, ema_decay=config.ema_decay
    )

    def eval_step(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        params = state.params if state.ema is None else state.ema
        return task.eval(params, state.collections, batch)

    batch_shardings, eval_shardings = (
        {name: spec.sharding for name, spec in specs.items()} for specs in (batch_spec, eval_batch_spec)
    )
    return Run(
        config=config,
        mesh=mesh,
        task=task,
        tx=tx,
        schedule=schedule,
        abstract_state=abstract_state,
        batch_spec=batch_spec,
        eval_batch_spec=eval_batch_spec,
        train_step=jax.jit(
            train_step,
            donate_argnums=0,
            in_shardings=(state_shardings, batch_shardings),
            out_shardings=(state_shardings, replicated),
        ),
        eval_step=jax.jit(eval_step, in_shardings=(state_shardings, eval_shardings), out_shardings=replicated),
        _init=jax.jit(init, out_shardings=state_shardings),
    )


def _check_batch(config: ml_collections.ConfigDict, mesh: Mesh, batch_spec: dict[str, jax.ShapeDtypeStruct]) -> None:
    sizes = json.dumps({axis: size for axis, size in mesh.shape.items() if size > 1})
    for spec in batch_spec.values():
        rows = spec.sharding.shard_shape(spec.shape) if _divides(spec) else None
        if rows is None:
            ways = _ways(spec, 0)
            if spec.shape[0] % ways:
                raise field_error("config.batch_size", config.batch_size, f"is not divisible over the mesh {sizes}",
                                  f"Set a multiple of {ways * config.grad_accum}")  # fmt: skip
            raise field_error("config.seq_len", config.seq_len, f"is not divisible over the mesh {sizes}",
                              f"Set a multiple of {_ways(spec, 1)}")  # fmt: skip
        if rows[0] % config.grad_accum:
            raise field_error(
                "config.grad_accum", config.grad_accum,
                f"does not divide the {rows[0]} rows that a device has of config.batch_size = {config.batch_size}",
                f"Set config.batch_size to a multiple of {_ways(spec, 0) * config.grad_accum}",
            )  # fmt: skip


def _ways(spec: jax.ShapeDtypeStruct, dim: int) -> int:
    partition = spec.sharding.spec
    entry = partition[dim] if dim < len(partition) else None
    axes = (entry,) if isinstance(entry, str) else entry or ()
    ways = 1
    for axis in axes:
        ways *= spec.sharding.mesh.shape[axis]
    return ways


def _divides(spec: jax.ShapeDtypeStruct) -> bool:
    return all(size % _ways(spec, dim) == 0 for dim, size in enumerate(spec.shape))

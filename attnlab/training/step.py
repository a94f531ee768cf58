"""The train state and the one train step: `train_step(state, batch) -> (state, metrics)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from attnlab.methods.task import Task

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: int32 scalar, steps taken.
        params: the parameters, float32, unboxed.
        opt_state: optax's state.
        collections: variables that are not parameters (online statistics), possibly empty.
        ema: the moving average of the parameters, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    collections: Any
    ema: Any


def init_state(task: Task, tx: optax.GradientTransformation, rng: jax.Array, *, ema: bool) -> TrainState:
    """Initialises a state; the same numbers on every mesh, since the random bits do not depend on the sharding."""
    from flax import linen as nn

    variables = nn.unbox(task.init(rng))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        collections=variables,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    grad_accum: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step; jit it with a donated state.

    With `grad_accum` = A > 1 the batch is taken as A micro-batches in a scan. Rows i, i + A, i + 2A, ... form
    micro-batch i, so that each device cuts its own rows and nothing moves. Micro-batches are weighted by their mass:
    the accumulated gradient is the whole batch's.

    A task with `update` makes the step itself, of as many passes as it needs (`methods.gradient_routing`).

    Metrics of a step: what the task reports, `learning_rate`, `grad_norm` (before clipping), `param_norm`.
    """
    value_and_grad = jax.value_and_grad(task.loss, has_aux=True)

    def whole(params: Any, collections: Any, batch: Batch, rng: jax.Array):
        (_, aux), grads = value_and_grad(params, collections, batch, rng)
        return grads, aux.metrics, aux.collections

    def accumulated(params: Any, collections: Any, batch: Batch, rng: jax.Array):
        def cut(x):
            return x.reshape(x.shape[0] // grad_accum, grad_accum, *x.shape[1:]).swapaxes(0, 1)

        def micro(carry, scanned):
            total, mass, collections = carry
            index, rows = scanned
            (_, aux), grads = value_and_grad(params, collections, rows, jax.random.fold_in(rng, index))
            weighted = jax.tree.map(lambda x: x * aux.weight, (grads, aux.metrics))
            return (jax.tree.map(jnp.add, total, weighted), mass + aux.weight, aux.collections), None

        micro_batches = (jnp.arange(grad_accum), jax.tree.map(cut, batch))
        first = jax.tree.map(lambda x: x[0], micro_batches[1])
        shapes = jax.eval_shape(value_and_grad, params, collections, first, rng)
        (_, aux), grads = shapes
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, aux.metrics))
        carry = (zeros, jnp.zeros(aux.weight.shape, aux.weight.dtype), collections)
        (total, mass, collections), _ = jax.lax.scan(micro, carry, micro_batches)
        grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(mass, 1.0), total)
        return grads, metrics, collections

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = whole if grad_accum == 1 else accumulated
        params, opt_state, collections = state.params, state.opt_state, state.collections
        if hasattr(task, "update"):
            params, opt_state, collections, metrics, grads = task.update(compute, tx, params, opt_state, collections, batch, rng)
        else:
            grads, metrics, collections = compute(params, collections, batch, rng)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
        metrics |= {
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
        }
        return TrainState(state.step + 1, params, opt_state, collections, ema), metrics

    return train_step

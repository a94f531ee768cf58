"""Gradient routing: gates and weights are trained by optimizers of their own, in two passes over the same batch.

"Feature Selection Gates with Gradient Routing for Endoscopic Image Computing" (2024, arXiv 2407.04400). Per batch: the gate
pass (gradient, clip, Adam on the gates), then the main pass with the new gates (gradient, clip, the run's optimizer on all
other parameters). Both are one jitted step: a task that has `update` is asked by the train step to make it.

    routing = Routing(mode="clean", gate_learning_rate=1e-2)
    tx = routing.optimizer(optax.adam(1e-4), params)
    step = routing.update(compute, tx, params, tx.init(params), collections, batch, rng)

From a config: `config.task = "gated_image_classification"`, `--config.gradient_routing.mode=accumulate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from attnlab.errors import field_error
from attnlab.methods import fields
from attnlab.methods.image_classification import ImageClassification
from attnlab.nn.feature_gates import gate_weights, is_gate, raw_gates

MODES = ("clean", "accumulate", "joint")
_CLIP_FLOOR = 1e-6  # beside the norm, as torch.nn.utils.clip_grad_norm_
_CYCLES = 64  # of warm restarts that are told apart

# (params, collections, batch, rng) -> (gradients of all parameters, metrics, collections)
Compute = Callable[[Any, Any, Any, jax.Array], tuple[Any, dict[str, jax.Array], Any]]


class RoutedOptimizer(NamedTuple):
    """An `optax.GradientTransformation` of two parts.

    Attributes:
        init: params -> {"gates", "main"}.
        update: (gradients, state, params) -> (updates, state): both parts by one gradient, which only mode "joint" allows.
        gates: moves gates, leaves all else.
        main: moves all else, leaves gates.
    """

    init: Callable[[Any], Any]
    update: Callable[..., Any]
    gates: optax.GradientTransformation
    main: optax.GradientTransformation


class Step(NamedTuple):
    """What `Routing.update` returns: the new state, the metrics, and the main pass's gradient before it is clipped."""

    params: Any
    opt_state: Any
    collections: Any
    metrics: dict[str, jax.Array]
    grads: Any


@dataclasses.dataclass(frozen=True)
class Routing:
    """How gates are trained.

    Attributes:
        mode: "clean": each pass uses its own gradient (the paper). "accumulate": gradients of both passes add up in all
            parameters and both clips see all of them, as in the released loop without mixed precision. "joint": one pass, and
            both optimizers on its gradient (for comparisons).
        gate_learning_rate: of Adam on the gates.
        gate_schedule: "constant", or "cosine" over the run, down to `gate_final_fraction`.
        gate_final_fraction: share of the rate at the last step.
        clip_gates: norm of the gate pass's gradient; 0 = off.
        clip_main: of the main pass's; 0 = off. (`optimizer.clip_norm` is another clip, in the main optimizer.)
        l2: times the parameters, added to the main gradient after clipping: weight decay as in Adam, not AdamW.
        num_train_steps: for the schedule.
    """

    mode: str = "clean"
    gate_learning_rate: float = 1e-2
    gate_schedule: str = "constant"
    gate_final_fraction: float = 1e-3
    clip_gates: float = 128.0
    clip_main: float = 10.0
    l2: float = 0.0
    num_train_steps: int = 0

    def __post_init__(self):
        fields.one_of("gradient_routing.mode", self.mode, MODES)
        fields.one_of("gradient_routing.gate_schedule", self.gate_schedule, ("constant", "cosine"))
        for name in ("gate_learning_rate", "clip_gates", "clip_main", "l2"):
            if not getattr(self, name) >= 0:
                raise field_error(f"config.gradient_routing.{name}", getattr(self, name), "must not be negative", "Set 0 or more")

    def optimizer(self, tx: optax.GradientTransformation, params: Any) -> RoutedOptimizer:
        """Returns Adam on the gates and `tx` on all other parameters of the tree."""
        labels = jax.tree_util.tree_map_with_path(lambda path, _: "gates" if _is_gate(path) else "main", params)
        rate = self.gate_learning_rate
        if self.gate_schedule == "cosine":
            rate = optax.cosine_decay_schedule(rate, self.num_train_steps, self.gate_final_fraction)
        main = optax.chain(optax.add_decayed_weights(self.l2), tx) if self.l2 else tx
        gates = optax.multi_transform({"gates": optax.adam(rate), "main": optax.set_to_zero()}, labels)
        main = optax.multi_transform({"gates": optax.set_to_zero(), "main": main}, labels)

        def init(params: Any) -> dict[str, Any]:
            return {"gates": gates.init(params), "main": main.init(params)}

        def update(grads: Any, state: dict[str, Any], params: Any = None) -> tuple[Any, dict[str, Any]]:
            if self.mode != "joint":
                raise NotImplementedError(f"mode {self.mode!r} has two passes: the train step has to call the task's update.")
            first, gate_state = gates.update(grads, state["gates"], params)
            second, main_state = main.update(grads, state["main"], params)
            return jax.tree.map(jnp.add, first, second), {"gates": gate_state, "main": main_state}

        return RoutedOptimizer(init, update, gates, main)

    def update(
        self, compute: Compute, tx: RoutedOptimizer, params: Any, opt_state: Any, collections: Any, batch: Any, rng: jax.Array
    ) -> Step:
        """Makes one step: the gate pass, then the main pass with the new gates.

        The passes see the same batch; dropout draws anew and batch statistics move in both. Entries of gradients that are
        not finite count as zero. What XLA does not need of the gate pass's gradient it does not compute.

        Args:
            compute: gradients of all parameters, metrics (of which `loss` is reported for both passes) and collections.
            tx: of `optimizer`.
            params: all parameters.
            opt_state: of `tx`.
            collections: variables that are not parameters.
            batch: of the step.
            rng: of the step.
        """
        if self.mode == "joint":
            grads, metrics, collections = compute(params, collections, batch, rng)
            grads, updated = _finite(grads), metrics | _gate_metrics(params)
            clipped = clip_by_norm(grads, self.clip_main)[0]
            updates, opt_state = tx.update(clipped, opt_state, params)
            return Step(optax.apply_updates(params, updates), opt_state, collections, updated, grads)
        rngs = jax.random.split(rng)
        first, early, collections = compute(params, collections, batch, rngs[0])
        first = _finite(first)
        first, gate_norm = clip_by_norm(first if self.mode == "accumulate" else _only(first, gates=True), self.clip_gates)
        updates, gate_state = tx.gates.update(first, opt_state["gates"], params)
        params = optax.apply_updates(params, updates)

        second, metrics, collections = compute(params, collections, batch, rngs[1])
        if self.mode == "accumulate":
            second = _finite(jax.tree.map(jnp.add, first, second))
        else:
            second = _only(_finite(second), gates=False)
        clipped, _ = clip_by_norm(second, self.clip_main)
        updates, main_state = tx.main.update(clipped, opt_state["main"], params)
        metrics = metrics | {"gate_pass/loss": early["loss"], "gate_pass/grad_norm": gate_norm} | _gate_metrics(params)
        opt_state = {"gates": gate_state, "main": main_state}
        return Step(optax.apply_updates(params, updates), opt_state, collections, metrics, second)


class GatedImageClassification(ImageClassification):
    """Image classification whose gates are trained by gradient routing; cross-entropy in both passes."""

    def __init__(self, config: ml_collections.ConfigDict, num_classes: int):
        super().__init__(config, num_classes)
        self.routing = Routing(**config.gradient_routing, num_train_steps=config.num_train_steps)

    @staticmethod
    def defaults(config: ml_collections.ConfigDict) -> None:
        """Adds `gradient_routing`, fields of `Routing`, to those of image classification."""
        ImageClassification.defaults(config)
        values = {field.name: field.default for field in dataclasses.fields(Routing) if field.name != "num_train_steps"}
        config.gradient_routing = ml_collections.ConfigDict(values)

    @staticmethod
    def validate(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
        """Checks the fields of `defaults`.

        Raises:
            ConfigError: the first bad field, with its value and the fix.
        """
        ImageClassification.validate(config, values)
        Routing(**config.gradient_routing)

    def optimizer(self, tx: optax.GradientTransformation, params: Any) -> RoutedOptimizer:
        """Adam on the gates, the run's optimizer on all other parameters.

        Raises:
            ConfigError: the model has no gates.
        """
        if not raw_gates(params):
            raise field_error("config.model.name", type(self.model).__name__, "has no feature gates",
                              "Use a gated model, or the task image_classification")  # fmt: skip
        return self.routing.optimizer(tx, params)

    def update(
        self, compute: Compute, tx: RoutedOptimizer, params: Any, opt_state: Any, collections: Any, batch: Any, rng: jax.Array
    ) -> Step:
        """The two passes of a step; see `Routing.update`."""
        return self.routing.update(compute, tx, params, opt_state, collections, batch, rng)

    def flops_per_step(self, params: Any) -> float:
        """Two forward passes and, of the weights' gradients, one pass: 5/3 of a plain step and a little more."""
        passes = {"clean": 5.0 / 3.0, "accumulate": 2.0, "joint": 1.0}[self.routing.mode]
        return passes * super().flops_per_step(params)


def clip_by_norm(grads: Any, limit: float) -> tuple[Any, jax.Array]:
    """Scales a tree by min(1, limit / (norm + 1e-6)), PyTorch's rule; returns it and the norm. A limit of 0 is none."""
    norm = optax.tree.norm(grads)
    if not limit:
        return grads, norm
    factor = jnp.minimum(1.0, limit / (norm + _CLIP_FLOOR))
    return jax.tree.map(lambda leaf: leaf * factor, grads), norm


def cosine_restarts(peak: float, minimum: float, period: float, multiplier: int = 1) -> Callable[[Any], jax.Array]:
    """Cosine annealing with warm restarts (Loshchilov & Hutter, 2016, arXiv 1608.03983), over fractional epochs.

    rate(e) = minimum + (peak - minimum) (1 + cos(pi c / P)) / 2, c epochs into a cycle of P: `period`, and each cycle
    `multiplier` times as long as the one before. The first epoch of a cycle is at the peak again, also at the very end of a run.

    Args:
        peak: first rate.
        minimum: rate that a cycle falls to.
        period: epochs of the first cycle.
        multiplier: at least 1.
    """
    lengths = period * np.power(float(multiplier), np.arange(_CYCLES)) if multiplier > 1 else np.full(_CYCLES, float(period))
    starts = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])

    def rate(epoch: Any) -> jax.Array:
        epoch = jnp.asarray(epoch, jnp.float32)
        if multiplier == 1:
            into, length = jnp.mod(epoch, period), period
        else:
            cycle = jnp.searchsorted(jnp.asarray(starts, jnp.float32), epoch, side="right") - 1
            into, length = epoch - jnp.asarray(starts, jnp.float32)[cycle], jnp.asarray(lengths, jnp.float32)[cycle]
        return minimum + (peak - minimum) * (1.0 + jnp.cos(math.pi * into / length)) / 2.0

    return rate


def _is_gate(path: Any) -> bool:
    return is_gate(tuple(jax.tree_util.keystr((key,), simple=True) for key in path))


def _only(tree: Any, *, gates: bool) -> Any:
    """The tree with zeros in place of all but the gates, or of the gates."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if _is_gate(path) == gates else jnp.zeros_like(leaf), tree)


def _finite(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0.0), tree)


def _gate_metrics(params: Any) -> dict[str, jax.Array]:
    """Mean of all gates, and the share of them that is nearly closed."""
    gates = jnp.concatenate([weights.reshape(-1) for weights in gate_weights(params).values()])
    return {"gates/mean": jnp.mean(gates), "gates/below_0.1": jnp.mean((gates < 0.1).astype(jnp.float32))}

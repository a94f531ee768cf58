"""Optimizers and schedules by name, and parameter groups by the path of a parameter."""

from __future__ import annotations

import inspect
import re
from typing import Any

import jax
import ml_collections
import optax

from attnlab.errors import field_error, nearest

_SCHEDULES = ("cosine", "linear", "constant", "rsqrt", "wsd")


def make_schedule(config: ml_collections.ConfigDict, num_train_steps: int) -> optax.Schedule:
    """Learning rate over steps: linear warm-up, then `cosine`, `linear`, `constant`, `rsqrt` or `wsd`.

    `wsd` stays at the peak and falls linearly over the last fifth of the run. `rsqrt` falls with the inverse square
    root of the step. `final_fraction` of the peak is reached at the last step by `cosine`, `linear` and `wsd`.

    Raises:
        ConfigError: unknown name, or a warm-up as long as the run.
    """
    peak, warmup, end = config.learning_rate, config.warmup_steps, config.learning_rate * config.final_fraction
    if config.schedule not in _SCHEDULES:
        raise field_error("config.optimizer.schedule", config.schedule, "is not known", nearest(config.schedule, _SCHEDULES))
    if warmup >= num_train_steps:
        raise field_error("config.optimizer.warmup_steps", warmup,
                          f"is not shorter than config.num_train_steps = {num_train_steps}",
                          "Shorten the warm-up or lengthen the run")  # fmt: skip
    rest = num_train_steps - warmup
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, end, rest)
    elif config.schedule == "constant":
        decay = optax.constant_schedule(peak)
    elif config.schedule == "rsqrt":
        offset = max(warmup, 1)

        def decay(step):
            return peak * (offset / (step + offset)) ** 0.5
    else:
        fall = max(rest // 5, 1)
        decay = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, end, fall)], [rest - fall]
        )
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), decay], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, params: Any, num_train_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimizer for a parameter tree (arrays or shapes).

    `config.name` is any optimizer of optax or optax.contrib; it gets those fields of the config that its signature
    takes. Each of `config.groups` has a regular expression `match` over the parameter's path (joined by "/"), a
    `weight_decay`, a `learning_rate_scale` and `frozen`; a parameter of no group gets the defaults.

    Returns:
        The transformation and the schedule of the default group.

    Raises:
        ConfigError: unknown optimizer, a broken expression, a parameter in two groups.
    """
    schedule = make_schedule(config, num_train_steps)
    factory = getattr(optax, config.name, None) or getattr(optax.contrib, config.name, None)
    if not callable(factory) or "learning_rate" not in inspect.signature(factory).parameters:
        raise field_error("config.optimizer.name", config.name, "is not an optimizer of optax",
                          nearest(config.name, _optimizer_names()))  # fmt: skip
    accepted = inspect.signature(factory).parameters

    def build(weight_decay: float, scale: float) -> optax.GradientTransformation:
        fields = {"b1": config.b1, "b2": config.b2, "eps": config.eps, "weight_decay": weight_decay}
        if "momentum" in accepted:
            fields["momentum"] = config.b1
        if "weight_decay_rate" in accepted:  # adafactor's name for it
            fields["weight_decay_rate"] = weight_decay or None
        if config.name == "adafactor":
            fields.pop("eps")  # of another meaning there
        kwargs = {name: value for name, value in fields.items() if name in accepted}
        return factory(learning_rate=lambda step: scale * schedule(step), **kwargs)

    transforms = {"default": build(config.weight_decay, 1.0)}
    for name, group in config.groups.items():
        transforms[name] = optax.set_to_zero() if group.frozen else build(group.weight_decay, group.learning_rate_scale)
    labels = parameter_labels(config, params)
    tx = optax.multi_transform(transforms, labels) if len(transforms) > 1 else transforms["default"]
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return tx, schedule


def parameter_labels(config: ml_collections.ConfigDict, params: Any) -> Any:
    """Returns the tree of group names of a parameter tree."""
    patterns = {}
    for name, group in config.groups.items():
        try:
            patterns[name] = re.compile(group.match)
        except re.error as error:
            raise field_error(f"config.optimizer.groups.{name}.match", group.match, f"is no regular expression ({error})",
                              "Correct it") from error  # fmt: skip

    def label(path, _):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [name for name, pattern in patterns.items() if pattern.search(where)]
        if len(found) > 1:
            raise field_error("config.optimizer.groups", found, f"all match the parameter {where}",
                              "Narrow their expressions so that a parameter is in one group")  # fmt: skip
        return found[0] if found else "default"

    return jax.tree_util.tree_map_with_path(label, params)


def _optimizer_names() -> list[str]:
    found = []
    for module in (optax, optax.contrib):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters:
                found.append(name)
    return found

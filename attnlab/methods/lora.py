"""Low-rank adapters for any linen model: y = x W + (alpha / r) (x A) B, with W frozen.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021, arXiv 2106.09685). With `train="embed|norm"` the
embeddings and norms are trained too, as LongLoRA (arXiv 2309.12307) needs it for longer contexts; there it is called LoRA+
(not the paper of that name, which is about learning rates).

An adapter lies in the parameter tree beside the kernel that it adapts, as `lora_a` [*inputs, r] and `lora_b` [r, *outputs]
(with the leading axis of scanned layers), so checkpoints, sharding and optimizer groups treat it as any parameter:

    spec = LoRA(rank=8, alpha=16.0)
    model, params = Adapted(model, spec), add(params, jax.random.key(0), spec)
    tx = optimizer(optax.adamw(2e-5), params, spec)            # trains adapters, embeddings and norms only
    grads = jax.grad(lambda p: loss(model.apply({"params": freeze(p, spec)}, x)))(params)
    params = merge(params, spec)                                # for the plain model: one kernel again

From a config: `--config.lora.rank=8`, with `--config.init_from=WORKDIR` for the parameters to adapt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

from attnlab.errors import ConfigError, field_error
from attnlab.methods.task import LossAux, Task, Variables
from attnlab.nn.partitioning import Named

_LEAVES = ("lora_a", "lora_b")
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which kernels are adapted, how, and what else is trained. Paths are joined by "/".

    Attributes:
        rank: r.
        alpha: the product is scaled by alpha / r.
        targets: expression of the kernels to adapt; the default takes query, key, value and output of attention.
        train: expression of the other parameters to train; "" = none. The default takes embeddings and norms.
        two_inputs: expression of kernels whose first two axes are inputs (heads and head width); of others it is one.
        stacked: expression of parameters with a leading axis of scanned layers.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"(^|/)(query|key|value|out)/kernel$"
    train: str = "embed|norm"
    two_inputs: str = r"(^|/)out/kernel$"
    stacked: str = r"(^|/)layers/"

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise field_error("lora.rank", self.rank, "is not a rank", "Set a positive int, or 0 in a config for no adapters")
        if not self.alpha > 0:
            raise field_error("lora.alpha", self.alpha, "must be positive", "Set 2 * rank, say")
        for field in ("targets", "train", "two_inputs", "stacked"):
            try:
                re.compile(getattr(self, field))
            except re.error as error:
                raise field_error(f"lora.{field}", getattr(self, field), f"is no regular expression ({error})",
                                  "Correct it") from error  # fmt: skip

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied with."""
        return self.alpha / self.rank

    def axes(self, path: Path, ndim: int) -> tuple[int, int]:
        """Returns (leading axes of stacked layers, input axes) of a kernel."""
        where = "/".join(path)
        stack = 1 if re.search(self.stacked, where) else 0
        inputs = 2 if re.search(self.two_inputs, where) else 1
        inputs = min(inputs, ndim - stack - 1)
        if inputs < 1:
            raise ConfigError(f"lora.targets = {self.targets!r}: {where} has {ndim} axes and is no kernel. Narrow the expression.")
        return stack, inputs

    def trains(self, path: Path) -> bool:
        """Whether a parameter is trained."""
        return is_adapter(path) or bool(self.train and re.search(self.train, "/".join(path)))


def add(params: Any, rng: jax.Array, spec: LoRA) -> Any:
    """Returns the parameters with new adapters: A uniform in +-1 / sqrt(fan-in) (Kaiming with a = sqrt 5), B zero.

    So the adapted model starts as the model that it was. Boxed parameters (with logical axis names) get boxed adapters.

    Raises:
        ConfigError: no parameter matches `spec.targets`.
    """
    flat = traverse_util.flatten_dict(params)
    found = [path for path in flat if re.search(spec.targets, "/".join(path)) and not is_adapter(path)]
    if not found:
        known = sorted({"/".join(path) for path in flat if path[-1] == "kernel"})
        there = ", ".join(known[:8]) or "no kernels"
        raise ConfigError(f"lora.targets = {spec.targets!r}: matches no parameter. There are {there}.")
    for path in found:
        box, kernel = flat[path], meta.unbox(flat[path])
        stack, inputs = spec.axes(path, kernel.ndim)
        lead, into, out = kernel.shape[:stack], kernel.shape[stack : stack + inputs], kernel.shape[stack + inputs :]
        bound = 1.0 / math.sqrt(math.prod(into))
        key = jax.random.fold_in(rng, zlib.crc32("/".join(path).encode()) & 0x7FFFFFFF)
        a = jax.random.uniform(key, (*lead, *into, spec.rank), kernel.dtype, -bound, bound)
        b = jnp.zeros((*lead, spec.rank, *out), kernel.dtype)
        if isinstance(box, nn.LogicallyPartitioned):
            names = tuple(box.names)
            a = Named(a, (*names[: stack + inputs], "norm"))
            b = Named(b, (*names[:stack], "norm", *names[stack + inputs :]))
        flat[(*path[:-1], "lora_a")], flat[(*path[:-1], "lora_b")] = a, b
    return traverse_util.unflatten_dict(flat)


def is_adapter(path: Path) -> bool:
    """Whether the parameter at a path belongs to an adapter."""
    return path[-1] in _LEAVES


def split(params: Any) -> tuple[Any, Any]:
    """Returns (parameters without adapters, adapters alone); `join` undoes it."""
    flat = traverse_util.flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
    base = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    return traverse_util.unflatten_dict(base), traverse_util.unflatten_dict(adapters)


def join(base: Any, adapters: Any) -> Any:
    """Puts adapters beside their kernels."""
    flat = traverse_util.flatten_dict(base)
    for path, leaf in traverse_util.flatten_dict(adapters).items():
        if not is_adapter(path) or (*path[:-1], "kernel") not in flat:
            raise ConfigError(f"adapters hold {'/'.join(path)}: the parameters have no such kernel. Use adapters of this model.")
        flat[path] = leaf
    return traverse_util.unflatten_dict(flat)


def merge(params: Any, spec: LoRA) -> Any:
    """Returns parameters for the plain model: kernels with their adapters' products added, in the kernels' type."""
    base, adapters = split(params)
    return _shifted(base, adapters, spec, 1.0)


def unmerge(merged: Any, adapters: Any, spec: LoRA) -> Any:
    """Takes the adapters' products out of merged kernels again and returns parameters with adapters.

    Kernels come back to within the rounding of `merge` (exactly while B is zero); keep `split`'s first part to have the bits.
    """
    return join(_shifted(merged, adapters, spec, -1.0), adapters)


def labels(params: Any, spec: LoRA) -> Any:
    """Returns the tree of "trained" and "frozen", for `optax.multi_transform`."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: "trained" if spec.trains(path) else "frozen" for path in flat})


def optimizer(tx: optax.GradientTransformation, params: Any, spec: LoRA) -> optax.GradientTransformation:
    """Returns the optimizer on the trained parameters only: no updates and no state for the others."""
    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels(params, spec))


def freeze(params: Any, spec: LoRA) -> Any:
    """Stops gradients of what is not trained; then its gradient is zero and is not computed."""
    flat = traverse_util.flatten_dict(params)
    flat = {path: leaf if spec.trains(path) else jax.lax.stop_gradient(leaf) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(flat)


@contextlib.contextmanager
def applied(spec: LoRA) -> Iterator[None]:
    """Inside, every module with an adapter beside its kernel adds the adapter's product to its result.

    Works for modules that contract the last axes of their one input with the first axes of the kernel (`nn.Dense`,
    `nn.DenseGeneral`, attnlab's `Projection`), also inside `nn.scan` and `nn.remat`.
    """

    def add_product(call, args, kwargs, context):
        y = call(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or module.scope is None or not module.has_variable("params", "lora_a"):
            return y
        x = args[0]
        a, b = (jnp.asarray(module.get_variable("params", name), y.dtype) for name in _LEAVES)
        inputs = a.ndim - 1
        if x.shape[x.ndim - inputs :] != a.shape[:-1] or y.shape != (*x.shape[: x.ndim - inputs], *b.shape[1:]):
            raise ConfigError(
                f"lora.targets: {'/'.join(module.path)} maps {x.shape} to {y.shape} and has an adapter for "
                f"{a.shape[:-1]} to {b.shape[1:]}. Only linear maps of the last axes can be adapted."
            )
        small = jnp.tensordot(x.astype(y.dtype), a, axes=inputs)
        return y + spec.scale * jnp.tensordot(small, b, axes=1)

    with nn.intercept_methods(add_product):
        yield


class Adapted:
    """A linen model with adapters applied: `init` adds them, `apply` uses them, all else is the model's.

    It stands in for the model in `generate`, evaluation and reports.
    """

    def __init__(self, model: nn.Module, spec: LoRA):
        self.model, self.spec = model, spec

    def __repr__(self) -> str:
        return f"Adapted({self.model!r}, {self.spec!r})"

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "spec"):  # not yet set, as in copying
            raise AttributeError(name)
        return getattr(self.model, name)

    def clone(self, **fields: Any) -> Adapted:
        """The same with other fields of the model."""
        return Adapted(self.model.clone(**fields), self.spec)

    def init(self, rng: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """The model's variables, with adapters among the parameters."""
        variables = self.model.init(rng, *args, **kwargs)
        return {**variables, "params": add(variables["params"], jax.random.fold_in(rng, 1), self.spec)}

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's `apply`, adapters included."""
        with applied(self.spec):
            return self.model.apply(variables, *args, **kwargs)


class LoRATask:
    """Any task of one model, trained by adapters; all that is not here is the task's."""

    def __init__(self, task: Task, spec: LoRA):
        task.model = Adapted(task.model, spec)
        self.task, self.spec = task, spec

    def __getattr__(self, name: str) -> Any:
        if name in ("task", "spec"):
            raise AttributeError(name)
        return getattr(self.task, name)

    def loss(
        self, params: Any, collections: Variables, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, LossAux]:
        """The task's loss; gradients reach what is trained only."""
        return self.task.loss(freeze(params, self.spec), collections, batch, rng)

    def optimizer(self, tx: optax.GradientTransformation, params: Any) -> optax.GradientTransformation:
        """Leaves frozen parameters out of the run's optimizer (and of the task's own)."""
        inner = getattr(self.task, "optimizer", None)
        return optimizer(tx if inner is None else inner(tx, params), params, self.spec)

    def flops_per_step(self, params: Any) -> float:
        """The task's, less the gradients of frozen parameters."""
        flat = traverse_util.flatten_dict(params)
        frozen = sum(leaf.size for path, leaf in flat.items() if not self.spec.trains(path))
        return self.task.flops_per_step(params) - 2.0 * frozen * self.task.units_per_step


def from_config(config: ml_collections.ConfigDict, task: Task) -> Task:
    """Returns the task with the adapters that `config.lora` asks for; the task itself where its rank is 0."""
    if not config.lora.rank:
        return task
    return LoRATask(task, LoRA(**config.lora))


def extend_vocabulary(params: Any, count: int, *, table: str = r"(^|/)embedding$", head: str = r"(^|/)output/kernel$") -> Any:
    """Returns parameters with `count` more tokens, each starting as the mean of all others, as LongLoRA adds special tokens.

    Args:
        params: unboxed.
        count: new tokens.
        table: expression of embeddings [V, D].
        head: expression of output kernels [D, V].

    Raises:
        ConfigError: no embedding matches.
    """
    flat = traverse_util.flatten_dict(params)
    found = False
    for path, leaf in flat.items():
        for expression, axis in ((table, 0), (head, 1)):
            if re.search(expression, "/".join(path)):
                mean = jnp.mean(leaf, axis=axis, keepdims=True, dtype=jnp.float32).astype(leaf.dtype)
                flat[path] = jnp.concatenate([leaf, jnp.repeat(mean, count, axis=axis)], axis=axis)
                found = True
    if not found:
        raise ConfigError(f"table = {table!r}: matches no parameter. Give the expression of the embedding's path.")
    return traverse_util.unflatten_dict(flat)


def _shifted(base: Any, adapters: Any, spec: LoRA, sign: float) -> Any:
    """Adds the adapters' products, times `sign`, to the kernels; computed in float32 and full precision."""
    flat = traverse_util.flatten_dict(base)
    pairs = traverse_util.flatten_dict(adapters)
    for path in [path for path in pairs if path[-1] == "lora_a"]:
        where = (*path[:-1], "kernel")
        if where not in flat:
            raise ConfigError(f"adapters hold {'/'.join(path)}: the parameters have no such kernel. Use adapters of this model.")
        a, b = (pairs[(*path[:-1], name)].astype(jnp.float32) for name in _LEAVES)
        kernel = flat[where]
        stack, inputs = spec.axes(where, kernel.ndim)
        lead, into, out = kernel.shape[:stack], kernel.shape[stack : stack + inputs], kernel.shape[stack + inputs :]
        product = jnp.matmul(
            a.reshape(*lead, math.prod(into), -1), b.reshape(*lead, -1, math.prod(out)), precision=jax.lax.Precision.HIGHEST
        )
        moved = kernel.astype(jnp.float32) + sign * spec.scale * product.reshape(kernel.shape)
        flat[where] = moved.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)

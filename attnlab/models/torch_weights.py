"""Published checkpoints into our variables and back, by the names of `models.torch_names`.

    model = UniFormer.sized("small")
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    variables = load_weights(model, read_arrays("uniformer_small.safetensors"), like)
    write_safetensors("mine.safetensors", to_state_dict(model, variables))

PyTorch's own files are pickles and are not opened; `safetensors.torch.save_file` converts a state dict where PyTorch is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models.torch_names import Entry, name_table

_SHOWN = 10  # mismatches that a message lists
_IGNORED = ("num_batches_tracked",)

# Layout of an array there: (there to here, given our shape; here to there).
LAYOUTS = {
    "same": (lambda x, shape: x, lambda x: x),
    "vector": (lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)),
    "channels": (lambda x, shape: x.reshape(shape), lambda x: x.reshape(1, -1, 1, 1)),
    "conv": (  # (out, in, ..., y, x) and (..., y, x, in, out)
        lambda x, shape: x.transpose(*range(2, x.ndim), 1, 0),
        lambda x: x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)),
    ),
    "linear": (lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T),  # (out, in) and (in, *out)
    "heads_out": (lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T),  # (out, in) and (*in, out)
    "pointwise": (lambda x, shape: x.reshape(shape), lambda x: x[None, None]),  # (1, 1, in, out) and (in, out)
    "depthwise": (lambda x, shape: x.swapaxes(2, 3), lambda x: x.swapaxes(2, 3)),  # (y, x, channel, 1) and (y, x, 1, channel)
}


def load_weights(
    model: Any,
    state: Mapping[str, np.ndarray],
    like: Any,
    *,
    skip: Sequence[str] = (),
    inflate: str | None = None,
) -> dict[str, Any]:
    """Returns the variables of a model with the arrays of a checkpoint.

    Args:
        model: one of `torch_names`.
        state: arrays by their published names, as `safetensors.read_arrays` returns them.
        like: the model's variables, or their shapes (`jax.eval_shape(model.init, ...)`).
        skip: beginnings of published names to leave as they are in `like`, for example ("head.",) for other classes.
        inflate: how kernels of images become those of a video model: "mean" repeats them over the frames and divides by their
            number, "centre" puts them at the middle one (arXiv 2201.04676).

    Raises:
        ConfigError: arrays that are missing, unknown or of another shape: the first of them are listed.
    """
    if inflate not in (None, "mean", "centre"):
        raise ConfigError(f"inflate = {inflate!r}: unknown. Use 'mean', 'centre' or None.")
    ours = _flat(like)
    state = {name.removeprefix("module."): array for name, array in state.items() if not name.endswith(_IGNORED)}
    table = _present(model, ours)
    skipped = tuple(skip)
    loaded: dict[tuple, Any] = {}
    faults, known = [], set()
    for entry in table:
        known.add(entry.theirs)
        if entry.theirs.startswith(skipped):
            continue
        if entry.theirs not in state:
            faults.append(f"{entry.theirs}: is missing")
            continue
        given, wanted = np.asarray(state[entry.theirs]), _shape(entry, ours)
        if inflate and entry.layout == "conv" and given.ndim == len(wanted) - 1:
            given = _inflated(given, wanted[2], inflate)
        if given.shape != wanted:
            faults.append(f"{entry.theirs}: has shape {given.shape}, the model needs {wanted}")
            continue
        for path, array in zip(entry.ours, _to_ours(entry, given, ours), strict=True):
            if entry.index is None:
                loaded[path] = array
            else:
                loaded.setdefault(path, {})[entry.index] = array
    unknown = sorted(name for name in state if name not in known and not name.startswith(skipped))
    faults += [f"{name}: is not of this model" for name in unknown]
    if faults:
        more = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise ConfigError("\n  ".join([f"weights of {type(model).__name__} do not fit:", *faults[:_SHOWN], *more]))
    return traverse_util.unflatten_dict({path: _final(path, loaded, leaf) for path, leaf in ours.items()})


def to_state_dict(model: Any, variables: Any) -> dict[str, np.ndarray]:
    """Returns the variables of a model by their published names, in the published layout."""
    ours = _flat(variables)
    return {entry.theirs: np.ascontiguousarray(_to_theirs(entry, ours)) for entry in _present(model, ours)}


def _flat(variables: Any) -> dict[tuple, Any]:
    """Parameters and running statistics by path."""
    unboxed = meta.unbox(variables)
    return traverse_util.flatten_dict({name: dict(unboxed[name]) for name in ("params", "batch_stats") if name in unboxed})


def _present(model: Any, ours: Mapping[tuple, Any]) -> list[Entry]:
    """The entries of variables that there are; every variable has one."""
    table = [entry for entry in name_table(model) if all(path in ours for path in entry.ours)]
    nameless = sorted("/".join(path) for path in set(ours) - {path for entry in table for path in entry.ours})
    if nameless:
        raise ConfigError(f"{', '.join(nameless[:_SHOWN])}: no published checkpoint of {type(model).__name__} has these parameters.")
    return table


def _to_theirs(entry: Entry, ours: Mapping[tuple, Any]) -> np.ndarray:
    parts = [np.asarray(ours[path]) for path in entry.ours]
    parts = [LAYOUTS[entry.layout][1](part if entry.index is None else part[entry.index]) for part in parts]
    joint = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return joint.reshape(*joint.shape, *(1,) * entry.ones)


def _to_ours(entry: Entry, given: np.ndarray, ours: Mapping[tuple, Any]) -> list[np.ndarray]:
    given = given.reshape(given.shape[: given.ndim - entry.ones])
    shapes = [ours[path].shape if entry.index is None else ours[path].shape[1:] for path in entry.ours]
    if len(shapes) == 1:
        return [LAYOUTS[entry.layout][0](given, shapes[0])]
    sizes = [LAYOUTS[entry.layout][1](_blank(shape)).shape[0] for shape in shapes]
    parts = np.split(given, np.cumsum(sizes)[:-1])
    return [LAYOUTS[entry.layout][0](part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _shape(entry: Entry, ours: Mapping[tuple, Any]) -> tuple[int, ...]:
    """The shape that an array has to have there."""
    return _to_theirs(entry, {path: _blank(ours[path].shape) for path in entry.ours}).shape


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.zeros((), np.int8), shape)


def _inflated(kernel: np.ndarray, frames: int, how: str) -> np.ndarray:
    """(out, in, y, x) to (out, in, frames, y, x)."""
    share = np.full(frames, 1 / frames) if how == "mean" else np.arange(frames) == frames // 2
    return kernel[:, :, None] * share.astype(kernel.dtype)[:, None, None]


def _final(path: tuple, loaded: Mapping[tuple, Any], leaf: Any) -> Any:
    array = loaded.get(path)
    if array is None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ConfigError(f"{'/'.join(path)} is skipped: give variables, not shapes, to take it from.")
        return leaf
    if isinstance(array, dict):
        array = np.stack([array[i] for i in range(len(array))])
    return np.ascontiguousarray(array).astype(leaf.dtype)

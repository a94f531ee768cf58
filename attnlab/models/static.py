"""Models as static arguments of `jax.jit`."""

from __future__ import annotations

import flax.linen as nn


class Static:
    """Holds a model so that `jax.jit` can key on it: equal models share a program, even if a field does not hash."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._key = (type(model), repr(model))

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return isinstance(other, Static) and self._key == other._key

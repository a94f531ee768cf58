"""The weights of dense attention as a matrix, for looking at; computed by the reference."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from attnlab.errors import ConfigError, nearest
from attnlab.ops.attention import attention_matrix, make_call
from attnlab.ops.sigmoid import row_factor
from attnlab.types import Array, Float

KINDS = ("softmax", "sigmoid")


def attention_weights(
    kind: str, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], **options: Any
) -> Float[Array, "B N T S"]:
    """Returns the matrix that `softmax_attention` or `sigmoid_attention` multiplies the values with.

    Args:
        kind: "softmax" or "sigmoid".
        q: queries.
        k: keys.
        **options: the keyword arguments of that op (no dropout, no implementation).

    Returns:
        float32 weights, exactly zero where masked.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r} of attention: {nearest(kind, KINDS)}")
    row_normalization = options.pop("row_normalization", None) if kind == "sigmoid" else None
    call = make_call(q, k, jnp.zeros_like(k), normalization=kind, **options)
    weights = attention_matrix(call)
    if row_normalization is None:
        return weights
    return weights * row_factor(call.positions()[0], row_normalization)[:, None, :, None]

"""Depthwise convolution: every channel with its own kernel, in any number of spatial dimensions.

XLA's grouped convolution is slow on CPU; there the sum over the kernel's taps of shifted maps runs instead, several times
to tens of times faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops import dispatch
from attnlab.types import Array, Float

OP = "depthwise_conv"


def depthwise_conv(
    x: Float[Array, "B *spatial D"],
    kernel: Float[Array, "*taps 1 D"],
    *,
    stride: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B *out D"]:
    """Correlates each channel of a map with its kernel.

    Args:
        x: a map.
        kernel: the same number of spatial dimensions.
        stride: by dimension, default 1.
        padding: "SAME", "VALID" or pairs by dimension; default half the kernel on every side.
        implementation: "taps" (CPU; the size of the map is kept, reverse-mode derivatives only) or "conv" (XLA's
            convolution); None = the best that can.

    Raises:
        ConfigError: shapes that do not fit.
        NotImplementedError: the named implementation cannot do this call.
    """
    size = kernel.shape[:-2]
    if len(size) != x.ndim - 2 or kernel.shape[-2:] != (1, x.shape[-1]):
        raise ConfigError(f"kernel has shape {kernel.shape}: a map of shape {x.shape} needs {x.ndim - 2} taps, 1 and its channels.")
    stride = (1,) * len(size) if stride is None else tuple(stride)
    padding = [(n // 2, n // 2) for n in size] if padding is None else padding
    return dispatch.call(OP, implementation, x, kernel, stride, padding)


def _conv(x: Array, kernel: Array, stride: tuple[int, ...], padding: str | Sequence[tuple[int, int]]) -> Array:
    layout = "N" + "DHW"[3 - len(stride) :] + "C"
    return jax.lax.conv_general_dilated(
        x, kernel, stride, padding, dimension_numbers=(layout, layout[1:-1] + "IO", layout),
        feature_group_count=x.shape[-1],
    )  # fmt: skip


def _taps(x: Array, kernel: Array, stride: tuple[int, ...], padding: str | Sequence[tuple[int, int]]) -> Array:
    del stride, padding
    return _sum_of_taps(x, kernel).astype(x.dtype)


def _refuse_taps(x: Array, kernel: Array, stride: tuple[int, ...], padding: str | Sequence[tuple[int, int]]) -> str | None:
    size = kernel.shape[:-2]
    if any(step != 1 for step in stride):
        return f"stride {stride}: taps are summed at stride 1"
    if any(n % 2 == 0 for n in size):
        return f"kernel {size}: taps are summed for odd kernels"
    if padding != "SAME" and (isinstance(padding, str) or [tuple(pair) for pair in padding] != [(n // 2, n // 2) for n in size]):
        return f"padding {padding}: taps are summed where the map keeps its size"
    return None


def _padded(x: Array, size: tuple[int, ...]) -> Array:
    return jnp.pad(x, ((0, 0), *((n // 2, n // 2) for n in size), (0, 0)))


@jax.custom_vjp
def _sum_of_taps(x: Array, kernel: Array) -> Array:
    """Sums shifted maps times their tap, in float32."""
    size = kernel.shape[:-2]
    padded, kernel = _padded(x, size), kernel.astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for at in itertools.product(*map(range, size)):
        end = (x.shape[0], *(a + n for a, n in zip(at, x.shape[1:-1], strict=True)), x.shape[-1])
        total = total + jax.lax.slice(padded, (0, *at, 0), end) * kernel[at][0]
    return total


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _sum_of_taps(x, kernel), (x, kernel)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    size = kernel.shape[:-2]
    dx = _sum_of_taps(dy, jnp.flip(kernel, tuple(range(len(size)))))
    padded = _padded(x, size)

    def tap(at: Array) -> Array:
        # One tap at a time: unrolled, the sums are compiled long and run slowly.
        near = jax.lax.dynamic_slice(padded, (0, *at, 0), x.shape)
        return (near * dy).sum(tuple(range(x.ndim - 1)))

    offsets = jnp.asarray(list(itertools.product(*map(range, size))), jnp.int32)
    dkernel = jax.lax.map(tap, offsets).reshape(kernel.shape)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_sum_of_taps.defvjp(_forward, _backward)

dispatch.register(OP, "taps", dispatch.Implementation(_taps, _refuse_taps), platforms=("cpu",))
dispatch.register(OP, "conv", dispatch.Implementation(_conv))

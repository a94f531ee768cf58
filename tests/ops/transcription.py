"""Dense attention written down once more, from the papers and in float64, with none of the library's code."""

import jax
import jax.numpy as jnp
import numpy as np


def weights(
    kind, q, k, *, causal=False, window=(-1, -1), segments=None, kv_mask=None, slopes=None, bias=0.0, temperature=0.0,
    rows=None,
):  # fmt: skip
    """[B, N, T, S]: sigmoid((q k^T / sqrt(H) - slope * distance) e^temperature + bias), or the softmax of that."""
    (batch, length, heads, width), keys = q.shape, k.shape[1]
    k = jnp.repeat(k, heads // k.shape[2], axis=2)
    place, key = jnp.arange(length)[:, None] + keys - length, jnp.arange(keys)[None, :]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(width)
    if slopes is not None:
        distance = jnp.maximum(place - key, 0) if causal else jnp.abs(place - key)
        scores = scores - jnp.broadcast_to(jnp.asarray(slopes), (batch, heads))[:, :, None, None] * distance
    scores = scores * np.exp(temperature) + bias
    left, right = window
    visible = jnp.ones((batch, 1, length, keys), bool)
    if causal:
        visible &= key <= place
    if left >= 0:
        visible &= key >= place - left
    if right >= 0:
        visible &= key <= place + right
    if segments is not None:
        visible &= (segments[:, :, None] == segments[:, None, :])[:, None]
    if kv_mask is not None:
        visible &= kv_mask[:, None, None, :]
    if kind == "sigmoid":
        result = jnp.where(visible, 1 / (1 + jnp.exp(-scores)), 0.0)
    else:
        largest = jnp.max(jnp.where(visible, scores, -1e30), axis=-1, keepdims=True)
        powers = jnp.where(visible, jnp.exp(jnp.where(visible, scores - largest, 0.0)), 0.0)
        total = jnp.sum(powers, axis=-1, keepdims=True)
        result = powers / jnp.where(total > 0, total, 1.0)
    if rows is not None:
        result = result / (place + 1.0) ** {"row": 1.0, "sqrt_row": 0.5}[rows]
    return result


def attention(kind, q, k, v, cotangent, **options):
    """Returns float64 numpy (output, dq, dk, dv) for a cotangent of the output."""
    with jax.enable_x64(True):

        def forward(q, k, v):
            return jnp.einsum("bnts,bsnh->btnh", weights(kind, q, k, **options), jnp.repeat(v, q.shape[2] // v.shape[2], axis=2))

        @jax.jit
        def everything(q, k, v, cotangent):
            out, pullback = jax.vjp(forward, q, k, v)
            return out, *pullback(cotangent)

        return [np.asarray(x) for x in everything(*(np.asarray(x, np.float64) for x in (q, k, v, cotangent)))]


def rope(x, interleaved):
    """Rotates [B, T, N, H] by position, as complex numbers in numpy float64."""
    width = x.shape[-1]
    angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-2.0 * np.arange(width // 2) / width)
    turn = np.exp(1j * angle)[None, :, None, :]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : width // 2], x[..., width // 2 :])
    turned = (np.asarray(first, np.float64) + 1j * np.asarray(second, np.float64)) * turn
    if interleaved:
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    return np.concatenate([turned.real, turned.imag], axis=-1)

"""The float64 transcription, and inputs, for the tests of ops."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import transcription as _transcription

sys.path.pop(0)


@pytest.fixture(scope="session")
def transcription():
    return _transcription


@pytest.fixture(scope="session")
def draw():
    """Returns a function to (q, k, v, cotangent) of normal numbers."""

    def make(batch=2, length=24, keys=None, heads=4, kv_heads=2, width=8, dtype=jnp.float32, seed=0):
        keys = length if keys is None else keys
        shapes = [(batch, length, heads, width), *[(batch, keys, kv_heads, width)] * 2, (batch, length, heads, width)]
        return [
            jax.random.normal(key, shape, jnp.float32).astype(dtype)
            for key, shape in zip(jax.random.split(jax.random.key(seed), 4), shapes, strict=True)
        ]

    return make

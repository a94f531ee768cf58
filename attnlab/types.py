"""The letters of attnlab's shapes, fixed once for the whole library, and the array types of its signatures.

B batch, T query length, S key length, N query heads, K key/value heads (N is a multiple of K), G = N // K,
H head width, D model width, V vocabulary, L layers.

Signatures are written with jaxtyping (`Float[Array, "B T N H"]`); they cost nothing in use and are checked in the tests
through jaxtyping's import hook.
"""

from __future__ import annotations

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Key, UInt32

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "PRNGKey", "Window"]

# A random key: typed (jax.random.key) or raw (jax.random.PRNGKey).
PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
# Keys seen to the left and right of a query, both inclusive; None or -1 = no limit; one int = the same on both sides.
Window = int | tuple[int | None, int | None] | list[int | None] | None

"""The row-sparse update of a state: a token writes, and decays, few of its rows (arXiv 2507.16577)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab.errors import ConfigError
from attnlab.ops.linear_scan import gated_linear_scan
from attnlab.types import Array, Float


class RowSparse(NamedTuple):
    """What `row_sparse_scan` returns: o [B,T,N,Hv], keys and mask [B,T,N,Hk], the last state [B,N,Hk,Hv] float32."""

    out: Array
    key: Array
    row_mask: Array
    state: Array


def row_sparse_scan(
    q: Float[Array, "B T N Hk"],
    k_logits: Float[Array, "B T N Hk"],
    v: Float[Array, "B T N Hv"],
    log_decay: Float[Array, "B T N Hk"],
    num_rows: int,
    **options: Any,
) -> RowSparse:
    """The row-sparse update of one state: a token writes, and decays, only the rows of its largest key logits (2507.16577).

    The key is the softmax of the kept logits, zero elsewhere; a row that is not kept neither decays nor is written. The choice
    has no gradient; ties go to the lower row.

    Args:
        q: queries, scaled by Hk^-1/2.
        k_logits: a token's assignment to the Hk rows.
        v: values.
        log_decay: <= 0, used at the kept rows.
        num_rows: rows kept per token and head.
        **options: further arguments of `gated_linear_scan`.

    Raises:
        ConfigError: `num_rows` is not in 1 .. Hk.
    """
    rows = k_logits.shape[-1]
    if not 1 <= num_rows <= rows:
        raise ConfigError(f"num_rows = {num_rows}: there are {rows} rows. Use 1 to {rows}.")
    wide = k_logits.astype(jnp.float32)
    index = jax.lax.top_k(jax.lax.stop_gradient(wide), num_rows)[1]
    kept = jnp.any(index[..., None] == jnp.arange(rows), axis=-2)
    key = jax.nn.softmax(wide, axis=-1, where=kept).astype(q.dtype)
    out, state = gated_linear_scan(q, key, v, jnp.where(kept, log_decay, 0.0), **options)
    return RowSparse(out, key, kept, state)

"""A call of `attnlab.ops.neural_memory` for kernels that work on tiles of one chunk each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.ops.neural_memory import MemoryCall, MemoryState, over_mesh, parts, recurrent
from attnlab.ops.tiles import Tiles, make_tiles
from attnlab.types import Array
from kernels_pallas.memory_scan.chunk import State


def run(scan: Callable[..., Any], call: MemoryCall) -> tuple[Array, Array, MemoryState]:
    """Computes a call by `scan`, a function like `vjp.memory_scan`, on each device's rows and heads."""

    def local(call: MemoryCall) -> tuple[Array, Array, MemoryState]:
        tiles = tiles_of(call)

        def by_tile(call):
            return _by_tile(scan, call, tiles)

        if tiles.exact:
            return by_tile(call)
        # Where the segments are so many and short that their chunks do not fit the tiles: slower, and exact all the same.
        return jax.lax.cond(tiles.used <= tiles.valid.shape[1], by_tile, recurrent, call)

    return over_mesh(local, call)


def widths(call: MemoryCall) -> tuple[int, ...]:
    """Widths of the memory's layers, input and output included."""
    weights = call.begin.weights
    return *(w.shape[-2] for w in weights), weights[-1].shape[-1]


def tiles_of(call: MemoryCall) -> Tiles:
    """The tiles of a call's rows."""
    batch, length = call.q.shape[:2]
    count = None if call.state is None else call.state.count
    ragged = {"mask": call.mask, "segment_ids": call.segment_ids, "start": call.start_count, "count": count}
    return make_tiles(batch, length, call.chunk_size, **ragged)


def _by_tile(scan: Callable[..., Any], call: MemoryCall, tiles: Tiles) -> tuple[Array, Array, MemoryState]:
    def lay(x):  # [B, T, N, ...] to [B, N, M, C, ...]
        return jnp.moveaxis(tiles.take(x), 3, 1)

    def unlay(x):
        return tiles.untake(jnp.moveaxis(x, 1, 3))

    rows = call.q.shape[0]
    begin = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), State(*parts(call.begin)))
    initial = begin if call.state is None else State(*parts(call.state))
    y, loss, final = scan(
        *(lay(x) for x in (call.q, call.k, call.v)),
        tuple(lay(x) for x in call.gates),
        tiles.valid,
        tiles.reset,
        tiles.fresh,
        initial,
        None if call.segment_ids is None else begin,
        before=call.before,
    )
    return unlay(y), unlay(loss), MemoryState(*final, tiles.count)

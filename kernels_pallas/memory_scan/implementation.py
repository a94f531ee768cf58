"""The memory kernels as an entry of the ops' table (attnlab/ops/dispatch.py)."""

from __future__ import annotations

import functools

from attnlab.ops import dispatch, sharding
from attnlab.ops.neural_memory import MemoryCall, MemoryState
from attnlab.types import Array
from kernels_pallas.memory_scan import tiled
from kernels_pallas.memory_scan.vjp import memory_scan, refusal

# Tokens below which most of a kernel's chunk would be padding
_FEW_TOKENS = 16


def remember_pallas(call: MemoryCall) -> tuple[Array, Array, MemoryState]:
    """Computes a call of `neural_memory`."""
    return tiled.run(functools.partial(memory_scan, interpret=dispatch.interpreting()), call)


def refuse(call: MemoryCall) -> str | None:
    """Says why the kernels cannot do a call, or None."""
    rows, tiles, _ = tiled.tiles_of(call).valid.shape
    entries = -(-rows // sharding.shard_count("batch")) * tiles
    return refusal(widths=tiled.widths(call), chunk=call.chunk_size, entries=entries)


def defer(call: MemoryCall) -> str | None:
    """Says why another implementation serves better, or None."""
    if call.q.shape[1] < _FEW_TOKENS:
        return f"{call.q.shape[1]} tokens: a chunk of the kernel has at least {_FEW_TOKENS}"
    return "no TPU has timed it against 'xla_chunked' yet; name it to have it"


IMPLEMENTATION = dispatch.Implementation(remember_pallas, refuse, defer)

"""Attention of sequences that the mesh splits: keys and values travel round a ring of devices.

Every device keeps its queries. Its keys and values, their positions and segments move on to the next device, step by step,
while it attends to those it has; softmax results are joined by their log-sum-exp, sigmoid results are added. The backward
pass goes round once more: gradients of keys and values travel with them and come home. Memory per device is linear in T / n
for n devices, and scores are never held for more than a chunk of queries.

"Ring Attention with Blockwise Transformers for Near-Infinite Context" (Liu et al., 2023, arXiv 2310.01889).

Devices hold consecutive tokens. Under the causal order a device skips the keys that lie after all of its queries, so the
last device works at every step and the first at one; a window to the left that ends before the ring does stops it early.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.ops import attention_part as _parts  # noqa: F401  (registers the two ops)
from attnlab.ops import dispatch, sharding
from attnlab.ops.attention import AttentionCall
from attnlab.types import Array


class _Plan(NamedTuple):
    """What is static in a ring.

    Attributes:
        call: the call without its arrays.
        axes: mesh axes of the ring.
        count: devices in it.
        steps: how many of the parts any query can see; `count` where that is not known.
    """

    call: AttentionCall
    axes: tuple[str, ...]
    count: int
    steps: int


def attend_ring(call: AttentionCall) -> Array:
    """Computes a call whose sequences are split over the mesh; returns [B, T, N, H] in the type of q."""
    axes = sharding.sequence_axes()
    count = sharding.shard_count("sequence")
    length, keys = call.lengths
    pad_q, pad_kv = -length % count, -keys % count
    q_positions, kv_positions = call.positions()
    if call.kv_mask is not None:
        kv_positions = jnp.where(call.kv_mask, kv_positions, -1)
    k, v = sharding.repeat_kv_heads(call.k, call.v, call.q.shape[2])
    arrays = {
        "q": _pad(call.q, pad_q),
        "k": _pad(k, pad_kv),
        "v": _pad(v, pad_kv),
        "alibi_slopes": call.alibi_slopes,
        "q_positions": _pad(q_positions, pad_q),
        "kv_positions": _pad(kv_positions, pad_kv, -1),
        "q_segment_ids": _pad(call.q_segment_ids, pad_q),
        "kv_segment_ids": _pad(call.kv_segment_ids, pad_kv),
    }
    letters = ("BTNH", "BSKH", "BSKH", "BN", "BT", "BS", "BT", "BS")
    batch = call.q.shape[0]
    layouts = ["1" + l[1:] if x is not None and x.shape[0] != batch else l for x, l in zip(arrays.values(), letters, strict=True)]
    bare = dataclasses.replace(call, **dict.fromkeys(arrays), kv_mask=None, empty_slots=True, self_segments=False)
    plan = _Plan(bare, axes, count, _steps(call, count))

    def local(q, k, v, slopes, *vectors):
        return _ring(plan, q, k, v, slopes, dict(zip(list(arrays)[4:], vectors, strict=True)))

    return sharding.shard_over_mesh(local, tuple(arrays.values()), layouts, "BTNH", sequence=True)[:, :length]


def refuse(call: AttentionCall) -> str | None:
    """Says why the ring cannot do a call, or None."""
    if sharding.shard_count("sequence") == 1:
        return "no mesh in force splits sequences"
    unknown = {
        "a dense mask": call.mask is not None,
        "a bias array": call.dense_bias is not None,
        "dropout": call.dropout_rate > 0.0,
    }
    found = [name for name, present in unknown.items() if present]
    return f"the ring does not do {' or '.join(found)}" if found else None


def defer(call: AttentionCall) -> str | None:
    """Says why XLA's own partition serves better, or None."""
    count = sharding.shard_count("sequence")
    if call.lengths[0] < count:
        return f"{call.lengths[0]} queries are fewer than the {count} devices of the ring"
    return None


def _steps(call: AttentionCall, count: int) -> int:
    """How many parts a query can see: its own, and as many before it as a causal window reaches."""
    length, keys = call.lengths
    left, right = call.window
    if call.q_positions is not None or length != keys or right != 0 or left is None:
        return count
    return min(-(-left // -(-length // count)) + 1, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan: _Plan, q: Array, k: Array, v: Array, slopes: Array | None, vectors: dict[str, Array | None]) -> Array:
    return _forward(plan, q, k, v, slopes, vectors)[0]


def _forward(plan, q, k, v, slopes, vectors):
    softmax = plan.call.normalization == "softmax"
    out = jnp.zeros(q.shape, jnp.float32)
    lse = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf) if softmax else None

    def step(carry, _):
        found, visiting = carry
        part = _part(plan, q, slopes, vectors, visiting)

        def attend():
            here = dispatch.call("attention_part", _named(), part)
            return _joined(*found, *here) if softmax else (found[0] + here[0], None)

        found = jax.lax.cond(_sees(part), attend, lambda: found)
        return (found, _send(plan, visiting, 1)), None

    start = ((out, lse), _travelling(k, v, vectors))
    ((out, lse), _), _ = jax.lax.scan(step, start, length=plan.steps)
    return out.astype(q.dtype), lse


def _ring_forward(plan, q, k, v, slopes, vectors):
    out, lse = _forward(plan, q, k, v, slopes, vectors)
    return out, (q, k, v, slopes, vectors, out if lse is not None else None, lse)


def _ring_backward(plan, residuals, cotangent):
    q, k, v, slopes, vectors, out, lse = residuals
    delta = None
    if lse is not None:
        delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), cotangent.astype(jnp.float32))

    def step(carry, _):
        staying, leaving, visiting = carry
        part = _part(plan, q, slopes, vectors, visiting)

        def attend():
            dq, dk, dv, dslopes = dispatch.call("attention_part_gradient", _named(), part, cotangent, lse, delta)
            return jax.tree.map(jnp.add, (staying, leaving), ((dq, dslopes), (dk, dv)))

        staying, leaving = jax.lax.cond(_sees(part), attend, lambda: (staying, leaving))
        return (staying, *_send(plan, (leaving, visiting), 1)), None

    def zeros(x):
        return None if x is None else jnp.zeros(x.shape, jnp.float32)

    start = ((zeros(q), zeros(slopes)), (zeros(k), zeros(v)), _travelling(k, v, vectors))
    ((dq, dslopes), leaving, _), _ = jax.lax.scan(step, start, length=plan.steps)
    dk, dv = _send(plan, leaving, plan.count - plan.steps)  # home
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), vectors)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dslopes, nothing


_ring.defvjp(_ring_forward, _ring_backward)


def _travelling(k: Array, v: Array, vectors: dict[str, Array | None]) -> dict[str, Any]:
    return {"k": k, "v": v, **{name: x for name, x in vectors.items() if name.startswith("kv_")}}


def _part(plan, q, slopes, vectors, visiting) -> AttentionCall:
    """The call of this device's queries against the keys that visit it."""
    staying = {name: x for name, x in vectors.items() if name.startswith("q_")}
    return dataclasses.replace(plan.call, q=q, alibi_slopes=slopes, **staying, **visiting)


def _send(plan: _Plan, tree: Any, hops: int) -> Any:
    """Sends arrays `hops` devices on."""
    if hops == 0:
        return tree
    pairs = [(i, (i + hops) % plan.count) for i in range(plan.count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, plan.axes, pairs), tree)


def _sees(part: AttentionCall) -> Array:
    """Whether any query may see any key, by their positions."""
    left, right = part.window
    low, high = jnp.min(part.q_positions), jnp.max(part.q_positions)
    there = part.kv_positions >= 0
    first = jnp.min(jnp.where(there, part.kv_positions, np.iinfo(np.int32).max))
    last = jnp.max(part.kv_positions)
    seen = last >= 0
    if right is not None:
        seen = seen & (first <= high + right)
    if left is not None:
        seen = seen & (last >= low - left)
    return seen


def _joined(out: Array, lse: Array, other: Array, other_lse: Array) -> tuple[Array, Array]:
    """Joins normalised results [B, T, N, H] over two sets of keys by their log-sum-exps [B, N, T]."""
    largest = jnp.maximum(lse, other_lse)
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    one, two = jnp.exp(lse - largest), jnp.exp(other_lse - largest)
    total = one + two
    inverse = jnp.where(total > 0.0, 1.0 / total, 0.0)

    def scaled(x, factor):
        return x * jnp.swapaxes(factor * inverse, 1, 2)[..., None]

    return scaled(out, one) + scaled(other, two), largest + jnp.log(total)


def _named() -> str | None:
    """The parts' implementation: in the interpreter the kernel, which would not be chosen on its own."""
    return "pallas" if dispatch.interpreting() else None


def _pad(x: Array | None, count: int, value: int = 0) -> Array | None:
    if x is None or not count:
        return x
    return jnp.pad(x, [(0, count if axis == 1 else 0) for axis in range(x.ndim)], constant_values=value)


IMPLEMENTATION = dispatch.Implementation(attend_ring, refuse, defer)

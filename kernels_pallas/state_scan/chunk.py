"""One chunk of a gated linear or gated delta scan, as the body of the kernels: everything is a matrix, nothing has a batch.

With C tokens, log decays g <= 0 and the state S [Hk, Hv] before the chunk, held transposed as Z = S^T [Hv, Hk] so that a decay
per key channel runs along the lanes,

    G_ij  = sum_{j < m <= i} g_m                          0 for i <= j
    P     = tril(q_i k_j exp(G_ij)),  L = strictly tril(beta_i k_i k_j exp(G_ij)),  X = (I + L)^-1
    u     = v                                             gated linear attention
    u     = X beta (v - (k exp(G_i0)) S)                  gated delta rule (arXiv 2406.06484, 2412.06464)
    out   = (q exp(G_i0)) S + P u
    S'    = exp(G_C0) S + (k exp(G_Cj))^T u

Decays stay logarithms, and every G is a sum of its own terms, by a product with zeros and ones (per head) or by doubling (per
channel): there is no difference of two sums, so nothing cancels, no exponent is positive, and `RESET` is an exact reset.
Per-channel decays build P by doubling too: at each level a query in an odd block of s tokens meets the keys of the block before
it, both decayed to the boundary between them.

The backward kernel takes `jax.vjp` of `chunk` inside its body: what that traces are these matrix products and their transposes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.state_scan import ScanSpec

# x y, x y^T and x^T y
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(ScanSpec):
    """Static description of a scan.

    Attributes:
        group: heads per step of the grid: independent work for the compiler to interleave.
    """

    group: int

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the numbers per token, in the order of the rows of `tokens`."""
        return ("decay",) * (not self.channel) + ("beta",) * self.delta

    @property
    def passes(self) -> int:
        """Of the matrix unit per product, see `product`."""
        return 6 if self.exact else 1


class Head(NamedTuple):
    """What a chunk holds of one head, float32."""

    q: jax.Array | None  # [C, Hk], scaled; None where nothing is read
    k: jax.Array  # [C, Hk]
    v: jax.Array  # [C, Hv]
    g: jax.Array | None  # [C, Hk], log decays per channel
    tokens: jax.Array | None  # [numbers, C], log decays per head and beta, as far as `Spec.vectors` names them


def chunk(spec: Spec, heads: list[Head], states: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the outputs [C, Hv] of a chunk and the transposed states [Hv, Hk] after it, per head, from the states before."""
    decays = _decays(spec, heads, read=True)
    written = _written(spec, heads, states, decays)
    reads = [product(h.q * decay.since, z, NT, spec.passes) for h, decay, z in zip(heads, decays, states, strict=True)]
    outs = [r + product(decay.scores[-1], u, NN, spec.passes) for r, decay, u in zip(reads, decays, written, strict=True)]
    return outs, _onward(spec, heads, written, states, decays)


def states_after(spec: Spec, heads: list[Head], states: list[jax.Array]) -> list[jax.Array]:
    """The second result of `chunk` alone; needs no q."""
    decays = _decays(spec, heads, read=False)
    return _onward(spec, heads, _written(spec, heads, states, decays), states, decays)


class _Decay(NamedTuple):
    """Decays of a chunk, and lower triangular scores with decayed keys."""

    since: jax.Array  # [C, Hk or 1], from the chunk's start
    until: jax.Array  # [C, Hk or 1], to its end
    whole: jax.Array  # [1, Hk]
    scores: list[jax.Array]  # each [C, C]: of the keys (delta rule), of the queries (where they are read)


def _decays(spec: Spec, heads: list[Head], read: bool) -> list[_Decay]:
    decays = []
    for head in heads:
        sides = (head.k,) * spec.delta + ((head.q,) if read else ())
        decays.append((_channel_decay if spec.channel else _head_decay)(spec, head, sides))
    return decays


def _written(spec: Spec, heads: list[Head], states: list[jax.Array], decays: list[_Decay]) -> list[jax.Array]:
    """What the tokens write, u of the module's docstring."""
    if not spec.delta:
        return [head.v for head in heads]
    betas = [_column(head.tokens[-1:], lambda i, j: i == j) for head in heads]
    lower = [_keep(decay.scores[0] * beta, lambda i, j: i > j) for decay, beta in zip(decays, betas, strict=True)]
    inverses = unit_lower_inverses(tuple(lower), 6 if spec.exact else 3)
    known = [product(h.k * decay.since, z, NT, spec.passes) for h, decay, z in zip(heads, decays, states, strict=True)]
    rest = [(head.v - one) * beta for head, one, beta in zip(heads, known, betas, strict=True)]
    return [product(inverse, one, NN, spec.passes) for inverse, one in zip(inverses, rest, strict=True)]


def _onward(spec: Spec, heads: list[Head], written: list, states: list, decays: list[_Decay]) -> list[jax.Array]:
    return [
        decay.whole * state + product(new, head.k * decay.until, TN, spec.passes)
        for head, new, state, decay in zip(heads, written, states, decays, strict=True)
    ]


def _head_decay(spec: Spec, head: Head, sides: tuple[jax.Array, ...]) -> _Decay:
    row = head.tokens[:1]
    up_to = _keep(jnp.broadcast_to(row, (spec.chunk, spec.chunk)), lambda i, m: m <= i)
    ratio = _keep(jnp.exp(_sums_after(up_to, 3 if spec.exact else 2)), lambda i, j: j <= i)
    return _Decay(
        since=jnp.exp(jnp.sum(up_to, axis=1, keepdims=True)),
        until=jnp.exp(_column(row, lambda j, m: m > j)),
        whole=jnp.exp(jnp.broadcast_to(jnp.sum(row, axis=1, keepdims=True), (1, spec.rows))),
        scores=[product(side, head.k, NT, spec.passes) * ratio for side in sides],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sums_after(x: jax.Array, parts: int) -> jax.Array:
    """y_ij = sum of x_im over m > j, by a product with zeros and ones, which are exact, of x in `parts` pieces of 8 bits."""
    return _split_product(x, parts, lambda m, j: m > j)


def _split_product(x: jax.Array, parts: int, where: Any) -> jax.Array:
    mask = _keep(jnp.ones_like(x), where).astype(jnp.bfloat16)
    total = None
    for _ in range(parts):
        piece = x.astype(jnp.bfloat16)
        x = x - piece.astype(jnp.float32)
        part = lax.dot_general(piece, mask, NN, preferred_element_type=jnp.float32)
        total = part if total is None else total + part
    return total


_sums_after.defvjp(
    lambda x, parts: (_sums_after(x, parts), None),
    lambda parts, _, ct: (_split_product(ct, parts, lambda j, m: m > j),),
)


def _channel_decay(spec: Spec, head: Head, sides: tuple[jax.Array, ...]) -> _Decay:
    below, since, until = _channel_scores(spec, sides, head.k, head.g)
    scores = []
    for side, part in zip(sides, below, strict=True):
        diagonal = jnp.broadcast_to(jnp.sum(side * head.k, axis=1, keepdims=True), part.shape)
        scores.append(part + _keep(diagonal, lambda i, j: i == j))
    return _Decay(jnp.exp(since), jnp.exp(until), jnp.exp(jnp.sum(head.g, axis=0, keepdims=True)), scores)


def _levels(spec: Spec) -> list[int]:
    return [1 << shift for shift in range(spec.chunk.bit_length() - 1)]


def _grown(arrive: jax.Array, leave: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Sums of a token's block up to it and after it, [C, H], of blocks twice as long."""
    total = arrive + leave
    odd = lambda i, j: (i & block) != 0  # noqa: E731
    even = lambda i, j: (i & block) == 0  # noqa: E731
    size = total.shape[0]
    return arrive + _keep(pltpu.roll(total, block, 0), odd), leave + _keep(pltpu.roll(total, size - block, 0), even)


def _grown_backward(darrive: jax.Array, dleave: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    size = darrive.shape[0]
    from_odd = pltpu.roll(_keep(darrive, lambda i, j: (i & block) != 0), size - block, 0)
    dtotal = from_odd + pltpu.roll(_keep(dleave, lambda i, j: (i & block) == 0), block, 0)
    return darrive + dtotal, dleave + dtotal


def _meets(block: int) -> Any:
    """Pairs (i, j) with i in an odd block and j in the one before."""
    return lambda i, j: ((i & block) != 0) & ((i & -block) == (j & -block) + block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _channel_scores(
    spec: Spec, sides: tuple[jax.Array, ...], k: jax.Array, g: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Scores below the diagonal with decays per channel, by doubling, and the sums of log decays up to and after each token.

    The backward pass makes the levels again.
    """
    arrive, leave = g, jnp.zeros_like(g)
    scores = [jnp.zeros((spec.chunk, spec.chunk), jnp.float32) for _ in sides]
    for block in _levels(spec):
        keys, decay = k * jnp.exp(leave), jnp.exp(arrive)
        parts = [product(side * decay, keys, NT, spec.passes) for side in sides]
        scores = [score + _keep(part, _meets(block)) for score, part in zip(scores, parts, strict=True)]
        arrive, leave = _grown(arrive, leave, block)
    return tuple(scores), arrive, leave


def _channel_scores_backward(spec: Spec, residuals: tuple, cotangents: tuple) -> tuple[tuple, jax.Array, jax.Array]:
    sides, k, g = residuals
    dscores, darrive, dleave = cotangents
    dsides, dk = [jnp.zeros_like(side) for side in sides], jnp.zeros_like(k)
    levels = _levels(spec)
    sums = [(g, jnp.zeros_like(g))]
    for block in levels[:-1]:
        sums.append(_grown(*sums[-1], block))
    for block, (arrive, leave) in zip(reversed(levels), reversed(sums), strict=True):
        darrive, dleave = _grown_backward(darrive, dleave, block)
        decay, until = jnp.exp(arrive), jnp.exp(leave)
        keys = k * until
        dkeys = jnp.zeros_like(k)
        for index, (side, dscore) in enumerate(zip(sides, dscores, strict=True)):
            part = _keep(dscore, _meets(block))
            arrived = side * decay
            darrived = product(part, keys, NN, spec.passes)
            dkeys = dkeys + product(part, arrived, TN, spec.passes)
            dsides[index] = dsides[index] + darrived * decay
            darrive = darrive + darrived * arrived
        dk = dk + dkeys * until
        dleave = dleave + dkeys * keys
    # a block of one token: its sum up to the token is g, and there is nothing after it
    return tuple(dsides), dk, darrive


_channel_scores.defvjp(
    lambda spec, sides, k, g: (_channel_scores(spec, sides, k, g), (sides, k, g)), _channel_scores_backward
)


def _keep(x: jax.Array, where: Any) -> jax.Array:
    """x where `where(row, column)`, else zero."""
    row, column = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(where(row, column), x, 0.0)


def _column(row: jax.Array, where: Any) -> jax.Array:
    """[1, C] summed where `where(row, column)`, as [C, 1]."""
    square = jnp.broadcast_to(row, (row.shape[1], row.shape[1]))
    return jnp.sum(_keep(square, where), axis=1, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a: jax.Array, b: jax.Array, form: Any, passes: int) -> jax.Array:
    """a b, a b^T or a^T b of float32 arrays; gradients are such products too.

    Args:
        a: first factor.
        b: second factor.
        form: `NN`, `NT` or `TN`.
        passes: of the matrix unit: 1 rounds the factors to bfloat16 (8 bits), 3 to pairs of them (16 bits), 6 is float32.
    """
    dot = functools.partial(lax.dot_general, dimension_numbers=form, preferred_element_type=jnp.float32)
    if passes == 6:
        return dot(a, b, precision=lax.Precision.HIGHEST)
    high_a, high_b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    if passes == 1:
        return dot(high_a, high_b)
    low_a, low_b = ((x - high.astype(jnp.float32)).astype(jnp.bfloat16) for x, high in ((a, high_a), (b, high_b)))
    return dot(high_a, high_b) + (dot(high_a, low_b) + dot(low_a, high_b))


def _product_backward(form: Any, passes: int, factors: tuple, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = factors
    if form == NN:
        return product(ct, b, NT, passes), product(a, ct, TN, passes)
    if form == NT:
        return product(ct, b, NN, passes), product(ct, a, TN, passes)
    return product(b, ct, NT, passes), product(a, ct, NN, passes)


product.defvjp(lambda a, b, form, passes: (product(a, b, form, passes), (a, b)), _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_lower_inverses(lower: tuple[jax.Array, ...], passes: int) -> tuple[jax.Array, ...]:
    """(I + L)^-1 of strictly lower triangular L [C, C], C = 16, 32, 64 or 128.

    Diagonal blocks of 16 tokens by substitution, then by halves: X, the inverses of blocks of s tokens, and X - X (L where a
    block meets the one before it) X for 2 s. Matrices of several heads stand side by side in the lanes of one array, and so do
    the blocks of 16, so that registers and the matrix unit are full; such arrays advance level by level together.

    Args:
        lower: the L of some heads.
        passes: of the products.
    """
    size = lower[0].shape[0]
    each = _LANES // size
    missing = [jnp.zeros_like(lower[0])] * (-len(lower) % each)
    matrices = [*lower, *missing]
    packs = [_side_by_side(matrices[at : at + each]) for at in range(0, len(matrices), each)]
    inverses = _substituted([_diagonal_blocks(pack) for pack in packs])
    inverses = [_spread_blocks(inverse, size) for inverse in inverses]
    for shift in range(_BASE.bit_length() - 1, size.bit_length() - 1):
        inverses = _next_level(packs, inverses, 1 << shift, passes)
    apart = [inverse[:, j * size : (j + 1) * size] for inverse in inverses for j in range(each)]
    return tuple(apart[: len(lower)])


_LANES = 128
_BASE = 16


def _side_by_side(matrices: list[jax.Array]) -> jax.Array:
    return matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices, axis=1)


def _block_of(column: jax.Array, size: int, block: int) -> jax.Array:
    """First column of the block that a column of matrices [size, size] side by side belongs to, within its matrix."""
    return column & (size - 1) & -block


def _diagonal_blocks(pack: jax.Array) -> jax.Array:
    """The diagonal blocks [16, 16] of the matrices [C, C] in [C, LANES], each in its own lanes, [16, LANES]."""
    size = pack.shape[0]
    rows = (
        _keep(pack[at : at + _BASE], lambda i, j, at=at: _block_of(j, size, _BASE) == at) for at in range(0, size, _BASE)
    )
    return functools.reduce(jnp.add, rows)


def _spread_blocks(blocks: jax.Array, size: int) -> jax.Array:
    """The opposite of `_diagonal_blocks`, zeros elsewhere."""
    rows = [_keep(blocks, lambda i, j, at=at: _block_of(j, size, _BASE) == at) for at in range(0, size, _BASE)]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=0)


def _substituted(lower: list[jax.Array]) -> list[jax.Array]:
    """Inverses of unit lower triangular blocks [16, 16] side by side, by forward substitution, column by column."""
    inverses = [_keep(jnp.ones_like(one), lambda i, j: i == (j & (_BASE - 1))) for one in lower]
    for at in range(_BASE - 1):
        for index, one in enumerate(lower):
            column = _keep(one, lambda i, j, at=at: (j & (_BASE - 1)) == at)
            column = pltpu.roll(column, -at % _LANES, 1)  # to the first lane of each block, then to all of its lanes
            for step in range(_BASE.bit_length() - 1):
                column = column + pltpu.roll(column, 1 << step, 1)
            inverses[index] = inverses[index] - column * inverses[index][at : at + 1]
    return inverses


def _next_level(lower: list[jax.Array], inverses: list[jax.Array], block: int, passes: int) -> list[jax.Array]:
    """From inverses of blocks to those of twice as many tokens. Only rows of odd blocks have anything to do."""
    size = lower[0].shape[0]
    odd = range(block, size, 2 * block)
    meets = [
        jnp.concatenate([_keep(x[at : at + block], lambda i, j, at=at: _block_of(j, size, block) == at - block) for at in odd])
        for x in lower
    ]
    below = [product(x, _block_diagonal(inverse), NN, passes) for x, inverse in zip(meets, inverses, strict=True)]
    nothing = jnp.zeros((block, _LANES), jnp.float32)
    halves = range(0, size // 2, block)
    below = [jnp.concatenate([y for at in halves for y in (nothing, x[at : at + block])]) for x in below]
    sides = [jnp.concatenate([inverse[at : at + block] for at in odd]) for inverse in inverses]
    change = [product(side, _block_diagonal(x), NN, passes) for side, x in zip(sides, below, strict=True)]
    return [
        jnp.concatenate(
            [y for at, h in zip(odd, halves, strict=True) for y in (x[at - block : at], x[at : at + block] - dx[h : h + block])]
        )
        for x, dx in zip(inverses, change, strict=True)
    ]


def _block_diagonal(pack: jax.Array) -> jax.Array:
    """Matrices [C, C] side by side in [C, LANES], as a block-diagonal matrix [LANES, LANES]."""
    size = pack.shape[0]
    if size == _LANES:
        return pack
    return jnp.concatenate([_keep(pack, lambda i, j, at=at: (j & -size) == at) for at in range(0, _LANES, size)])


def _inverses_forward(lower: tuple, passes: int) -> tuple[tuple, tuple]:
    inverses = unit_lower_inverses(lower, passes)
    return inverses, inverses


def _inverses_backward(passes: int, inverses: tuple, cotangents: tuple) -> tuple[tuple]:
    gradients = []
    for inverse, cotangent in zip(inverses, cotangents, strict=True):
        inside = product(product(inverse, cotangent, TN, passes), inverse, NT, passes)
        gradients.append(_keep(-inside, lambda i, j: i > j))
    return (tuple(gradients),)


unit_lower_inverses.defvjp(_inverses_forward, _inverses_backward)

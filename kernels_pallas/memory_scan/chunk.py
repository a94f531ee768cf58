"""One chunk of the neural memory, as the body of the kernels: everything is a matrix, nothing has a batch.

With the rule of `attnlab.ops.neural_memory`, C tokens, p the products of eta and r those of 1 - alpha between two tokens,

    E_rs = p_{s+1..r}            D_tr = r_{r+1..t}            0 above the diagonals
    F    = D diag(there) E,      w = -F diag(theta)           there: 1, of padding 0
    y    = kept_t (x W) + mixed_t (x S) + (tril(x a^T) * w) d           per layer, x what it reads, (a, d) what it writes
    W'   = kept_C W + mixed_C S + (a w_C)^T d,                S' = p_{1..C} S + (a e_C)^T d

where kept_t = r_{1..t}, mixed_t = sum_s D_ts there_s p_{1..s}, and w_C, e_C are the last rows of w and -E diag(theta). With
"before", D and kept stop one token earlier in what is read.

Factors come as floored logarithms (`log_factor`): every exponent is a sum of its own terms by a product with zeros and ones, so
nothing cancels and no exponent is positive. All products are float32: the outer gradient goes through the inner one.

The backward kernel takes `jax.vjp` of `chunk` inside its body: what that traces are these products and their transposes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.state_scan.chunk import NN, NT, TN
from kernels_pallas.state_scan.chunk import product as _product

product = functools.partial(_product, passes=6)  # float32 on the matrix unit

NUMBERS = ("theta", "log_eta", "log_keep", "there")  # rows of `Tokens.numbers`


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static description of a scan, in the kernels' own layout.

    Attributes:
        batch: B.
        heads: N.
        tiles: M, chunks per row, each of which fills one tile of C slots.
        chunk: C, padded.
        widths: of the memory's layers, input and output included, padded.
        before: tokens read without their own write.
        resets: segments start inside of rows.
        interpret: run in Pallas' interpreter.
    """

    batch: int
    heads: int
    tiles: int
    chunk: int
    widths: tuple[int, ...]
    before: bool
    resets: bool
    interpret: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of the weights of each layer."""
        return tuple(zip(self.widths[:-1], self.widths[1:], strict=True))


class Tokens(NamedTuple):
    """A chunk of one head, float32; padding has zeros but for log_eta and log_keep, which are 0 anyway.

    Attributes:
        q: [C, H], or None where nothing is read.
        k: [C, H].
        v: [C, H].
        numbers: [4, C], see `NUMBERS`.
    """

    q: jax.Array | None
    k: jax.Array
    v: jax.Array
    numbers: jax.Array


class State(NamedTuple):
    """Weights at the chunk's start (where gradients are taken), weights and momentum before it: an [I, O] per layer each."""

    start: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...]
    momentum: tuple[jax.Array, ...]


After = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]  # weights and momentum


class _Factors(NamedTuple):
    """What the gates of a chunk make of its state and writes, as in `attnlab.ops.memory_chunk.ChunkFactors`.

    Attributes:
        writes: [C, 1].
        leaves: [C, 1].
        last_kept: [1, 1].
        last_mixed: [1, 1].
        stays: [1, 1].
        reads: [C, C], or None where nothing is read, as the others below.
        kept: [C, 1].
        mixed: [C, 1].
    """

    writes: jax.Array
    leaves: jax.Array
    last_kept: jax.Array
    last_mixed: jax.Array
    stays: jax.Array
    reads: jax.Array | None = None
    kept: jax.Array | None = None
    mixed: jax.Array | None = None


def chunk(spec: Spec, tokens: Tokens, state: State) -> tuple[jax.Array, jax.Array, After]:
    """Returns y [C, H], the losses [1, C], and weights and momentum after the chunk."""
    made = _factors(spec, tokens.numbers)
    inputs, errors, loss = _surprise(tokens.k, tokens.v, state.start)
    return _read(tokens.q, state, inputs, errors, made), loss, _write(state, inputs, errors, made)


def states_after(spec: Spec, tokens: Tokens, state: State) -> After:
    """The last result of `chunk` alone; needs no q."""
    inputs, errors, _ = _surprise(tokens.k, tokens.v, state.start)
    return _write(state, inputs, errors, _factors(spec, tokens.numbers, reading=False))


def _factors(spec: Spec, numbers: jax.Array, reading: bool = True) -> _Factors:
    """The factors from `Tokens.numbers`; those of what is read only if it is."""
    theta, log_eta, log_keep, there = (_pick(numbers, at) for at in range(len(NUMBERS)))
    there = _column(there, _same)
    momenta, since = _decays(log_eta, True)
    until = jnp.exp(_column(log_keep, lambda j, m: m > j)) * there  # decays of the weights to the chunk's end
    made = _Factors(
        writes=_column(jnp.sum(until * momenta, axis=0, keepdims=True) * -theta, _same),
        leaves=jnp.exp(_column(log_eta, lambda j, m: m > j)) * _column(-theta, _same),
        last_kept=jnp.exp(jnp.sum(log_keep, axis=1, keepdims=True)),
        last_mixed=jnp.sum(until * since, axis=0, keepdims=True),
        stays=jnp.exp(jnp.sum(log_eta, axis=1, keepdims=True)),
    )
    if not reading:
        return made
    decays, kept = _decays(log_keep, not spec.before)
    mixed = jnp.sum(decays * jnp.broadcast_to(_row(there * since), decays.shape), axis=1, keepdims=True)
    return made._replace(reads=product(decays, there * momenta, NN) * -theta, kept=kept, mixed=mixed)


def _surprise(
    k: jax.Array, v: jax.Array, start: tuple[jax.Array, ...]
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """What each layer reads [C, I], its error [C, O], and the losses [1, C]."""
    inputs, slopes = [k], []
    for w in start[:-1]:
        value, slope = _gelu(product(inputs[-1], w, NN))
        inputs.append(value)
        slopes.append(slope)
    miss = product(inputs[-1], start[-1], NN) - v
    errors = [2.0 * miss]
    for w, slope in zip(start[:0:-1], slopes[::-1], strict=True):
        errors.append(product(errors[-1], w, NT) * slope)
    return inputs, errors[::-1], _row(jnp.sum(miss * miss, axis=1, keepdims=True))


def _read(q: jax.Array, state: State, inputs: list[jax.Array], errors: list[jax.Array], made: _Factors) -> jax.Array:
    """What the tokens read, [C, H]."""
    y = q
    for layer, (w, s, a, d) in enumerate(zip(state.weights, state.momentum, inputs, errors, strict=True)):
        y = _gelu(y)[0] if layer else y
        inside = product(y, a, NT) * made.reads
        y = made.kept * product(y, w, NN) + made.mixed * product(y, s, NN) + product(inside, d, NN)
    return y


def _write(state: State, inputs: list[jax.Array], errors: list[jax.Array], made: _Factors) -> After:
    """Weights and momentum after the chunk."""
    weights, momentum = [], []
    for w, s, a, d in zip(state.weights, state.momentum, inputs, errors, strict=True):
        weights.append(_wide(made.last_kept, w) * w + _wide(made.last_mixed, s) * s + product(a, d * made.writes, TN))
        momentum.append(_wide(made.stays, s) * s + product(a, d * made.leaves, TN))
    return tuple(weights), tuple(momentum)


def _decays(log: jax.Array, own: bool) -> tuple[jax.Array, jax.Array]:
    """[C, C] products of factors after column j up to row i, and [C, 1] up to row i; without row i's own if not `own`."""
    size = log.shape[1]
    last = 0 if own else 1
    up_to = _keep(jnp.broadcast_to(log, (size, size)), lambda i, m: m + last <= i)
    after = _keep(jnp.ones_like(up_to), lambda m, j: m > j)
    square = _keep(jnp.exp(product(up_to, after, NN)), lambda i, j: j + last <= i)
    return square, jnp.exp(jnp.sum(up_to, axis=1, keepdims=True))


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The exact GELU and its derivative."""
    cumulative = 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))
    return x * cumulative, cumulative + x * (jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi)))


def _wide(one: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(one, (1, like.shape[1]))


def _pick(numbers: jax.Array, at: int) -> jax.Array:
    """Row `at` as [1, C]."""
    return jnp.sum(_keep(numbers, lambda i, j: i == at), axis=0, keepdims=True)


def _row(column: jax.Array) -> jax.Array:
    """[C, 1] as [1, C]."""
    square = jnp.broadcast_to(column, (column.shape[0], column.shape[0]))
    return jnp.sum(_keep(square, _same), axis=0, keepdims=True)


def _column(row: jax.Array, where: Any) -> jax.Array:
    """[1, C] summed where `where(row, column)`, as [C, 1]."""
    square = jnp.broadcast_to(row, (row.shape[1], row.shape[1]))
    return jnp.sum(_keep(square, where), axis=1, keepdims=True)


def _same(i: Any, j: Any) -> Any:
    return i == j


def _keep(x: jax.Array, where: Any) -> jax.Array:
    """x where `where(row, column)`, else zero."""
    row, column = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(where(row, column), x, 0.0)

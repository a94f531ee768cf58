"""What one compiled attention kernel is: the static description that all its passes share, and its score arithmetic."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# Stands for -infinity where a difference of two scores must stay finite.
MASKED = -1e30
# Base-2 scores of a head that is certified to stay within this need no running maximum: 2^88 per key, summed over
# millions of keys and multiplied with values, is far from the largest float32 (2^127), and so is 2^-88 from the smallest.
BOUND = 88.0
# contract over the minor dimension of both (x y^T), and the plain product
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))

Form = Literal["softmax", "tanh", "logistic"]


class Tiles(NamedTuple):
    """How the inner computation of a block is cut and interleaved; see tuning.py.

    Attributes:
        rows: rows of scores per sub-tile.
        columns: columns of scores per sub-tile.
        depth: how many sub-tiles the score products run ahead of their use.
        column_major: walk down the rows first.
        staged: weights (and score gradients) wait in VMEM for their products. The compiler would else keep them in
            registers, of which there are fewer than a block needs, and spill.
    """

    rows: int
    columns: int
    depth: int
    column_major: bool
    staged: bool = False


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static description of an attention call, in the kernels' own layout.

    Attributes:
        form: "softmax", or how the sigmoid is computed: "tanh" ((1 + tanh(x/2)) / 2, one transcendental, an absolute error of
            about 1e-7) or "logistic" (1 / (1 + 2^-x'), two of them, accurate relative to small weights).
        window: canonical (left, right), right = 0 when causal.
        causal: for ALiBi's distance.
        offset: position of query 0 where positions are implied (S - T).
        length: T before padding.
        keys: S before padding.
        scale: of q k^T.
        bias: constant of all scores (sigmoid).
        positions: explicit positions are given; negative key positions are empty.
        segments: segment ids are given.
        alibi: slopes are given.
        batch: B.
        heads: N.
        kv_heads: K.
        width: H, padded.
        block_q: queries per block.
        block_kv: keys per block.
        table_batch: 1 or B, of the list of steps.
        table_groups: 1, K or N.
        forward: tiles of the forward kernel, in FULL and in PARTIAL blocks.
        online: the same where the softmax needs a running maximum (`depth` counts rows of sub-tiles; always staged).
        dq: tiles of the dq kernel, alike.
        dkv: tiles of the dk, dv kernel (rows are keys), alike.
        interpret: run in Pallas' interpreter.
        wide: give results and gradients in float32.
    """

    form: Form
    window: tuple[int | None, int | None]
    causal: bool
    offset: int
    length: int
    keys: int
    scale: float
    bias: float
    positions: bool
    segments: bool
    alibi: bool
    batch: int
    heads: int
    kv_heads: int
    width: int
    block_q: int
    block_kv: int
    table_batch: int
    table_groups: int
    forward: tuple[Tiles, Tiles]
    online: tuple[Tiles, Tiles]
    dq: tuple[Tiles, Tiles]
    dkv: tuple[Tiles, Tiles]
    interpret: bool = False
    wide: bool = False

    @property
    def factor(self) -> float:
        """Scale of the scores inside the kernel, folded into q: half of it for tanh, base 2 for the others."""
        return 0.5 if self.form == "tanh" else LOG2E

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the integer vectors that masks or ALiBi need, in the order of the kernels' arguments."""
        return ("positions",) * self.positions + ("segments",) * self.segments


def precision(dtype: Any) -> lax.Precision | None:
    """float32 inputs multiply in full precision, bfloat16 inputs as they are."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(x: jax.Array, y: jax.Array, dims: Any) -> jax.Array:
    """x y^T or x y with float32 accumulation."""
    return lax.dot_general(x, y, dims, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def weight(spec: Spec, scores: jax.Array) -> jax.Array:
    """Unnormalised weights of inner scores: 2 a for "tanh" (a is the sigmoid), a for "logistic", 2^s for "softmax"."""
    if spec.form == "tanh":
        return jnp.tanh(scores) + 1.0
    if spec.form == "logistic":
        return 1.0 / (1.0 + jnp.exp2(-scores))
    return jnp.exp2(scores)


def slope(spec: Spec, weights: jax.Array) -> jax.Array:
    """da/ds up to `gradient_factor`: 4 a (1 - a) for "tanh", a (1 - a) for "logistic"; sigmoid only."""
    return weights * ((2.0 if spec.form == "tanh" else 1.0) - weights)


def output_factor(spec: Spec) -> float:
    """Factor from sums of `weight` to sums of sigmoids."""
    return 0.5 if spec.form == "tanh" else 1.0


def gradient_factor(spec: Spec) -> float:
    """Factor from `slope` to the derivative of the sigmoid."""
    return 0.25 if spec.form == "tanh" else 1.0


def distance(spec: Spec, q_minus_kv: jax.Array) -> jax.Array:
    """ALiBi's distance in float32 from position differences p - j."""
    away = jnp.maximum(q_minus_kv, 0) if spec.causal else jnp.abs(q_minus_kv)
    return away.astype(jnp.float32)

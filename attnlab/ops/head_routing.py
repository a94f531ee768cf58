"""Which heads a token uses, and with which weights: the routers of mixture-of-head attention.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (2024, arXiv 2410.11842). Of N heads the first s are shared, always
on; the other R = N - s are routed, and a token uses k of them. Everything here is float32, whatever the model computes in.
A choice carries no gradient and is named "selection" for rematerialisation policies; ties go to the lower head.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnlab.errors import ConfigError
from attnlab.types import Array, Bool, Float

_EPSILON = float(jnp.finfo(jnp.float32).eps)


class HeadRoute(NamedTuple):
    """What a router decided.

    Attributes:
        gates: [B, T, N] float32, the weight of each head; 0 for routed heads that are not selected.
        scores: [B, T, R] float32, softmax of the router over the routed heads.
        selected: [B, T, R] bool.
    """

    gates: Array
    scores: Array
    selected: Array


def check_heads(num_heads: int, shared_heads: int, top_k: int) -> None:
    """Refuses numbers of heads that do not fit each other.

    Raises:
        ConfigError: one is out of range.
    """
    if not 0 <= shared_heads <= num_heads:
        raise ConfigError(f"shared_heads = {shared_heads}: there are {num_heads} heads. Use 0 to {num_heads}.")
    routed = num_heads - shared_heads
    if routed and not 1 <= top_k <= routed:
        raise ConfigError(f"top_k = {top_k}: there are {routed} routed heads. Use 1 to {routed}, or shared_heads={num_heads}.")
    if not routed and top_k:
        raise ConfigError(f"top_k = {top_k}: all {num_heads} heads are shared. Use 0, or fewer shared heads.")


def select_heads(scores: Float[Array, "B T R"], top_k: int) -> Bool[Array, "B T R"]:
    """Marks the `top_k` best heads of every token; a constant."""
    if top_k == scores.shape[-1]:
        return jnp.ones(scores.shape, bool)
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)[1]
    return checkpoint_name(jnp.any(best[..., None] == jnp.arange(scores.shape[-1]), axis=-2), "selection")


def route_heads(
    routed_logits: Float[Array, "B T R"] | None,
    shared_logits: Float[Array, "B T s"] | None,
    group_logits: Float[Array, "B T 2"] | None,
    *,
    shared_heads: int,
    top_k: int,
) -> HeadRoute:
    """The learned router, as in the released code of the ViT and DiT models.

    g_R = k p m / max(sum(p m), eps), p = softmax(routed logits), m its top k; g_S = s softmax(shared logits), 1 where s = 1;
    with heads of both kinds (w_S, w_R) = 2 softmax(group logits) multiply them. The factors make the gates average about
    one, as in plain multi-head attention. (The paper's formula has neither factors nor renormalisation.)

    Args:
        routed_logits: None where there are no routed heads.
        shared_logits: None where s <= 1.
        group_logits: None unless there are heads of both kinds.
        shared_heads: s.
        top_k: k.

    Raises:
        ConfigError: numbers of heads, or logits, that do not fit.
    """
    routed = 0 if routed_logits is None else routed_logits.shape[-1]
    check_heads(shared_heads + routed, shared_heads, top_k)
    _expect("shared_logits", shared_logits, shared_heads if shared_heads > 1 else 0)
    _expect("group_logits", group_logits, 2 if shared_heads and routed else 0)
    if routed_logits is None and shared_logits is None:
        raise ConfigError(f"shared_heads = {shared_heads}: a single head has nothing to route. Use plain attention.")
    given = next(x for x in (routed_logits, shared_logits) if x is not None)
    empty = jnp.zeros((*given.shape[:-1], 0), jnp.float32)
    scores, selected, gates = empty, empty.astype(bool), []
    groups = [1.0, 1.0]
    if group_logits is not None:
        groups = jnp.split(2.0 * jax.nn.softmax(group_logits.astype(jnp.float32), axis=-1), 2, axis=-1)
    if shared_logits is not None:
        gates.append(groups[0] * shared_heads * jax.nn.softmax(shared_logits.astype(jnp.float32), axis=-1))
    elif shared_heads:
        gates.append(groups[0] * jnp.ones((), jnp.float32))
    if routed_logits is not None:
        scores = jax.nn.softmax(routed_logits.astype(jnp.float32), axis=-1)
        selected = select_heads(scores, top_k)
        kept = jnp.where(selected, scores, 0.0)
        gates.append(groups[1] * top_k * kept / jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), _EPSILON))
    return HeadRoute(jnp.concatenate(gates, axis=-1), scores, selected)


def route_by_norm(
    q: Float[Array, "B T N H"], *, shared_heads: int, top_k: int, ste: Literal["none", "all_routed"] = "none"
) -> HeadRoute:
    """The router without parameters, for models that were trained as plain attention (MoH-LLaMA3).

    A head's score is the length of its query before rotation: p = softmax(a / std(a)) over the routed heads, std unbiased.
    Gates are 1 for shared and selected heads, 0 for others, so that the scale of the pre-trained output stays.

    Args:
        q: projected queries.
        shared_heads: s.
        top_k: k.
        ste: the gates' gradient. "none": they are constants, as in the released inference code. "all_routed": straight
            through, dL/dgate goes to p of every routed head, selected or not (our reading of the paper's training).

    Raises:
        ConfigError: numbers of heads that do not fit, or an unknown `ste`.
    """
    heads = q.shape[2]
    check_heads(heads, shared_heads, top_k)
    if ste not in ("none", "all_routed"):
        raise ConfigError(f"ste = {ste!r}: unknown. Use 'none' or 'all_routed'.")
    ones = jnp.ones((*q.shape[:2], shared_heads), jnp.float32)
    if shared_heads == heads:
        return HeadRoute(ones, ones[..., :0], ones[..., :0].astype(bool))
    squares = jnp.sum(jnp.square(q[:, :, shared_heads:].astype(jnp.float32)), axis=-1)
    # A zero query has no gradient of its length; the inner `where` keeps NaN out of the backward pass.
    lengths = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    away = lengths - jnp.mean(lengths, axis=-1, keepdims=True)
    variance = jnp.sum(jnp.square(away), axis=-1, keepdims=True) / max(lengths.shape[-1] - 1, 1)
    # Equal lengths (or one routed head) have no spread: the published quotient is NaN there, ours are equal scores.
    spread = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    scores = jax.nn.softmax(jnp.where(variance > 0, lengths / spread, 0.0), axis=-1)
    selected = select_heads(scores, top_k)
    gates = selected.astype(jnp.float32)
    if ste == "all_routed":
        # m + p - stop(p), with the difference first: it is exactly zero, so the gates are exactly 0 and 1.
        gates = gates + (scores - jax.lax.stop_gradient(scores))
    return HeadRoute(jnp.concatenate([ones, gates], axis=-1), scores, selected)


def balance_loss(
    scores: Float[Array, "B T R"],
    selected: Bool[Array, "B T R"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    form: Literal["code", "paper"] = "code",
    axis_name: Any = None,
) -> Float[Array, ""]:
    """Load balance of the routed heads over all tokens: sum_i P_i f_i, times R in the code's form; f has no gradient.

    P_i is the mean score of head i, f_i the share of tokens that selected it, so balanced heads give k ("code") or k / R
    ("paper"). The published coefficient 0.01 goes with the code's form, averaged over the layers with routed heads.

    Args:
        scores: of `HeadRoute`.
        selected: of `HeadRoute`.
        mask: False = padding, left out.
        form: "code" or "paper".
        axis_name: of `jax.pmap` or `jax.vmap`: means over it too. (Under `jax.jit` they are global anyway.)

    Raises:
        ConfigError: unknown form.
    """
    if form not in ("code", "paper"):
        raise ConfigError(f"form = {form!r}: unknown. Use 'code' or 'paper'.")
    probability, load = (_token_mean(x, mask, axis_name) for x in (scores, selected))
    total = jnp.sum(probability * jax.lax.stop_gradient(load))
    return total * scores.shape[-1] if form == "code" else total


def head_load(
    selected: Bool[Array, "B T R"], *, mask: Bool[Array, "B T"] | None = None, axis_name: Any = None
) -> Float[Array, " R"]:
    """Share of the tokens that selected each routed head; arguments as of `balance_loss`."""
    return _token_mean(selected, mask, axis_name)


def _token_mean(x: Array, mask: Array | None, axis_name: Any) -> Array:
    """[B, T, R] to the mean [R] over tokens."""
    x = x.astype(jnp.float32)
    counted = jnp.ones(x.shape[:2], jnp.float32) if mask is None else mask.astype(jnp.float32)
    total, count = jnp.einsum("btr,bt->r", x, counted, precision=jax.lax.Precision.HIGHEST), jnp.sum(counted)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1.0)


def _expect(name: str, logits: Array | None, width: int) -> None:
    have = 0 if logits is None else logits.shape[-1]
    if have != width:
        raise ConfigError(f"{name} has {have} columns: these heads need {width}.")

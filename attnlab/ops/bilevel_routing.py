"""Bi-level routing attention: every region of a map picks its best regions, then its tokens attend to the tokens of these.

Zhu et al., 2023, "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810, sections 3.1 and 3.2.
Maps are [B, Y, X, N, H]. Regions lie on a grid and are numbered row by row, tokens inside a region alike, so that after
`to_regions` a region is a run of consecutive tokens and a table of routed regions is a block list (`ops.block_index`).

The released code has two forms. `bilevel_routing_attention` is that of the T, S and B models: n_win x n_win regions that
divide the map. `ragged_bilevel_routing_attention` is the refactored one for any map. Where n_win divides the map both are
the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from attnlab.errors import ConfigError, nearest
from attnlab.ops import dispatch, select
from attnlab.ops.block_attention import block_attention
from attnlab.types import Array, Float, Int

OP = "bilevel_routing_attention"
KV_DOWNSAMPLE_MODES = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")

# Tokens per block where a region is longer, and the step of a kernel's block sizes.
_LARGEST_BLOCK = 512
_LANES = 128
# Below this many tokens most of a kernel's smallest block would be padding.
_SHORT_REGION = 64


class Routing(NamedTuple):
    """What the first level chose.

    Attributes:
        index: [B, P, J] int32, the chosen regions of each of the P regions, best first; a constant.
        weight: [B, P, J] float32, softmax over the logits of the chosen regions.
    """

    index: Array
    weight: Array


def bilevel_routing_attention(
    q: Float[Array, "B Y X N H"],
    k: Float[Array, "B Y X N H"],
    v: Float[Array, "B Y X N E"],
    *,
    n_win: int,
    topk: int,
    own_region: bool = False,
    scale: float | None = None,
    kv_downsample_mode: str = "identity",
    kv_per_win: int = 4,
    kv_downsample_ratio: int = 4,
    soft_routing: bool = False,
    diff_routing: bool = False,
    implementation: Literal["blocks", "gather"] | None = None,
    block_implementation: str | None = None,
) -> tuple[Float[Array, "B Y X N E"], Routing]:
    """Bi-level routing attention over n_win x n_win regions that divide the map (the released T, S and B models).

    Regions are compared by the means of their queries and keys over all heads, so all heads share one choice; a region
    need not choose itself. The choice is a constant. The weights of the chosen regions matter with `soft_routing` only,
    and have a gradient with `diff_routing` only.

    Args:
        q: queries.
        k: keys, before any downsampling (the choice is made with the full ones).
        v: values; their heads may have another width.
        n_win: regions per side, P = n_win^2.
        topk: regions chosen by each region; P gives full attention.
        own_region: each region is one of those that it chooses; with topk = 1 this is attention in windows.
        scale: of the products on both levels, default (N H)^-1/2: the full width, not that of a head.
        kv_downsample_mode: how keys and values of a region are pooled before they are attended to: "identity",
            "ada_avgpool" or "ada_maxpool" (to kv_per_win x kv_per_win), "avgpool" or "maxpool" (by kv_downsample_ratio).
        kv_per_win: pooled tokens per side of a region.
        kv_downsample_ratio: tokens per side that one pooled token stands for; what is left over at the end is dropped.
        soft_routing: multiply keys and values of a chosen region with its weight.
        diff_routing: let gradients flow into the weights.
        implementation: "blocks" (`ops.block_attention` over lists of blocks, with its kernels; not for soft routing) or
            "gather" (the reference: copies the chosen keys and values to every region); None takes the first that can.
        block_implementation: of `ops.block_attention`, None = the best that can.

    Returns:
        Attended values in the type of q, and the `Routing`.

    Raises:
        ConfigError: n_win does not divide the map, fewer than topk regions, an unknown or impossible pooling.
        NotImplementedError: diff_routing without soft_routing (the published code leaves it open too), or the named
            implementation cannot do this call.
    """
    if diff_routing and not soft_routing:
        raise NotImplementedError("diff_routing without soft_routing: never published. Set soft_routing=True as well.")
    height, width = q.shape[1:3]
    if n_win < 1 or height % n_win or width % n_win:
        raise ConfigError(
            f"n_win = {n_win}: does not divide a map of {height} x {width}. Pad the map (auto_pad=True of the module), "
            "choose a divisor, or use ragged_bilevel_routing_attention (variant 'nchw')."
        )
    size = (height // n_win, width // n_win)
    scale = (q.shape[3] * q.shape[4]) ** -0.5 if scale is None else float(scale)
    q, k, v = (to_regions(x, size) for x in (q, k, v))
    routing = route_regions(_means(q), _means(k), topk, own_region=own_region, scale=scale, diff_routing=diff_routing)
    pool = _pooling(kv_downsample_mode, size, kv_per_win, kv_downsample_ratio)
    weight = routing.weight if soft_routing else None
    out = attend_regions(
        q, pool(k), pool(v), routing.index, weight, scale=scale, implementation=implementation,
        block_implementation=block_implementation,
    )  # fmt: skip
    return from_regions(out, (n_win, n_win), size), routing


def ragged_bilevel_routing_attention(
    q: Float[Array, "B Y X N H"],
    k: Float[Array, "B Y X N H"],
    v: Float[Array, "B Y X N E"],
    *,
    n_win: int,
    topk: int,
    own_region: bool = False,
    scale: float | None = None,
    implementation: Literal["blocks", "gather"] | None = None,
    block_implementation: str | None = None,
) -> tuple[Float[Array, "B Y X N E"], Routing]:
    """Bi-level routing attention over a map of any size (the released refactored op).

    A region has floor(Y / n_win) x floor(X / n_win) tokens, so there may be more than n_win^2 of them. Regions at the
    end are filled up with zero queries, keys and values: such keys have score 0 and take their share of the softmax (as
    released), but do not count in the means that regions are compared by. Logits of regions are not scaled, which
    changes the weights of the `Routing`, not the choice.

    Args:
        q: queries.
        k: keys.
        v: values.
        n_win: regions per side, at least.
        topk: regions chosen by each region.
        own_region: each region is one of those that it chooses.
        scale: of the products with tokens, default (N H)^-1/2.
        implementation: as in `bilevel_routing_attention`.
        block_implementation: alike.

    Returns:
        Attended values in the type of q, and the `Routing`.

    Raises:
        ConfigError: a map smaller than n_win x n_win, or fewer than topk regions.
        NotImplementedError: the named implementation cannot do this call.
    """
    height, width = q.shape[1:3]
    size, grid = ragged_regions(height, width, n_win)
    scale = (q.shape[3] * q.shape[4]) ** -0.5 if scale is None else float(scale)
    padding = ((0, 0), (0, grid[0] * size[0] - height), (0, grid[1] * size[1] - width), (0, 0), (0, 0))
    there = to_regions(jnp.pad(jnp.ones((1, height, width, 1, 1), bool), padding), size)
    q, k, v = (to_regions(jnp.pad(x, padding), size) for x in (q, k, v))
    routing = route_regions(_means(q, there), _means(k, there), topk, own_region=own_region, scale=1.0)
    out = attend_regions(
        q, k, v, routing.index, scale=scale, implementation=implementation, block_implementation=block_implementation
    )
    return from_regions(out, grid, size)[:, :height, :width], routing


def ragged_regions(height: int, width: int, n_win: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the size of a region (rows, columns) and the grid of regions (rows, columns) of the refactored form.

    Raises:
        ConfigError: a map smaller than n_win x n_win.
    """
    if not 1 <= n_win <= min(height, width):
        raise ConfigError(f"n_win = {n_win}: a map of {height} x {width} has no such regions. Choose at most the shorter side.")
    size = (height // n_win, width // n_win)
    return size, (-(-height // size[0]), -(-width // size[1]))


def to_regions(x: Array, size: tuple[int, int]) -> Array:
    """Cuts a map [B, Y, X, ...] into regions of size (rows, columns): [B, P, tokens, ...]."""
    batch, height, width, *rest = x.shape
    rows, columns = height // size[0], width // size[1]
    x = x.reshape(batch, rows, size[0], columns, size[1], *rest).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, size[0] * size[1], *rest)


def from_regions(x: Array, grid: tuple[int, int], size: tuple[int, int]) -> Array:
    """Undoes `to_regions` for a grid of (rows, columns) regions."""
    batch, _, _, *rest = x.shape
    x = x.reshape(batch, *grid, *size, *rest).swapaxes(2, 3)
    return x.reshape(batch, grid[0] * size[0], grid[1] * size[1], *rest)


def route_regions(
    q: Float[Array, "B P C"],
    k: Float[Array, "B P C"],
    topk: int,
    *,
    scale: float,
    own_region: bool = False,
    diff_routing: bool = False,
) -> Routing:
    """The first level: each region's `topk` best regions by the products of descriptors, in float32.

    Args:
        q: what the regions ask for.
        k: what they offer.
        topk: regions to choose.
        scale: of the products.
        own_region: a region chooses itself, first of all.
        diff_routing: let gradients flow into the weights; the choice itself has none.

    Raises:
        ConfigError: there are fewer regions.
    """
    regions = k.shape[1]
    if not 1 <= topk <= regions:
        raise ConfigError(f"topk = {topk}: the map has {regions} regions. Choose between 1 and {regions}, or raise n_win.")
    if not diff_routing:
        q, k = jax.lax.stop_gradient((q, k))
    scores = select.block_scores(q[:, :, None], k[:, :, None], scale=scale)
    # Under its name a rematerialised layer can keep the choice, so that computing it again cannot flip it.
    forced = np.eye(regions, dtype=bool) if own_region else None
    index = checkpoint_name(select.top_blocks(scores, topk, forced=forced)[:, 0], "routing")
    return Routing(index, jax.nn.softmax(jnp.take_along_axis(scores[:, 0], index, axis=-1), axis=-1))


def attend_regions(
    q: Float[Array, "B P W N H"],
    k: Float[Array, "B P U N H"],
    v: Float[Array, "B P U N E"],
    index: Int[Array, "B P J"],
    weight: Float[Array, "B P J"] | None = None,
    *,
    scale: float,
    implementation: Literal["blocks", "gather"] | None = None,
    block_implementation: str | None = None,
) -> Float[Array, "B P W N E"]:
    """The second level: tokens of a region attend to all tokens of the regions that its row of `index` names.

    Args:
        q: queries by region.
        k: keys by region; a region may have fewer keys than queries (pooled ones).
        v: values.
        index: chosen regions, all >= 0, none twice in a row.
        weight: multiplies keys and values of the chosen regions, or None.
        scale: of the products.
        implementation: "blocks", "gather" or None.
        block_implementation: of `ops.block_attention`.

    Raises:
        NotImplementedError: "blocks" with weights: a key would differ from region to region.
    """
    return dispatch.call(OP, implementation, q, k, v, index, weight, scale, block_implementation)


def routed_weights(
    q: Float[Array, "B P W N H"],
    k: Float[Array, "B P U N H"],
    index: Int[Array, "B P J"],
    weight: Float[Array, "B P J"] | None = None,
    *,
    scale: float,
) -> Float[Array, "B P N W P U"]:
    """The softmax weights of `attend_regions` over the keys of all regions, float32: zero where not chosen; for pictures."""
    near = _gathered_weights(q, _near(k, index, weight), scale)
    chosen = jax.nn.one_hot(index, k.shape[1], dtype=near.dtype)
    return jnp.einsum("bpnwju,bpjr->bpnwru", near, chosen, precision=jax.lax.Precision.HIGHEST)


def _means(x: Array, there: Array | None = None) -> Array:
    """Means of a region's tokens over all heads, [B, P, W, N, H] to [B, P, N H] float32; `there` = tokens that count."""
    x = x.astype(jnp.float32)
    mean = x.mean(2) if there is None else jnp.where(there, x, 0.0).sum(2) / there.sum(2)
    return mean.reshape(*mean.shape[:2], -1)


def _pooling(mode: str, size: tuple[int, int], per_win: int, ratio: int) -> Callable[[Array], Array]:
    """Returns the function that pools keys or values [B, P, W, N, H] of regions of that size."""
    if mode not in KV_DOWNSAMPLE_MODES:
        raise ConfigError(f"kv_downsample_mode = {mode!r}: unknown, {nearest(mode, KV_DOWNSAMPLE_MODES)}")
    if mode == "identity":
        return lambda x: x
    if mode.startswith("ada_"):
        if per_win < 1:
            raise ConfigError(f"kv_per_win = {per_win}: a region needs a key. Give 1 or more.")
        # bins of adaptive pooling: from floor(i n / m) to ceil((i + 1) n / m), so that neighbours may overlap
        bins = [[(i * n // per_win, -(-(i + 1) * n // per_win)) for i in range(per_win)] for n in size]
    else:
        if not 1 <= ratio <= min(size):
            raise ConfigError(
                f"kv_downsample_ratio = {ratio}: a region has {size[0]} x {size[1]} tokens. Choose at most {min(size)}."
            )
        bins = [[(i * ratio, (i + 1) * ratio) for i in range(n // ratio)] for n in size]
    reduce = jnp.mean if mode.endswith("avgpool") else jnp.max

    def pool(x: Array) -> Array:
        wide = x.astype(jnp.float32).reshape(*x.shape[:2], *size, *x.shape[3:])
        for axis, parts in zip((2, 3), bins, strict=True):  # rows, then columns: the bins are rectangles
            cut = [jax.lax.slice_in_dim(wide, start, end, axis=axis) for start, end in parts]
            wide = jnp.stack([reduce(part, axis=axis) for part in cut], axis=axis)
        return wide.reshape(*x.shape[:2], -1, *x.shape[3:]).astype(x.dtype)

    return pool


def _near(x: Array, index: Array, weight: Array | None) -> Array:
    """Gathers the chosen regions, [B, P, U, N, H] to [B, P, J, U, N, H], times their weights."""
    near = jax.vmap(lambda x, index: x[index])(x, index)
    return near if weight is None else near * weight[..., None, None, None].astype(x.dtype)


def _gathered_weights(q: Array, near_k: Array, scale: float) -> Array:
    """Softmax weights [B, P, N, W, J, U] float32."""
    scores = jnp.einsum("bpwnh,bpjunh->bpnwju", q, near_k, precision=_precision(q), preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * scale, axis=(-2, -1))


def _attend_gathered(
    q: Array, k: Array, v: Array, index: Array, weight: Array | None, scale: float, block_implementation: str | None
) -> Array:
    """The reference: every region gets a copy of the keys and values that it chose."""
    del block_implementation
    near = _gathered_weights(q, _near(k, index, weight), scale)
    out = jnp.einsum(
        "bpnwju,bpjunh->bpwnh", near.astype(v.dtype), _near(v, index, weight), precision=_precision(q),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return out.astype(q.dtype)


def _attend_blocks(
    q: Array, k: Array, v: Array, index: Array, weight: Array | None, scale: float, block_implementation: str | None
) -> Array:
    """The regions as blocks: long ones are cut into several, short ones filled up to what a kernel takes."""
    del weight
    batch, regions, tokens, heads, _ = q.shape
    kv_tokens, out_width = k.shape[2], v.shape[4]
    # A kernel takes blocks of whole lanes; XLA takes any, and serves short regions better.
    if block_implementation is None:
        kernel = _kernels() and min(tokens, kv_tokens) >= _SHORT_REGION
    else:
        kernel = not block_implementation.startswith("xla")
    step = _LANES if kernel else 1
    width = max(q.shape[4], out_width)
    (q_blocks, block_q), (kv_blocks, block_kv) = _cut(tokens, step), _cut(kv_tokens, step)

    def in_line(x: Array, length: int) -> Array:
        """[B, P, W, N, h] to [B, P * length, N, H]; channels of zeros change neither scores nor values."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0), (0, width - x.shape[4])))
        return x.reshape(batch, regions * length, heads, width)

    kv_length = kv_blocks * block_kv
    kv_mask = None
    if kv_length > kv_tokens:
        kv_mask = jnp.broadcast_to(jnp.tile(jnp.arange(kv_length) < kv_tokens, regions), (batch, regions * kv_length))
    out = block_attention(
        in_line(q, q_blocks * block_q),
        in_line(k, kv_length),
        in_line(v, kv_length),
        select.expand_blocks(index[:, None], q_blocks, kv_blocks),
        block_q=block_q,
        block_kv=block_kv,
        kv_mask=kv_mask,
        scale=scale,
        implementation=block_implementation,
    )
    return out.reshape(batch, regions, -1, heads, width)[:, :, :tokens, :, :out_width]


def _cut(tokens: int, step: int) -> tuple[int, int]:
    """Returns how many blocks a region of so many tokens has, and their size."""
    count = -(-tokens // _LARGEST_BLOCK)
    return count, -(-tokens // count // step) * step


def _kernels() -> bool:
    """Tells whether the target platform has a kernel for block lists (and kernels are wanted)."""
    if dispatch.is_portable():
        return False
    table = dispatch.implementations("block_attention").items()
    return any(dispatch.target_platform() in platforms and not name.startswith("xla") for name, platforms in table)


def _refuse(
    q: Array, k: Array, v: Array, index: Array, weight: Array | None, scale: float, block_implementation: str | None
) -> str | None:
    if weight is not None:
        return "soft routing scales a region's keys anew for every region that chose it; a block list shares them"
    return None


def _precision(x: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


dispatch.register(OP, "blocks", dispatch.Implementation(_attend_blocks, _refuse))
dispatch.register(OP, "gather", dispatch.Implementation(_attend_gathered))

"""Mixture-of-head attention: a token uses the shared heads and the best few of the others.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (2024, arXiv 2410.11842); official code SkyworkAI/MoH.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab import ops
from attnlab.errors import ConfigError, nearest
from attnlab.nn.attention import DenseAttention
from attnlab.nn.partitioning import named
from attnlab.nn.projection import INIT_STD
from attnlab.ops import head_routing
from attnlab.ops.head_routing import HeadRoute
from attnlab.ops.mixture_of_heads import mixture_of_heads_attention

ROUTERS = ("learned", "norm")
INITS = {
    "normal": nn.initializers.normal(INIT_STD),
    "xavier": nn.initializers.xavier_uniform(),  # the published DiT
    "truncated": nn.initializers.truncated_normal(INIT_STD),  # the published ViT
}


class HeadRouter(nn.Module):
    """The learned router (`ops.head_routing.route_heads`); reads the layer's input, computes in float32.

    Parameters, without biases: `routed` [D, R], `shared` [D, s] where s > 1, `group` [D, 2] (shared, routed) where there are
    heads of both kinds.

    Attributes:
        num_heads: N.
        shared_heads: s, the first heads.
        top_k: k.
        router_init: of the kernels: "normal", "xavier" or "truncated".
    """

    num_heads: int
    shared_heads: int
    top_k: int
    router_init: str = "normal"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> HeadRoute:
        """Maps [B, T, D] to the heads of every token.

        Raises:
            ConfigError: numbers of heads that do not fit, or an unknown `router_init`.
        """
        if self.router_init not in INITS:
            raise ConfigError(f"router_init = {self.router_init!r}: unknown, {nearest(self.router_init, INITS)}")
        head_routing.check_heads(self.num_heads, self.shared_heads, self.top_k)
        shared, routed = self.shared_heads, self.num_heads - self.shared_heads
        widths = {"routed": routed, "shared": shared if shared > 1 else 0, "group": 2 if shared and routed else 0}
        wide = x.astype(jnp.float32)

        def logits(name: str) -> jax.Array | None:
            if not widths[name]:
                return None
            kernel = self.param(name, named(INITS[self.router_init], "embed", None), (x.shape[-1], widths[name]), self.param_dtype)
            return jnp.matmul(wide, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

        return head_routing.route_heads(
            logits("routed"), logits("shared"), logits("group"), shared_heads=shared, top_k=self.top_k
        )


class MixtureOfHeads(DenseAttention):
    """Softmax attention whose heads are weighed, and mostly switched, token by token; other fields as in `DenseAttention`.

    Keys and values of all heads stay: a gate belongs to a query token, so any chunking with a cache equals the full pass.
    Parameters are those of `SoftmaxAttention` and, for the learned router, `router`: a checkpoint of plain attention serves
    router="norm" as it is, and router="learned" but for the router.

    Sows `balance` to `losses` (padding left out), `balance` (without coefficient), `head_load_min` and `head_load_max` to
    `metrics`, and with `capture_attention` also `gates` [B, T, N], `head_scores` and `head_selected` [B, T, R] to
    `intermediates`.

    Attributes:
        shared_heads: s, the first heads; None = N / 2.
        top_k: k, routed heads that a token uses; None = N / 4, so that 75 % of the heads are on.
        router: "learned", or "norm" (by the length of the queries, without parameters and with gates of 0 and 1).
        qkv_bias: biases of queries, keys and values; None = `proj_bias`, which says it of all projections.
        ste: gradient of the gates of router="norm": "none", or "all_routed" (straight through), for training. With
            "all_routed" all heads are computed: those that are off have a gradient too.
        balance_coefficient: of the balance loss.
        balance_layers: layers with routed heads in the model: the published loss is averaged over them.
        router_init: "normal", "xavier" (DiT) or "truncated" (ViT).
        axis_name: of `jax.pmap` or `jax.vmap`, for the means in the balance loss.
        implementation: of `ops.mixture_of_heads.mixture_of_heads_attention`: "all_heads" or "gathered".
    """

    shared_heads: int | None = None
    top_k: int | None = None
    router: str = "learned"
    qkv_bias: bool | None = None
    ste: str = "none"
    balance_coefficient: float = 0.01
    balance_layers: int = 1
    router_init: str = "normal"
    axis_name: str | None = None

    @nn.nowrap
    def head_counts(self) -> tuple[int, int]:
        """Returns (s, k).

        Raises:
            ConfigError: they do not fit.
        """
        shared = self.num_heads // 2 if self.shared_heads is None else self.shared_heads
        top_k = min(self.num_heads // 4, self.num_heads - shared) if self.top_k is None else self.top_k
        head_routing.check_heads(self.num_heads, shared, top_k)
        return shared, top_k

    @nn.nowrap
    def sequence_flops(self, length: int) -> float:
        """Forward FLOPs per token of the products with keys and values, of the heads that are on."""
        return super().sequence_flops(length) * sum(self.head_counts()) / self.num_heads

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *, route: HeadRoute, **masks: Any
    ) -> jax.Array:
        """Calls `mixture_of_heads_attention`."""
        if self.router == "norm" and self.ste == "all_routed":
            masks.pop("implementation", None)
            y = ops.softmax_attention(q, k, v, **masks)
            return (y.astype(jnp.float32) * route.gates[..., None]).astype(y.dtype)
        return mixture_of_heads_attention(q, k, v, route.gates, route.selected, top_k=self.head_counts()[1], **masks)

    def weights(
        self, q: jax.Array, k: jax.Array, positions: jax.Array, *, route: HeadRoute, **masks: Any
    ) -> jax.Array:
        """Rows sum to one, gates not applied."""
        return ops.attention_weights("softmax", q, k, **masks)

    @nn.nowrap
    def input_bias(self) -> bool:
        """See `qkv_bias`."""
        return self.proj_bias if self.qkv_bias is None else self.qkv_bias

    def token_options(
        self, x: jax.Array, q: jax.Array, *, segment_ids: jax.Array | None, mask: jax.Array | None
    ) -> dict[str, Any]:
        """Chooses the heads of every token, as `route`, and sows what is said of them.

        Raises:
            ConfigError: an unknown router, or numbers of heads that do not fit.
        """
        route = self._route(x, q)
        coefficient = self.balance_coefficient / self.balance_layers
        sow_route(self, route, _counted(segment_ids, mask), coefficient=coefficient, axis_name=self.axis_name)
        return {"route": route}

    def _route(self, x: jax.Array, q: jax.Array) -> HeadRoute:
        """Chooses heads, from the layer's input or from the queries as projected."""
        shared, top_k = self.head_counts()
        if self.router not in ROUTERS:
            raise ConfigError(f"router = {self.router!r}: unknown, {nearest(self.router, ROUTERS)}")
        if self.router == "norm":
            return head_routing.route_by_norm(q, shared_heads=shared, top_k=top_k, ste=self.ste)
        if self.ste != "none":
            raise ConfigError(f"ste = {self.ste!r}: the learned router has gradients of its own. Use 'none', or router='norm'.")
        return HeadRouter(self.num_heads, shared, top_k, self.router_init, self.param_dtype, name="router")(x)


def sow_route(module: nn.Module, route: HeadRoute, counted: jax.Array | None, *, coefficient: float, axis_name: Any) -> None:
    """Sows what `MixtureOfHeads` lists; `counted` [B, T] bool is False for padding."""
    if module.capture_attention:
        for name, value in zip(("gates", "head_scores", "head_selected"), route, strict=True):
            module.sow("intermediates", name, value)
    if not route.selected.shape[-1]:
        return
    load = head_routing.head_load(route.selected, mask=counted, axis_name=axis_name)
    balance = head_routing.balance_loss(route.scores, route.selected, mask=counted, axis_name=axis_name)
    module.sow("losses", "balance", coefficient * balance)
    module.sow("metrics", "balance", balance)
    module.sow("metrics", "head_load_min", jnp.min(load))
    module.sow("metrics", "head_load_max", jnp.max(load))


def _counted(segment_ids: jax.Array | None, mask: jax.Array | None) -> jax.Array | None:
    if segment_ids is None:
        return mask
    return segment_ids != 0 if mask is None else mask & (segment_ids != 0)

"""Feature-selection gates: a learned weight in (0, 1) per channel, the same for all inputs and positions.

"Feature Selection Gates with Gradient Routing for Endoscopic Image Computing" (2024, arXiv 2407.04400; "Hard-Attention Gates" in
its preprint). A gate multiplies features, it does not touch attention weights, and it is never thresholded. Gates are the
parameters named `feature_gate`: `methods.gradient_routing` trains them by themselves, `fold_gates` takes them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.nn.norm import LayerNorm
from attnlab.nn.partitioning import constrain, named
from attnlab.nn.vision import MLP, GlobalAttention

GATE = "feature_gate"
# Standard deviations of a normal start for C channels: those of a (1, C) kernel.
_INITS = {"xavier": lambda channels: (2.0 / (1 + channels)) ** 0.5, "he": lambda channels: (2.0 / channels) ** 0.5}


class FeatureGate(nn.Module):
    """x * sigmoid(g) over the last axis; parameter `feature_gate` [C], which starts near 0 and so the gates near a half.

    Attributes:
        gate_init: standard deviation of g: "xavier", sqrt(2 / (1 + C)), or "he", sqrt(2 / C).
    """

    gate_init: str = "xavier"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., C] to the same.

        Raises:
            ConfigError: unknown `gate_init`.
        """
        if self.gate_init not in _INITS:
            raise ConfigError(f"gate_init = {self.gate_init!r}: unknown, {nearest(self.gate_init, _INITS)}")
        normal = nn.initializers.normal(_INITS[self.gate_init](x.shape[-1]))
        gate = self.param(GATE, named(normal, "norm"), (x.shape[-1],), self.param_dtype)
        return x * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(x.dtype)


class GatedBlock(nn.Module):
    """x = x + s(g) * attention(norm(x)); x = x + s(g') * mlp(norm(x)): a ViT block whose branches have gates.

    Parameters: `attention_norm`, `mlp_norm` (epsilon 1e-6), `attention` (`GlobalAttention`), `mlp` (exact GELU, biases),
    `attention_gate`, `mlp_gate`. Gates stand where other blocks have layer scale and drop path.

    Attributes:
        num_heads: N.
        hidden: width inside the MLP.
        qkv_bias: biases of queries, keys and values.
        gates: without them it is the plain pre-norm block, for comparisons and for folded parameters.
        gate_init: as of `FeatureGate`.
        capture_attention: sow the weights.
    """

    num_heads: int
    hidden: int
    qkv_bias: bool = True
    gates: bool = True
    gate_init: str = "xavier"
    capture_attention: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to the same."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = GlobalAttention(
            x.shape[-1], self.num_heads, self.qkv_bias, capture_attention=self.capture_attention, name="attention", **types
        )
        for name, branch in (("attention", attention), ("mlp", MLP(self.hidden, name="mlp", **types))):
            y = branch(LayerNorm(1e-6, self.param_dtype, name=f"{name}_norm")(x))
            if self.gates:
                y = FeatureGate(self.gate_init, self.param_dtype, name=f"{name}_gate")(y)
            x = x + y
        return constrain(x, "act_batch", "act_seq", "act_embed")


def is_gate(path: tuple[str, ...]) -> bool:
    """Whether the parameter at a path is a gate."""
    return path[-1] == GATE


def gate_weights(params: Any) -> dict[str, jax.Array]:
    """Returns sigmoid(g) [C] of every gate by its path, joined by "/"; for histograms."""
    return {name: jax.nn.sigmoid(raw.astype(jnp.float32)) for name, raw in raw_gates(params).items()}


def raw_gates(params: Any) -> dict[str, jax.Array]:
    """Returns g [C] of every gate by the path of its module, joined by "/"."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if is_gate(tuple(keys)):
            found["/".join(keys[:-1])] = leaf
    return found


def fold_gates(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters of `GatedBlock`s, anywhere in the tree, for the same blocks with `gates=False`: the output stays.

    The gates go into kernel and bias of `attention/out` and `mlp/fc2`. Unboxed parameters; those of scanned layers do as well.

    Raises:
        ConfigError: a gate that does not belong to a `GatedBlock`.
    """
    folded = {name: fold_gates(value) if isinstance(value, Mapping) else value for name, value in params.items()}
    for name, part in (("attention", "out"), ("mlp", "fc2")):
        gate = params.get(f"{name}_gate")
        if gate is not None and part in params.get(name, {}):
            scaled = {key: scale_outputs(leaf, gate[GATE]) for key, leaf in params[name][part].items()}
            folded[name] = {**folded[name], part: scaled}
            del folded[f"{name}_gate"]
    left = [name for name, value in folded.items() if isinstance(value, Mapping) and GATE in value]
    if left:
        raise ConfigError(f"gates {left} do not belong to blocks of nn.feature_gates. Fold them where their model says how.")
    return folded


def scale_outputs(leaf: jax.Array, gate: jax.Array) -> jax.Array:
    """A kernel [..., inputs, C] or bias [..., C] times sigmoid(g), g [..., C], along the last axis."""
    weight = jax.nn.sigmoid(gate.astype(jnp.float32))
    weight = weight.reshape(*gate.shape[:-1], *(1,) * (leaf.ndim - gate.ndim), gate.shape[-1])
    return (leaf.astype(jnp.float32) * weight).astype(leaf.dtype)


def scale_inputs(kernel: jax.Array, gate: jax.Array) -> jax.Array:
    """A kernel [..., C, outputs] times sigmoid(g), g [C], along its inputs: what a gate before it does."""
    weight = jax.nn.sigmoid(gate.astype(jnp.float32))
    return (kernel.astype(jnp.float32) * weight[:, None]).astype(kernel.dtype)

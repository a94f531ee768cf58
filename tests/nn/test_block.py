"""Norms, feed-forward layers and the residual block against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.scipy.special import erf

from attnlab import nn
from attnlab.errors import ConfigError
from attnlab.nn.norm import LayerScale

X = jax.random.normal(jax.random.key(0), (2, 6, 16)) + 0.5


def _init(module, *arguments):
    variables = meta.unbox(module.init(jax.random.key(1), *arguments))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), variables)


def test_norms():
    for module, eps in ((nn.RMSNorm(), 1e-6), (nn.LayerNorm(), 1e-5)):
        variables = _init(module, X)
        params = variables["params"]
        x = X - (X.mean(-1, keepdims=True) if "bias" in params else 0.0)
        want = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * params["scale"] + params.get("bias", 0.0)
        np.testing.assert_allclose(module.apply(variables, X), want, atol=1e-5)
        assert module.apply(variables, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_feed_forward_layers():
    gated = nn.GatedMLP()
    variables = _init(gated, X)
    gate, up, down = (variables["params"][name]["kernel"] for name in ("gate", "up", "down"))
    assert gate.shape == (16, 64)  # 8/3 of 16 rounded up to 64
    np.testing.assert_allclose(gated.apply(variables, X), (jax.nn.silu(X @ gate) * (X @ up)) @ down, atol=1e-4)
    gelu = nn.GeluMLP(hidden=24)
    variables = _init(gelu, X)
    inner = X @ variables["params"]["fc1"]["kernel"]
    want = (inner * 0.5 * (1 + erf(inner / np.sqrt(2)))) @ variables["params"]["fc2"]["kernel"]
    np.testing.assert_allclose(gelu.apply(variables, X), want, atol=1e-4)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-4])
def test_block_is_the_sum_of_its_parts(hybrid, scale):
    mixer = nn.SoftmaxAttention(dim=16, num_heads=2)
    fields = {"norm": "layernorm", "mlp": "gelu", "layer_scale": scale, "hybrid_norm": hybrid}
    block = nn.Block(mixer=mixer, **fields)
    fresh = meta.unbox(block.init(jax.random.key(1), X))["params"]
    if scale:
        np.testing.assert_allclose(fresh["mixer_scale"]["gamma"], scale)
    variables = _init(block, X)
    params = variables["params"]

    def part(module, name, x):
        return module.apply({"params": params[name]}, x)

    y, _ = part(mixer, "mixer", part(nn.LayerNorm(), "mixer_norm", X))
    y = part(nn.LayerNorm(), "post_norm", y) if hybrid else y
    x = X + (part(LayerScale(scale), "mixer_scale", y) if scale else y)
    y = part(nn.GeluMLP(), "mlp_block", part(nn.LayerNorm(), "mlp_norm", x))
    x = x + (part(LayerScale(scale), "mlp_scale", y) if scale else y)
    np.testing.assert_allclose(block.apply(variables, X)[0], x, atol=1e-5)
    assert ("post_norm" in params) == hybrid


def test_types_of_parameters_and_results():
    mixer = nn.SoftmaxAttention(dim=16, num_heads=2, dtype=jnp.bfloat16)
    block = nn.Block(mixer=mixer, dtype=jnp.bfloat16)
    variables = block.init(jax.random.key(1), X)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert block.apply(variables, X.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(("fields", "message"), [({"norm": "rms"}, "'rmsnorm'"), ({"mlp": "gate"}, "'gated'")])
def test_unknown_parts(fields, message):
    with pytest.raises(ConfigError, match=message):
        nn.Block(mixer=nn.SoftmaxAttention(dim=16, num_heads=2), **fields).init(jax.random.key(1), X)

"""The ops as `attention_fn` of flax's own multi-head attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from attnlab import ops


@pytest.mark.parametrize("op", [ops.softmax_attention, ops.sigmoid_attention])
def test_drops_into_multi_head_attention(op):
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    mask = linen.make_causal_mask(jnp.ones((2, 12)))
    module = linen.MultiHeadDotProductAttention(num_heads=4, qkv_features=16, attention_fn=op, dropout_rate=0.1)
    variables = module.init(jax.random.key(1), x, deterministic=True)
    y = module.apply(variables, x, mask=mask, deterministic=True)
    assert y.shape == x.shape
    if op is ops.softmax_attention:
        plain = linen.MultiHeadDotProductAttention(num_heads=4, qkv_features=16)
        np.testing.assert_allclose(y, plain.apply(variables, x, mask=mask), atol=1e-5)
    gradient = jax.grad(lambda x: module.apply(variables, x, mask=mask, deterministic=True)[:, 5].sum())(x)
    assert np.any(gradient[:, 5]) and not np.any(gradient[:, 6:])
    noisy = module.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(2)})
    assert not np.allclose(noisy, module.apply(variables, x, deterministic=True))

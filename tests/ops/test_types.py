"""The jaxtyping signatures of the public ops, checked by beartype through the import hook, in a process of its own."""

CODE = """
import jaxtyping
jaxtyping.install_import_hook("attnlab.ops", "beartype.beartype")
import jax, jax.numpy as jnp
from attnlab import ops

q, k = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 6, 2, 8))
at = jnp.arange(6, dtype=jnp.int32)[None]
for op in (ops.softmax_attention, ops.sigmoid_attention):
    options = dict(
        causal=True, window=(3, None), q_segment_ids=jnp.ones((2, 6), jnp.int32), kv_mask=jnp.ones((2, 6), bool),
        mask=jnp.ones((6, 6), bool), alibi_slopes=ops.alibi_slopes(4), bias=jnp.zeros((1, 6, 6)), scale=0.3,
    )
    op(q, k, k, **options)
    op(q, k, k, q_positions=at, kv_positions=at, alibi_slopes=jnp.ones((1, 4)), window=2)
    op(q, k, k, dropout_rng=jax.random.key(0), dropout_rate=0.1, deterministic=False, dtype=jnp.bfloat16)
    op(q, k, k, dropout_rng=jax.random.PRNGKey(0), dropout_rate=0.1, deterministic=False)
    jax.jit(lambda q: op(q, k, k))(q)
    for wrong in (
        lambda: op(q, k[:1], k),
        lambda: op(q[..., :7], k, k),
        lambda: op(q[0], k, k),
        lambda: op(q, k, k, kv_mask=jnp.ones((2, 5), bool)),
        lambda: op(q, k, k, kv_mask=jnp.ones((2, 6))),
        lambda: op(q, k, k, q_segment_ids=jnp.ones((2, 6))),
    ):
        try:
            wrong()
        except (jaxtyping.TypeCheckError, TypeError):
            continue
        raise SystemExit("a wrong shape or type was accepted")
    ops.attention_weights(op.__name__.split("_")[0], q, k, causal=True)
ops.sigmoid_attention(q, k, k, row_normalization="row", bias=-1.0)
ops.rotary(q, at, interleaved=True)
print("checked")
"""


def test_signatures_hold_and_refuse(run_python):
    assert run_python(["-c", CODE]).stdout.strip() == "checked"

"""The mixer contract for sparse state expansion, gated linear attention and the gated delta network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab import nn
from attnlab.errors import ConfigError
from attnlab.models.lm import LM
from attnlab.nn.gated_linear import GatedDeltaNet, GatedLinearAttention
from attnlab.nn.sparse_state import SparseStateExpansion

LENGTH, DIM = 101, 16
COMMON = {"dim": DIM, "num_heads": 2, "chunk_size": 16}
MIXERS = {
    "sse gla": SparseStateExpansion(**COMMON, num_partitions=4, num_writers=2, num_readers=2, use_short_conv=True, num_v_heads=4),
    "sse gdn": SparseStateExpansion(**COMMON, rule="gdn", num_partitions=3, expand_v=2.0, use_output_gate=False),
    "sse mask": SparseStateExpansion(**COMMON, num_partitions=4, num_writers=2, use_q_softmax=True),
    "gla": GatedLinearAttention(**COMMON, k_activation="softmax"),
    "gdn": GatedDeltaNet(**COMMON, num_v_heads=4, allow_neg_eigval=True),
}


def start(mixer, seed=0, length=LENGTH, batch=2):
    x = jax.random.normal(jax.random.key(seed), (batch, length, DIM))
    variables = meta.unbox(jax.jit(mixer.init)(jax.random.key(seed + 1), x[:, :2]))
    assert set(variables) == {"params"}
    # larger kernels than at initialisation, so that gates and routers are far from uniform
    return x, jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 and leaf.shape[0] == DIM else leaf, variables)


def applied(mixer):
    return jax.jit(lambda variables, x, cache=None, **masks: mixer.apply(variables, x, cache=cache, **masks))


@pytest.mark.parametrize("name", MIXERS)
def test_full_pass_equals_any_chunking(name):
    mixer = MIXERS[name]
    x, variables = start(mixer)
    mask = jnp.arange(LENGTH)[None] >= jnp.array([[0], [5]])  # row 1 is padded on the left
    mask = mask.at[1, 50].set(False)  # and in the middle
    run = applied(mixer)
    want, none = run(variables, x, mask=mask)
    assert none is None and np.any(want)
    assert not np.any(want[1, :5])
    cache, parts, splits = mixer.init_cache(2, LENGTH), [], (1, 63, 64, 100)
    for chunk, part_mask in zip(np.split(x, splits, axis=1), np.split(mask, splits, axis=1), strict=True):
        part, cache = run(variables, chunk, cache, mask=part_mask)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=1e-4)
    assert int(cache.index) == LENGTH

    def one(cache, token):
        y, cache = mixer.apply(variables, token[0][:, None], mask=token[1][:, None], cache=cache)
        return cache, y[:, 0]

    tokens = (x.swapaxes(0, 1), mask.T)
    last, by_token = jax.jit(lambda tokens: jax.lax.scan(one, mixer.init_cache(2, 1), tokens))(tokens)
    np.testing.assert_allclose(by_token.swapaxes(0, 1), want, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), last, cache)
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, mixer.init_cache(2, 9999))


@pytest.mark.parametrize("name", ["sse gla", "sse mask", "gdn"])
def test_packed_documents_do_not_see_each_other(name):
    mixer = MIXERS[name]
    x, variables = start(mixer, length=40)
    segments = jnp.repeat(jnp.array([[1, 2, 0]]), jnp.array([15, 21, 4]), axis=1, total_repeat_length=40).repeat(2, axis=0)
    run = applied(mixer)
    packed, _ = run(variables, x, segment_ids=segments)
    for part in (slice(0, 15), slice(15, 36)):
        size = part.stop - part.start  # filled up to one length for one compilation: the order is causal
        alone, _ = run(variables, jnp.pad(x[:, part], ((0, 0), (0, 40 - size), (0, 0))))
        np.testing.assert_allclose(packed[:, part], alone[:, :size], atol=5e-5)
    assert not np.any(packed[:, 36:])


@pytest.mark.parametrize("name", ["sse gla", "sse gdn", "gla"])
def test_order_and_padding_by_gradients(name):
    mixer = MIXERS[name]
    x, variables = start(mixer, length=24)
    mask = jnp.ones((2, 24), bool).at[0, 7].set(False)

    @jax.jit
    def gradients(mask, weight):
        loss = lambda variables, x: jnp.sum(weight * mixer.apply(variables, x, mask=mask)[0])  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(variables, x)

    _, gradient = gradients(mask, (jnp.arange(24) == 12)[:, None])
    assert np.any(gradient[:, 12]) and not np.any(gradient[:, 13:])
    assert not np.any(gradient[0, 7]) and np.any(gradient[0, 6]) and np.any(gradient[1, 0])
    none = jnp.zeros((2, 24), bool)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients(none, jnp.ones((24, 1)))))


def test_losses_and_metrics_are_sown():
    mixer = MIXERS["sse gla"]
    x, variables = start(mixer, length=30)
    valid = jnp.ones((2, 30), bool).at[1].set(False)
    apply = jax.jit(lambda v, x, **masks: mixer.apply(v, x, mutable=["losses", "metrics", "intermediates"], **masks))
    _, sown = apply(variables, x, mask=valid)
    loss, entropy = (sown[kind][name][0] for kind, name in (("losses", "load_balance"), ("metrics", "router_entropy")))
    np.testing.assert_allclose(loss, 0.01 * sown["metrics"]["load_balance"][0], rtol=1e-5)
    assert 0.0 < entropy <= np.log(4) + 1e-6
    alone = apply(variables, x[:1])[1]["losses"]["load_balance"][0]
    np.testing.assert_allclose(loss, alone, rtol=1e-5)  # padding plays no part
    assert np.all(sown["intermediates"]["write_mask"][0].sum(-1) == 2)
    router = jax.jit(jax.grad(lambda v: mixer.apply(v, x, mutable=["losses"])[1]["losses"]["load_balance"][0]))(variables)
    assert np.any(router["params"]["router"]["kernel"])


def test_hybrid_language_model():
    """SSE-H: linear layers with one of softmax attention now and then; the cached pass equals the whole one."""
    options = {"sse": {"num_partitions": 3, "chunk_size": 8}, "softmax": {"window": 9}}
    model = LM(64, 4, DIM, 2, pattern=("sse", "sse", "softmax"), mixer_options=options)
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 64)
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(1), tokens))
    (want, _), sown = jax.jit(lambda t: model.apply(variables, t, mutable=["losses", "metrics"]))(tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(sown["losses"])) == 3
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache=cache))
    first, cache = step(tokens[:, :9], model.init_cache(2, 12))
    rest = []
    for t in range(9, 12):
        logits, cache = step(tokens[:, t : t + 1], cache)
        rest.append(logits)
    np.testing.assert_allclose(jnp.concatenate([first, *rest], axis=1), want, atol=2e-5)
    assert model.forward_flops_per_token(variables["params"], 128) > 0


def test_under_vmap_and_in_bfloat16():
    mixer = MIXERS["sse gla"]
    x, variables = start(mixer, length=20, batch=4)
    run = applied(mixer)
    pairs = jax.jit(jax.vmap(lambda x: mixer.apply(variables, x)[0]))(x.reshape(2, 2, 20, DIM))
    np.testing.assert_allclose(pairs.reshape(x.shape), run(variables, x)[0], atol=2e-5)
    low = mixer.clone(dtype=jnp.bfloat16)
    y, cache = applied(low)(variables, x, low.init_cache(4, 20))
    assert y.dtype == jnp.bfloat16 and cache.state.dtype == jnp.float32 and np.all(np.isfinite(y.astype(jnp.float32)))


def test_caches_that_do_not_fit():
    mixer = MIXERS["sse gla"]
    x, variables = start(mixer, length=6)
    cache = mixer.init_cache(2, 6)
    for bad, message in (
        (mixer.init_cache(3, 6), "cache of batch 3 used with batch 2"),
        (mixer.clone(num_partitions=5).init_cache(2, 6), "Remake it"),
        (mixer.clone(dtype=jnp.bfloat16).init_cache(2, 6), "cache of type bfloat16"),
        (cache.replace(state=cache.state.astype(jnp.bfloat16)), "cache of type bfloat16"),
    ):
        with pytest.raises(ConfigError, match=message):
            mixer.apply(variables, x, cache=bad)
    with pytest.raises(ConfigError, match="segment_ids with a cache"):
        mixer.apply(variables, x, cache=cache, segment_ids=jnp.ones((2, 6), jnp.int32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"causal": False}, "causal = False"),
        ({"num_heads": 3}, "num_heads = 3: does not divide dim = 16"),
        ({"num_v_heads": 3}, "num_v_heads = 3: is not a multiple of num_heads = 2"),
        ({"expand_v": 0.3}, "expand_v = 0.3"),
        ({"num_writers": 4}, "num_writers = 4: needs 1 or more, and fewer than num_partitions = 4"),
        ({"num_readers": 4}, "num_readers = 4"),
        ({"rule": "gdm"}, "rule = 'gdm': unknown, did you mean 'gdn'"),
        ({"num_readers": 2, "implementation": "varlen"}, "num_readers = 2: implementation='varlen' needs as many readers"),
        ({"chunk_size": 40}, "chunk_size = 40"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    mixer = SparseStateExpansion(**{"dim": 16, "num_heads": 2} | fields)
    with pytest.raises(ConfigError, match=message):
        mixer.init(jax.random.key(0), jnp.zeros((1, 4, 16)))
    if "chunk_size" not in fields:
        with pytest.raises(ConfigError, match=message):
            mixer.init_cache(1, 4)


def test_unknown_activations_are_refused():
    with pytest.raises(ConfigError, match="activation = 'relu'"):
        GatedLinearAttention(dim=16, num_heads=2, q_activation="relu").init(jax.random.key(0), jnp.zeros((1, 4, 16)))


def test_parameters_carry_logical_names():
    params = jax.eval_shape(MIXERS["sse gdn"].init, jax.random.key(0), jnp.zeros((1, 4, DIM)))["params"]
    assert params["query"]["kernel"].names == ("embed", "heads", "head_dim")
    assert params["out"]["kernel"].names == ("heads", "head_dim", "embed")
    boxes = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    assert all(isinstance(box, nn.partitioning.Named) for box in boxes)


SHARDED = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import linen
from flax.core import meta
from jax.sharding import AxisType
from attnlab.nn.sparse_state import SparseStateExpansion
from attnlab.training.config import MESH_AXES, SHARDING_RULES

mixer = SparseStateExpansion(dim=16, num_heads=2, num_partitions=3, use_short_conv=True, chunk_size=8)
x = jax.random.normal(jax.random.key(0), (2, 64, 16))
variables = meta.unbox(mixer.init(jax.random.key(1), x))
variables = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 and leaf.shape[0] == 16 else leaf, variables)
segments = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], [10, 17, 37], axis=1))

def step(variables, x):
    def loss(variables, x):
        (y, _), sown = mixer.apply(variables, x, segment_ids=segments, mutable=["losses"])
        return jnp.sum(jnp.sin(3 * y)) + sown["losses"]["load_balance"][0], y
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

want = jax.jit(step)(variables, x)
errors = {}
for shape in ((2, 1, 2, 2),):
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh), linen.logical_axis_rules(SHARDING_RULES):
        have = jax.jit(step)(variables, x)
    pairs = zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True)
    errors[str(shape)] = max(float(jnp.abs(a - b).max() / (1 + jnp.abs(b).max())) for a, b in pairs)
print(json.dumps(errors))
"""


def test_module_on_a_mesh_equals_one_device(run_python):
    errors = json.loads(run_python(["-c", SHARDED], devices=8, timeout=600).stdout.splitlines()[-1])
    assert max(errors.values()) < 2e-5, errors

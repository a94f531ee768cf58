"""The Titans mixers: the contract (cache, segments, padding, order), their parts, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.nn.segmented import SegmentedAttention
from attnlab.nn.titans import TitansLMM, TitansMAC, TitansMAG, TitansMAL
from attnlab.nn.titans_lucid import LucidMemory

LENGTH, DIM = 101, 8
SMALL = {"dim": DIM, "memory_expansion": 2.0, "chunk_size": 8}
MIXERS = {
    "lmm": TitansLMM(**SMALL, num_persistent=3, conv_width=4, memory_heads=2),
    "mac": TitansMAC(**SMALL, num_heads=2, num_persistent=2),
    "mag": TitansMAG(**SMALL, num_heads=2, num_persistent=3, window=5, conv_width=3),
    "mal": TitansMAL(**SMALL, num_heads=2, num_persistent=3, window=12),
    "lucid": LucidMemory(
        dim=DIM, num_heads=2, chunk_size=4, batch_size=8, memory_expansion=2.0, layer_modulation=True, momentum_order=2,
        post_norm=True, qk_norm=True, max_grad_norm=0.05, pool="attention",
    ),
    "segments": SegmentedAttention(dim=DIM, num_heads=2, segment_len=6, num_longterm=1, num_persistent=2),
    "sliding": SegmentedAttention(dim=DIM, num_heads=2, segment_len=6, num_persistent=2, sliding=True),
}  # fmt: skip


def start(mixer, seed=0, length=LENGTH, batch=2):
    x = jax.random.normal(jax.random.key(seed), (batch, length, DIM))
    variables = meta.unbox(jax.jit(mixer.init)(jax.random.key(seed + 1), x[:, :4]))
    noise = iter(jax.random.split(jax.random.key(seed + 2), 64))
    # away from the initial values, at which some parts would be zeros or all alike
    return x, jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape), {"params": variables["params"]})


@pytest.mark.parametrize("name", MIXERS)
def test_full_pass_equals_any_chunking(name):
    mixer = MIXERS[name]
    x, variables = start(mixer)
    mask = jnp.arange(LENGTH)[None] >= jnp.array([[0], [5]])  # row 1 is padded on the left
    step = jax.jit(lambda x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))
    want, none = jax.jit(lambda x: mixer.apply(variables, x, mask=mask))(x)
    assert none is None
    x, mask = np.asarray(x), np.asarray(mask)
    for splits in ((1, 63, 64, 100), tuple(range(1, LENGTH))):
        last, parts = mixer.init_cache(2, LENGTH), []
        for chunk in zip(*(np.split(a, splits, axis=1) for a in (x, mask)), strict=True):
            part, last = step(*chunk, last)
            parts.append(part)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=3e-5)
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, mixer.init_cache(2, 10**6))
    assert last.seen.tolist() == [LENGTH, LENGTH - 5]


@pytest.mark.parametrize("name", ["lmm", "mac", "mal", "lucid", "segments"])
def test_packed_documents_do_not_see_each_other(name):
    mixer = MIXERS[name]
    x, variables = start(mixer, length=40)
    segments = jnp.where(jnp.arange(40) < 15, 4, 2)[None].repeat(2, axis=0).at[:, 36:].set(0)
    have = jax.jit(lambda x: mixer.apply(variables, x, segment_ids=segments)[0])(x)
    run = jax.jit(lambda x: mixer.apply(variables, x)[0])
    for first, stop in ((0, 15), (15, 36)):
        alone = run(jnp.pad(x[:, first:stop], ((0, 0), (0, 40 - stop + first), (0, 0))))  # causal: what follows plays no part
        np.testing.assert_allclose(have[:, first:stop], alone[:, : stop - first], atol=2e-5)
    assert not np.any(have[:, 36:])


@pytest.mark.parametrize("name", ["mac", "lmm"])
def test_many_short_documents(name):
    """More segments than tiles: token by token inside, the same numbers."""
    mixer = MIXERS[name]
    x, variables = start(mixer, length=24, batch=1)
    ids = jnp.arange(24)[None] // 2 + 1
    have = jax.jit(lambda x: mixer.apply(variables, x, segment_ids=ids)[0])(x)
    alone = jax.jit(lambda x: mixer.apply(variables, x)[0])(x.reshape(12, 2, DIM))
    np.testing.assert_allclose(have.reshape(12, 2, DIM), alone, atol=2e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_order_and_padding_by_gradients(name):
    mixer = MIXERS[name]
    x, variables = start(mixer, length=24, batch=3)
    mask = jnp.ones((3, 24), bool).at[0, 11].set(False).at[2].set(False)

    def value(x, variables):
        y, _ = mixer.apply(variables, x, mask=mask)
        return jnp.sum(y[:, 12] ** 2), y

    (by_x, by_parameters), y = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(x, variables)
    assert np.any(by_x[:2, 12]) and not np.any(by_x[:, 13:])
    assert not np.any(by_x[0, 11]) and np.any(by_x[0, 10]) and np.any(by_x[1, 11])
    assert not np.any(by_x[2])  # a row of padding
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(by_parameters))
    if name not in ("segments", "sliding"):
        assert np.any(by_x[1, 0])  # beyond the window
    assert not np.any(y[2]) and not np.any(y[0, 11])


def test_mac_reads_nothing_from_later_tokens_of_its_segment():
    """A read per token goes before the segment's tokens in the published layout: its order is kept causal here."""
    mixer = MIXERS["mac"]
    x, variables = start(mixer, length=16, batch=1)
    jacobian = jax.jit(jax.jacobian(lambda x: mixer.apply(variables, x[None])[0][0].sum(-1)))(x[0])
    seen = np.abs(jacobian).sum(-1) > 0
    np.testing.assert_array_equal(seen, np.tril(np.ones((16, 16), bool)))


def test_hybrids_reach_beyond_their_window_and_attention_alone_does_not():
    x, variables = start(MIXERS["mag"], length=30, batch=1)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(MIXERS["mag"].apply(variables, x)[0][:, 29] ** 2)))(x)
    assert np.any(gradient[:, 3])
    x, variables = start(MIXERS["sliding"], length=30, batch=1)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(MIXERS["sliding"].apply(variables, x)[0][:, 29] ** 2)))(x)
    assert np.any(gradient[:, 23]) and not np.any(gradient[:, :23])


def test_ablations_and_heads():
    x, variables = start(MIXERS["lmm"], length=20)
    apply = lambda mixer, *args, **options: jax.jit(functools.partial(mixer.apply, **options))(variables, *args)  # noqa: E731
    full = apply(MIXERS["lmm"], x)[0]
    for change in ({"momentum": False}, {"forgetting": False}, {"chunk_size": 1}, {"theta_max": 0.0}):
        assert not np.allclose(apply(MIXERS["lmm"].clone(**change), x)[0], full, atol=1e-4)
    y, sown = apply(MIXERS["lmm"], x, mutable=["metrics"])
    assert np.isfinite(sown["metrics"]["surprise"][0]) and np.all(np.isfinite(y[0]))
    low = MIXERS["mac"].clone(dtype=jnp.bfloat16)
    x, variables = start(MIXERS["mac"], length=20)
    y, cache = apply(low, x.astype(jnp.bfloat16), cache=low.init_cache(2, 20))
    assert y.dtype == jnp.bfloat16 and cache.keys[0].dtype == jnp.bfloat16 and cache.memory.weights[0].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), apply(MIXERS["mac"], x)[0], atol=0.15)


@pytest.mark.parametrize("name", ["mac", "lucid"])
def test_under_scan_and_remat(name):
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + MIXERS[name].clone(parent=self, name="mixer")(x)[0], None

    scanned = linen.scan(linen.remat(Layer), variable_axes={True: 0}, split_rngs={"params": True}, length=2,
                         metadata_params={linen.PARTITION_NAME: "layers"})()  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, 10, DIM))
    variables = jax.jit(scanned.init)(jax.random.key(1), x, None)
    boxed = jax.tree.leaves(variables["params"], is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    assert all(leaf.names[0] == "layers" and len(leaf.names) == leaf.value.ndim for leaf in boxed)
    params = {"params": meta.unbox(variables["params"])}
    y, alone = x, jax.jit(MIXERS[name].apply)
    for i in range(2):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]["mixer"])
        y = y + alone({"params": layer}, y)[0]

    def value(params):
        y, _ = scanned.apply(params, x, None)
        return jnp.sum(y**2), y

    gradient, have = jax.jit(jax.grad(value, has_aux=True))(params)
    np.testing.assert_allclose(have, y, atol=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", MIXERS)
def test_caches_that_do_not_fit(name):
    mixer = MIXERS[name]
    x = jnp.zeros((2, 4, DIM))
    variables = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x))

    def apply(cache, **options):
        return jax.eval_shape(lambda variables: mixer.apply(variables, x, cache=cache, **options), variables)

    with pytest.raises(ConfigError, match="cache of batch 3 used with batch 2"):
        apply(mixer.init_cache(3, 20))
    with pytest.raises(ConfigError, match="segment_ids with a cache"):
        apply(mixer.init_cache(2, 20), segment_ids=jnp.ones((2, 4), jnp.int32))
    if name != "lucid":  # its cache is float32 whatever the module computes in
        with pytest.raises(ConfigError, match="type bfloat16"):
            apply(mixer.clone(dtype=jnp.bfloat16).init_cache(2, 20))
    with pytest.raises(ConfigError, match="causal = False"):
        mixer.clone(causal=False).init_cache(2, 20)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (TitansLMM(dim=8, causal=False), "causal = False"),
        (TitansLMM(dim=8, memory_heads=3), "memory_heads = 3: does not divide dim = 8"),
        (TitansMAC(dim=8, num_heads=3), "num_heads = 3: does not divide dim = 8"),
        (TitansMAC(dim=8, chunk_size=0), "chunk_size = 0"),
        (TitansLMM(dim=8, memory_depth=0), "memory_depth = 0"),
        (TitansMAG(dim=8, window=0), "window = 0"),
        (TitansMAL(dim=8, num_persistent=-1), "num_persistent = -1"),
        (LucidMemory(dim=8, num_heads=3), "num_heads = 3"),
        (LucidMemory(dim=8, head_dim=4), "one head has the width"),
        (LucidMemory(dim=8, chunk_size=4, batch_size=6), "batch_size = 6: not a multiple of chunk_size = 4"),
        (LucidMemory(dim=8, pool="max"), "pool = 'max'"),
        (LucidMemory(dim=8, pool="attention", chunk_size=1), "nothing to pool"),
        (LucidMemory(dim=8, momentum_order=0), "momentum_order = 0"),
        (SegmentedAttention(dim=8, num_heads=3), "num_heads = 3"),
        (SegmentedAttention(dim=6, num_heads=2), "even head width"),
        (SegmentedAttention(dim=8, num_heads=2, segment_len=0), "segment_len = 0"),
    ],
)
def test_fields_that_do_not_fit(mixer, message):
    with pytest.raises(ConfigError, match=message):
        mixer.init(jax.random.key(0), jnp.zeros((1, 4, mixer.dim)))

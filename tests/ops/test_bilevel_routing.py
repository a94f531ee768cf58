"""Bi-level routing attention against dense attention under a mask, both implementations, both forms, all poolings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import ops
from attnlab.errors import ConfigError
from attnlab.ops import bilevel_routing as bra
from attnlab.ops import dispatch

ops_op = bra.bilevel_routing_attention


def arrays(height, width, heads=2, qk=4, v=6, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((batch, height, width, heads, size)).astype(np.float32) for size in (qk, qk, v, v))


def region_of(height, width, size):
    """The number of the region of every token, tokens row by row."""
    y, x = np.divmod(np.arange(height * width), width)
    return y // size[0] * (-(-width // size[1])) + x // size[1]


def dense(q, k, v, *, n_win, topk, own_region=False, scale=None, soft=False, diff=False, ragged=False, pool=None):
    """The published computation by other means: a mask (and weights) over all pairs of tokens of the padded map."""
    batch, height, width, heads, head_dim = q.shape
    size = (height // n_win, width // n_win)
    scale = (heads * head_dim) ** -0.5 if scale is None else scale
    full = [-(-n // s) * s for n, s in zip((height, width), size, strict=True)]
    real = np.zeros(full, bool)
    real[:height, :width] = True
    region = region_of(*full, size)
    regions = region.max() + 1
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, full[0] - height), (0, full[1] - width), (0, 0), (0, 0))).reshape(batch, -1, *x.shape[3:])
        for x in (q, k, v)
    )
    counted = jnp.asarray(np.eye(regions)[region] * real.reshape(-1, 1))  # [T, P]
    q_mean, k_mean = (jnp.einsum("btnh,tp->bpnh", x, counted / counted.sum(0)).reshape(batch, regions, -1) for x in (q, k))
    if not diff:
        q_mean, k_mean = jax.lax.stop_gradient((q_mean, k_mean))
    logits = jnp.einsum("bpc,brc->bpr", q_mean, k_mean, precision="highest") * (1.0 if ragged else scale)
    order = jnp.argsort(-jnp.where(own_region & np.eye(regions, dtype=bool), jnp.inf, logits), axis=-1)[..., :topk]
    chosen = jax.nn.one_hot(order, regions).sum(-2)
    share = jax.nn.softmax(jnp.where(chosen > 0, logits, -jnp.inf), axis=-1)
    kv_region = region
    if pool is not None:
        k, v, kv_region = (*(pool(x) for x in (k, v)), np.repeat(np.arange(regions), pool(k).shape[1] // regions))
    pairs = chosen[:, region][:, :, kv_region]
    factor = share[:, region][:, :, kv_region][:, None] if soft else 1.0
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * scale * factor
    weights = jax.nn.softmax(jnp.where(pairs[:, None] > 0, scores, -jnp.inf), axis=-1) * factor
    out = jnp.einsum("bnts,bsne->btne", weights, v, precision="highest")
    return out.reshape(batch, *full, heads, -1)[:, :height, :width], order


def agree(reference, inputs, *checked, atol=2e-5):
    """Values, choice and gradients under a random cotangent, in one program; returns the routing."""
    def run(f, inputs, cotangent):
        y, pull, choice = jax.vjp(f, *inputs, has_aux=True)
        return y, choice, pull(cotangent)

    every = jax.jit(lambda *inputs, cotangent: [run(f, inputs, cotangent) for f in (reference, *checked)])
    (want, order, want_grads), *found = every(*inputs[:-1], cotangent=inputs[-1])
    for have, routing, have_grads in found:
        np.testing.assert_array_equal(routing.index, order)
        np.testing.assert_allclose(have, want, atol=atol)
        for name, a, b in zip("qkv", have_grads, want_grads, strict=True):
            np.testing.assert_allclose(a, b, atol=atol, err_msg=name)
    return routing


def both(op, **options):
    return [functools.partial(op, implementation=name, **options) for name in ("gather", "blocks")]


@pytest.mark.parametrize(("height", "width", "options"), [
    (8, 8, {"n_win": 4, "topk": 3}),
    (6, 9, {"n_win": 3, "topk": 1, "scale": 0.7}),
    (6, 9, {"n_win": 3, "topk": 2, "own_region": True}),
])  # fmt: skip
def test_values_and_gradients(height, width, options):
    agree(functools.partial(dense, **options), arrays(height, width), *both(ops_op, **options))


@pytest.mark.parametrize("diff", [False, True])
def test_soft_routing(diff):
    """Without diff_routing the weights scale keys and values, but nothing is learnt through them."""
    options = {"n_win": 3, "topk": 4}
    op = functools.partial(ops_op, soft_routing=True, diff_routing=diff, **options)
    routing = agree(functools.partial(dense, soft=True, diff=diff, **options), arrays(6, 6), op)
    np.testing.assert_allclose(routing.weight.sum(-1), 1.0, atol=1e-6)
    assert np.all(np.diff(routing.weight, axis=-1) <= 0)


@pytest.mark.parametrize(("height", "width", "n_win", "topk"), [(9, 11, 4, 3), (5, 4, 4, 5)])
def test_ragged_maps(height, width, n_win, topk):
    options = {"n_win": n_win, "topk": topk}
    checked = both(bra.ragged_bilevel_routing_attention, **options)
    routing = agree(functools.partial(dense, ragged=True, **options), arrays(height, width), *checked)
    size, grid = bra.ragged_regions(height, width, n_win)
    assert routing.index.shape == (2, grid[0] * grid[1], topk) and size == (height // n_win, width // n_win)


def test_own_regions_alone_are_windows():
    q, k, v, _ = arrays(6, 8, qk=4, v=4)
    cut = [bra.to_regions(x, (3, 4)) for x in (q, k, v)]
    want = jax.vmap(lambda q, k, v: ops.softmax_attention(q, k, v, scale=8**-0.5, implementation="xla"), in_axes=1, out_axes=1)(*cut)
    for op in (ops_op, bra.ragged_bilevel_routing_attention):
        have, routing = op(q, k, v, n_win=2, topk=1, own_region=True)
        np.testing.assert_array_equal(routing.index[..., 0], np.broadcast_to(np.arange(4), (2, 4)))
        np.testing.assert_allclose(bra.to_regions(have, (3, 4)), want, atol=1e-6)


def test_both_forms_agree_where_regions_divide():
    q, k, v, _ = arrays(8, 12)
    forms = (ops_op, bra.ragged_bilevel_routing_attention)
    (first, a), (second, b) = jax.jit(lambda *x: [f(*x, n_win=4, topk=3, implementation="gather") for f in forms])(q, k, v)
    np.testing.assert_array_equal(a.index, b.index)
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_all_regions_are_full_attention():
    q, k, v, _ = arrays(6, 6, qk=5, v=5)
    flat_q, flat_k, flat_v = (x.reshape(2, 36, 2, 5) for x in (q, k, v))
    scores = np.exp(np.einsum("btnh,bsnh->bnts", flat_q, flat_k) * 10**-0.5)
    want = np.einsum("bnts,bsnh->btnh", scores / scores.sum(-1, keepdims=True), flat_v).reshape(q.shape)
    for have, _ in jax.jit(lambda *x: [f(*x) for f in both(ops_op, n_win=3, topk=9)])(q, k, v):
        np.testing.assert_allclose(have, want, atol=1e-5)


def naive_pool(x, height, width, n_win, mode, size):
    """Pools region after region by lists of tokens; x is [B, T, N, H] row by row, the result [B, P * u, N, H] by region."""
    rows, columns = height // n_win, width // n_win
    number = np.arange(height * width).reshape(height, width)
    bins = []
    for j, i in np.ndindex(n_win, n_win):
        part = number[j * rows : (j + 1) * rows, i * columns : (i + 1) * columns]
        if mode.startswith("ada_"):
            for a, b in np.ndindex(size, size):
                ys = slice(int(np.floor(a * rows / size)), int(np.ceil((a + 1) * rows / size)))
                xs = slice(int(np.floor(b * columns / size)), int(np.ceil((b + 1) * columns / size)))
                bins.append(part[ys, xs].reshape(-1))
        else:
            for a, b in np.ndindex(rows // size, columns // size):
                bins.append(part[a * size : (a + 1) * size, b * size : (b + 1) * size].reshape(-1))
    if "max" in mode:  # a token that is listed twice changes no maximum
        longest = max(map(len, bins))
        return jnp.max(x[:, np.array([np.resize(tokens, longest) for tokens in bins])], axis=2)
    mean = np.array([np.bincount(tokens, minlength=height * width) / len(tokens) for tokens in bins], np.float32)
    return jnp.einsum("ut,btnh->bunh", mean, x, precision="highest")


@pytest.mark.parametrize(("mode", "size", "implementation"), [
    ("ada_avgpool", 7, "gather"), ("ada_maxpool", 3, "blocks"), ("avgpool", 2, "gather"), ("maxpool", 3, "blocks"),
])  # fmt: skip
def test_pooled_keys(mode, size, implementation):
    """Regions of 5 x 4 tokens: bins overlap, and fixed ratios leave some tokens out; the choice sees all of them."""
    height, width = 10, 8
    options = {"n_win": 2, "topk": 2}
    pooling = {"kv_downsample_mode": mode, "kv_per_win" if mode.startswith("ada_") else "kv_downsample_ratio": size}
    op = functools.partial(ops_op, implementation=implementation, **options, **pooling)
    pool = functools.partial(naive_pool, height=height, width=width, n_win=2, mode=mode, size=size)
    agree(functools.partial(dense, pool=pool, **options), arrays(height, width), op)


def test_pooled_and_soft():
    pool = functools.partial(naive_pool, height=6, width=6, n_win=2, mode="ada_maxpool", size=2)
    op = functools.partial(ops_op, n_win=2, topk=3, soft_routing=True, kv_downsample_mode="ada_maxpool", kv_per_win=2)
    agree(functools.partial(dense, n_win=2, topk=3, soft=True, pool=pool), arrays(6, 6), op)


def test_long_regions_are_cut_into_blocks():
    q, k, v, _ = arrays(30, 46, heads=1, batch=1, qk=2, v=2)  # regions of 15 x 46 = 690 tokens, two blocks of 345
    forms = [f for n_win in (1, 2) for f in both(ops_op, n_win=n_win, topk=1)]
    one, one_listed, four, four_listed = jax.jit(lambda *x: [f(*x)[0] for f in forms])(q, k, v)
    np.testing.assert_allclose(one_listed, one, atol=2e-5)
    np.testing.assert_allclose(four_listed, four, atol=2e-5)


def test_kernel_in_the_interpreter():
    """Regions of 100 tokens fill blocks of 128: the padding is not attended to."""
    options = {"n_win": 2, "topk": 2}
    with dispatch.interpreted():
        op = functools.partial(ops_op, implementation="blocks", block_implementation="pallas", **options)
        agree(functools.partial(dense, **options), arrays(20, 20, batch=1, heads=1, qk=4, v=6), op, atol=1e-4)


def test_what_runs_where():
    shape = jax.ShapeDtypeStruct((1, 64, 64, 2, 32), jnp.bfloat16)

    def decisions(platform, **options):
        with dispatch.target(platform, "TPU v5e" if platform == "tpu" else None), dispatch.record() as found:
            jax.eval_shape(lambda q, k, v: ops_op(q, k, v, **options)[0], shape, shape, shape)
        return [decision.chosen for decision in found]

    assert decisions("tpu", n_win=4, topk=4) == ["blocks", "pallas"]  # 256 tokens
    assert decisions("tpu", n_win=16, topk=4) == ["blocks", "xla"]  # 16 tokens
    assert decisions("cpu", n_win=4, topk=4) == ["blocks", "xla"]
    assert decisions("tpu", n_win=4, topk=4, soft_routing=True) == ["gather"]
    assert "soft routing" in str(ops.explain(lambda q: ops_op(q, q, q, n_win=4, topk=4, soft_routing=True)[0], shape))


def test_the_choice_is_made_in_float32():
    narrow = [x.astype(jnp.bfloat16) for x in arrays(8, 8)[:3]]
    wide = [x.astype(np.float32) for x in narrow]
    both = jax.jit(lambda narrow, wide: (ops_op(*narrow, n_win=4, topk=3), dense(*wide, n_win=4, topk=3)))
    (y, routing), (want, order) = both(narrow, wide)
    assert y.dtype == jnp.bfloat16 and routing.weight.dtype == jnp.float32
    np.testing.assert_array_equal(routing.index, order)
    np.testing.assert_allclose(y.astype(np.float32), want, atol=0.05)


def test_rematerialised_choice_is_kept():
    q, k, v, _ = arrays(4, 4)
    keep = jax.checkpoint_policies.save_only_these_names("routing")
    f = jax.checkpoint(lambda q, k, v: ops_op(q, k, v, n_win=2, topk=2)[0].sum(), policy=keep)
    # the sort of the top-k appears in the forward pass only
    assert str(jax.make_jaxpr(jax.grad(f))(q, k, v)).count("top_k[") == 1


def test_weights_over_all_regions():
    q, k, v, _ = arrays(6, 4)

    @jax.jit
    def run(q, k, v):
        regions, found = [bra.to_regions(x, (3, 2)) for x in (q, k, v)], []
        for soft in (False, True):
            want, routing = ops_op(q, k, v, n_win=2, topk=2, scale=0.4, soft_routing=soft)
            weights = bra.routed_weights(*regions[:2], routing.index, routing.weight if soft else None, scale=0.4)
            out = bra.from_regions(jnp.einsum("bpnwru,brune->bpwne", weights, regions[2]), (2, 2), (3, 2))
            found.append((weights, routing.index, out, want))
        return found

    for soft, (weights, index, out, want) in enumerate(run(q, k, v)):
        listed = (np.asarray(index)[..., None] == np.arange(4)).any(2)
        np.testing.assert_allclose(weights.sum((-2, -1)), 1.0, atol=1e-6)
        assert not np.any(np.moveaxis(weights, 4, 2)[~listed])
        if not soft:
            np.testing.assert_allclose(out, want, atol=1e-5)


def test_regions_and_back():
    x = np.arange(2 * 6 * 8).reshape(2, 6, 8, 1)
    regions = np.asarray(bra.to_regions(x, (3, 2)))
    assert regions.shape == (2, 8, 6, 1)
    np.testing.assert_array_equal(regions[0, 5, :, 0], x[0, 3:6, 2:4, 0].reshape(-1))
    np.testing.assert_array_equal(bra.from_regions(regions, (2, 4), (3, 2)), x)


@pytest.mark.parametrize(("options", "message"), [
    ({"n_win": 3, "topk": 1}, "n_win = 3: does not divide a map of 8 x 4"),
    ({"n_win": 0, "topk": 1}, "n_win = 0"),
    ({"n_win": 2, "topk": 5}, "topk = 5: the map has 4 regions. Choose between 1 and 4"),
    ({"n_win": 2, "topk": 0}, "topk = 0"),
    ({"n_win": 2, "topk": 1, "kv_downsample_mode": "ada_avg"}, "did you mean 'ada_avgpool'"),
    ({"n_win": 2, "topk": 1, "kv_downsample_mode": "avgpool", "kv_downsample_ratio": 3}, "a region has 4 x 2 tokens"),
    ({"n_win": 2, "topk": 1, "kv_downsample_mode": "ada_maxpool", "kv_per_win": 0}, "kv_per_win = 0"),
])  # fmt: skip
def test_bad_input(options, message):
    q, k, v, _ = arrays(8, 4)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(functools.partial(ops_op, **options), q, k, v)


def test_bad_input_of_the_ragged_form_and_of_implementations():
    def run(op=ops_op, **options):
        jax.eval_shape(functools.partial(op, **options), *arrays(8, 4)[:3])

    for n_win in (0, 5):
        with pytest.raises(ConfigError, match=f"n_win = {n_win}: a map of 8 x 4"):
            run(bra.ragged_bilevel_routing_attention, n_win=n_win, topk=1)
    with pytest.raises(ConfigError, match="topk = 7"):
        run(bra.ragged_bilevel_routing_attention, n_win=2, topk=7)
    with pytest.raises(NotImplementedError, match="diff_routing without soft_routing"):
        run(n_win=2, topk=1, diff_routing=True)
    with pytest.raises(NotImplementedError, match="soft routing scales"):
        run(n_win=2, topk=1, soft_routing=True, implementation="blocks")
    with pytest.raises(NotImplementedError, match="runs on"):
        run(n_win=2, topk=1, implementation="blocks", block_implementation="pallas")
    with pytest.raises(ConfigError, match="did you mean 'gather'"):
        run(n_win=2, topk=1, implementation="gathered")

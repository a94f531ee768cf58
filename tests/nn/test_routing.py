"""The mixers of the Routing Transformer and of its PyTorch port: contract, centroids, caches, training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models.lm import LM, attention_maps
from attnlab.nn.kmeans_attention import KMeansAttention
from attnlab.nn.routing import RoutingAttention

DIM = 16
OFFICIAL = RoutingAttention(dim=DIM, num_heads=4, num_clusters=3, cluster_size=8, block=4, max_relative_position=5)
STRICT = OFFICIAL.clone(rule="causal", flange=8)
LOCAL = OFFICIAL.clone(routing_heads=0)
KMEANS = KMeansAttention(dim=DIM, num_heads=4, window=8, num_clusters=3, num_mem_kv=1)
MIXERS = {
    "official": OFFICIAL,
    "strict": STRICT,
    "strict, routing alone": STRICT.clone(routing_heads=4, cluster_relative=False),
    "local alone": LOCAL,
    "random": OFFICIAL.clone(rule="random"),
    "both ways": OFFICIAL.clone(causal=False, share_qk=False, local_relative=False),
    "kmeans": KMEANS,
}


@functools.cache
def initialised(mixer):
    """Variables without what is sown; jitted, so that the pass itself falls away."""

    def kept(key, x):
        variables = meta.unbox(mixer.init(key, x))
        return {name: tree for name, tree in variables.items() if name in ("params", "centroids")}

    variables = jax.jit(kept)(jax.random.key(1), jnp.zeros((1, 8, DIM)))
    # larger kernels than at initialisation, so that attention is far from uniform
    variables["params"] = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 else leaf, variables["params"])
    return variables


@functools.cache
def jitted(mixer):
    return jax.jit(lambda variables, x, arguments: mixer.apply(variables, x, **arguments))


def start(mixer, seed=0, length=24, batch=2):
    return jax.random.normal(jax.random.key(seed), (batch, length, DIM)), dict(initialised(mixer))


def call(mixer, variables, x, **arguments):
    return jitted(mixer)(variables, x, arguments)


@pytest.mark.parametrize(
    ("name", "length"), [("official", 1), ("official", 63), ("strict", 1), ("strict", 100), ("both ways", 63), ("kmeans", 63)]
)
def test_any_length(name, length):
    x, variables = start(MIXERS[name], length=length)
    y, cache = call(MIXERS[name], variables, x)
    assert y.shape == x.shape and cache is None and np.all(np.isfinite(y)) and np.any(y)


@pytest.mark.parametrize("name", ["strict", "strict, routing alone", "local alone"])
def test_full_pass_equals_any_chunking(name):
    mixer, length = MIXERS[name], 50
    x, variables = start(mixer, length=length)
    mask = jnp.arange(length)[None] >= jnp.array([[0], [5]])  # row 1 is padded on the left
    want, none = call(mixer, variables, x, mask=mask)
    assert none is None
    step = jax.jit(lambda x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))
    for splits in ((1, 23, 24, 49), tuple(range(1, length))):
        cache, parts = mixer.init_cache(2, length + 3), []
        for at, end in zip((0, *splits), (*splits, length), strict=True):
            part, cache = step(x[:, at:end], mask[:, at:end], cache)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=3e-5)


@pytest.mark.parametrize("mixer", [OFFICIAL, KMEANS.clone(local_heads=0)], ids=["official", "kmeans"])
def test_published_decoding_is_the_full_pass_of_what_is_known(mixer):
    """Prefill is the full pass; a later token gets what a full pass over the tokens so far gives it."""
    x, variables = start(mixer, length=24)
    step = jax.jit(lambda x, cache: mixer.apply(variables, x, cache=cache))
    y, cache = step(x[:, :16], mixer.init_cache(2, 24))
    np.testing.assert_allclose(y, call(mixer, variables, x[:, :16])[0], atol=3e-5)
    got = []
    for at in range(16, 24):
        y, cache = step(x[:, at : at + 1], cache)
        got.append(y[:, 0])
    want, _ = call(mixer, variables, x)
    np.testing.assert_allclose(got[7], want[:, 23], atol=3e-5)
    assert not np.allclose(jnp.stack(got, axis=1), want[:, 16:], atol=1e-3)  # the published rule is not strictly causal


def test_strict_rule_is_blind_to_later_tokens_and_the_published_one_is_not():
    for mixer, strict in ((STRICT, True), (OFFICIAL, False), (KMEANS, False)):
        x, variables = start(mixer, seed=3)
        other = x.at[:, 13:].set(jax.random.normal(jax.random.key(9), x[:, 13:].shape))
        first, second = (call(mixer, variables, rows)[0][:, :13] for rows in (x, other))
        same = np.allclose(first, second, atol=1e-6)
        assert same == strict


@pytest.mark.parametrize("name", ["official", "strict", "random", "kmeans"])
def test_order_and_padding_by_gradients(name):
    mixer = MIXERS[name]
    x, variables = start(mixer)
    mask = jnp.ones((2, 24), bool).at[0, 11].set(False)

    def one(x):
        y, _ = mixer.apply(variables, x, mask=mask)
        return jnp.sum(y[:, 12]), y

    gradient, y = jax.jit(jax.grad(one, has_aux=True))(x)
    assert np.any(gradient[:, 12]) and not np.any(gradient[:, 13:])
    assert not np.any(gradient[0, 11]) and np.any(gradient[1, 11])
    assert np.all(np.isfinite(y)) and not np.any(y[0, 11])


def test_packed_documents():
    """By the strict rule a document is on its own where it begins at a block; by the published one it does not mix."""
    segments = jnp.where(jnp.arange(24) < 12, 1, 2).at[22:].set(0)[None].repeat(2, axis=0)
    x, variables = start(STRICT)
    packed, _ = call(STRICT, variables, x, segment_ids=segments)
    for part in (slice(0, 12), slice(12, 22)):
        np.testing.assert_allclose(packed[:, part], call(STRICT, variables, x[:, part])[0], atol=2e-5)
    for mixer in (OFFICIAL, MIXERS["both ways"]):
        x, variables = start(mixer)
        gradient = jax.jit(
            jax.grad(lambda x, v=variables, m=mixer: jnp.sum(m.apply(v, x, segment_ids=segments)[0][:, 12:]))
        )(x)
        assert not np.any(gradient[:, :12]) and np.any(gradient[:, 12:22]) and not np.any(gradient[:, 22:])


@pytest.mark.parametrize("name", ["official", "strict", "both ways", "kmeans"])
def test_maps_are_sown_on_request(name):
    mixer = MIXERS[name]
    if name != "kmeans":
        mixer = mixer.clone(cluster_relative=False, local_relative=False)
    x, variables = start(mixer)
    mixer = mixer.clone(capture_attention=True)
    assert set(jax.eval_shape(lambda x: mixer.apply(variables, x, mutable=["losses"])[1], x)) == {"losses"}
    (y, _), sown = jax.jit(lambda x: mixer.apply(variables, x, mutable=["intermediates"]))(x)
    weights, attended = (sown["intermediates"][key][0] for key in ("attention", "attended"))
    assert weights.shape == (2, 4, 24, 24) and weights.dtype == jnp.float32 and np.all(weights >= 0)
    assert np.all(weights.sum(-1) < 1 + 1e-5)
    if name != "both ways":
        assert not np.any(np.triu(weights, 1))
    order = [part for part in ("routing", "local") if part in variables["params"]]
    order = order[::-1] if name == "kmeans" else order
    if name != "kmeans":  # rotated values and memory are not in the weights
        values = [jnp.einsum("btd,dnh->btnh", x, variables["params"][part]["value"]["kernel"]) for part in order]
        np.testing.assert_allclose(jnp.einsum("bnts,bsnh->btnh", weights, jnp.concatenate(values, 2)), attended, atol=1e-4)
    parts = jnp.split(attended, [variables["params"][f"{order[0]}_out"]["kernel"].shape[0]], axis=2)
    mix = variables["params"].get("mix", jnp.eye(4))
    rebuilt = sum(
        jnp.einsum("btnh,hg,ngd->btd", part, mix, variables["params"][f"{where}_out"]["kernel"])
        for part, where in zip(parts, order, strict=False)
    )
    np.testing.assert_allclose(rebuilt, y, atol=1e-4)


@pytest.mark.parametrize("mixer", [OFFICIAL, STRICT, MIXERS["both ways"], KMEANS], ids=["official", "strict", "both", "kmeans"])
def test_centroids_move_in_training_and_stand_still_otherwise(mixer):
    x, variables = start(mixer)
    collections = ["centroids", "losses", "metrics"]

    def loss(params):
        (y, _), new = mixer.apply({**variables, "params": params}, x, mutable=collections)
        return new["losses"]["routing"]["commitment"][0], (y, new)

    # of the commitment loss alone: it reaches the queries, and no values
    (commitment, (y, new)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert np.any(gradients["routing"]["query"]["kernel"]) and not np.any(gradients["routing"]["value"]["kernel"])
    before, after = variables["centroids"]["routing"], new["centroids"]["routing"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert not np.allclose(before["means"], after["means"])
    assert commitment.shape == () and 0 < commitment < 1e-2
    if mixer is not KMEANS:  # whose first batch makes the centroids
        np.testing.assert_allclose(y, call(mixer, variables, x)[0], atol=1e-6)  # the old centroids served this pass
        assert np.all(after["counts"].sum(-1) > 0)
        per_step = 2 * 24 * (1 if mixer.share_qk else 1 + 0.999) * 0.001
        np.testing.assert_allclose(after["counts"].sum(-1), per_step, rtol=1e-5)


def test_kmeans_heads_begin_with_lloyd_steps():
    x, variables = start(KMEANS, length=40)
    train = jax.jit(lambda variables: KMEANS.apply(variables, x, mutable=["centroids", "metrics", "losses"]))
    losses = []
    for _ in range(3):
        _, new = train(variables)
        losses.append(float(new["losses"]["routing"]["commitment"][0]))
        assert np.all(new["centroids"]["routing"]["ready"])
        variables = {"params": variables["params"], "centroids": new["centroids"]}
    frozen = start(KMEANS, length=40)[1]
    untrained = jax.jit(lambda v: KMEANS.apply(v, x, mutable=["losses"])[1])(frozen)["losses"]["routing"]["commitment"][0]
    assert losses[0] < 0.8 * untrained and losses[2] <= losses[1] <= losses[0] + 1e-9
    np.testing.assert_allclose(jnp.linalg.norm(variables["centroids"]["routing"]["means"], axis=-1), 1.0, atol=0.01)


def language_model(**changes):
    options = {"num_clusters": 2, "cluster_size": 8, "block": 4, "decay": 0.9}
    fields = {"vocab_size": 32, "num_layers": 2, "dim": DIM, "num_heads": 4, "pattern": ("routing",)} | changes
    return LM(mixer_options={"routing": options, "near": {"mixer": "routing", "routing_heads": 0} | options}, **fields)


TOKENS = jax.random.randint(jax.random.key(7), (2, 16), 0, 32)


def train_once(model, variables):
    def loss(params):
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        (logits, _), new = model.apply(
            {"params": params, **rest}, TOKENS, deterministic=False, mutable=["centroids", "losses", "metrics"]
        )
        auxiliary = sum(map(jnp.sum, jax.tree.leaves(new["losses"])))
        return jnp.mean(jnp.square(logits)) + auxiliary, new["centroids"]

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_language_model_scanned_and_rematerialised():
    """Against layers that are called one after the other: loss, gradients and moved centroids of every layer."""
    scanned = language_model(remat="full")
    variables = meta.unbox(jax.jit(scanned.init)(jax.random.key(0), TOKENS))
    means = variables["centroids"]["layers"]["blocks_0"]["mixer"]["routing"]["means"]
    assert means.shape == (2, 2, 2, 4) and not np.allclose(means[0], means[1])
    (loss, centroids), gradients = train_once(scanned, variables)
    moved = centroids["layers"]["blocks_0"]["mixer"]["routing"]["means"]
    assert np.all(np.any(moved != means, axis=(1, 2, 3)))

    def split(tree):
        layers = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(2)}
        return {key: value for key, value in tree.items() if key != "layers"} | layers

    plain = language_model(scan_layers=False)
    want = train_once(plain, {name: split(variables[name]) for name in ("params", "centroids")})
    got = (loss, split(centroids)), split(gradients)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # centroids that were never chosen are huge


def test_language_model_with_routing_in_the_last_layer_alone():
    model = language_model(pattern=("near", "routing"), capture_attention=True)
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))
    frozen = {name: variables[name] for name in ("params", "centroids")}
    assert list(frozen["centroids"]["layers"]) == ["blocks_1"]
    (want, _), sown = jax.jit(lambda: model.apply(frozen, TOKENS, mutable=["intermediates"]))()
    assert [weights.shape for weights in attention_maps(model, sown["intermediates"])] == [(2, 4, 16, 16)] * 2
    logits, _ = jax.jit(lambda cache: model.apply(frozen, TOKENS, cache=cache))(model.init_cache(2, 16))
    np.testing.assert_allclose(logits, want, atol=1e-5)


@pytest.mark.parametrize("mixer", [OFFICIAL, STRICT], ids=["official", "strict"])
def test_vmap(mixer):
    """Centroids averaged over a mapped axis are those of the whole batch."""
    x, variables = start(mixer, batch=6)
    stacked = x.reshape(3, 2, *x.shape[1:])
    mapped = mixer.clone(axis_name="rows")
    (y, _), new = jax.jit(jax.vmap(lambda x: mapped.apply(variables, x, mutable=["centroids"]), axis_name="rows"))(stacked)
    (want, _), moved = jax.jit(lambda x: mixer.apply(variables, x, mutable=["centroids"]))(x)
    np.testing.assert_allclose(y.reshape(want.shape), want, atol=1e-5)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5)


def test_bridge_to_nnx():
    x = jnp.ones((1, 8, DIM))
    module = nnx.bridge.ToNNX(OFFICIAL, rngs=nnx.Rngs(0)).lazy_init(x)
    assert module(x)[0].shape == x.shape


def test_types_and_logical_names():
    mixer = OFFICIAL.clone(dtype=jnp.bfloat16)
    variables = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 8, DIM)))
    params = variables["params"]
    assert params["routing"]["query"]["kernel"].names == ("embed", "heads", "head_dim")
    assert params["local_out"]["kernel"].names == ("heads", "head_dim", "embed")
    boxed = jax.tree.leaves(variables["centroids"], is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    assert all(isinstance(leaf, linen.LogicallyPartitioned) for leaf in boxed)
    y, _ = jax.eval_shape(lambda x: mixer.apply(meta.unbox(variables), x), jnp.ones((1, 8, DIM)))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables["centroids"]))
    assert OFFICIAL.sequence_flops(64) > LOCAL.clone(num_heads=2, head_dim=4).sequence_flops(64) > 0
    assert KMEANS.sequence_flops(64) > 0
    assert OFFICIAL.clone(cluster_size=None, train_length=100).window() == 34


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads = 3: does not divide dim = 16"),
        ({"routing_heads": 5}, "routing_heads = 5: num_heads = 4 counts all heads"),
        ({"share_qk": False}, "share_qk = False with causal routing"),
        ({"rule": "causal", "causal": False}, "rule = 'causal': for causal, shared"),
        ({"rule": "oficial"}, "rule = 'oficial': unknown, did you mean 'official'"),
        ({"flange": 6}, "flange = 6: block = 4 does not divide it"),
        ({"num_clusters": 0}, "num_clusters = 0"),
        ({"cluster_size": None}, "cluster_size = None: .*Set train_length"),
        ({"cluster_size": 0}, "cluster_size = 0"),
        ({"counting": "both"}, "counting = 'both': unknown"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    x = jnp.zeros((1, 8, DIM))
    with pytest.raises(ConfigError, match=message):
        mixer = OFFICIAL.clone(**fields)
        variables = jax.eval_shape(mixer.init, jax.random.key(0), x)
        jax.eval_shape(lambda v: mixer.apply(v, x, mutable=["centroids"]), variables)


def test_caches_and_segments_that_do_not_fit():
    for mixer in (OFFICIAL, STRICT, KMEANS):
        x, variables = start(mixer, length=12)
        with pytest.raises(ConfigError, match=r"longer than the cache: 0 \+ 12 tokens, 11 slots"):
            mixer.apply(variables, x, cache=mixer.init_cache(2, 11))
        with pytest.raises(ConfigError, match="batch 3"):
            mixer.apply(variables, x, cache=mixer.init_cache(3, 20))
        _, cache = call(mixer, variables, x, cache=mixer.init_cache(2, 20))
        assert np.all(np.isnan(call(mixer, variables, x, cache=cache)[0]))  # traced: loud instead of wrong
        with pytest.raises(ConfigError, match="segment_ids"):
            mixer.apply(variables, x, cache=mixer.init_cache(2, 20), segment_ids=jnp.ones((2, 12), jnp.int32))
    for mixer, message in (
        (MIXERS["both ways"], "causal = False"),
        (MIXERS["random"], "rule = 'random'"),
        (KMEANS.clone(share_qk=False), "share_qk=True"),
    ):
        with pytest.raises(ConfigError, match=message):
            mixer.init_cache(2, 20)
    with pytest.raises(ConfigError, match="num_mem_kv = 0"):
        KMEANS.clone(share_qk=False, num_mem_kv=0).init(jax.random.key(0), x)
    with pytest.raises(ConfigError, match="local_heads = 9"):
        KMEANS.clone(local_heads=9).init(jax.random.key(0), x)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import linen
from flax.core import meta
from attnlab.nn.routing import RoutingAttention
from attnlab.training.config import SHARDING_RULES
mesh = jax.make_mesh((2, 2, 2, 1), ("data", "fsdp", "tensor", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 4)
for rule in ("official", "causal"):
    mixer = RoutingAttention(dim=16, num_heads=4, num_clusters=3, cluster_size=8, block=4, rule=rule)
    x = jax.random.normal(jax.random.key(0), (4, 24, 16))
    variables = meta.unbox(jax.jit(mixer.init)(jax.random.key(1), x))
    variables = {name: variables[name] for name in ("params", "centroids")}
    def both(variables, x):
        def loss(params):
            (y, _), new = mixer.apply({**variables, "params": params}, x, mutable=["centroids", "losses"])
            return jnp.sum(jnp.sin(100 * y)) + new["losses"]["routing"]["commitment"][0], (y, new["centroids"])
        return jax.value_and_grad(loss, has_aux=True)(variables["params"])
    want = jax.jit(both)(variables, x)
    with jax.set_mesh(mesh), linen.logical_axis_rules(SHARDING_RULES):
        rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        got = jax.jit(both)(variables, rows)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
print("equal")
"""


def test_sharded_equals_unsharded(run_python):
    assert run_python(["-c", SHARDED], devices=8).stdout.strip() == "equal"

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

DIM, LENGTH = 16, 24
OFFICIAL = RoutingAttention(dim=DIM, num_heads=4, num_clusters=3, cluster_size=8, block=4, max_relative_position=5)
STRICT = OFFICIAL.clone(rule="causal", flange=8)
LOCAL = OFFICIAL.clone(routing_heads=0)
KMEANS = KMeansAttention(dim=DIM, num_heads=4, window=8, num_clusters=3, num_mem_kv=1)
MIXERS = {
    "official": OFFICIAL,
    "strict": STRICT,
    "strict alone": STRICT.clone(routing_heads=4),
    "local alone": LOCAL,
    "random": OFFICIAL.clone(rule="random"),
    "both ways": OFFICIAL.clone(causal=False, share_qk=False, local_relative=False),
    "kmeans": KMEANS,
    "kmeans alone": KMEANS.clone(local_heads=0),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(module, x):
    """Parameters and centroids as after initialisation, with kernels so large that attention is far from uniform."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("means", "sums"):
            means = normal(2, *leaf.shape)
            means -= 0 if isinstance(module, KMeansAttention) else means.mean(-1, keepdims=True)
            return means / (means**2).mean(-1, keepdims=True) ** 0.5 / (leaf.shape[-1] ** 0.5 if "ready" in names else 1)
        if name in ("counts", "ready"):
            return np.zeros(leaf.shape, leaf.dtype)
        return (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    shapes = {name: shapes[name] for name in ("params", "centroids") if name in shapes}
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def initialised(mixer):
    return filled(mixer.clone(capture_attention=False, axis_name=None), np.zeros((1, 8, DIM), np.float32))


def start(mixer, seed=0, length=LENGTH, batch=2):
    return normal(seed, batch, length, DIM), initialised(mixer)


@functools.cache
def jitted(mixer):
    return jax.jit(lambda variables, x, mask, cache: mixer.apply(variables, x, mask=mask, cache=cache))


def call(mixer, variables, x, mask=None, cache=None):
    return jitted(mixer)(variables, x, np.ones(x.shape[:2], bool) if mask is None else mask, cache)


@functools.cache
def training(mixer):
    """(variables, x) to ((commitment loss, (y, collections)), gradients of that loss alone)."""

    def run(variables, x):
        def loss(params):
            (y, _), new = mixer.apply({**variables, "params": params}, x, mutable=["centroids", "losses", "metrics"])
            return new["losses"]["routing"]["commitment"][0], (y, new)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return jax.jit(run)


@pytest.mark.parametrize("name", ["official", "kmeans"])
def test_one_token(name):
    x, variables = start(MIXERS[name], length=1)
    y, cache = jax.jit(MIXERS[name].apply)(variables, x)
    assert y.shape == x.shape and cache is None and np.all(np.isfinite(y)) and np.any(y)


@pytest.mark.parametrize("name", ["strict alone", "local alone"])
def test_full_pass_equals_any_chunking(name):
    mixer = MIXERS[name]
    x, variables = start(mixer)
    mask = np.arange(LENGTH)[None] >= np.array([[0], [5]])  # row 1 is padded on the left
    want, none = call(mixer, variables, x, mask)
    assert none is None
    for lengths in ((1,) * LENGTH, (8, *(1,) * 8, 8)):
        cache, parts, at = mixer.init_cache(2, LENGTH), [], 0
        for length in lengths:
            part, cache = call(mixer, variables, x[:, at : at + length], mask[:, at : at + length], cache)
            parts.append(part)
            at += length
        np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=3e-5)
    assert np.all(np.isnan(call(mixer, variables, x[:, :1], cache=cache)[0]))  # no slot left: loud instead of wrong


@pytest.mark.parametrize("name", ["official", "kmeans alone"])
def test_published_decoding_is_the_full_pass_of_what_is_known(name):
    """A call on an empty cache is the full pass; a later token gets what a full pass over the tokens so far gives it."""
    mixer = MIXERS[name]
    x, variables = start(mixer)
    want, _ = call(mixer, variables, x)
    np.testing.assert_allclose(call(mixer, variables, x, cache=mixer.init_cache(2, LENGTH))[0], want, atol=3e-5)
    cache, parts = mixer.init_cache(2, LENGTH), []
    for at in range(LENGTH):
        y, cache = call(mixer, variables, x[:, at : at + 1], cache=cache)
        parts.append(y[:, 0])
    np.testing.assert_allclose(parts[-1], want[:, -1], atol=3e-5)
    assert not np.allclose(np.stack(parts, axis=1), want, atol=1e-3)  # the published rule is not strictly causal
    assert np.all(np.isnan(call(mixer, variables, x[:, :1], cache=cache)[0]))


def test_strict_rule_is_blind_to_later_tokens_and_the_published_one_is_not():
    for mixer, strict in ((STRICT, True), (OFFICIAL, False), (KMEANS, False)):
        x, variables = start(mixer, seed=3)
        other = np.concatenate([x[:, :13], normal(9, 2, LENGTH - 13, DIM)], axis=1)
        first, second = (call(mixer, variables, rows)[0][:, :13] for rows in (x, other))
        assert np.allclose(first, second, atol=1e-6) == strict


@pytest.mark.parametrize("name", ["official", "strict", "random", "both ways", "kmeans"])
def test_order_and_padding_by_gradients_and_maps_on_request(name):
    """Row 0 has one padding token, row 1 none, row 2 nothing else."""
    mixer = MIXERS[name]
    if name != "kmeans":  # with values of relative positions, weights and values alone are not the result
        mixer = mixer.clone(cluster_relative=False, local_relative=False)
    x, variables = start(mixer, batch=3)
    mixer = mixer.clone(capture_attention=True)
    mask = np.ones((3, LENGTH), bool)
    mask[0, 11] = mask[2] = False

    def one(x):
        (y, _), sown = mixer.apply(variables, x, mask=mask, mutable=["intermediates"])
        return jnp.sum(y[:, 12]), (y, sown["intermediates"])

    gradient, (y, sown) = jax.jit(jax.grad(one, has_aux=True))(x)
    assert np.all(np.any(gradient[:2, 12], axis=-1)) and np.any(gradient[:, 13:]) == (name == "both ways")
    assert not np.any(gradient[0, 11]) and np.any(gradient[1, 11])
    assert np.all(np.isfinite(y)) and not np.any(y[0, 11]) and not np.any(y[2])
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[2])

    weights, attended = (np.asarray(sown[key][0]) for key in ("attention", "attended"))
    assert weights.shape == (3, 4, LENGTH, LENGTH) and weights.dtype == np.float32 and np.all(weights >= 0)
    real = np.moveaxis(weights, 2, 1)[mask]
    assert np.all(real.sum(-1) < 1 + 1e-5) and np.all(real.sum(-1) > -1e-5)
    if name != "both ways":
        assert not np.any(np.triu(weights[:2], 1))
    params = variables["params"]
    order = ["local", "routing"] if name == "kmeans" else ["routing", "local"]
    if name != "kmeans":  # rotated values and memory are not in the weights
        values = np.concatenate([np.einsum("btd,dnh->btnh", x, params[part]["value"]["kernel"]) for part in order], axis=2)
        values = np.where(mask[:, :, None, None], values, 0)
        np.testing.assert_allclose(np.einsum("bnts,bsnh->btnh", weights, values)[mask], attended[mask], atol=1e-4)
    out = np.concatenate([params[f"{part}_out"]["kernel"] for part in order])
    rebuilt = np.einsum("btnh,hg,ngd->btd", attended, params.get("mix", np.eye(4)), out)
    np.testing.assert_allclose(rebuilt, y, atol=1e-4)
    if name == "official":
        assert set(jax.eval_shape(lambda x: mixer.apply(variables, x, mutable=["losses"])[1], x)) == {"losses"}


def test_packed_documents():
    """By the strict rule a document is on its own where it begins at a block; by the published one it does not mix."""
    segments = np.tile(np.repeat([1, 2, 0], [12, 10, 2]), (2, 1))
    x, variables = start(STRICT)
    alone = lambda x: STRICT.apply(variables, x)[0]  # noqa: E731
    packed, *parts = jax.jit(
        lambda x: (STRICT.apply(variables, x, segment_ids=segments)[0], alone(x[:, :12]), alone(x[:, 12:22]))
    )(x)
    np.testing.assert_allclose(packed[:, :22], np.concatenate(parts, axis=1), atol=2e-5)
    x, variables = start(OFFICIAL)
    late = lambda x: jnp.sum(OFFICIAL.apply(variables, x, segment_ids=segments)[0][:, 12:])  # noqa: E731
    gradient = jax.jit(jax.grad(late))(x)
    assert not np.any(gradient[:, :12]) and np.any(gradient[:, 12:22]) and not np.any(gradient[:, 22:])


@pytest.mark.parametrize("name", ["official", "both ways", "kmeans"])
def test_centroids_move_in_training_and_stand_still_otherwise(name):
    mixer = MIXERS[name]
    x, variables = start(mixer)
    # of the commitment loss alone: it reaches the queries, and no values
    (commitment, (y, new)), gradients = training(mixer)(variables, x)
    assert np.any(gradients["routing"]["query"]["kernel"]) and not np.any(gradients["routing"]["value"]["kernel"])
    before, after = variables["centroids"]["routing"], new["centroids"]["routing"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert not np.allclose(before["means"], after["means"])
    assert commitment.shape == () and 0 < commitment < 1e-2
    if name == "official":  # the old centroids served this pass
        np.testing.assert_allclose(y, call(mixer, variables, x)[0], atol=1e-5)
    if name != "kmeans":  # whose first batch makes the centroids
        per_step = 2 * LENGTH * (1 if mixer.share_qk else 1 + 0.999) * 0.001
        np.testing.assert_allclose(after["counts"].sum(-1), per_step, rtol=1e-5)


def test_kmeans_heads_begin_with_lloyd_steps():
    x, variables = start(KMEANS)
    random = variables["centroids"]["routing"] | {"ready": np.ones((), bool)}
    (untrained, _), _ = training(KMEANS)({**variables, "centroids": {"routing": random}}, x)
    losses = []
    for _ in range(3):
        (loss, (_, new)), _ = training(KMEANS)(variables, x)
        losses.append(float(loss))
        assert np.all(new["centroids"]["routing"]["ready"])
        variables = {"params": variables["params"], "centroids": new["centroids"]}
    assert losses[0] < 0.8 * untrained and losses[2] <= losses[1] <= losses[0] + 1e-9
    np.testing.assert_allclose(np.linalg.norm(variables["centroids"]["routing"]["means"], axis=-1), 1.0, atol=0.01)


def language_model(routing_heads=2, **changes):
    options = {"routing_heads": routing_heads, "num_clusters": 2, "cluster_size": 8, "block": 4, "decay": 0.9}
    fields = {"vocab_size": 32, "num_layers": 2, "dim": DIM, "num_heads": 4, "pattern": ("routing",)} | changes
    return LM(mixer_options={"routing": options, "near": {"mixer": "routing"} | options | {"routing_heads": 0}}, **fields)


TOKENS = np.random.default_rng(7).integers(0, 32, (2, 16))


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
    scanned, plain = (language_model(routing_heads=4, **fields) for fields in ({"remat": "full"}, {"scan_layers": False}))
    centroids = jax.jit(lambda key: meta.unbox(scanned.init(key, TOKENS))["centroids"])(jax.random.key(0))
    variables = {"params": filled(scanned, TOKENS)["params"], "centroids": centroids}
    means = centroids["layers"]["blocks_0"]["mixer"]["routing"]["means"]
    assert means.shape == (2, 4, 2, 4) and not np.allclose(means[0], means[1])
    (loss, centroids), gradients = train_once(scanned, variables)
    moved = centroids["layers"]["blocks_0"]["mixer"]["routing"]["means"]
    assert np.all(np.any(moved != means, axis=(1, 2, 3)))

    def split(tree):
        tree = jax.tree.map(np.asarray, tree)
        layers = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(2)}
        return {key: value for key, value in tree.items() if key != "layers"} | layers

    want = train_once(plain, {name: split(variables[name]) for name in ("params", "centroids")})
    got = (loss, split(centroids)), split(gradients)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # centroids that were never chosen are huge


def test_language_model_with_routing_in_the_last_layer_alone():
    model = language_model(pattern=("near", "routing"), capture_attention=True)
    variables = filled(model, TOKENS)
    assert list(variables["centroids"]["layers"]) == ["blocks_1"]

    @jax.jit
    def run(variables):
        (want, _), sown = model.apply(variables, TOKENS, mutable=["intermediates"])
        return want, attention_maps(model, sown["intermediates"]), model.apply(variables, TOKENS, cache=model.init_cache(2, 16))[0]

    want, maps, logits = run(variables)
    assert [weights.shape for weights in maps] == [(2, 4, 16, 16)] * 2
    np.testing.assert_allclose(logits, want, atol=2e-5)


@pytest.mark.parametrize("name", ["official", "kmeans alone"])
def test_vmap(name):
    """Centroids averaged over a mapped axis are those of the whole batch."""
    mixer = MIXERS[name]
    x, variables = start(mixer, batch=4)
    if name != "official":  # past the first batch, whose vectors are drawn row by row
        ready = variables["centroids"]["routing"] | {"ready": np.ones((), bool)}
        variables = {**variables, "centroids": {"routing": ready}}
    mapped = mixer.clone(axis_name="rows")

    @jax.jit
    def run(x):
        part = lambda x: mapped.apply(variables, x, mutable=["centroids"])  # noqa: E731
        return jax.vmap(part, axis_name="rows")(x.reshape(2, 2, *x.shape[1:])), mixer.apply(variables, x, mutable=["centroids"])

    ((y, _), new), ((want, _), moved) = run(x)
    np.testing.assert_allclose(y.reshape(want.shape), want, atol=1e-5)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5)


def test_bridge_to_nnx():
    def run(x):
        module = nnx.bridge.ToNNX(OFFICIAL, rngs=nnx.Rngs(0)).lazy_init(x)
        return module(x)[0]

    x = jnp.ones((1, 8, DIM))
    assert jax.eval_shape(run, x).shape == x.shape


def test_types_and_logical_names():
    mixer = OFFICIAL.clone(dtype=jnp.bfloat16)
    x = np.zeros((1, 8, DIM), np.float32)
    variables = jax.eval_shape(mixer.init, jax.random.key(0), x)
    params = variables["params"]
    assert params["routing"]["query"]["kernel"].names == ("embed", "heads", "head_dim")
    assert params["local_out"]["kernel"].names == ("heads", "head_dim", "embed")
    boxed = jax.tree.leaves(variables["centroids"], is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
    assert all(isinstance(leaf, linen.LogicallyPartitioned) for leaf in boxed)
    y, _ = jax.eval_shape(mixer.apply, meta.unbox(variables), x)
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
    x = np.zeros((1, 8, DIM), np.float32)
    with pytest.raises(ConfigError, match=message):
        mixer = OFFICIAL.clone(**fields)
        variables = jax.eval_shape(mixer.init, jax.random.key(0), x)
        jax.eval_shape(lambda v: mixer.apply(v, x, mutable=["centroids"]), variables)


def test_caches_and_segments_that_do_not_fit():
    x = normal(0, 2, 12, DIM)

    def apply(mixer, **arguments):  # arguments are no tracers: what is known of a cache is checked
        jax.eval_shape(lambda variables: mixer.apply(variables, x, **arguments), initialised(mixer))

    for mixer in (OFFICIAL, STRICT, KMEANS):
        with pytest.raises(ConfigError, match=r"longer than the cache: 0 \+ 12 tokens, 11 slots"):
            apply(mixer, cache=mixer.init_cache(2, 11))
        with pytest.raises(ConfigError, match="batch 3"):
            apply(mixer, cache=mixer.init_cache(3, 20))
        with pytest.raises(ConfigError, match="segment_ids"):
            apply(mixer, cache=mixer.init_cache(2, 20), segment_ids=np.ones((2, 12), np.int32))
    for mixer, message in (
        (MIXERS["both ways"], "causal = False"),
        (MIXERS["random"], "rule = 'random'"),
        (KMEANS.clone(share_qk=False), "share_qk=True"),
    ):
        with pytest.raises(ConfigError, match=message):
            mixer.init_cache(2, 20)
    for fields, message in (({"share_qk": False, "num_mem_kv": 0}, "num_mem_kv = 0"), ({"local_heads": 9}, "local_heads = 9")):
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(KMEANS.clone(**fields).init, jax.random.key(0), x)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import linen
from flax.core import meta
from attnlab.nn.routing import RoutingAttention
from attnlab.training.config import SHARDING_RULES
mesh = jax.make_mesh((2, 2, 2, 1), ("data", "fsdp", "tensor", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 4)
rng = np.random.default_rng(0)
for rule in ("official", "causal"):
    mixer = RoutingAttention(dim=16, num_heads=4, num_clusters=3, cluster_size=8, block=4, rule=rule)
    x = rng.standard_normal((4, 24, 16)).astype(np.float32)
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(1), x))
    variables = {name: jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes[name])
                 for name in ("params", "centroids")}
    variables["params"] = jax.tree.map(lambda leaf: 0.3 * leaf, variables["params"])
    variables["centroids"]["routing"]["counts"] **= 2
    def both(variables, x):
        def loss(params):
            (y, _), new = mixer.apply({**variables, "params": params}, x, mutable=["centroids", "losses"])
            return jnp.sum(jnp.sin(y)) + new["losses"]["routing"]["commitment"][0], (y, new["centroids"])
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

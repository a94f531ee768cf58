"""Adapters: in any linen model, merged or separate, and what is trained beside them."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.inference.decode import generate
from attnlab.methods import lora
from attnlab.methods.lora import Adapted, LoRA
from attnlab.models.lm import LM
from attnlab.training import config as config_lib
from attnlab.training.build import build

SPEC = LoRA(rank=3, alpha=12.0)
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 12)).astype(np.int32)


class Foreign(linen.Module):
    """A model that knows nothing of attnlab."""

    @linen.compact
    def __call__(self, x):
        x = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attention")(linen.LayerNorm()(x))
        return linen.Dense(5, name="head")(x)


def language_model(**fields):
    return LM(vocab_size=19, num_layers=3, dim=16, num_heads=2, pattern=("softmax", "sf"), **fields)


MODELS = {
    "scanned": (language_model(), TOKENS, SPEC),
    "unrolled, rematerialised": (language_model(scan_layers=False, remat="full", tie_embeddings=False), TOKENS, SPEC),
    "scanned MLP": (language_model(remat="dots"), TOKENS, LoRA(rank=2, targets=r"mlp_block/\w+/kernel$|value/kernel$")),
    "foreign": (Foreign(), np.ones((2, 6, 8), np.float32), LoRA(rank=2, targets="kernel$")),
}


def drawn(tree, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * random.normal(size=leaf.shape)).astype(leaf.dtype), tree)


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", MODELS)
def test_separate_and_merged_agree(name):
    model, inputs, spec = MODELS[name]
    if not isinstance(model, LM):
        inputs = inputs * np.arange(1, 9)
    adapted = Adapted(model, spec)
    shapes = meta.unbox(jax.eval_shape(adapted.init, jax.random.key(0), inputs))["params"]
    params = drawn(shapes)
    run = jax.jit(lambda params, inputs: first(adapted.apply({"params": params}, inputs)))
    plain = jax.jit(lambda params, inputs: first(model.apply({"params": params}, inputs)))
    merged = lora.merge(params, spec)
    base, adapters = lora.split(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    separate = run(params, inputs)
    np.testing.assert_allclose(separate, plain(merged, inputs), atol=2e-4)
    assert not np.allclose(separate, plain(base, inputs), atol=1e-2)
    again = lora.unmerge(merged, adapters, spec)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    # with B = 0 it is the model that it was, to the bit
    zeros = traverse_util.path_aware_map(lambda path, leaf: 0 * leaf if path[-1] == "lora_b" else leaf, params)
    np.testing.assert_array_equal(run(zeros, inputs), plain(base, inputs))
    for a, b in zip(jax.tree.leaves(lora.merge(zeros, spec)), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)


def test_shapes_names_and_start():
    variables = jax.jit(Adapted(language_model(), SPEC).init)(jax.random.key(0), TOKENS)
    node = variables["params"]["layers"]["blocks_0"]["mixer"]
    assert node["query"]["lora_a"].names == ("layers", "embed", "norm")
    assert node["query"]["lora_b"].names == ("layers", "norm", "heads", "head_dim")
    assert node["out"]["lora_a"].names == ("layers", "heads", "head_dim", "norm")
    params = meta.unbox(variables["params"])
    node = params["layers"]["blocks_1"]["mixer"]
    assert node["key"]["lora_a"].shape == (1, 16, 3) and node["key"]["lora_b"].shape == (1, 3, 2, 8)
    assert node["out"]["lora_a"].shape == (1, 2, 8, 3) and node["out"]["lora_b"].shape == (1, 3, 16)
    assert params["tail"]["blocks_0"]["mixer"]["out"]["lora_a"].shape == (2, 8, 3)
    a = np.concatenate([leaf.ravel() for path, leaf in traverse_util.flatten_dict(params).items() if path[-1] == "lora_a"])
    assert np.abs(a).max() <= 0.25 and np.abs(a).max() > 0.24 and abs(a.mean()) < 0.03  # +-1 / sqrt(16)
    assert SPEC.scale == 4.0 and len(np.unique(a)) == a.size  # every adapter has its own numbers
    assert not any(np.any(leaf) for path, leaf in traverse_util.flatten_dict(params).items() if path[-1] == "lora_b")


def test_only_adapters_norms_and_embeddings_are_trained():
    model = Adapted(language_model(tie_embeddings=False), SPEC)
    params = drawn(meta.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))["params"])
    tx = lora.optimizer(optax.adamw(1e-2, weight_decay=0.1), params, SPEC)

    @jax.jit
    def step(params):
        def loss(params):
            logits = model.apply({"params": lora.freeze(params, SPEC)}, TOKENS)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, tx.init(params), params)
        return grads, optax.apply_updates(params, updates), state

    grads, new, state = step(params)
    trained = {path: label == "trained" for path, label in traverse_util.flatten_dict(lora.labels(params, SPEC)).items()}
    assert {path[-2] for path, yes in trained.items() if yes and path[-1] not in ("lora_a", "lora_b")} == {
        "embed", "mixer_norm", "mlp_norm", "final_norm",
    }  # fmt: skip
    assert not trained["output", "kernel"]
    before, after, grads = (traverse_util.flatten_dict(tree) for tree in (params, new, grads))
    for path, yes in trained.items():
        assert np.any(grads[path]) == yes, path
        assert np.any(before[path] != after[path]) == yes, path
    kept = sum(before[path].size for path, yes in trained.items() if yes)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * kept  # no moments for the rest
    assert set(traverse_util.flatten_dict(lora.labels(params, LoRA(train=""))).values()) == {"trained", "frozen"}
    frozen = traverse_util.flatten_dict(lora.labels(params, LoRA(train="")))
    assert frozen["embed", "embedding"] == "frozen"


def test_adapted_models_decode():
    model = Adapted(language_model(), SPEC)
    params = drawn(meta.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))["params"])
    options = {"prompt": TOKENS, "max_new_tokens": 4, "temperature": 0}
    adapted = generate(model, {"params": params}, **options).tokens
    np.testing.assert_array_equal(adapted, generate(model.model, {"params": lora.merge(params, SPEC)}, **options).tokens)
    assert model.clone(capture_attention=True).capture_attention and repr(model) != repr(model.clone(remat="full"))


@pytest.fixture(scope="module")
def run():
    config = config_lib.base()
    config.update_from_flattened_dict({
        "batch_size": 2, "seq_len": 16, "model.num_layers": 2, "model.dim": 16, "model.num_heads": 2, "model.dtype": "float32",
        "model.mixer": "sf", "lora.rank": 2, "optimizer.warmup_steps": 1, "optimizer.clip_norm": 0.5,
    })  # fmt: skip
    return build(config.lock())


def test_a_run_trains_adapters_by_its_config(run):
    state = run.init_state()
    start = traverse_util.flatten_dict(jax.device_get(state.params))
    batch = {name: np.ones(spec.shape, spec.dtype) for name, spec in run.batch_spec.items()}
    batch["inputs"] = np.arange(32, dtype=np.int32).reshape(2, 16)
    with run.context():
        for _ in range(2):
            state, metrics = run.train_step(state, batch)
    end = traverse_util.flatten_dict(jax.device_get(state.params))
    changed = {"/".join(path) for path in start if np.any(start[path] != end[path])}
    assert "layers/blocks_0/mixer/query/lora_b" in changed and "embed/embedding" in changed
    assert all(path.endswith(("lora_a", "lora_b")) or "norm" in path or "embed" in path for path in changed)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert isinstance(run.task.model, Adapted) and run.task.model.num_layers == 2


def test_flops_leave_out_the_gradients_of_frozen_kernels(run):
    params = run.abstract_state.params
    frozen = sum(leaf.size for path, leaf in traverse_util.flatten_dict(params).items() if not LoRA().trains(path))
    assert run.task.flops_per_step(params) == run.task.task.flops_per_step(params) - 2 * 32 * frozen > 0


def test_new_tokens_start_as_the_mean():
    params = {"embed": {"embedding": jnp.arange(6.0).reshape(3, 2)}, "output": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    wider = lora.extend_vocabulary(params, 2)
    np.testing.assert_array_equal(wider["embed"]["embedding"][3:], [[2.0, 3.0]] * 2)
    np.testing.assert_array_equal(wider["output"]["kernel"][:, 3:], [[1.0, 1.0], [4.0, 4.0]])
    with pytest.raises(ConfigError, match="table = 'tokens'"):
        lora.extend_vocabulary(params, 1, table="tokens", head="tokens")


def test_bad_input():
    params = {"a": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32)}}
    for fields, message in (
        ({"rank": 0}, "lora.rank = 0"),
        ({"rank": -2}, "lora.rank = -2"),
        ({"alpha": 0.0}, "lora.alpha = 0.0"),
        ({"targets": "("}, r"lora.targets = '\(': is no regular expression"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoRA(**fields)
    with pytest.raises(ConfigError, match="matches no parameter"):
        lora.add(params, jax.random.key(0), LoRA())
    with pytest.raises(ConfigError, match="a/bias has 1 axes and is no kernel"):
        lora.add(params, jax.random.key(0), LoRA(targets="bias"))
    adapters = lora.split(lora.add(params, jax.random.key(0), LoRA(targets="kernel")))[1]
    with pytest.raises(ConfigError, match="no such kernel"):
        lora.join({"b": params["a"]}, adapters)
    with pytest.raises(ConfigError, match="no such kernel"):
        lora.unmerge({"b": params["a"]}, adapters, LoRA())
    convolution = linen.Conv(4, (3,))
    with pytest.raises(ConfigError, match="Only linear maps of the last axes"):
        model = Adapted(convolution, LoRA(targets="kernel"))
        jax.eval_shape(lambda x: model.apply(model.init(jax.random.key(0), x), x), np.zeros((1, 6, 2), np.float32))

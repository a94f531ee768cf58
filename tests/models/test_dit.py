"""DiT: its start, what it is conditioned on, the published sizes; and the sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.inference.denoising import contact_sheet, denoise
from attnlab.methods.diffusion import linear_schedule
from attnlab.models.dit import SIZES, DiT, dit, sine_times

SMALL = DiT(
    num_classes=3, image_shape=(8, 12, 2), patch=4, dim=16, head_dim=8, heads=(2, 3), shared_heads=(2, 1), top_ks=(0, 1)
)


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], (2, 8, 12, 2)), jnp.array([3, 700]), jnp.array([0, 3])


@functools.cache
def started():
    return meta.unbox(jax.jit(SMALL.init)(jax.random.key(1), *inputs()))["params"]


def drawn():
    params = started()
    keys = iter(jax.random.split(jax.random.key(2), 200))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), params)


def test_starts_at_zero_and_then_listens_to_time_and_class():
    images, times, labels = inputs()
    apply = jax.jit(lambda params, *inputs: SMALL.apply({"params": params}, *inputs))
    np.testing.assert_array_equal(apply(started(), images, times, labels), 0.0)
    call = functools.partial(apply, drawn())
    found = call(images, times, labels)
    assert found.shape == images.shape and found.dtype == jnp.float32
    assert not np.allclose(found, call(images, times + 50, labels), atol=1e-3)
    changed = call(images, times, jnp.array([1, 3]))
    assert not np.allclose(found[0], changed[0], atol=1e-3)
    np.testing.assert_allclose(found[1], changed[1], atol=1e-6)


def test_balance_loss_is_averaged_over_layers_with_routed_heads():
    images, times, labels = inputs()
    apply = jax.jit(functools.partial(SMALL.apply, mutable=["losses", "metrics"]))
    _, sown = apply({"params": drawn()}, images, times, labels)
    assert set(sown["losses"]) == {"blocks_1"}  # all heads of the first layer are shared
    value, plain = sown["losses"]["blocks_1"]["attention"]["balance"][0], sown["metrics"]["blocks_1"]["attention"]["balance"][0]
    np.testing.assert_allclose(value, 0.01 * plain, rtol=1e-6)
    dense = SMALL.clone(shared_heads=(), top_ks=())
    assert "router" not in jax.eval_shape(dense.init, jax.random.key(0), *inputs())["params"]["blocks_1"]["attention"]


@pytest.mark.parametrize(
    ("size", "layers", "mean_heads"),
    [("XL/2-90", 28, 16), ("XL/2-75", 28, 16), ("L/2-75", 24, 16), ("B/2-90", 12, 12), ("S/2-75", 12, 6)],
)
def test_published_sizes(size, layers, mean_heads):
    fields = SIZES[size]
    assert {len(fields[name]) for name in ("heads", "shared_heads", "top_ks")} == {layers}
    assert np.mean(fields["heads"]) == pytest.approx(mean_heads, abs=0.01)
    on = np.sum(np.add(fields["shared_heads"], fields["top_ks"])) / np.sum(fields["heads"])
    assert on == pytest.approx(int(size[-2:]) / 100, abs=0.06)
    if size == "S/2-75":
        shapes = jax.eval_shape(dit(size).init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
        params = shapes["params"]
        routers = sum(leaf.size for i in range(12) for leaf in jax.tree.leaves(params[f"blocks_{i}"]["attention"].get("router", {})))
        assert routers == 384 * (2 * (4 + 2 + 2) + 8 * (3 + 3 + 2) + 2 * 6)
        # DiT-S/2 has 33M: its last layer is twice as wide, for variances
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) - routers == 32_865_056 - (384 + 1) * 16
    with pytest.raises(ConfigError, match="size = 'M/2-75'"):
        dit("M/2-75")


def test_time_embedding():
    have = sine_times(jnp.array([0, 5]))
    np.testing.assert_allclose(have[0], np.concatenate([np.ones(128), np.zeros(128)]))
    np.testing.assert_allclose(have[1, [0, 64, 128]], [np.cos(5.0), np.cos(0.05), np.sin(5.0)], rtol=1e-5)


def test_the_sampler_finds_a_known_image():
    """With the exact noise of one image, every number of steps leads to it; guidance away from none does too."""
    schedule = linear_schedule(100)
    target = jax.random.uniform(jax.random.key(0), (4, 4, 1), minval=-1.0, maxval=1.0)

    def predict(x, times, labels):
        left = jnp.asarray(schedule, jnp.float32)[times][:, None, None, None]
        shown = jnp.where(labels[:, None, None, None] == 2, 0.0, target)  # the label 2 is none
        return (x - jnp.sqrt(left) * shown) / jnp.sqrt(1.0 - left)

    for steps, eta in ((1, 0.0), (7, 0.0), (100, 1.0)):
        found = jax.jit(lambda key, s=steps, e=eta: denoise(predict, key, jnp.array([0, 1]), (4, 4, 1), schedule, steps=s, eta=e))(
            jax.random.key(1)
        )
        np.testing.assert_allclose(found[1], target, atol=1e-3)
    guided = denoise(predict, jax.random.key(1), jnp.array([0]), (4, 4, 1), schedule, steps=3, guidance=3.0, no_class=2, limit=1.0)
    np.testing.assert_allclose(guided[0], np.clip(3 * target, -1, 1), atol=1e-3)
    with pytest.raises(ConfigError, match="steps = 101"):
        denoise(predict, jax.random.key(1), jnp.array([0]), (4, 4, 1), schedule, steps=101)
    with pytest.raises(ConfigError, match=r"guidance = 2.0"):
        denoise(predict, jax.random.key(1), jnp.array([0]), (4, 4, 1), schedule, steps=2, guidance=2.0)


def test_schedule():
    left = linear_schedule(1000)
    np.testing.assert_allclose([left[0], left[-1]], [1 - 1e-4, 4.0358e-5], rtol=1e-3)
    assert np.all(np.diff(linear_schedule(50)) < 0) and linear_schedule(50)[-1] < 1e-3


def test_contact_sheet():
    sheet = contact_sheet(np.zeros((3, 2, 2, 1), np.uint8), 2)
    assert sheet.shape == (5, 5, 1) and sheet[0, 2, 0] == 255 and not sheet[3:, :2].any() and np.all(sheet[3:, 3:] == 255)


def test_inputs_that_do_not_fit():
    images, times, labels = inputs()
    with pytest.raises(ConfigError, match="the model is for"):
        SMALL.init(jax.random.key(0), images[:, :4], times, labels)
    with pytest.raises(ConfigError, match="patch = 3: does not divide images of 8 x 12"):
        SMALL.clone(patch=3).init(jax.random.key(0), images, times, labels)
    with pytest.raises(ConfigError, match=r"\(2, 2, 1\) entries"):
        SMALL.clone(top_ks=(0,)).init(jax.random.key(0), images, times, labels)

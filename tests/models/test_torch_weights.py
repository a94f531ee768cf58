"""Published checkpoints: the golden backbones by their published names, there and back, mismatches, damaged files."""

import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from attnlab.errors import ConfigError
from attnlab.models.biformer import BiFormer
from attnlab.models.mavit import MAViT
from attnlab.models.moat import MOAT
from attnlab.models.safetensors import read_arrays, write_safetensors
from attnlab.models.torch_weights import load_weights, to_state_dict
from attnlab.models.uniformer import UniFormer
from attnlab.models.uniformer_light import UniFormerLight

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "data"
TINY = {"num_classes": 5, "depths": (1, 1, 2, 1), "dims": (4, 8, 8, 16), "head_dim": 4, "mlp_ratio": 2}


def stored(case):
    """A golden case: its configuration, arrays, and parameters by their names there."""
    arrays = dict(np.load(GOLDEN / f"{case}.npz", allow_pickle=False))
    state = {name[6:]: array for name, array in arrays.items() if name.startswith("param/")}
    return json.loads((GOLDEN / f"{case}.json").read_text())["config"], arrays, state


def published_biformer(state):
    """The golden case has JAX' layout and short names: those of the checkpoint."""
    converted = {}
    for name, array in state.items():
        name = name.replace("down/", "downsample_layers/").replace("/", ".").replace("kernel", "weight").replace("scale", "weight")
        converted[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return converted


def biformer():
    config, arrays, state = stored("biformer/backbone_tiny")
    model = BiFormer(
        num_classes=5, depths=tuple(config["depth"]), dims=tuple(config["embed_dim"]), topks=tuple(config["topks"]),
        mlp_ratios=tuple(config["mlp_ratios"]), head_dim=config["head_dim"], n_win=config["n_win"], attention={"auto_pad": True},
    )  # fmt: skip
    return model, arrays["in/image"], published_biformer(state), arrays["out/logits"]


def mavit():
    config, arrays, state = stored("mala/backbone_64")
    model = MAViT(
        num_classes=5, dims=tuple(config["embed_dims"]), depths=tuple(config["depths"]), num_heads=tuple(config["num_heads"]),
        mlp_ratios=tuple(config["mlp_ratios"]), projection=config["projection"],
    )  # fmt: skip
    return model, arrays["in/image"].transpose(0, 2, 3, 1), state, arrays["out/logits"]


def moat():
    config, arrays, state = stored("moat/model_tiny")
    model = MOAT(
        num_classes=5, stem=tuple(config["stem_size"]), depths=tuple(config["num_blocks"]), dims=tuple(config["hidden_size"]),
        head_dim=config["head_size"], position_sizes=tuple(config["position_embedding_size"]),
    )  # fmt: skip
    return model, arrays["in/x"], state, arrays["out/logits"]


def uniformer():
    config, arrays, state = stored("uniformer/model_image_convstem")
    model = UniFormer(
        num_classes=5, depths=tuple(config["depth"]), dims=tuple(config["embed_dim"]), head_dim=config["head_dim"],
        mlp_ratio=config["mlp_ratio"], conv_stem=True,
    )  # fmt: skip
    return model, np.moveaxis(arrays["in/x"], 1, -1), state, arrays["out/logits"]


def shapes(model, *shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("case", [biformer, mavit, moat, uniformer])
def test_golden_backbones(case, tmp_path):
    model, images, state, logits = case()
    state = {f"module.{name}": array for name, array in state.items()} | {"module.norm.num_batches_tracked": np.int64(3)}
    variables = load_weights(model, state, shapes(model, *images.shape))
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(jax.jit(model.apply)(variables, images), logits, rtol=1e-3, atol=1e-4)
    write_safetensors(tmp_path / "x.safetensors", to_state_dict(model, variables))
    again = read_arrays(tmp_path / "x.safetensors")
    assert {name: array.shape for name, array in again.items()} == {
        name.removeprefix("module."): array.shape for name, array in state.items() if array.shape
    }  # fmt: skip
    for name, array in again.items():
        np.testing.assert_array_equal(array, state[f"module.{name}"])


@pytest.mark.parametrize("model", [
    UniFormerLight(**TINY, layer_scale=1.0), UniFormer(**TINY, token_labels=True, layer_scale=1.0),
    UniFormer(**TINY, video=True, split=True), MOAT(stem=(4, 4), dims=(4, 8, 8, 16), head_dim=4, relative_positions=False),
    BiFormer(num_classes=0, depths=(1, 2), dims=(8, 8), topks=(0, -1), mlp_ratios=(2, 2), layer_scale=1.0, scan_layers=False),
], ids=["light", "token_labels", "split", "without_tables", "kinds"])  # fmt: skip
def test_there_and_back(model):
    """Every parameter has a name."""
    like = meta.unbox(shapes(model, 1, *((2,) if getattr(model, "video", False) else ()), 32, 32, 3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), like)
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    jax.tree.map(np.testing.assert_array_equal, load_weights(model, to_state_dict(model, variables), like), variables)


def test_images_into_video_and_other_classes():
    images = UniFormer(**TINY)
    rng = np.random.default_rng(0)
    like = meta.unbox(shapes(images, 1, 32, 32, 3))
    state = to_state_dict(images, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), like))
    video = UniFormer(**{**TINY, "num_classes": 7}, video=True)
    start = jax.tree.map(lambda leaf: np.full(leaf.shape, 2.0, np.float32), meta.unbox(shapes(video, 1, 2, 32, 32, 3)))
    for how in ("mean", "centre"):
        variables = load_weights(video, state, start, inflate=how, skip=("head.",))
        kernel = variables["params"]["stage_0_0"]["relation"]["kernel"]
        want = np.moveaxis(state["blocks1.0.attn.weight"], (0, 1), (3, 2))
        np.testing.assert_allclose(kernel.sum(0), want, rtol=1e-5)
        assert np.any(kernel[0]) == (how == "mean") and np.all(variables["params"]["head"]["kernel"] == 2.0)
    with pytest.raises(ConfigError, match=r"head/(kernel|bias) is skipped"):
        load_weights(video, state, shapes(video, 1, 2, 32, 32, 3), inflate="mean", skip=("head.",))


def test_mismatches_are_listed():
    model, images, state, _ = uniformer()
    like = shapes(model, *images.shape)
    state["head.bias"] = np.zeros(7, np.float32)
    del state["norm.weight"]
    state["aux_head.weight"] = np.zeros((5, 16), np.float32)
    with pytest.raises(ConfigError) as caught:
        load_weights(model, state, like)
    message = str(caught.value)
    for line in (
        "weights of UniFormer do not fit:", "norm.weight: is missing", "aux_head.weight: is not of this model",
        "head.bias: has shape (7,), the model needs (5,)",
    ):  # fmt: skip
        assert line in message
    with pytest.raises(ConfigError, match=r"\.\.\. and \d+ more"):
        load_weights(model, {}, like)
    with pytest.raises(ConfigError, match="inflate = 'middle'"):
        load_weights(model, state, like, inflate="middle")
    with pytest.raises(ConfigError, match="only tiny, small and base"):
        load_weights(BiFormer.sized("stl"), {}, {"params": {}})
    with pytest.raises(ConfigError, match="model = int"):
        load_weights(1, {}, {"params": {}})


def test_files(tmp_path):
    arrays = {"b": np.arange(3, dtype=np.int8), "a": np.ones((2, 3), jnp.bfloat16), "empty": np.zeros((0, 2), np.float32)}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, arrays)
    again = read_arrays(path)
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)
    np.savez(tmp_path / "x.npz", **{"a": np.ones(2)})
    assert list(read_arrays(tmp_path / "x.npz")) == ["a"]
    with pytest.raises(ConfigError, match="safetensors knows"):
        write_safetensors(path, {"a": np.zeros(1, np.complex64)})
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:5], struct.pack("<Q", 1 << 40) + whole[8:], struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="is no intact safetensors file"):
            read_arrays(path)
    np.savez(tmp_path / "x.npz", np.asarray([{}], object))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_arrays(tmp_path / "x.npz")
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickles are not opened"):
        read_arrays(tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="is no file"):
        read_arrays(tmp_path / "none.npz")

"""The harness itself: made-up cases of the whole specification pass, damaged or half-understood ones fail."""

import importlib.util
import json
import pathlib

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("transcription", HERE.parent / "ops" / "transcription.py")
transcription = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(transcription)

ROWS = {"sigmoid": None, "softmax": None, "seq_len_normalized_sigmoid": "row", "sqrt_seq_len_normalized_sigmoid": "sqrt_row"}
LAYER = {
    "kind": "layer", "num_heads": 4, "hybrid_norm": False, "layer_scale": False, "window": None, "activation": "sigmoid",
    "qk_norm": False, "attn_bias": -2.0, "attn_temp": None, "proj_bias": False, "pos": "none", "causal": True,
}  # fmt: skip
KERNEL = LAYER | {"kind": "kernel", "kv_heads": 2, "window": [-1, -1]}
SLOPES = {2: [2.0**-4, 2.0**-8], 4: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], 6: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]}
CASES = {
    "layer_full": LAYER | {"pos": "rope", "causal": False, "qk_norm": True, "proj_bias": True, "attn_bias": None},
    "layer_rows": LAYER | {"pos": "alibi", "activation": "seq_len_normalized_sigmoid", "num_heads": 6, "attn_temp": -0.4},
    "layer_roots": LAYER | {"activation": "sqrt_seq_len_normalized_sigmoid", "causal": False, "window": [4, 2]},
    "layer_softmax": LAYER | {"pos": "rope", "activation": "softmax", "attn_temp": 0.3, "window": [6, -1]},
    "block_plain": LAYER | {"kind": "block", "pos": "rope", "qk_norm": True},
    "block_all": LAYER | dict.fromkeys(("proj_bias", "hybrid_norm", "layer_scale"), True) | {"kind": "block", "pos": "alibi"},
    "kernel_window": KERNEL | {"window": [5, 0], "causal": True, "attn_temp": 0.2},
    "kernel_alibi": KERNEL | {"pos": "alibi", "causal": False, "kv_heads": 1, "window": [3, 7]},
    "kernel_more_queries": KERNEL | {"causal": True, "kv_heads": 4, "lengths": [30, 17]},
    "kernel_padding": KERNEL | {"causal": True, "padding": True, "lengths": [9, 21]},
}  # fmt: skip


def layer_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def rope(x):
    width = x.shape[-1]
    angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    turn = np.exp(1j * angle)[None, :, None, :]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def weights(config, q, k, kv_mask, slopes):
    return transcription.weights(
        "softmax" if config["activation"] == "softmax" else "sigmoid", q, k, causal=config["causal"],
        window=tuple(config["window"] or (-1, -1)), kv_mask=kv_mask, slopes=slopes, bias=config["attn_bias"] or 0.0,
        temperature=config["attn_temp"] or 0.0, rows=ROWS[config["activation"]],
    )  # fmt: skip


def layer(config, x, key_valid, p):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, p["qkv_kernel"][:, i]) for i in range(3))
    if config["proj_bias"]:
        q, k, v = (y + p["qkv_bias"][i] for i, y in enumerate((q, k, v)))
    if config["qk_norm"]:
        q, k = layer_norm(q, p["q_norm_scale"], p["q_norm_bias"]), layer_norm(k, p["k_norm_scale"], p["k_norm_bias"])
    if config["pos"] == "rope":
        q, k = rope(q), rope(k)
    a = weights(config, q, k, key_valid, np.array(SLOPES[config["num_heads"]]) if config["pos"] == "alibi" else None)
    o = jnp.einsum("bnts,bsnh->btnh", a, v)
    y = jnp.einsum("btnh,nhd->btd", o, p["proj_kernel"]) + (p["proj_bias"] if config["proj_bias"] else 0.0)
    return {"attn_matrix": a, "attn_times_v": o.reshape(*x.shape[:2], -1), "y": y}


def block(config, x, key_valid, p):
    y = layer(config, layer_norm(x, p["norm1_scale"], p["norm1_bias"]), key_valid, p)["y"]
    if config["hybrid_norm"]:
        y = layer_norm(y, p["post_norm_scale"], p["post_norm_bias"])
    x = x + y * (p["ls1_gamma"] if config["layer_scale"] else 1.0)
    y = layer_norm(x, p["norm2_scale"], p["norm2_bias"]) @ p["fc1_kernel"]
    y = (y * 0.5 * (1 + jax.scipy.special.erf(y / np.sqrt(2)))) @ p["fc2_kernel"]
    return {"y": x + y * (p["ls2_gamma"] if config["layer_scale"] else 1.0)}


def arrays_of(config, rng):
    """Inputs and parameters of a made-up case, float64."""
    heads, width = config["num_heads"], 4
    dim = heads * width
    if config["kind"] == "kernel":
        length, keys = config.pop("lengths", (12, 19))
        shapes = {"q": (2, length, heads, width)} | dict.fromkeys(("k", "v"), (2, keys, config["kv_heads"], width))
        inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        if config["pos"] == "alibi":
            inputs["alibi_slopes"] = rng.uniform(0.1, 1.0, (2, heads))
        if config.pop("padding", False):
            inputs["key_valid"] = np.arange(keys)[None] >= np.array([[keys], [keys - 4]])  # row 0: no key at all
        return inputs, {}
    inputs = {"x": rng.normal(size=(2, 14, dim)), "key_valid": np.arange(14)[None] < np.array([[14], [9]])}
    shapes = {"qkv_kernel": (dim, 3, heads, width), "proj_kernel": (heads, width, dim)}
    if config["proj_bias"]:
        shapes |= {"qkv_bias": (3, heads, width), "proj_bias": (dim,)}
    if config["qk_norm"]:
        shapes |= dict.fromkeys(("q_norm_scale", "q_norm_bias", "k_norm_scale", "k_norm_bias"), (width,))
    if config["kind"] == "block":
        names = ["norm1_scale", "norm1_bias", "norm2_scale", "norm2_bias"]
        names += ["post_norm_scale", "post_norm_bias"] * config["hybrid_norm"] + ["ls1_gamma", "ls2_gamma"] * config["layer_scale"]
        shapes |= dict.fromkeys(names, (dim,)) | {"fc1_kernel": (dim, 2 * dim), "fc2_kernel": (2 * dim, dim)}
    return inputs, {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}


def write(folder, name, config, seed=0):
    """Computes a case in float64 and stores it as the golden files are."""
    rng = np.random.default_rng(seed)
    config = dict(config)
    inputs, params = arrays_of(config, rng)

    def outputs(tree):
        i, p = tree["in"], tree["param"]
        if config["kind"] != "kernel":
            return (layer if config["kind"] == "layer" else block)(config, i["x"], inputs["key_valid"], p)
        a = weights(config, i["q"], i["k"], inputs.get("key_valid"), inputs.get("alibi_slopes"))
        return {"o": jnp.einsum("bnts,bsnh->btnh", a, jnp.repeat(i["v"], a.shape[1] // i["v"].shape[2], 2)), "attn_matrix": a}

    main = "o" if config["kind"] == "kernel" else "y"
    chosen = {name: value for name, value in inputs.items() if name in ("x", "q", "k", "v")}
    with jax.enable_x64(True):
        tree = jax.tree.map(jnp.asarray, {"in": chosen, "param": params})
        cotangent = rng.normal(size=jax.eval_shape(outputs, tree)[main].shape)
        out, gradients = jax.jit(
            lambda tree: (outputs(tree), jax.grad(lambda tree: jnp.sum(outputs(tree)[main] * cotangent))(tree))
        )(tree)
    stored = {f"cot/{main}": cotangent} | {f"out/{key}": value for key, value in out.items()}
    stored |= {f"in/{key}": value for key, value in inputs.items()} | {f"param/{key}": value for key, value in params.items()}
    stored |= {f"grad/{kind}/{key}": value for kind, group in gradients.items() for key, value in group.items()}
    folder.mkdir(parents=True, exist_ok=True)
    narrow = {
        key: np.asarray(value) if np.asarray(value).dtype == bool else np.asarray(value, np.float32)
        for key, value in stored.items()
    }
    np.savez(folder / f"{name}.npz", **narrow)
    description = {"system": "sigmoid_attention", "case": name, "config": config, "rtol": 5e-4, "atol": 5e-5}
    (folder / f"{name}.json").write_text(json.dumps(description))
    return folder / name


@pytest.mark.parametrize("name", CASES)
def test_made_up_cases_agree(name, tmp_path):
    harness.run("sigmoid_attention", write(tmp_path / "sigmoid_attention", name, CASES[name]))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    stem = write(tmp_path_factory.mktemp("goldens") / "sigmoid_attention", "kernel", KERNEL)
    with np.load(stem.with_suffix(".npz")) as arrays:
        return json.loads(stem.with_suffix(".json").read_text()), dict(arrays)


def _changed(name, change):
    def apply(arrays):
        arrays[name] = change(arrays[name])

    return apply


DAMAGES = {
    "wrong value": (None, _changed("out/o", lambda x: x + 1e-3), "out/o: .* differ"),
    "wrong gradient": (None, _changed("grad/in/k", lambda x: x * 1.01), "grad/in/k: .* differ"),
    "wrong shape": (None, _changed("out/o", lambda x: x[:1]), "out/o: shape"),
    "not finite": (None, _changed("out/o", lambda x: np.where(x > x.max() - 1e-6, np.nan, x)), "out/o: 1 of"),
    "unknown output": (None, lambda arrays: arrays.update({"out/other": np.zeros(3)}), "out/other: not returned"),
    "unknown input": (None, lambda arrays: arrays.update({"in/other": np.zeros(3)}), "not read by the adapter: in/other"),
    "unknown parameter": (None, lambda arrays: arrays.update({"param/w": np.zeros(3)}), "not read by the adapter: param/w"),
    "unknown group": (None, lambda arrays: arrays.update({"state/s": np.zeros(3)}), "key 'state/s'"),
    "gradient of nothing": (None, lambda arrays: arrays.update({"grad/in/z": np.zeros(3)}), "not stored"),
    "no cotangent": (None, lambda arrays: arrays.pop("cot/o"), "without a cotangent"),
    "unknown field": (lambda text: text["config"].update(extra=1), None, "not read by the adapter: config 'extra'"),
    "unknown kind": (lambda text: text["config"].update(kind="kernels"), None, "KeyError"),
    "no tolerance": (lambda text: text.pop("rtol"), None, "fields missing \\['rtol'\\]"),
    "unknown description": (lambda text: text.update(extra=1), None, "fields unknown \\['extra'\\]"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_cases_fail(name, stored, tmp_path):
    change_text, change_arrays, message = DAMAGES[name]
    text, arrays = json.loads(json.dumps(stored[0])), dict(stored[1])
    for change, value in ((change_text, text), (change_arrays, arrays)):
        if change:
            change(value)
    np.savez(tmp_path / "case.npz", **arrays)
    (tmp_path / "case.json").write_text(json.dumps(text))
    with pytest.raises((harness.CaseError, KeyError)) as raised:
        harness.run("sigmoid_attention", tmp_path / "case")
    assert raised.match(message) if message != "KeyError" else raised.type is KeyError


def test_missing_and_unreadable_files_fail(stored, tmp_path):
    (tmp_path / "a.json").write_text("{")
    np.savez(tmp_path / "b.npz", x=np.zeros(2))
    (tmp_path / "c.json").write_text(json.dumps(stored[0]))
    (tmp_path / "d.json").write_text(json.dumps(stored[0]))
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 not a zip")
    for name in "abcd":
        with pytest.raises(harness.CaseError, match="cannot be read"):
            harness.run("sigmoid_attention", tmp_path / name)


def test_folders_are_found_in_either_form(tmp_path):
    for system in ("sigmoid_attention", "unknown_system"):
        (tmp_path / system).mkdir()
        (tmp_path / system / "one.json").write_text(json.dumps({"system": system}))
    (tmp_path / "empty").mkdir()
    found, foreign = harness.find(tmp_path)
    assert list(found) == ["sigmoid_attention"] and foreign == ["unknown_system"]
    found, foreign = harness.find(tmp_path / "sigmoid_attention")
    assert [stem.name for stem in found["sigmoid_attention"]] == ["one"] and not foreign
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "one.json").write_text(json.dumps({"system": "sigmoid_attention"}))
    assert list(harness.find(tmp_path / "renamed")[0]) == ["sigmoid_attention"]
    assert harness.find(tmp_path / "absent") == ({}, [])


def test_the_command_reports_what_it_did_not_run(stored, tmp_path, run_python):
    arguments = ["-m", "pytest", "tests/golden/test_golden.py", "-p", "no:cacheprovider", "--goldens"]
    (tmp_path / "another_system").mkdir()
    (tmp_path / "another_system" / "case.json").write_text(json.dumps({"system": "another_system"}))
    done = run_python([*arguments, str(tmp_path)], check=False)
    assert done.returncode != 0 and "no golden case of a known system" in done.stdout
    folder = tmp_path / "sigmoid_attention"
    folder.mkdir()
    np.savez(folder / "good.npz", **stored[1])
    (folder / "good.json").write_text(json.dumps(stored[0]))
    (folder / "bad.json").write_text(json.dumps(stored[0]))
    done = run_python([*arguments, str(tmp_path)], check=False)
    assert "1 failed, 1 passed" in done.stdout and "bad.npz cannot be read" in done.stdout
    assert "another_system: not run" in done.stdout

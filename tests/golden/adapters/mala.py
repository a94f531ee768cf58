"""Magnitude-aware linear attention: `core` through the op, `attention` through the module, `backbone` through MAViT."""

import jax.numpy as jnp

from attnlab.models.mavit import MAViT
from attnlab.nn.magnitude_aware import MagnitudeAwareMapAttention
from attnlab.ops.magnitude_aware import (
    axial_frequencies,
    axial_rotation,
    magnitude_aware_attention,
    magnitude_aware_weights,
)

KINDS = {"linear": "linear", "softmax": "softmax", "vanilla": "softmax", "l": "linear", "v": "softmax"}


def outputs(case, inputs, params):
    kind = case.config["kind"]
    return {"core": _core, "attention": _attention, "backbone": _backbone}[kind](case.config, inputs, params)


def _core(config, inputs, params):
    del params
    q, k, v = (inputs[name].swapaxes(1, 2) for name in ("q", "k", "v"))  # [B, heads, T, H] to [B, T, N, H]
    height, width, head_dim = config["height"], config["width"], config["head_dim"]
    if q.shape != (config["batch"], height * width, config["num_heads"], head_dim):
        raise ValueError(f"arrays of shape {q.shape} differ from the configuration")
    rotation = axial_rotation(height, width, head_dim, base=config.get("rope_base", 10000)) if config["rope"] else None
    options = {"variant": config["variant"], "rotation": rotation, "eps": config["eps_z"]}
    y, _ = magnitude_aware_attention(q, k, v, **options)
    weights, beta, gamma = magnitude_aware_weights(q, k, **options)
    return {"y": y.swapaxes(1, 2), "attn": weights, "beta": beta, "gamma": gamma}


def _attention(config, inputs, params):
    x = inputs["x"]
    dim, height, width, heads = config["dim"], config["height"], config["width"], config["num_heads"]
    if x.shape != (config["batch"], dim, height, width):
        raise ValueError(f"x of shape {x.shape} differs from the configuration")
    kind, eps, base = KINDS[config["which"]], config.get("eps_z", 1e-6), config.get("rope_base", 10000)
    module = MagnitudeAwareMapAttention(dim=dim, num_heads=heads, kind=kind, eps=eps, rope_base=base)
    tree = _attention_params(params, "", heads)
    y = module.apply({"params": tree}, x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    sin, cos = axial_rotation(height, width, dim // heads, base=base)
    return {"y": y, "sin": sin, "cos": cos, "angle": axial_frequencies(dim // heads, base=base)}


def _backbone(config, inputs, params):
    image = inputs["image"]
    if image.shape != (config["batch"], 3, *config["image"]):
        raise ValueError(f"image of shape {image.shape} differs from the configuration")
    scales = [float(value) if used else None for used, value in zip(config["layerscales"], config["layer_init_values"], strict=True)]
    heads = config["num_heads"]
    model = MAViT(
        num_classes=config["num_classes"],
        dims=tuple(config["embed_dims"]),
        depths=tuple(config["depths"]),
        num_heads=tuple(heads),
        mlp_ratios=tuple(config["mlp_ratios"]),
        flags=tuple(tuple(flags) for flags in config["flagss"]),
        drop_path=config["drop_path_rate"],
        layer_scales=tuple(scales),
        projection=config["projection"],
    )
    tree, stats = {}, {}

    def norm(ours, theirs):
        tree[ours] = {"scale": params[f"{theirs}.weight"], "bias": params[f"{theirs}.bias"]}
        stats[ours] = {"mean": params[f"{theirs}.running_mean"], "var": params[f"{theirs}.running_var"]}

    for i in range(4):
        tree[f"stem_convs_{i}"] = _conv(params, f"patch_embed.proj.{3 * i}")
        norm(f"stem_norms_{i}", f"patch_embed.proj.{3 * i + 1}")
    for i, depth in enumerate(config["depths"]):
        for j in range(depth):
            tree[f"stages_{i}_{j}"] = _block(params, f"layers.{i}.blocks.{j}", heads[i], scales[i] is not None)
        if i < len(config["depths"]) - 1:
            tree[f"merge_convs_{i}"] = _conv(params, f"layers.{i}.downsample.reduction")
            norm(f"merge_norms_{i}", f"layers.{i}.downsample.norm")
    tree["project"], tree["head"] = _linear(params, "proj"), _linear(params, "head")
    norm("project_norm", "norm")
    variables = {"params": tree, "batch_stats": stats}
    pixels = image.transpose(0, 2, 3, 1)
    pyramid = model.apply(variables, pixels, method="features")
    maps = {"stem": pyramid.stem}
    maps |= {f"stage{i}": x for i, x in enumerate((*pyramid.merged, pyramid.stages[-1]))}
    return {"logits": model.apply(variables, pixels)} | {name: x.transpose(0, 3, 1, 2) for name, x in maps.items()}


def _block(params, prefix, heads, scaled):
    tree = {
        "position": _conv(params, f"{prefix}.pos"),
        "attention": _attention_params(params, f"{prefix}.attn.", heads),
        "ffn": {name: _linear(params, f"{prefix}.ffn.{name}") for name in ("fc1", "fc2")},
    }
    tree["ffn"]["dwconv"] = _conv(params, f"{prefix}.ffn.dwconv")
    for ours, theirs in (("attention_norm", "norm1"), ("ffn_norm", "norm2")):
        tree[ours] = {"scale": params[f"{prefix}.{theirs}.norm.weight"], "bias": params[f"{prefix}.{theirs}.norm.bias"]}
    if scaled:
        tree["attention_scale"] = {"gamma": params[f"{prefix}.gamma_1"].reshape(-1)}
        tree["ffn_scale"] = {"gamma": params[f"{prefix}.gamma_2"].reshape(-1)}
    return tree


def _attention_params(params, prefix, heads):
    kernel, bias = params[f"{prefix}qkvo.weight"], params[f"{prefix}qkvo.bias"]
    dim = kernel.shape[1]
    kernels = jnp.split(kernel[:, :, 0, 0].T.reshape(dim, 4 * heads, -1), 4, axis=1)
    biases = jnp.split(bias.reshape(4 * heads, -1), 4, axis=0)
    names = ("query", "key", "value", "gate")
    tree = {name: {"kernel": kernels[i], "bias": biases[i]} for i, name in enumerate(names)}
    out = _linear(params, f"{prefix}proj")
    tree["out"] = {"kernel": out["kernel"].reshape(heads, -1, dim), "bias": out["bias"]}
    return tree | {"lepe": _conv(params, f"{prefix}lepe")}


def _conv(params, name):
    """Kernels (out, in, y, x) to (y, x, in, out)."""
    return {"kernel": params[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": params[f"{name}.bias"]}


def _linear(params, name):
    """A 1x1 convolution (out, in, 1, 1) as a matrix [in, out]."""
    return {"kernel": params[f"{name}.weight"][:, :, 0, 0].T, "bias": params[f"{name}.bias"]}

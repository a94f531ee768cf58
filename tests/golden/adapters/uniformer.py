"""UniFormer: `local_block`, `global_block` and `window_block` are one block, `model` a classifier, `evo_chain` pruning blocks."""

import jax.numpy as jnp

from attnlab.models.uniformer import UniFormer
from attnlab.nn.token_pruning import PruningBlock
from attnlab.nn.uniformer import GlobalBlock, LocalBlock
from attnlab.ops.token_pruning import pool_scores


def outputs(case, inputs, params):
    kinds = {
        "local_block": _local_block, "global_block": _global_block, "window_block": _global_block, "model": _model,
        "evo_chain": _evo_chain,
    }  # fmt: skip
    return kinds[case.config["kind"]](case.config, inputs, params)


def _local_block(config, inputs, params):
    x = _last(inputs["x"])
    dim = _checked(config, x, "bn_epsilon", "bn_momentum", "ln_epsilon", "num_heads", "window_size")
    block = LocalBlock(
        hidden=int(config["mlp_ratio"] * dim),
        kernel=config["kernel_size"],
        dpe_kernel=config["dpe_kernel"],
        batch_norm_epsilon=config["bn_epsilon"],
        batch_norm_momentum=config["bn_momentum"],
    )
    tree, stats = _local_variables(params, "")
    variables = {"params": tree, "batch_stats": stats}
    if not config["training"]:
        return {"y": _first(block.apply(variables, x))}
    y, kept = block.apply(variables, x, deterministic=False, mutable=["batch_stats"])
    return {"y": _first(y)} | _state(kept["batch_stats"], {"norm1": ("norm1",), "norm2": ("norm2",)})


def _global_block(config, inputs, params):
    x = _last(inputs["x"])
    dim = _checked(config, x, "bn_epsilon", "bn_momentum", "training", "qkv_bias")
    heads = config["num_heads"]
    block = GlobalBlock(
        num_heads=heads,
        hidden=int(config["mlp_ratio"] * dim),
        window=config.get("window_size"),
        dpe_kernel=config["dpe_kernel"],
        qkv_bias="attn.qkv.bias" in params,
        layer_scale=float("gamma_1" in params),
        norm_epsilon=config["ln_epsilon"],
    )
    config.get("layer_scale")
    return {"y": _first(block.apply({"params": _global_tree(params, "", heads)}, x))}


def _model(config, inputs, params):
    config["bn_epsilon"], config["bn_momentum"]  # one value for all published models
    depths, dims, head_dim = config["depth"], config["embed_dim"], config["head_dim"]
    video = config["ndim"] == 3
    config.get("layer_scale")  # the parameters tell
    model = UniFormer(
        num_classes=config["num_classes"],
        depths=tuple(depths),
        dims=tuple(dims),
        head_dim=head_dim,
        mlp_ratio=config["mlp_ratio"],
        video=video,
        conv_stem=bool(config["conv_stem"]),
        temporal_embed=bool(config["std"]),
        split=bool(config["split"]),
        layer_scale=float("blocks3.0.gamma_1" in params),
        norm_epsilon=config["ln_epsilon"],
    )
    tree, stats, norms = {}, {}, {"norm": ("norm",)}
    for i, depth in enumerate(depths):
        name = f"embed_{i}"
        tree[name], stats_of = _embed_variables(params, f"patch_embed{i + 1}.", i, config["conv_stem"])
        if stats_of:
            stats[name] = stats_of
            paths = {"1": ("norm_0",), "4": ("norm_1",)} if i == 0 else {"1": ("norm", "batchnorm")}
            norms |= {f"patch_embed{i + 1}.proj.{number}": (name, *path) for number, path in paths.items()}
        for j in range(depth):
            block, theirs = f"stage_{i}_{j}", f"blocks{i + 1}.{j}."
            if i < 2:
                tree[block], stats[block] = _local_variables(params, theirs)
                norms |= {f"{theirs}{norm}": (block, norm) for norm in ("norm1", "norm2")}
            else:
                tree[block] = _global_tree(params, theirs, dims[i] // head_dim)
    tree["norm"], stats["norm"] = _batch_norm(params, "norm")
    tree["head"] = _linear(params, "head")
    variables, x = {"params": tree, "batch_stats": stats}, _last(inputs["x"])
    training = config["training"]


    def run(model, x):
        last = model.features(x, deterministic=not training)[-1]
        last = model.last_norm(last, deterministic=not training)
        return last, model.classify(last)[0]

    (feature, logits), kept = model.apply(variables, x, method=run, mutable=["batch_stats"])
    return {"logits": logits, "feature": _first(feature)} | (_state(kept["batch_stats"], norms) if training else {})


def _evo_chain(config, inputs, params):
    x = _last(inputs["x"])
    dim = _checked(config, x, "training")
    class_token, scores, heads, results = inputs["cls"], None, config["num_heads"], {}
    rules = zip(config["prune_ratio"], config["trade_off"], config["downsample"], strict=True)
    for i, (keep, trade_off, downsample) in enumerate(rules):
        block = PruningBlock(
            num_heads=heads,
            hidden=int(config["mlp_ratio"] * dim),
            keep=keep,
            trade_off=trade_off,
            layer_scale=float(config["layer_scale"]),
            norm_epsilon=config["ln_epsilon"],
        )
        variables = {"params": _global_tree(params, f"blocks.{i}.", heads)}
        (x, class_token, scores), sown = block.apply(variables, x, class_token, scores, mutable=["intermediates"])
        if keep < 1:
            results[f"kept_{i}"] = sown["intermediates"]["kept"][0]
        if downsample and keep < 1:  # as published: a block that keeps all tokens leaves the scores as they are
            scores = pool_scores(scores, x.shape[1:3])
        results[f"global_attn_{i}"] = scores
    return results | {"x": _first(x), "cls": class_token}


def _checked(config, x, *unused):
    """Compares the input with the configuration, marks fields that say nothing about this kind as read; returns the width."""
    for name in unused:
        config.get(name)
    if x.shape[-1] != config["dim"] or x.ndim - 2 != config["ndim"]:
        raise ValueError(f"an input of shape {x.shape} differs from the configuration")
    return config["dim"]


def _first(x):
    return jnp.moveaxis(x, -1, 1)


def _last(x):
    return jnp.moveaxis(x, 1, -1)


def _conv(params, name):
    """Kernels (out, in, ..., y, x) to (..., y, x, in, out)."""
    kernel = params[f"{name}.weight"]
    return {"kernel": kernel.transpose(*range(2, kernel.ndim), 1, 0), "bias": params[f"{name}.bias"]}


def _linear(params, name):
    return {"kernel": params[f"{name}.weight"].T, "bias": params[f"{name}.bias"]}


def _norm(params, name):
    return {"scale": params[f"{name}.weight"], "bias": params[f"{name}.bias"]}


def _batch_norm(params, name):
    return _norm(params, name), {"mean": params[f"{name}.running_mean"], "var": params[f"{name}.running_var"]}


def _state(stats, norms):
    """Updated statistics by their names there; `norms` are our paths."""
    results = {}
    for theirs, path in norms.items():
        node = stats
        for key in path:
            node = node[key]
        results |= {f"state/{theirs}.running_mean": node["mean"], f"state/{theirs}.running_var": node["var"]}
    return results


def _embed_variables(params, prefix, i, conv_stem):
    if not conv_stem:
        return {"conv": _conv(params, f"{prefix}proj"), "norm": {"layernorm": _norm(params, f"{prefix}norm")}}, {}
    if i > 0:
        norm, stats = _batch_norm(params, f"{prefix}proj.1")
        return {"conv": _conv(params, f"{prefix}proj.0"), "norm": {"batchnorm": norm}}, {"norm": {"batchnorm": stats}}
    norms = [_batch_norm(params, f"{prefix}proj.{place}") for place in (1, 4)]
    tree = {"conv_0": _conv(params, f"{prefix}proj.0"), "conv_1": _conv(params, f"{prefix}proj.3")}
    tree |= {f"norm_{n}": norm for n, (norm, _) in enumerate(norms)}
    return tree, {f"norm_{n}": stats for n, (_, stats) in enumerate(norms)}


def _local_variables(params, prefix):
    names = {"conv1": "conv1", "relation": "attn", "conv2": "conv2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    if f"{prefix}pos_embed.weight" in params:
        names["pos_embed"] = "pos_embed"
    tree, stats = {ours: _conv(params, f"{prefix}{theirs}") for ours, theirs in names.items()}, {}
    for name in ("norm1", "norm2"):
        tree[name], stats[name] = _batch_norm(params, f"{prefix}{name}")
    return tree, stats


def _global_tree(params, prefix, heads):
    tree = {
        "norm1": _norm(params, f"{prefix}norm1"),
        "attention": _attention(params, f"{prefix}attn.", heads),
        "norm2": _norm(params, f"{prefix}norm2"),
        "mlp": {name: _linear(params, f"{prefix}mlp.{name}") for name in ("fc1", "fc2")},
    }
    if f"{prefix}pos_embed.weight" in params:
        tree["pos_embed"] = _conv(params, f"{prefix}pos_embed")
    if f"{prefix}t_norm.weight" in params:
        tree |= {"time_norm": _norm(params, f"{prefix}t_norm"), "time_attention": _attention(params, f"{prefix}t_attn.", heads)}
    for number in (1, 2, 3):
        if f"{prefix}gamma_{number}" in params:
            tree[f"scale{number}"] = {"gamma": params[f"{prefix}gamma_{number}"].reshape(-1)}
    return tree


def _attention(params, prefix, heads):
    """Splits the joint projection [q; k; v] into its parts and these into heads."""
    kernel, out = params[f"{prefix}qkv.weight"], _linear(params, f"{prefix}proj")
    dim = kernel.shape[1]
    tree = {"out": {"kernel": out["kernel"].reshape(heads, -1, dim), "bias": out["bias"]}}
    for i, name in enumerate(("query", "key", "value")):
        part = slice(i * dim, (i + 1) * dim)
        tree[name] = {"kernel": kernel[part].T.reshape(dim, heads, -1)}
        if f"{prefix}qkv.bias" in params:
            tree[name]["bias"] = params[f"{prefix}qkv.bias"][part].reshape(heads, -1)
    return tree

"""MOAT: `mbconv` and `moat_block` are one block, `model` the whole classifier with its maps."""

from attnlab.models.moat import MOAT, MBConv, MOATBlock

# Ours, theirs.
CONVS = {"shortcut": "shortcut_conv", "expand": "expand_conv", "depthwise": "depthwise_conv", "shrink": "shrink_conv"}
GATES = {"squeeze": "se/reduce", "excite": "se/expand"}
BATCH_NORMS = ("pre_norm", "expand_norm", "depthwise_norm")
PROJECTIONS = {"query": "attn/q", "key": "attn/k", "value": "attn/v", "out": "attn/o"}


def outputs(case, inputs, params):
    return {"mbconv": _mbconv, "moat_block": _moat_block, "model": _model}[case.config["kind"]](case.config, inputs, params)


def _mbconv(config, inputs, params):
    block = MBConv(se_ratio=config.get("se_ratio") or 0.0, **_convolution(config))
    return _apply(block, config, inputs["x"], _mbconv_variables(params, ""), {"": ""})


def _moat_block(config, inputs, params):
    if config.get("se_ratio"):
        raise ValueError("a MOAT block has no squeeze-and-excitation")
    block = MOATBlock(
        head_dim=config["head_size"],
        window=_pair(config.get("window_size")),
        position_size=_position_size(config, config.get("position_embedding_size", 7)),
        norm_epsilon=config["ln_epsilon"],
        **_convolution(config),
    )
    return _apply(block, config, inputs["x"], _moat_variables(params, ""), {"": ("mbconv",)})


def _model(config, inputs, params):
    kinds, depths = config["block_type"], config["num_blocks"]
    stem = config["stem_size"]
    model = MOAT(
        num_classes=config["num_classes"],
        stem=tuple(stem),
        kinds=tuple(kinds),
        depths=tuple(depths),
        dims=tuple(config["hidden_size"]),
        strides=tuple(config["stage_stride"]),
        expansion=config["expansion_rate"],
        se_ratio=config["se_ratio"] or 0.0,
        pool_size=config["pool_size"],
        head_dim=config["head_size"],
        windows=tuple(_pair(window) for window in config["window_size"]),
        global_last=config["global_attention_at_end_of_moat_stage"],
        position_sizes=tuple(_position_size(config, size) for size in config["position_embedding_size"]),
        batch_norm=_batch_norm(config),
        norm_epsilon=config["ln_epsilon"],
    )
    tree, stats, norms = {"stem": {}}, {"stem": {}}, {}
    for i in range(len(stem)):
        tree["stem"][f"conv_{i}"] = _layer(params, f"stem/conv_{i}")
        if i < len(stem) - 1:
            tree["stem"][f"norm_{i}"], stats["stem"][f"norm_{i}"] = _norm(params, f"stem/norm_{i}")
    norms |= {"stem/": ("stem",)}
    for i, depth in enumerate(depths):
        for j in range(depth):
            prefix, name = f"stage{i}/block{j}/", f"stage_{i}_{j}"
            variables = (_mbconv_variables if kinds[i] == "mbconv" else _moat_variables)(params, prefix)
            tree[name], stats[name] = variables["params"], variables["batch_stats"]
            norms[prefix] = (name,) if kinds[i] == "mbconv" else (name, "mbconv")
    tree["norm"] = _scale(params, "final_norm")
    head = _layer(params, "head")
    tree["head"] = {"kernel": head["kernel"].reshape(head["kernel"].shape[-2:]), "bias": head["bias"]}
    variables = {"params": tree, "batch_stats": stats}
    results = _apply(model, config, inputs["x"], variables, norms, "logits")
    for name, activate in (("stage", False), ("res", True)):
        options = {"deterministic": not config["training"], "activate": activate, "mutable": ["batch_stats"]}
        maps, _ = model.apply(variables, inputs["x"], method="features", **options)
        results |= {f"{name}{i + 1}": x for i, x in enumerate(maps)}
    return results


def _apply(module, config, x, variables, norms, output="y"):
    """Runs a module in the case's mode; `norms` are our paths to batch norms by the prefix of their names there."""
    if not config["training"]:
        return {output: module.apply(variables, x, deterministic=True)}
    y, kept = module.apply(variables, x, deterministic=False, mutable=["batch_stats"])
    results = {output: y}
    for prefix, path in norms.items():
        node = kept["batch_stats"]
        for key in path:
            node = node[key]
        for name, leaf in node.items():
            results |= {f"state/{prefix}{name}/moving_mean": leaf["mean"], f"state/{prefix}{name}/moving_var": leaf["var"]}
    return results


def _convolution(config):
    config["in_channels"]
    return {
        "features": config["hidden_size"],
        "stride": config["block_stride"],
        "expansion": config["expansion_rate"],
        "kernel": config["kernel_size"],
        "pool_size": config["pool_size"],
        "batch_norm": _batch_norm(config),
    }


def _batch_norm(config):
    # Keras: new = momentum old + (1 - momentum) batch, with the biased variance.
    return {"epsilon": config["bn_epsilon"], "momentum": 1 - config["bn_momentum"], "unbiased": False}


def _position_size(config, size):
    if config["relative_position_embedding_type"] is None:
        return None
    return _pair(size)


def _pair(value):
    return tuple(value) if isinstance(value, list) else value


def _mbconv_variables(params, prefix):
    tree, stats = {}, {}
    for ours, theirs in (CONVS | GATES).items():
        if f"{prefix}{theirs}/kernel" not in params:
            continue
        tree[ours] = _layer(params, f"{prefix}{theirs}")
        kernel = tree[ours]["kernel"]
        # The depthwise one is (y, x, channel, 1), all others are 1x1.
        tree[ours]["kernel"] = kernel.swapaxes(2, 3) if ours == "depthwise" else kernel.reshape(kernel.shape[-2:])
    for name in BATCH_NORMS:
        tree[name], stats[name] = _norm(params, f"{prefix}{name}")
    return {"params": tree, "batch_stats": stats}


def _moat_variables(params, prefix):
    inner = _mbconv_variables(params, prefix)
    attention = {ours: _layer(params, f"{prefix}{theirs}") for ours, theirs in PROJECTIONS.items()}
    if f"{prefix}attn/rel_pos_table" in params:
        attention["position_table"] = params[f"{prefix}attn/rel_pos_table"]
    tree = {"mbconv": inner["params"], "attention_norm": _scale(params, f"{prefix}attn_norm"), "attention": attention}
    return {"params": tree, "batch_stats": {"mbconv": inner["batch_stats"]}}


def _layer(params, name):
    return {leaf: params[f"{name}/{leaf}"] for leaf in ("kernel", "bias") if f"{name}/{leaf}" in params}


def _scale(params, name):
    return {"scale": params[f"{name}/gamma"], "bias": params[f"{name}/beta"]}


def _norm(params, name):
    return _scale(params, name), {"mean": params[f"{name}/moving_mean"], "var": params[f"{name}/moving_var"]}

"""Bi-level routing attention: `bra` is one layer, `backbone` the whole classifier in evaluation."""

from attnlab.models.biformer import BiFormer
from attnlab.nn.bilevel_routing import BiLevelRoutingAttention

# Switches of a layer that a case may leave out, each with its published default.
LAYER_OPTIONS = {
    "soft_routing": False,
    "diff_routing": False,
    "kv_downsample_mode": "identity",
    "kv_per_win": 4,
    "kv_downsample_ratio": 4,
    "auto_pad": False,
}


def outputs(case, inputs, params):
    return {"bra": _bra, "backbone": _backbone}[case.config["kind"]](case.config, inputs, params)


def _layer_options(config):
    options = {name: config.get(name, default) for name, default in LAYER_OPTIONS.items()}
    # What a mode does not use may be stored as null.
    return {name: LAYER_OPTIONS[name] if value is None else value for name, value in options.items()}


def _attention_params(qkv_kernel, qkv_bias, out_kernel, out_bias, heads):
    """Splits the joint projection into query, key and value, and these into heads."""
    dim = out_kernel.shape[0]
    qk_dim = (qkv_kernel.shape[1] - dim) // 2
    tree, start = {}, 0
    for name, size in (("query", qk_dim), ("key", qk_dim), ("value", dim)):
        part = slice(start, start + size)
        start += size
        tree[name] = {"kernel": qkv_kernel[:, part].reshape(dim, heads, size // heads)}
        if qkv_bias is not None:
            tree[name]["bias"] = qkv_bias[part].reshape(heads, size // heads)
    tree["out"] = {"kernel": out_kernel.reshape(heads, dim // heads, dim), "bias": out_bias}
    return tree


def _bra(config, inputs, params):
    config["has_grad"]
    x, heads = inputs["x"], config["num_heads"]
    if x.shape[-1] != config["dim"]:
        raise ValueError("the width of the input differs from the configuration")
    layer = BiLevelRoutingAttention(
        dim=config["dim"],
        num_heads=heads,
        n_win=config["n_win"],
        topk=config["topk"],
        qk_dim=config["qk_dim"],
        scale=config["scale"],
        side_dwconv=config["side_dwconv"],
        variant=config["variant"],
        capture_attention=True,
        **_layer_options(config),
    )
    tree = _attention_params(params["qkv_kernel"], params["qkv_bias"], params["out_kernel"], params["out_bias"], heads)
    if config["side_dwconv"]:
        tree["lepe"] = {"kernel": params["lepe_kernel"], "bias": params["lepe_bias"]}
    (y, _), sown = layer.apply({"params": tree}, x, mutable=["intermediates"])
    sown = sown["intermediates"]
    return {"y": y, "route_idx": sown["route_index"][0], "route_weight": sown["route_weight"][0]}


def _backbone(config, inputs, params):
    depths, topks = config["depth"], config["topks"]
    model = BiFormer(
        num_classes=config["num_classes"],
        depths=tuple(depths),
        dims=tuple(config["embed_dim"]),
        topks=tuple(topks),
        mlp_ratios=tuple(config["mlp_ratios"]),
        head_dim=config["head_dim"],
        dense_heads=config["stage3_num_heads"],
        n_win=config["n_win"],
        side_dwconv=config["side_dwconv"],
        before_attn_dwconv=config["before_attn_dwconv"],
        pre_norm=config.get("pre_norm", True),
        layer_scale=1.0 if "stages/0/0/gamma1" in params else 0.0,
        attention=_layer_options(config),
        scan_layers=False,
    )
    config.get("layer_scale_init_value"), config.get("drop_path_rate")  # of the start and of training: nothing here
    config.get("variant")
    leaves = {"params": {}, "batch_stats": {}}

    def place(kind, leaf, *path):
        node = leaves[kind]
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf

    def put(source, *path):
        for leaf in ("kernel", "scale", "bias"):
            if f"{source}/{leaf}" in params:
                place("params", params[f"{source}/{leaf}"], *path, leaf)
        for name, leaf in (("running_mean", "mean"), ("running_var", "var")):
            if f"{source}/{name}" in params:
                place("batch_stats", params[f"{source}/{name}"], *path, leaf)

    for place_in_stem, name in ((0, "conv_0"), (1, "norm_0"), (3, "conv_1"), (4, "norm_1")):
        put(f"down/0/{place_in_stem}", "downsample_0", name)
    for i, depth in enumerate(depths):
        if i:
            put(f"down/{i}/0", f"downsample_{i}", "conv")
            put(f"down/{i}/1", f"downsample_{i}", "norm", "batchnorm")
        for j in range(depth):
            source, block = f"stages/{i}/{j}", f"stage_{i}_{j}"
            put(f"{source}/pos_embed", block, "pos_embed")
            put(f"{source}/norm1", block, "norm1", "layernorm")
            put(f"{source}/norm2", block, "norm2", "layernorm")
            put(f"{source}/mlp/0", block, "mlp", "fc1")
            put(f"{source}/mlp/3", block, "mlp", "fc2")
            for number in (1, 2):
                if f"{source}/gamma{number}" in params:
                    place("params", params[f"{source}/gamma{number}"], block, f"scale{number}", "gamma")
            if topks[i] == 0:
                for number, name in ((1, "conv_in"), (2, "conv_mix"), (3, "conv_out")):
                    put(f"{source}/attn/{number}", block, name)
                continue
            routed = topks[i] > 0
            qkv, out = ("qkv/qkv", "wo") if routed else ("qkv", "proj")
            heads = config["embed_dim"][i] // config["head_dim"] if routed else config["stage3_num_heads"]
            tree = _attention_params(
                params[f"{source}/attn/{qkv}/kernel"],
                params[f"{source}/attn/{qkv}/bias"] if routed else None,
                params[f"{source}/attn/{out}/kernel"],
                params[f"{source}/attn/{out}/bias"],
                heads,
            )
            place("params", tree, block, "attention")
            put(f"{source}/attn/lepe", block, "attention", "lepe")
    put("norm", "norm")
    put("head", "head")
    maps = model.apply(leaves, inputs["image"], method="features")
    return {"logits": model.apply(leaves, inputs["image"]), **{f"stage{i}": x for i, x in enumerate(maps)}}

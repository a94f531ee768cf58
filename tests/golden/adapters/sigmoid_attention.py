"""Sigmoid attention: `layer` and `block` through the modules, `kernel` through the op."""

import jax.numpy as jnp

from attnlab import nn, ops

ROWS = {"sigmoid": None, "seq_len_normalized_sigmoid": "row", "sqrt_seq_len_normalized_sigmoid": "sqrt_row"}


def outputs(case, inputs, params):
    kind = case.config["kind"]
    return {"layer": _layer, "block": _block, "kernel": _kernel}[kind](case.config, inputs, params)


def _mixer(config, dim, head_dim):
    position = config["pos"]
    if position not in ("none", "rope", "alibi"):
        raise ValueError(f"unknown position encoding {position!r}")
    window = config.get("window")
    return nn.SigmoidAttention(
        dim=dim,
        num_heads=config["num_heads"],
        num_kv_heads=config.get("kv_heads"),
        head_dim=head_dim,
        causal=config["causal"],
        window=None if window is None else tuple(window),
        rope=position == "rope",
        alibi=position == "alibi",
        qk_norm="layernorm" if config["qk_norm"] else None,
        proj_bias=config["proj_bias"],
        activation=config["activation"],
        bias=config["attn_bias"] or 0.0,
        temperature=config["attn_temp"] or 0.0,
        capture_attention=True,
    )


def _mixer_params(config, params):
    tree = {name: {"kernel": params["qkv_kernel"][:, i]} for i, name in enumerate(("query", "key", "value"))}
    tree["out"] = {"kernel": params["proj_kernel"]}
    if config["proj_bias"]:
        for i, name in enumerate(("query", "key", "value")):
            tree[name]["bias"] = params["qkv_bias"][i]
        tree["out"]["bias"] = params["proj_bias"]
    if config["qk_norm"]:
        tree["query_norm"] = {"scale": params["q_norm_scale"], "bias": params["q_norm_bias"]}
        tree["key_norm"] = {"scale": params["k_norm_scale"], "bias": params["k_norm_bias"]}
    return tree


def _layer(config, inputs, params):
    config.get("hybrid_norm"), config.get("layer_scale")  # of the block; a layer has neither
    x = inputs["x"]
    mixer = _mixer(config, x.shape[-1], params["proj_kernel"].shape[1])
    (y, _), sown = mixer.apply(
        {"params": _mixer_params(config, params)}, x, mask=inputs.get("key_valid"), mutable=["intermediates"]
    )
    sown = sown["intermediates"]
    return {"y": y, "attn_matrix": sown["attention"][0], "attn_times_v": sown["attended"][0].reshape(*x.shape[:2], -1)}


def _block(config, inputs, params):
    x = inputs["x"]
    block = nn.Block(
        mixer=_mixer(config, x.shape[-1], params["proj_kernel"].shape[1]),
        norm="layernorm",
        mlp="gelu",
        mlp_dim=params["fc1_kernel"].shape[1],
        layer_scale=1e-4 if config["layer_scale"] else 0.0,
        hybrid_norm=config["hybrid_norm"],
    )
    tree = {
        "mixer": _mixer_params(config, params),
        "mixer_norm": {"scale": params["norm1_scale"], "bias": params["norm1_bias"]},
        "mlp_norm": {"scale": params["norm2_scale"], "bias": params["norm2_bias"]},
        "mlp_block": {"fc1": {"kernel": params["fc1_kernel"]}, "fc2": {"kernel": params["fc2_kernel"]}},
    }
    if config["hybrid_norm"]:
        tree["post_norm"] = {"scale": params["post_norm_scale"], "bias": params["post_norm_bias"]}
    if config["layer_scale"]:
        initial = jnp.full(x.shape[-1], 1e-4)  # where a case leaves them at their start
        tree["mixer_scale"] = {"gamma": params.get("ls1_gamma", initial)}
        tree["mlp_scale"] = {"gamma": params.get("ls2_gamma", initial)}
    (y, _), sown = block.apply({"params": tree}, x, mask=inputs.get("key_valid"), mutable=["intermediates"])
    return {"y": y, "attn_matrix": sown["intermediates"]["mixer"]["attention"][0]}


def _kernel(config, inputs, params):
    del params
    for field in ("qk_norm", "proj_bias", "hybrid_norm", "layer_scale"):
        if config.get(field):
            raise ValueError(f"{field} has no meaning for kind 'kernel'")
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if (q.shape[2], k.shape[2]) != (config["num_heads"], config.get("kv_heads") or config["num_heads"]):
        raise ValueError("heads of the arrays differ from the configuration")
    if config["pos"] not in ("none", "alibi"):
        raise ValueError(f"position encoding {config['pos']!r} has no meaning for kind 'kernel'")
    window = config.get("window")
    options = {
        "causal": config["causal"],
        "window": None if window is None else tuple(window),
        "kv_mask": inputs.get("key_valid"),
        "alibi_slopes": inputs["alibi_slopes"] if config["pos"] == "alibi" else None,
        "bias": config["attn_bias"] or 0.0,
        "temperature": config["attn_temp"] or 0.0,
        "row_normalization": ROWS[config["activation"]],
    }
    return {
        "o": ops.sigmoid_attention(q, k, v, **options),
        "attn_matrix": ops.attention_weights("sigmoid", q, k, **options),
    }

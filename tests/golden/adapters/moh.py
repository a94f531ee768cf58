"""Mixture-of-head attention: `moh` and `moh_llama` through the mixer, `moh_vit` through the module over maps."""

from attnlab.nn.mixture_of_heads import MixtureOfHeads
from attnlab.nn.mixture_of_heads_map import MixtureOfHeadsMapAttention
from attnlab.ops.head_routing import balance_loss

KINDS = ("moh", "moh_vit", "moh_llama")


def outputs(case, inputs, params):
    config, kind = case.config, case.config["kind"]
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}")
    x = inputs["x"]
    options = {"capture_attention": True, "balance_coefficient": 1.0, "dim": x.shape[-1]}
    options |= {name: config[name] for name in ("num_heads", "head_dim", "shared_heads")} | {"top_k": config["routed_top_k"]}
    theta, scale, ste = config["rope_theta"], config["seq_length_scale"], config["ste"]
    tree = _projections(params)
    if any(name.startswith("router_") for name in params):
        names = [name for name in ("routed", "shared", "group") if f"router_{name}_kernel" in params]
        tree["router"] = {name: params[f"router_{name}_kernel"] for name in names}
    options["qkv_bias"] = "qkv_bias" in params
    mutable = ["intermediates", "losses"]
    if kind == "moh_vit":
        if config["causal"] or config["kv_heads"] != config["num_heads"] or theta is not None or ste != "none":
            raise ValueError("the vision form has neither an order, nor groups, rotation or straight-through gates")
        tree |= {name: params[name] for name in ("temperature", "query_embedding")}
        tree["position_bias"] = {name: _affine(params, f"cpb_{name}") for name in ("fc1", "fc2")}
        relative = (inputs["relative_coords_table"], inputs["relative_pos_index"])
        module = MixtureOfHeadsMapAttention(**options)
        y, sown = module.apply({"params": tree}, x, relative=relative, length_scale=scale, mutable=mutable)
    else:
        if scale is not None:
            raise ValueError("only the vision form scales by the length")
        module = MixtureOfHeads(
            num_kv_heads=config["kv_heads"],
            causal=config["causal"],
            rope=theta is not None,
            rope_base=theta or 0.0,
            qk_norm="layernorm" if "q_norm_scale" in params else None,
            proj_bias="proj_bias" in params,
            router="norm" if kind == "moh_llama" else "learned",
            ste=ste,
            **options,
        )
        (y, _), sown = module.apply({"params": tree}, x, mutable=mutable)
    seen = sown["intermediates"]
    results = {"y": y, "gates": seen["gates"][0]}
    if config["routed_top_k"]:
        scores, selected = seen["head_scores"][0], seen["head_selected"][0]
        results |= {"routed_scores": scores, "selected": selected, "l_aux": sown["losses"]["balance"][0]}
        results["l_balance_paper"] = balance_loss(scores, selected, form="paper")
    return results


def _projections(params):
    names = ("query", "key", "value")
    if "qkv_kernel" in params:
        tree = {name: {"kernel": params["qkv_kernel"][:, i]} for i, name in enumerate(names)}
        if "qkv_bias" in params:
            for i, name in enumerate(names):
                tree[name]["bias"] = params["qkv_bias"][i]
    else:
        tree = {name: _affine(params, name[0]) for name in names}
    for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        if f"{theirs}_scale" in params:
            tree[ours] = {"scale": params[f"{theirs}_scale"], "bias": params[f"{theirs}_bias"]}
    return tree | {"out": _affine(params, "proj")}


def _affine(params, name):
    tree = {"kernel": params[f"{name}_kernel"]}
    return tree | ({"bias": params[f"{name}_bias"]} if f"{name}_bias" in params else {})

"""Titans: `memory_core` through the op, `block`, `lucid_memory` and `segmented_attention` through the modules."""

import jax.numpy as jnp

from attnlab.nn.segmented import SegmentedAttention
from attnlab.nn.titans import TitansLMM, TitansMAC, TitansMAG, TitansMAL
from attnlab.nn.titans_lucid import LucidMemory
from attnlab.nn.titans_memory import L2_EPSILON
from attnlab.ops.neural_memory import neural_memory

LINEAR = ("to_adaptive_step", "to_momentum", "to_decay_factor", "to_layer_modulation")


def outputs(case, inputs, params):
    kinds = {"memory_core": _core, "block": _block, "lucid_memory": _lucid, "segmented_attention": _segmented}
    _same(case.config, "batch", inputs["x" if "x" in inputs else "q"].shape[0])
    _same(case.config, "length", inputs["x" if "x" in inputs else "q"].shape[1])
    return kinds[case.config["kind"]](case.config, inputs, params)


def _same(config, field, value):
    if config.get(field, value) != value:
        raise ValueError(f"{field} = {config[field]!r}, which is {value!r} here")


def _layers(params, depth):
    return [params[f"memory_w{i}"][None] for i in range(depth)]


def _core(config, inputs, params):
    _same(config, "activation", "gelu_erf")
    _same(config, "loss", "sum_squared")
    _same(config, "dim", inputs["q"].shape[2])
    weights = _layers(params, config["memory_depth"])
    if len(weights) > 1:
        _same(config, "memory_expansion", weights[0].shape[2] / weights[0].shape[1])
    config.get("memory_expansion")
    one_head = [inputs[name][:, :, None] for name in ("q", "k", "v", "theta", "eta", "alpha")]
    result = neural_memory(
        *one_head, weights, chunk_size=config["chunk_size"], retrieve=config["retrieve"], momentum=config["momentum"]
    )
    found = {"y": result.y[:, :, 0], "memory_loss": result.loss[:, :, 0]}
    for i, (w, s) in enumerate(zip(result.state.weights, result.state.momentum, strict=True)):
        found |= {f"final_w{i}": w[:, 0], f"final_s{i}": s[:, 0]}
    return found


def _block(config, inputs, params):
    _same(config, "l2_eps", L2_EPSILON)
    config.get("rms_eps")  # of the mixing norms, where there are some
    x, variant, heads = inputs["x"], config["variant"], config.get("num_heads", 1)
    dim = x.shape[-1]
    _same(config, "dim", dim)
    window, chunk = config.get("segment_or_window"), config["chunk_size"]
    fields = {
        "dim": dim,
        "num_heads": heads,
        "memory_depth": config["memory_depth"],
        "memory_expansion": config["memory_expansion"],
        "theta_max": config["theta_max"],
        "num_persistent": params["persistent"].shape[0] if "persistent" in params else 0,
    }
    tree = {f"memory_{name}": {"kernel": params[f"mem_{name[0]}"][:, None]} for name in ("query", "key", "value")}
    tree["memory_gate"] = {"kernel": params["mem_gate"][..., None], "bias": params["mem_gate_b"][..., None]}
    tree |= {f"memory_w{i}": {"kernel": w} for i, w in enumerate(_layers(params, config["memory_depth"]))}
    if "persistent" in params:
        tree["persistent"] = params["persistent"]
        _same(config, "num_persistent", params["persistent"].shape[0])
    config.get("num_persistent")
    if variant == "LMM":
        mixer = TitansLMM(**fields, chunk_size=chunk, output_gate=False)
    else:
        for name in ("query", "key", "value"):
            tree[name] = {"kernel": params[f"attn_{name[0]}"].reshape(dim, heads, -1)}
        tree["out"] = {"kernel": params["attn_o"].reshape(heads, -1, dim)}
        if variant == "MAC":  # the memory's chunk is the segment
            mixer = TitansMAC(**fields, chunk_size=window)
        else:
            mixer = {"MAG": TitansMAG, "MAL": TitansMAL}[variant](**fields, chunk_size=chunk, window=window)
        if variant != "MAL":
            tree |= {"mix_attention": {"scale": params["mix_y"]}, "mix_memory": {"scale": params["mix_m"]}}
    y, _ = mixer.apply({"params": tree}, x)
    return {"y": y}


def _lucid(config, inputs, params):
    x = inputs["x"]
    batch, length, dim = x.shape
    _same(config, "dim", dim)
    heads, width = config["heads"], config["dim_head"] or dim
    chunk = config["chunk_size"]
    mixer = LucidMemory(
        dim=dim,
        num_heads=heads,
        head_dim=width,
        chunk_size=chunk,
        batch_size=config["batch_size"],
        memory_depth=config["memory_depth"],
        memory_expansion=config["memory_expansion"],
        max_lr=config["default_step_transform_max_lr"],
        layer_modulation=config["per_parameter_lr_modulation"],
        max_layer_modulation=config["max_mem_layer_modulation"],
        momentum=config["momentum"],
        momentum_order=config["momentum_order"],
        pre_norm=config["pre_rmsnorm"],
        post_norm=config["post_rmsnorm"],
        qk_norm=config["qk_rmsnorm"],
        max_grad_norm=config["max_grad_norm"],
        pool="attention" if config["attn_pool_chunks"] else "mean",
    )
    tree = {"to_queries": {"kernel": params["to_queries.weight"].T.reshape(dim, heads, width)}}
    for name in ("to_keys", "to_values"):
        tree[name] = {"kernel": params[f"{name}.weight"].T.reshape(dim, heads, width)}
    sources = {name: f"{name}.0" for name in LINEAR} | {"pool_logits": "reduce_to_chunk_rep.to_attn_logits"}
    for name, source in sources.items():
        if f"{source}.weight" in params:
            tree[name] = {"kernel": params[f"{source}.weight"].T, "bias": params[f"{source}.bias"][None]}
    for name in ("store_norm", "retrieve_norm"):
        if f"{name}.weight" in params:
            tree[name] = {"scale": params[f"{name}.weight"]}
    for name in ("multihead_rmsnorm", "q_norm", "k_norm"):
        if f"{name}.gamma" in params:
            tree[f"{name}_gamma"] = params[f"{name}.gamma"][:, 0]
    if heads > 1:
        tree["retrieve_gate"] = {"kernel": params["retrieve_gate.0.weight"].T}
        tree["combine_heads"] = {"kernel": params["combine_heads.weight"].T.reshape(heads, width, dim)}
    tree["memory_gamma"] = params["memory_model_parameters.0"]
    depth = config["memory_depth"]
    tree |= {f"memory_w{i}": params[f"memory_model_parameters.{i + 1}"] for i in range(depth)}
    cache = mixer.init_cache(batch, length)
    (y, cache), sown = mixer.apply({"params": tree}, x, cache=cache, mutable=["intermediates"])
    sown, whole = sown["intermediates"], length // chunk * chunk
    found = {"y": y}
    found["memory_loss"], found["step_size"] = (sown[name][0][:, :whole].swapaxes(1, 2) for name in ("surprise", "step_size"))
    for i, name in enumerate(["norm.gamma", *(f"model.weights.{i}" for i in range(depth))]):
        weight, momentum = cache.state.weights[i], jnp.moveaxis(cache.state.momentum[i], 1, 0)
        found[f"final_weight.{name}"] = weight.reshape(-1, *weight.shape[2:])
        found[f"final_momentum.{name}"] = momentum.reshape(momentum.shape[0], -1, *momentum.shape[3:])
    return found


def _segmented(config, inputs, params):
    x = inputs["x"]
    dim, heads, width = x.shape[-1], config["heads"], config["dim_head"]
    _same(config, "dim", dim)
    count = config["num_persist_mem_tokens"]
    mixer = SegmentedAttention(
        dim=dim,
        num_heads=heads,
        head_dim=width,
        segment_len=config["segment_len"],
        num_longterm=config["num_longterm_mem_tokens"],
        num_persistent=count,
        sliding=config["sliding"],
        rope_base=float(config["rotary_theta"]),
    )
    tree = {
        "norm": {"scale": params["norm.weight"]},
        "to_qkv": {"kernel": params["to_qkv.weight"].T.reshape(dim, 3, heads, width)},
        "to_out": {"kernel": params["to_out.weight"].T.reshape(heads, width, dim)},
    }
    kept = params.get("persistent_memory")
    if count:
        tree["persistent_memory"] = kept
    y, _ = mixer.apply({"params": tree}, x)
    return {"y": y}

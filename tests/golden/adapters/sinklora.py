"""SinkLoRA: `attention` through the S2 and SF mixers, `h2o_mask` through the H2O mixer, `h2o_cache` through its function."""

import jax.numpy as jnp

from attnlab.inference import heavy_hitter_cache
from attnlab.inference.heavy_hitter import HeavyHitterAttention
from attnlab.nn.shifted import S2Attention, SFAttention


def outputs(case, inputs, params):
    kind = case.config["kind"]
    return {"attention": _attention, "h2o_mask": _h2o_mask, "h2o_cache": _h2o_cache}[kind](case.config, inputs, params)


def _params(params, heads, kv_heads, width):
    shapes = {"query": ("q", heads), "key": ("k", kv_heads), "value": ("v", kv_heads)}
    tree = {name: {"kernel": params[f"{key}_kernel"].reshape(-1, count, width)} for name, (key, count) in shapes.items()}
    return {"params": tree | {"out": {"kernel": params["o_kernel"].reshape(heads, width, -1)}}}


def _attention(config, inputs, params):
    x, heads, width = inputs["x"], config["num_heads"], config["head_dim"]
    kv_heads = config.get("num_kv_heads") or heads
    variant = config["variant"]
    mixer = {"roll": S2Attention, "windows": S2Attention, "sf": SFAttention}[variant](
        dim=x.shape[-1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        group_size=config["group_size"],
        variant="windows" if variant == "sf" else variant,
        num_sinks=config["num_sinks"],
        returned_fraction=config["returned_fraction"],
        rope_base=config["rope_theta"],
        rope_scaling=config["rope_factor"],
    )
    variables = _params(params, heads, kv_heads, width)
    y, _ = mixer.apply(variables, x, positions=inputs["position_ids"], mask=inputs.get("key_valid"), deterministic=False)
    return {"y": y, "allowed": mixer.pattern(x.shape[1]).visible(x.shape[1], heads)}


def _h2o_mask(config, inputs, params):
    x, heads, width = jnp.asarray(inputs["x"])[None], config["num_heads"], config["head_dim"]
    kv_heads, prompt = config.get("num_kv_heads") or heads, config["prompt_length"]
    mixer = HeavyHitterAttention(
        dim=x.shape[-1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        rope_base=config["rope_theta"],
        budget=heavy_hitter_cache.Budget(heavy_ratio=config["heavy_ratio"], recent_ratio=config["recent_ratio"]),
        form="mask",
    )
    heavy, recent = (int(table[prompt]) for table in mixer.budget.tables(prompt))
    if (heavy, recent) != (config.get("heavy_budget", heavy), config.get("recent_budget", recent)):
        raise ValueError(f"budgets {heavy} and {recent} differ from the configuration")
    variables = _params(params, heads, kv_heads, width)
    cache = mixer.init_cache(1, x.shape[1] + 1)
    results = []
    for first, last in _forwards(config):
        y, cache = mixer.apply(variables, x[:, first:last], cache=cache)
        results.append((y[0], cache.keep[0], cache.score[0]))
    y, keep, score = zip(*results, strict=True)
    return {"y": jnp.concatenate(y), "keep_mask": jnp.stack(keep), "scores": jnp.stack(score)}


def _h2o_cache(config, inputs, params):
    del params
    q, k, v = (jnp.swapaxes(jnp.asarray(inputs[name]), 0, 1)[None] for name in "qkv")
    heads, kv_heads = config["num_heads"], config.get("num_kv_heads") or config["num_heads"]
    if (q.shape[2:], k.shape[2]) != ((heads, config["head_dim"]), kv_heads):
        raise ValueError("heads of the arrays differ from the configuration")
    budget = heavy_hitter_cache.Budget(heavy=config["hh_size"], recent=config["recent_size"])
    cache = heavy_hitter_cache.init_evicting_cache(1, budget.heavy + budget.recent, kv_heads, q.shape[-1], q.dtype)
    results = []
    for first, last in _forwards(config):
        now = slice(first, last)
        positions = jnp.arange(first, last)[None]
        y, cache = heavy_hitter_cache.attend_evicting(q[:, now], k[:, now], v[:, now], positions, None, cache, budget)
        positions, score = cache.ordered()
        results.append((y[0], positions[0], score[0]))
    y, positions, score = zip(*results, strict=True)
    return {"y": jnp.swapaxes(jnp.concatenate(y), 0, 1), "kept_positions": jnp.stack(positions), "scores": jnp.stack(score)}


def _forwards(config):
    """The prompt at once, then token by token."""
    prompt = config["prompt_length"]
    return [(0, prompt), *((step, step + 1) for step in range(prompt, prompt + config["decode_steps"]))]

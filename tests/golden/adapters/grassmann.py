"""Grassmann mixing: `plucker` through the op, `mixing`, `block`, `lm` and `nli_head` through modules and models."""

import jax
import jax.numpy as jnp

from attnlab.models.grassmann_lm import GrassmannLM
from attnlab.models.grassmann_nli import GrassmannNLI
from attnlab.nn.grassmann import GrassmannBlock, GrassmannMixing
from attnlab.ops.grassmann import plucker_pairs


def outputs(case, inputs, params):
    kind = case.config["kind"]
    kinds = {"plucker": _plucker, "mixing": _mixing, "block": _block, "lm": _lm, "nli_head": _nli_head}
    return kinds[kind](case.config, inputs, params)


def objective(case, outputs):
    """Language-model cases store the gradient of the loss itself."""
    if case.config["kind"] != "lm":
        raise ValueError("only language-model cases have gradients without cotangents")
    return outputs["loss"]


def _plucker(config, inputs, params):
    del params
    z = inputs["z"]
    _check(z, config["batch"], config["length"], config["reduced_dim"])
    raw, unit = plucker_pairs(z, config["delta"], direction=config["direction"], eps=config["eps"])
    return {"plucker": raw, "plucker_unit": unit}


def _mixer(config):
    return GrassmannMixing(
        dim=config["dim"],
        reduced_dim=config["reduced_dim"],
        offsets=tuple(config["windows"]),
        direction=config["direction"],
        causal=False,
        norm="max",
        eps=config["eps"],
        out_proj=config.get("out_proj", False),
    )


def _mixing(config, inputs, params):
    x = inputs["x"]
    _check(x, config["batch"], config["length"], config["dim"])
    y, _ = _mixer(config).apply({"params": _mixer_params(params, "", config.get("out_proj", False))}, x)
    return {"y": y}


def _block(config, inputs, params):
    x = inputs["x"]
    _check(x, config["batch"], config["length"], config["dim"])
    if config.get("activation", "gelu_erf") != "gelu_erf":
        raise ValueError(f"unknown activation {config['activation']!r}")
    block = GrassmannBlock(mixer=_mixer(config), norm_style=config["norm_style"], ff_dim=config["ff_dim"])
    y, _ = block.apply({"params": _block_params(config, params, "")}, x)
    return {"y": y}


def _lm(config, inputs, params):
    ids = inputs["ids"]
    _check(ids, config["batch"], config["length"])
    if config.get("activation", "gelu_erf") != "gelu_erf":
        raise ValueError(f"unknown activation {config['activation']!r}")
    layers = config["layers"]
    options = {
        "reduced_dim": config["reduced_dim"],
        "offsets": tuple(config["windows"]),
        "direction": config["direction"],
        "norm": "max",
        "eps": config["eps"],
        "out_proj": config.get("out_proj", False),
    }
    model = GrassmannLM(
        vocab_size=config["vocab"],
        num_layers=layers,
        dim=config["dim"],
        num_heads=1,
        mixer_options={"grassmann": options},
        mlp_dim=config["ff_dim"],
        max_len=config["max_len"],
        norm_style=config["norm_style"],
        offset_schedule=config.get("offset_schedule", "all"),
        use_final_norm="ln_f.weight" in params,
        scan_layers=False,
    )
    tree = {"embed": {"embedding": params["token_embedding.weight"]}, "positions": params["position_embedding.weight"]}
    blocks = [_block_params(config, params, f"blocks.{layer}.") for layer in range(layers)]
    if config.get("offset_schedule", "all") == "per_layer":
        tree["layers_0"] = {f"blocks_{layer}": block for layer, block in enumerate(blocks)}
    else:
        tree |= {f"layers_{layer}": {"blocks_0": block} for layer, block in enumerate(blocks)}
    if "ln_f.weight" in params:
        tree["final_norm"] = _norm(params, "ln_f")
    logits, _ = model.apply({"params": tree}, ids)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    return {"logits": logits, "loss": -chosen.mean()}


def _nli_head(config, inputs, params):
    tokens, mask = inputs["tokens"], inputs["mask"]
    _check(tokens, config["batch"], config["length"], config["backbone_dim"])
    model = GrassmannNLI(
        num_classes=config["num_classes"],
        dim=config["dim"],
        num_layers=config["layers"],
        reduced_dim=config["proj_dim"],
        pair_heads=config["num_heads"],
        offsets=tuple(config["offsets"]),
        ff_dim=config["ff_dim"],
        window=config["window"],
        stride=config["stride"],
        norm="max",
        eps=config["eps"],
    )
    tree = {"input": {"linear": _linear(params, "inp")}, "output": _linear(params, "cls")}
    for layer in range(config["layers"]):
        names = {"reduce": "red", "pairs": "plu", "gate": "gate"}
        mixer = {ours: _linear(params, f"{theirs}.{layer}") for ours, theirs in names.items()}
        tree[f"blocks_{layer}"] = {
            "mixer": mixer | {"inner_norm": _norm(params, f"ln1.{layer}")},
            "mlp_norm": _norm(params, f"ln2.{layer}"),
            "mlp_block": {"fc1": _linear(params, f"f1.{layer}"), "fc2": _linear(params, f"f2.{layer}")},
        }
    variables = {"params": tree}
    slots, valid = model.apply(variables, tokens, mask, method="slots")
    pooled = model.apply(variables, slots, valid, method="pool")
    return {"logits": model.apply(variables, tokens, mask), "slots": slots, "pooled": pooled}


def _block_params(config, params, prefix):
    tree = {
        "mixer": _mixer_params(params, f"{prefix}grassmann.", config.get("out_proj", False)),
        "mlp_norm": _norm(params, f"{prefix}ln2"),
        "mlp_block": {"fc1": _linear(params, f"{prefix}ffn.0"), "fc2": _linear(params, f"{prefix}ffn.3")},
    }
    if config["norm_style"] == "pre":
        tree["mixer_norm"] = _norm(params, f"{prefix}ln1")
    return tree


def _mixer_params(params, prefix, out_proj):
    tree = {
        "reduce": _linear(params, f"{prefix}W_red"),
        "pairs": _linear(params, f"{prefix}W_plu"),
        "gate": _linear(params, f"{prefix}W_gate"),
        "inner_norm": _norm(params, f"{prefix}layer_norm"),
    }
    return tree | ({"out": _linear(params, f"{prefix}W_out")} if out_proj else {})


def _linear(params, name):
    return {"kernel": params[f"{name}.weight"].T, "bias": params[f"{name}.bias"]}


def _norm(params, name):
    return {"scale": params[f"{name}.weight"], "bias": params[f"{name}.bias"]}


def _check(x, *shape):
    if x.shape != shape:
        raise ValueError(f"an array of shape {x.shape} differs from the configuration's {shape}")

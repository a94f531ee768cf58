"""Feature-selection gates: blocks and networks through the modules, routing through `methods.gradient_routing`."""

import jax
import jax.numpy as jnp
import optax

from attnlab.methods.gradient_routing import Routing, cosine_restarts
from attnlab.methods.size_loss import scale_size, unscale_size, weighted_size_loss
from attnlab.models.gated_vit import GatedViT
from attnlab.models.multistream import MultiStreamNet
from attnlab.nn.feature_gates import GATE, GatedBlock

STREAMS = ("rgb", "mask", "depth")


def outputs(case, inputs, params):
    kinds = {"vit_block": _block, "multistream_cnn": _network, "gradient_routing": _routing, "losses": _losses}
    return kinds[case.config["kind"]](case.config, inputs, params)


def objective(case, results):
    """The losses case stores gradients without a cotangent: of the loss in millimetres."""
    if case.config["kind"] != "losses":
        raise ValueError("only the losses case has gradients without cotangents")
    return results["loss_mm"]


def _unused(config, *names):
    for name in names:
        if config.get(name) is not None:
            raise ValueError(f"{name} = {config[name]!r} has no meaning for {config['kind']!r}")


def _block(config, inputs, params):
    _unused(config, "streams", "routing", "steps", "lr_gate", "lr_main", "weight_decay", "clip_gate", "clip_main", "loss")
    x = inputs["x"]
    block = GatedBlock(config["num_heads"], int(x.shape[-1] * config["mlp_ratio"]), qkv_bias="qkv_bias" in params)
    return {"y": block.apply({"params": _block_params(params)}, x)}


def _block_params(params):
    attention = {"out": _affine(params, "proj")}
    for i, name in enumerate(("query", "key", "value")):
        attention[name] = {"kernel": params["qkv_kernel"][:, i]}
        if "qkv_bias" in params:
            attention[name]["bias"] = params["qkv_bias"][i]
    return {
        "attention": attention,
        "mlp": {name: _affine(params, name) for name in ("fc1", "fc2")},
        "attention_norm": {"scale": params["norm1_scale"], "bias": params["norm1_bias"]},
        "mlp_norm": {"scale": params["norm2_scale"], "bias": params["norm2_bias"]},
        "attention_gate": {GATE: params["gate_attn"]},
        "mlp_gate": {GATE: params["gate_mlp"]},
    }


def _network(config, inputs, params):
    unused = ("num_heads", "mlp_ratio", "routing", "steps", "lr_gate", "lr_main", "weight_decay", "clip_gate", "clip_main", "loss")
    _unused(config, *unused)
    streams = tuple(config["streams"])
    tree = {"fc2": _affine(params, "fc2"), "fc3": _affine(params, "fc3")}
    tree |= {name: {GATE: params[name]} for name in ("embed_gate", "hidden_gate")}
    for stream in streams:
        branch = {"stem": {"kernel": params[f"{stream}_stem_kernel"]}}
        for i in range(1, 5):
            branch[f"stage_{i}"] = {"kernel": params[f"{stream}_stage{i}_kernel"]}
            branch[f"gate_{i}"] = {GATE: params[f"{stream}_stage{i}_gate"]}
        tree[stream] = branch
    first = tree[streams[0]]
    model = MultiStreamNet(
        outputs=tree["fc3"]["bias"].shape[0],
        streams=streams,
        branch="plain",
        stem_width=first["stem"]["kernel"].shape[-1],
        widths=tuple(first[f"stage_{i}"]["kernel"].shape[-1] for i in range(1, 5)),
        hidden=tree["fc2"]["bias"].shape[0],
    )
    return {"y": model.apply({"params": tree}, {stream: inputs[stream] for stream in streams})}


def _routing(config, inputs, params):
    _unused(config, "streams")
    if config["loss"] != "cross_entropy":
        raise ValueError(f"unknown loss {config['loss']!r}")
    model = GatedViT(
        num_classes=params["head_bias"].shape[0],
        dim=params["norm1_scale"].shape[0],
        num_layers=1,
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias="qkv_bias" in params,
        pool="mean",
        norm_last=False,
    )

    def compute(params, collections, batch, rng):
        def loss(params):
            logits = model.apply({"params": params}, batch["x"], method="classify")
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return grads, {"loss": value}, collections

    routing = Routing(
        mode=config["routing"],
        gate_learning_rate=config["lr_gate"],
        clip_gates=config["clip_gate"] or 0.0,
        clip_main=config["clip_main"] or 0.0,
        l2=config["weight_decay"] or 0.0,
    )
    tree = {"blocks_0": _block_params(params), "head": _affine(params, "head")}
    tree = jax.tree.map(jnp.asarray, tree)
    tx = routing.optimizer(optax.adam(config["lr_main"]), tree)
    x, targets, state = inputs["x"], inputs["targets"], tx.init(tree)
    if x.shape[0] != config["steps"]:
        raise ValueError(f"{x.shape[0]} batches and {config['steps']} steps")
    found = {"loss_gate_pass": [], "loss_main_pass": [], "grad_norm_gate_pass": [], "grad_norm_main_pass": []}
    for i in range(x.shape[0]):
        step = routing.update(compute, tx, tree, state, {}, {"x": x[i], "targets": targets[i]}, jax.random.key(i))
        tree, state = step.params, step.opt_state
        found["loss_gate_pass"].append(step.metrics["gate_pass/loss"])
        found["loss_main_pass"].append(step.metrics["loss"])
        found["grad_norm_gate_pass"].append(step.metrics["gate_pass/grad_norm"])
        found["grad_norm_main_pass"].append(optax.tree.norm(step.grads))
    return {name: jnp.stack(values) for name, values in found.items()} | _flat(tree["blocks_0"]) | _named("head", tree["head"])


def _flat(block):
    """The block's parameters under the case's names."""
    heads = [block["attention"][name] for name in ("query", "key", "value")]
    flat = {"qkv_kernel": jnp.stack([head["kernel"] for head in heads], axis=1)}
    if "bias" in heads[0]:
        flat["qkv_bias"] = jnp.stack([head["bias"] for head in heads])
    flat |= {"gate_attn": block["attention_gate"][GATE], "gate_mlp": block["mlp_gate"][GATE]}
    flat |= _named("proj", block["attention"]["out"]) | _named("norm1", block["attention_norm"]) | _named("norm2", block["mlp_norm"])
    return flat | _named("fc1", block["mlp"]["fc1"]) | _named("fc2", block["mlp"]["fc2"])


def _named(name, layer):
    return {f"{name}_{key}": value for key, value in layer.items()}


def _losses(config, inputs, params):
    del params
    unused = ("num_heads", "mlp_ratio", "streams", "routing", "steps", "lr_gate", "lr_main", "weight_decay")
    _unused(config, *unused, "clip_gate", "clip_main")
    if config["loss"] != "weighted_size":
        raise ValueError(f"unknown loss {config['loss']!r}")
    options = {name: config[name] for name in ("alpha", "beta", "gamma")}
    options["thresholds"] = (config["size_threshold_1"], config["size_threshold_2"])
    options["weights"] = (config["weight_1"], config["weight_2"])
    prediction, target = inputs["pred_mm"], inputs["target_mm"]
    scaled, wanted = scale_size(prediction), scale_size(target)
    period = config["epochs"] // config["cycle_limit"]
    schedule = cosine_restarts(config["base_lr"], config["min_lr"], period, config["T_mult"])
    return {
        "loss_mm": weighted_size_loss(prediction, target, **options),
        "pred_scaled": scaled,
        "target_scaled": wanted,
        "loss_scaled": weighted_size_loss(scaled, wanted, **options),
        "pred_unscaled": unscale_size(scaled),
        "lr": schedule(inputs["epoch"]),
    }


def _affine(params, name):
    tree = {"kernel": params[f"{name}_kernel"]}
    return tree | ({"bias": params[f"{name}_bias"]} if f"{name}_bias" in params else {})

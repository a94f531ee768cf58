"""Routing Transformer: k-means and heads through the ops, the mixed layer through the module; the PyTorch port's heads."""

import jax
import jax.numpy as jnp

from attnlab.nn.routing import RoutingAttention
from attnlab.ops import kmeans
from attnlab.ops.kmeans_attention import kmeans_attention
from attnlab.ops.routing import routing_attention


def outputs(case, inputs, params):
    kinds = {
        "online_kmeans": _online_kmeans,
        "routing_heads": _routing_heads,
        "mixed_layer": _mixed_layer,
        "lucidrains_kmeans_attention": _kmeans_attention,
    }
    return kinds[case.config["kind"]](case.config, inputs, params)


def _online_kmeans(config, inputs, params):
    del params
    results = {}
    if inputs["x"].shape[0] != config["num_steps"] or inputs["means"].shape[:2] != (config["num_heads"], config["num_clusters"]):
        raise ValueError("arrays differ from the configuration")
    for prefix, counting in (("", "official"), ("fixed_", "per_head")):
        state = kmeans.Centroids(*(jnp.asarray(inputs[name]) for name in ("means", "ema_count", "ema_sum")))
        steps = []
        for x in inputs["x"]:
            x = jnp.swapaxes(x, 1, 2)
            found = {"dist": -jnp.swapaxes(kmeans.centroid_scores(x, state.means), 2, 3)}
            found["commit_loss"] = config["beta"] * kmeans.commitment_loss(x, state.means)
            state = kmeans.update_centroids(
                state, x, decay=config["decay"], epsilon=config["epsilon"], counting=counting
            )
            steps.append(found | {"means": state.means, "ema_count": state.counts, "ema_sum": state.sums})
        results |= {f"{prefix}{name}": jnp.stack([step[name] for step in steps]) for name in steps[0]}
    return results


def _routing_heads(config, inputs, params):
    q, k, v = (jnp.swapaxes(inputs[name], 1, 2) for name in ("q", "k", "v"))
    _same(q.shape[2:], (config["num_heads"], config["head_dim"]))
    _same(params["means"].shape[1], config["num_clusters"])
    tables = {"rel_keys": None, "rel_values": None}
    reach = config["max_relative_position"]
    if config["relative"]:
        tables = {name: params[name] for name in tables}
        _same(tables["rel_keys"].shape[0], 2 * reach + 1)

    def route(q, k):
        return routing_attention(
            q,
            None if config["share_qk"] else k,
            v,
            params["means"],
            window=config["attention_window"],
            causal=config["causal"],
            block=config["block"],
            norm_epsilon=config["layernorm_epsilon"],
            scatter_epsilon=config["scatter_epsilon"],
            implementation="xla",
            **tables,
        )

    def loss(q, k):
        routed = route(q, k)
        return config["beta"] * sum(kmeans.commitment_loss(x, params["means"]) for x in (routed.q, routed.k))

    routed = route(q, k)
    return {
        "y": jnp.swapaxes(routed.out, 1, 2),
        "member_idx_q": routed.q_members,
        "member_idx_k": routed.k_members,
        "commit_loss": loss(q, k),
        "commit_loss_grad_q": jnp.swapaxes(jax.grad(loss)(q, k), 1, 2),
    }


def _mixed_layer(config, inputs, params):
    x, routed, local = inputs["x"], config["routing_heads"], config["local_heads"]
    _same(x.shape[-1], config["dim"])
    heads = routed + local
    width = config["dim"] // heads
    module = RoutingAttention(
        dim=config["dim"],
        num_heads=heads,
        routing_heads=routed,
        num_clusters=config["num_clusters"],
        cluster_size=config["attention_window"],
        block=config["block"],
        flange=config["flange"],
        max_relative_position=config["max_relative_position"],
        share_qk=config["share_qk"],
        causal=config["causal"],
        cluster_relative=config["cluster_relative"],
        local_relative=config["local_relative"],
        beta=config["beta"],
        scatter_epsilon=config["scatter_epsilon"],
        norm_epsilon=config["layernorm_epsilon"],
        implementation="xla",
    )
    # Routing heads come first on the projected axis.
    kernels = {name: params[f"{name}_kernel"].reshape(-1, heads, width) for name in ("q", "k", "v")}
    out = params["out_kernel"].reshape(heads, width, -1)
    tree = {"mix": params["per_head_mix_kernel"]}
    names = {"q": "query", "k": "key", "v": "value"}
    collections = {}
    if routed:
        tree["routing"] = {names[name]: {"kernel": kernels[name][:, :routed]} for name in names}
        if config["share_qk"]:
            del tree["routing"]["key"]
        tree["routing_out"] = {"kernel": out[:routed]}
        means = params["means"]
        state = {"means": means, "counts": jnp.zeros(means.shape[:2]), "sums": means}
        collections["centroids"] = {"routing": state}
    if local:
        tree["local"] = {names[name]: {"kernel": kernels[name][:, routed:]} for name in names}
        tree["local_out"] = {"kernel": out[routed:]}
    for part, prefix, has in (("routing", "cluster", config["cluster_relative"]), ("local", "local", config["local_relative"])):
        if part in tree and has:
            tree[part] |= {name: params[f"{prefix}_{name}"] for name in ("rel_keys", "rel_values")}
    (y, _), sown = module.apply({"params": tree, **collections}, x, mutable=["losses"])
    return {"y": y, "commit_loss": sum(map(jnp.sum, jax.tree.leaves(sown)))}


def _kmeans_attention(config, inputs, params):
    q, k, v = (jnp.swapaxes(inputs[name], 1, 2) for name in ("q", "k", "v"))
    means = params["means"]
    _same(q.shape[2:], (config["num_heads"], config["head_dim"]))
    _same(means.shape[1], config["num_clusters"])
    memory = {name: params[name] for name in ("mem_key", "mem_value") if name in params}
    # The port has at least one memory where a query could be left without any key.
    least = 1 if config["causal"] and not config["share_qk"] else 0
    _same(memory["mem_key"].shape[2] if memory else 0, max(config["num_mem_kv"], least))
    routed = kmeans_attention(
        q,
        None if config["share_qk"] else k,
        v,
        means,
        window=config["window_size"],
        causal=config["causal"],
        mask=inputs.get("mask"),
        self_score=config["self_attn_value"],
        scatter_epsilon=config["scatter_epsilon"],
        **memory,
    )
    new = kmeans.lloyd_step(routed.x, means)
    return {
        "y": jnp.swapaxes(routed.out, 1, 2),
        "commit_loss": config["commitment"] * kmeans.commitment_loss(routed.x, means),
        "new_means": new,
        "means_after_ema": kmeans.average_means(means, new, config["ema_decay"]),
    }


def _same(found, wanted):
    if found != wanted:
        raise ValueError(f"arrays have {found}, the configuration has {wanted}")

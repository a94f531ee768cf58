"""Sparse state expansion: `layer` through the module, `core` and `row_sparse` through the ops."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.nn.sparse_state import SparseStateExpansion
from attnlab.ops import partition_streams, row_sparse, sparse_state

# `segment_offsets` of `core` leaves empty segments out: its length depends on values. The rest is jitted below.
EAGER = True


def outputs(case, inputs, params):
    return {"layer": _layer, "core": _core, "row_sparse": _row_sparse}[case.config["kind"]](case.config, inputs, params)


def _check(config, **actual):
    for name, value in actual.items():
        if config[name] != value:
            raise ValueError(f"{name} = {config[name]} in the configuration, and {value} in the arrays")


def _factors(config):
    """The mask form of the published code multiplies by p whatever the flags say."""
    masked = config["sse_implementation"] == "mask"
    return {"q": masked or bool(config["emulq"]), "k": masked or bool(config["emulk"])} | {
        flag: config[flag] for flag in ("emulq", "emulk")
    }


def _layer(config, inputs, params):
    x = inputs["x"]
    packed = config["packed"]
    lengths = np.diff(inputs["cu_seqlens"]) if packed else [x.shape[1]]
    if not packed:
        _check(config, batch=x.shape[0], length=x.shape[1])
    else:
        config.get("batch"), config.get("length")  # of the row that x is, or of the sequences in it
    _check(config, hidden_size=x.shape[-1])
    factors = _factors(config)
    gdn = config["linear_attn_type"] == "gdn"
    mixer = SparseStateExpansion(
        dim=x.shape[-1],
        num_heads=config["num_heads"],
        head_dim=config["head_dim"],
        num_v_heads=config["num_v_heads"],
        expand_v=config["expand_v"],
        rule=config["linear_attn_type"],
        num_partitions=config["num_sparse_partition"],
        num_writers=config["num_writer"],
        num_readers=config["num_reader"],
        emulq=factors["q"],
        emulk=factors["k"],
        use_q_softmax=config["use_q_softmax"],
        use_k_softmax=config["use_k_softmax"],
        use_output_gate=config["use_output_gate"],
        use_short_conv=config["use_short_conv"],
        conv_size=config["conv_size"],
        gate_low_rank_dim=config["gate_low_rank_dim"],
        gate_logit_normalizer=config["gate_logit_normalizer"],
        allow_neg_eigval=config["allow_neg_eigval"],
        norm_eps=config["norm_eps"],
        aux_weight=1.0,
        implementation=config["sse_implementation"],
    )
    variables = {"params": _params(config, mixer, params, gdn)}
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None] if packed else None

    def run(variables, x):
        (y, _), sown = mixer.apply(variables, x, segment_ids=segments, mutable=["losses", "intermediates"])
        ends = np.cumsum(lengths)
        rows = [x[:, end - length : end] for end, length in zip(ends, lengths, strict=True)]
        caches = [mixer.init_cache(row.shape[0], 0) for row in rows]
        caches = [mixer.apply(variables, row, cache=cache)[1] for row, cache in zip(rows, caches, strict=True)]
        states = jnp.concatenate([cache.state for cache in caches])
        routed = sown["intermediates"]
        return {
            "y": y,
            "aux_loss": sown["losses"]["load_balance"][0],
            "partition_prob": routed["partition_probability"][0],
            "write_mask": routed["write_mask"][0],
            "read_mask": routed["read_mask"][0],
            "state_final": jnp.concatenate([states[:, 0], states[:, 1:].reshape(-1, *states.shape[2:])]),
        }

    return jax.jit(run)(variables, x)


def _params(config, mixer, params, gdn):
    head_dim, v_heads, width = mixer.widths()
    heads = config["num_heads"]

    def linear(name, *shape):
        weight = params[f"{name}.weight"].T
        return {"kernel": weight.reshape(weight.shape[0], *shape)}

    tree = {
        "query": linear("q_proj", heads, head_dim),
        "key": linear("k_proj", heads, head_dim),
        "value": linear("v_proj", v_heads, width),
        "query_sparse_down": linear("lora_q_proj.0", width),
        "query_sparse_up": linear("lora_q_proj.1", heads, head_dim),
        "key_sparse_down": linear("lora_k_proj.0", width),
        "key_sparse_up": linear("lora_k_proj.1", heads, head_dim),
        "router": linear("e_proj", config["num_sparse_partition"]),
        "norm": {"scale": params["o_norm.weight"]},
        "out": {"kernel": params["o_proj.weight"].T.reshape(v_heads, width, -1)},
    }
    if gdn:
        tree |= {name: linear(f"{name}_proj", 2, v_heads) for name in ("a", "b")}
        tree |= {"a_log": params["A_log"].reshape(2, v_heads), "dt_bias": params["dt_bias"].reshape(2, v_heads)}
    else:
        for place, name in enumerate(("decay_shared", "decay_sparse")):
            tree[f"{name}_down"] = linear(f"gk_proj.{place}.0", config["gate_low_rank_dim"])
            bias = {"bias": params[f"gk_proj.{place}.1.bias"].reshape(heads, head_dim)}
            tree[f"{name}_up"] = linear(f"gk_proj.{place}.1", heads, head_dim) | bias
    if config["use_output_gate"]:
        tree |= {"gate_down": linear("g_proj.0", width), "gate_up": linear("g_proj.1", v_heads, width)}
    if config["use_short_conv"]:
        for name, stored in (("query_conv", "q_conv1d_shared"), ("key_conv", "k_conv1d_shared")):
            tree[name] = params[f"{stored}.weight"][:, 0].reshape(heads, head_dim, -1)
    return tree


def _core(config, inputs, params):
    del params
    names = ("q_shared", "q_sparse", "k_shared", "k_sparse", "v", "g_shared", "g_sparse")
    arrays = [inputs[name] for name in names]
    batch, length, heads, head_k = arrays[0].shape
    _check(config, batch=batch, length=length, num_heads=heads, head_k_dim=head_k, head_v_dim=arrays[4].shape[-1])
    _check(config, num_sparse_partition=inputs["router_logits"].shape[-1])
    writers, readers = config["num_writer"], config["num_reader"]
    factors = _factors(config)
    betas = {}
    if config["linear_attn_type"] == "gdn":
        betas = {name: inputs[name] for name in ("beta_shared", "beta_sparse")}

    def run(arrays, betas, logits):
        routing = sparse_state.route(logits, writers, readers)
        out, state = sparse_state.sparse_state_attention(
            *arrays,
            routing,
            **betas,
            read_factor=factors["q"],
            write_factor=factors["k"],
            implementation=config["sse_implementation"],
        )
        return {
            "o": out,
            "state_final": state,
            "aux_loss": sparse_state.load_balance_loss(routing),
            "partition_prob": routing.probability,
            "write_mask": routing.write_mask(),
            "read_mask": routing.read_mask(),
        }

    results = jax.jit(run)(arrays, betas, inputs["router_logits"])
    routing = sparse_state.route(jax.lax.stop_gradient(inputs["router_logits"]), writers, readers)
    order = partition_streams.sort_entries(routing.write_index, config["num_sparse_partition"])
    sizes = np.asarray(order.sizes)
    tokens = np.asarray(order.entry) // writers + length * np.arange(batch)[:, None]
    ends = np.cumsum(sizes[sizes > 0])
    return results | {
        "sorted_token_index": tokens.reshape(-1),
        "segment_sizes": sizes,
        "segment_offsets": np.concatenate([[0], ends]),
    }


def _row_sparse(config, inputs, params):
    del params
    arrays = [inputs[name] for name in ("q", "k_logits", "v", "g")]
    batch, length, heads, head_k = arrays[0].shape
    _check(config, batch=batch, length=length, num_heads=heads, head_k_dim=head_k, head_v_dim=arrays[2].shape[-1])
    rows = config["topk_rows"]
    result = jax.jit(lambda *arrays: row_sparse.row_sparse_scan(*arrays, rows))(*arrays)
    return {"o": result.out, "key": result.key, "row_mask": result.row_mask, "state_final": result.state}

"""Claims about what a mixer can remember, on generated recall tasks (`benchmarks/claims.py` runs them).

Every model has two layers (`configs/recall.py:reader`). In the first, each token sees itself and the token before, in all arms: it
brings a key the value that stands before it. The second differs, and the loss counts the answers alone. Training rows never
repeat, and evaluation rows are of a split that shares none with them.

What makes them learn in a thousand steps: rows begin with few pairs and get more in the course of training; kernels begin with a
deviation of fan-in^-1/2, embeddings with 0.2, and keys as queries, so that a question finds its key from the start. With keys
before their values, or many pairs at once, even softmax attention stays long where it says any of the row's values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from claim import Arm, Claim, Trained

_EMBEDDING = 10.0  # times the house's deviation of 0.02
_STD = 0.02  # of the house's kernels
_MOMENTUM = -1.0  # before the sigmoid; by default 0.5, with which larger steps diverge
_FORGETTING = -5.0  # before the sigmoid: a memory begins by keeping everything for some 150 tokens


def start(params: Any) -> Any:
    """Scales kernels and embeddings, and makes the second layer's keys begin as its queries; a neural memory stays as it is."""

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        *_, module, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if name == "embedding":
            return _EMBEDDING * leaf
        if module == "memory_gate" and name == "bias":  # of theta, eta, alpha
            return leaf.at[1].set(_MOMENTUM).at[2].set(_FORGETTING)
        if name != "kernel" or module.startswith("memory_"):
            return leaf
        inputs = leaf.shape[:-1] if module == "out" else leaf.shape[:1]  # `out` contracts heads and their width
        return leaf * (math.prod(inputs) ** -0.5 / _STD)

    params = jax.tree_util.tree_map_with_path(scaled, params)
    mixer = params["layers_0"]["blocks_1"]["mixer"]
    for name in [name for name in mixer if "query" in name and name.replace("query", "key") in mixer]:
        mixer[name.replace("query", "key")] = jax.tree.map(jnp.copy, mixer[name])
    return params


def _arm(name: str, mixer: str, **options: Any) -> Arm:
    fields = {f"model.mixer_options.{mixer}.{option}": value for option, value in options.items()}
    return Arm(name, "configs/recall.py:reader", {"model.pattern": ("shift", mixer)} | fields)


def _pairs(task: str, *shares: tuple[float, int]) -> tuple[tuple[float, dict[str, Any]], ...]:
    return tuple((share, {f"data.{task}.num_pairs": pairs}) for share, pairs in shares)


def _longer(task: str, option: str, amounts: dict[int, int]) -> Callable[[Trained], dict[str, Any]]:
    """Accuracy at other lengths: `amounts` says the option of the task at each."""

    def measure(trained: Trained) -> dict[str, Any]:
        found = {}
        for length, amount in amounts.items():
            options = {"seq_len": length, f"data.{task}.{option}": amount}
            found[f"T_{length}"] = trained.evaluate(options=options)["accuracy"]
        return found

    return measure


def _sse(name: str, partitions: int, used: int = 1, **options: Any) -> Arm:
    counts = {"num_partitions": partitions, "num_writers": used, "num_readers": used, "chunk_size": 8}
    return _arm(name, "sse", **counts, **options)


_NONE = {"q_activation": "none", "k_activation": "none", "v_activation": "none"}
_SHARED: dict[str, Any] = {"figure": "accuracy", "start": start, "course_batches": 2, "eval_batches": 8}
# Gradients of like tokens in a chunk add up: larger steps diverge, the sooner the longer the chunks and the deeper the memory.
_DEEP = {"chunk_size": 4, "memory_expansion": 2.0, "theta_max": 0.2}
_LINEAR = {"chunk_size": 4, "memory_depth": 1, "theta_max": 0.5}
_TRAINED, _LENGTHS = 64, (128, 256, 512)

CLAIMS = (
    Claim(
        name="sse",
        title="Sparse state expansion: more partitions remember more",
        question="Claim: at a fixed number of writers and readers, more partitions of the state remember more, with hardly more "
        "parameters and no more time (SSE, Pan et al., 2025, arXiv 2507.16577). Confirmed if the accuracy rises with P at k = 1 and "
        "P = 4 is above gated linear attention (GLA), whose state is one partition; refuted if P has no effect. Multi-query recall "
        "of 32 pairs with one head of 8 features; chance is 0.125.",
        arms=(
            _arm("GLA", "gla", **_NONE),
            _sse("SSE, P = 4", 4),
            _sse("SSE, P = 8", 8),
            _sse("SSE, P = 16", 16),
            _sse("SSE, P = 4, k = 3", 4, 3),
            _sse("SSE, P = 16, no balance loss", 16, aux_weight=0.0),
            _arm("softmax", "softmax"),
        ),
        changes={
            "seq_len": 128, "num_train_steps": 1600, "data.mqar.num_pairs": 32, "data.mqar.num_questions": 32, "model.head_dim": 8,
        },
        stages=_pairs("mqar", (0.4, 4), (0.5, 8), (0.65, 16)),
        **_SHARED,
    ),
    Claim(
        name="titans_memory",
        title="Titans: what the neural memory needs",
        question="Claim: a neural memory with momentum and forgetting is at least as good as without either, forgetting matters "
        "once rows are longer than those of the training, and deep memories are better than linear ones (Titans, Behrouz et al., "
        "2024, arXiv 2501.00663). Recall of the newest value of 4 keys that get new values among noise, trained at T = 64 with 4 "
        "updates and evaluated at up to T = 512 with 32; chance is 0.125. Memories of one layer, but for the last arm.",
        arms=(
            _arm("full", "titans_lmm", **_LINEAR),
            _arm("no momentum", "titans_lmm", **_LINEAR, momentum=False),
            _arm("no forgetting", "titans_lmm", **_LINEAR, forgetting=False),
            _arm("two layers", "titans_lmm", **_DEEP),
        ),
        changes={
            "seq_len": _TRAINED, "data.mqar.num_pairs": 4, "data.mqar.num_keys": 8, "data.mqar.num_noise": 8,
            "data.mqar.num_updates": 4, "data.mqar.spread": 0.7,
        },
        stages=((0.5, {"data.mqar.num_updates": 0}),),
        shown={f"T_{length}": ".3f" for length in _LENGTHS},
        measure=_longer("mqar", "num_updates", {length: length // 16 for length in _LENGTHS}),
        **_SHARED,
    ),
    Claim(
        name="titans_window",
        title="Titans: a memory beside a window",
        question="Claim: memory as context (MAC) and as gate (MAG) recall what lies beyond the window of their attention, which "
        "attention in the window alone cannot (Titans, Behrouz et al., 2024, arXiv 2501.00663). Windows and segments of 16 tokens, "
        "memories of one layer, facts at least 24 tokens back at T = 64, and in all the first half of longer rows; chance is 0.125.",
        arms=(
            _arm("window alone", "softmax", window=15),
            _arm("MAG", "titans_mag", **_LINEAR, window=16, num_persistent=4),
            _arm("MAC", "titans_mac", **_LINEAR | {"chunk_size": 16}, num_persistent=4),
            _arm("softmax", "softmax"),
        ),
        changes={
            "data.name": "long_range", "seq_len": _TRAINED, "data.long_range.num_pairs": 4, "data.long_range.num_noise": 8,
            "data.long_range.gap": 24, "data.long_range.value_first": True, "model.num_heads": 2, "num_train_steps": 600,
        },
        shown={f"T_{length}": ".3f" for length in _LENGTHS[:2]},
        measure=_longer("long_range", "gap", {length: length // 2 for length in _LENGTHS[:2]}),
        **_SHARED,
    ),
)  # fmt: skip

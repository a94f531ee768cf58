"""Claims about language models, on bytes of Python's standard library (`benchmarks/claims.py` runs them)."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from claim import Arm, Claim, Trained

from attnlab.training.evaluate_recall import Answers

_TEXT = {
    "model.num_layers": 2,
    "model.dim": 64,
    "seq_len": 128,
    "batch_size": 8,
    "num_train_steps": 500,
}
_EVALUATED = 96  # batches of _TEXT, 98 thousand bytes
_ROTARY = {"model.mixer_options.softmax.rope": True}
_LOAD_BATCHES = 8


def head_loads(trained: Trained) -> dict[str, Any]:
    """How often each routed head is on, on validation rows: `head_load` [layers][R], and the extremes.

    `load_ratio` is max f_i / min f_i of the layer where it is largest; a head that is never on counts as on once.
    """
    run, config = trained.arm.run, trained.arm.config
    if config.model.mixer != "moh":
        return {}
    model = run.task.model.clone(capture_attention=True)

    @jax.jit
    def selected(variables, inputs):
        sown = model.apply(variables, inputs, method="features", mutable=["intermediates"])[1]
        leaves = jax.tree_util.tree_leaves_with_path(sown["intermediates"])
        found = [leaf for path, leaf in leaves if "head_selected" in jax.tree_util.keystr(path)]  # [B, T, R], or stacked layers
        return jnp.concatenate([leaf.reshape(-1, *leaf.shape[-3:]).mean((1, 2)) for leaf in found])

    loader = trained.arm.data.loader("validation", batch_size=config.batch_size, seed=0, shuffle=True, repeat=False)
    with run.context():
        batches = itertools.islice(loader, _LOAD_BATCHES)
        load = np.mean([selected(trained.variables, batch["inputs"]) for batch in batches], axis=0)
    loader.close()
    least = 1 / (_LOAD_BATCHES * config.batch_size * config.seq_len)
    ratio = load.max(1) / np.maximum(load.min(1), least)
    shown = [[round(float(value), 4) for value in layer] for layer in load]
    return {"head_load": shown, "load_min": float(load.min()), "load_max": float(load.max()), "load_ratio": float(ratio.max())}


MOH = Claim(
    name="moh",
    title="Mixture of heads against all heads",
    question=(
        "Claim: with 75 % of the heads on, chosen token by token, a model is as good as with all heads; without shared heads it is "
        'worse; without the balance loss the load of the heads collapses ("MoH: Multi-Head Attention as Mixture-of-Head '
        'Attention", arXiv 2410.11842).'
    ),
    arms=(
        Arm("all heads", "configs/moh.py:small_softmax"),
        Arm("75 %: 2 shared, 4 of 6", "configs/moh.py:small"),
        Arm("50 %: 2 shared, 2 of 6", "configs/moh.py:small_half"),
        Arm("75 %: 6 of 8, none shared", "configs/moh.py:small_unshared"),
        Arm("75 %, no balance loss", "configs/moh.py:small_unbalanced"),
    ),
    changes=_TEXT,
    shown={"perplexity": ".3f", "load_min": ".3f", "load_max": ".3f", "load_ratio": ".3g"},
    eval_batches=_EVALUATED,
    measure=head_loads,
)

GRASSMANN = Claim(
    name="grassmann",
    title="Grassmann mixing against attention",
    question=(
        "Claim: a model that mixes tokens by planes through pairs of them, without attention, is within 10 to 15 % of a "
        'transformer\'s perplexity ("Attention Is Not What You Need", arXiv 2512.19428): confirmed at a ratio of 1.15 or less, '
        "refuted above 1.25. Is the geometry useful: is it better than a linear map of both tokens with as many parameters?"
    ),
    arms=(
        Arm("transformer", "configs/grassmann.py:small_transformer"),
        Arm("Grassmann", "configs/grassmann.py:small"),
        Arm("control, linear", "configs/grassmann.py:small_control"),
        # the other reading of the paper's offsets: a layer that knows how far apart its pairs are
        Arm(
            "Grassmann, one offset a layer",
            "configs/grassmann.py:small",
            {"model.offset_schedule": "per_layer", "model.mixer_options.grassmann.offsets": (1, 2)},
        ),
        # the paper's baseline has to learn its positions
        Arm("transformer, rotary", "configs/grassmann.py:small_transformer", _ROTARY),
    ),
    changes=_TEXT,
    figure="perplexity",
    ratio=True,
    shown={"loss": ".4f", "accuracy": ".3f"},
    eval_batches=_EVALUATED,
)


def by_reach(trained: Trained) -> dict[str, float]:
    """Accuracy at distances that are sums of at most L of the Grassmann offsets (from the answer to its question), and at others."""
    config, data = trained.arm.config, trained.arm.data
    reached = {0}
    for _ in range(config.model.num_layers):
        reached |= {place + offset for place in reached for offset in config.model.mixer_options.grassmann.offsets}
    answers = Answers(trained.arm.run, data.outputs)
    found = answers(trained.variables, data, "test", config.seq_len, batch_size=config.batch_size)
    inside = np.isin(found.distance, sorted(reached))
    return {"in_reach": float(found.correct[inside].mean()), "out_of_reach": float(found.correct[~inside].mean())}


RECALL = Claim(
    name="grassmann_recall",
    title="Grassmann mixing on multi-query recall",
    question=(
        "A layer that pairs tokens at fixed offsets finds nothing at a distance that is no sum of as many offsets as there are "
        "layers: accuracy within and beyond that reach, on rows of 4 pairs of 8 keys and 8 values (chance is 0.125; saying any of "
        "the row's values is right in 0.25 or more)."
    ),
    arms=(
        Arm("transformer", "configs/grassmann.py:small_transformer"),
        Arm("transformer, rotary", "configs/grassmann.py:small_transformer", _ROTARY),
        Arm("Grassmann", "configs/grassmann.py:small"),
    ),
    changes={
        "data.name": "mqar",
        "data.mqar.num_pairs": 4,
        "data.mqar.num_keys": 8,
        "data.mqar.num_values": 8,
        "data.mqar.num_noise": 8,
        "data.mqar.num_questions": 16,
        "seq_len": 64,
        "batch_size": 32,
        "model.num_layers": 2,
        "model.dim": 64,
        "model.tie_embeddings": False,
        "optimizer.learning_rate": 1e-3,
        "optimizer.weight_decay": 0.0,
        "num_train_steps": 600,
    },
    figure="accuracy",
    shown={"in_reach": ".3f", "out_of_reach": ".3f"},
    measure=by_reach,
)

MALA = Claim(
    name="mala",
    title="Magnitude-aware linear attention in a language model",
    question=(
        "Claim: linear attention whose rows feel the length of the query is better than plain normalised linear attention and on "
        'par with softmax ("Rectifying Magnitude Neglect in Linear Attention", arXiv 2507.00698, which reports a language model '
        "and releases none; the causal form is ours)."
    ),
    arms=(
        Arm("softmax", "configs/mala.py:small_softmax"),
        Arm("magnitude-aware", "configs/mala.py:small"),
        Arm("divided by the sum", "configs/mala.py:small_divided"),
    ),
    changes=_TEXT,
    shown={"perplexity": ".3f", "accuracy": ".3f"},
    eval_batches=_EVALUATED,
)

CLAIMS = (MOH, GRASSMANN, RECALL, MALA)

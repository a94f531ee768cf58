"""The report page of an evaluated run: gathers what `analysis.report` draws."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.analysis import attention, report, selection, series, text
from attnlab.errors import ConfigError, field_error
from attnlab.methods.fields import layer_pattern
from attnlab.models.lm import attention_maps
from attnlab.training import config as config_lib
from attnlab.training import workdir
from attnlab.training.evaluate import Options
from attnlab.training.evaluate_text import TextEvaluation, document_tokens
from attnlab.training.progress import si

TIMES = "\N{MULTIPLICATION SIGN}"
MAP_TOKENS = 96
LOAD_TOKENS = 4096  # for the loads of heads
MAX_LAYERS, MAX_HEADS = 4, 6  # maps shown by default: at most 24


def write(folder: str, result: TextEvaluation, options: Options) -> pathlib.Path:
    """Writes `<folder>/report.html` and returns its path.

    Raises:
        ConfigError: a layer or head of `options` that does not exist.
    """
    path = pathlib.Path(folder)
    config, figures = result.run.config, result.figures
    metrics = series.read_metrics(path / "metrics.jsonl")
    views, notes = head_views(result, options)
    loads, tokens = head_loads(result, options)
    page = report.Report(
        title=path.resolve().name,
        summary=_summary(result),
        facts=_facts(path, result),
        figures=figures,
        metrics=metrics,
        bits_per_nat=_bits_per_nat(metrics, figures),
        attention=views,
        loads=loads,
        loads_of=f"{tokens:,} tokens",
        samples=result.samples,
        decoding=_decoding(options),
        config=config_lib.to_json(config),
        notes=[*result.notes, *notes],
    )
    return report.write(page, path / "report.html")


def head_views(result: TextEvaluation, options: Options) -> tuple[report.HeadViews | None, list[str]]:
    """Attention of the start of a document of the split; None and a note when no layer has maps."""
    run, tokenizer = result.run, result.text.tokenizer
    tokens = document_tokens(result.text, options.split, min(MAP_TOKENS, run.config.seq_len), least_bytes=MAP_TOKENS)
    try:
        with run.context():
            captured = attention.capture(run.task.model, result.variables, tokens[None])
    except ConfigError as error:
        if options.layers is not None:
            raise
        return None, [f"No attention maps: {error}"]
    shown = [
        _chosen("--layers", options.layers, captured.layers, MAX_LAYERS),
        _chosen("--heads", options.heads, captured.heads, MAX_HEADS),
    ]
    rows = [captured.layers.index(layer) for layer in shown[0]]
    statistics = {name: np.asarray(value) for name, value in attention.head_statistics(captured.maps).items()}
    profile, edges = attention.strength_profile(captured.maps[:, 0])
    views = report.HeadViews(
        labels=text.token_labels(tokens, lambda ids: tokenizer.decode(np.asarray(ids)), tokenizer.eos_id),
        maps=captured.maps[rows][:, 0][:, shown[1]],
        layers=shown[0],
        heads=shown[1],
        statistics=statistics,
        all_layers=captured.layers,
        mixers=captured.mixers,
        profile=np.asarray(profile),
        edges=edges,
    )
    return views, []


def head_loads(result: TextEvaluation, options: Options) -> tuple[list[selection.HeadLoads], int]:
    """The loads of the heads in layers that choose among them, and of how many tokens of the split."""
    run, model = result.run, result.run.task.model.clone(capture_attention=True)
    rows = -(-LOAD_TOKENS // run.config.seq_len)
    loader = result.text.loader(options.split, batch_size=rows, seed=1, shuffle=True, repeat=False)
    batch = next(loader)
    loader.close()
    structure = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}

    def means(variables: Any, inputs: jax.Array) -> Any:
        _, updated = model.apply(variables, inputs, **structure, method="features", mutable=["intermediates"])
        return selection.head_means(updated.get("intermediates", {}), batch["mask"])

    with run.context():
        everywhere = NamedSharding(run.mesh, PartitionSpec())
        compiled = jax.jit(means, out_shardings=everywhere)
        if not jax.tree.leaves(jax.eval_shape(compiled, result.variables, batch["inputs"])):
            return [], 0  # nothing to compile
        found = compiled(result.variables, batch["inputs"])
    shares, gates = (attention_maps(model, found, kind) for kind in ("head_selected", "gates"))
    names = attention.layer_mixers(model)
    loads = [
        selection.HeadLoads(f"L{layer}" if len(set(names)) == 1 else f"L{layer} {names[layer]}", *map(np.asarray, pair))
        for layer, pair in enumerate(zip(shares, gates, strict=True))
        if pair[0] is not None
    ]
    return loads, int(batch["mask"].sum())


def _chosen(flag: str, wanted: tuple[int, ...] | None, known: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """What the flag names, or at most `limit` spread over all."""
    if wanted is None:
        return tuple(
            known[i] for i in np.unique(np.linspace(0, len(known) - 1, min(limit, len(known))).round().astype(int))
        )
    for index in wanted:
        if index not in known:
            raise field_error(flag, index, "there are no maps of it", f"Use numbers of {list(known)}")
    return tuple(wanted)


def _summary(result: TextEvaluation) -> str:
    model = result.run.config.model
    pattern = ", ".join(layer_pattern(model))
    return (
        f"Decoder of {model.num_layers} layers ({pattern}), width {model.dim}, {model.num_heads} heads; "
        f"{result.run.num_params():,} parameters"
    )


def _facts(path: pathlib.Path, result: TextEvaluation) -> list[tuple[str, str]]:
    config, run, text_data = result.run.config, result.run, result.text
    trained = workdir.facts(path)
    mesh = f" {TIMES} ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1) or "one device"
    tokens = result.figures["step"] * config.batch_size * config.seq_len
    optimizer = config.optimizer
    facts = [
        (
            "trained on",
            f"{trained['num_devices']} {TIMES} {trained['device']}" if "device" in trained else "not recorded",
        ),
        ("evaluated on", f"{run.mesh.size} {TIMES} {run.mesh.devices.flat[0].device_kind}, {mesh}"),
        ("data", f"{config.data.name}, sha256 {text_data.fingerprint[:12]}"),
        ("tokenizer", f"{config.data.tokenizer}, {text_data.tokenizer.vocab_size:,} ids"),
        ("batch", f"{config.batch_size} {TIMES} {config.seq_len} tokens"),
        ("seen in training", f"{result.figures['step']:,} steps, {si(tokens)} tokens"),
        ("optimizer", f"{optimizer.name}, {optimizer.learning_rate:g}, {optimizer.schedule}"),
        ("compute", f"{config.model.dtype}, seed {config.seed}"),
    ]
    if "jax" in trained:
        facts.append(("versions", f"attnlab {trained.get('attnlab', '?')}, jax {trained['jax']}"))
    return facts


def _decoding(options: Options) -> str:
    if options.temperature == 0:
        return "Greedy decoding."
    rules = [f"temperature {options.temperature:g}"]
    rules += [f"top-k {options.top_k}"] if options.top_k else []
    rules += [f"top-p {options.top_p:g}"] if options.top_p < 1 else []
    return f"Drawn with {', '.join(rules)}, seed {options.seed}."


def _bits_per_nat(metrics: dict[str, series.Series], figures: dict) -> float:
    """Bits per byte for one nat per token: of the validation split where logged, else of the evaluated one."""
    if "eval/loss" in metrics and "eval/bits_per_byte" in metrics:
        nats, bits = metrics["eval/loss"][1], metrics["eval/bits_per_byte"][1]
        if len(nats) == len(bits) and np.isfinite(bits[-1] / nats[-1]):
            return float(bits[-1] / nats[-1])
    return figures["bits_per_byte"] / figures["loss"] if figures["loss"] else math.nan

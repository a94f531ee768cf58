"""What the claims gave: one record per arm and seed in claim_NAME.json, tabulated as claim_NAME.md and claim_NAME.svg."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import claim as claim_lib
import crossover
import experiment
import flax
import jax
import numpy as np

from attnlab.analysis import charts

Record = dict[str, Any]


def device() -> str:
    """The accelerator, or how many cores of which processor."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        kind = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), kind)
    return f"{cores} core{'s' if cores != 1 else ''} of {kind}"


def about(of: str) -> Record:
    """When and on what a record was made; `of` is the device, "" = as found."""
    versions = {"python": sys.version.split()[0], "jax": jax.__version__, "flax": flax.__version__}
    return {"date": datetime.date.today().isoformat(), "device": of or device(), **versions}


def path(out: pathlib.Path, name: str) -> pathlib.Path:
    """The file of a claim's records."""
    return out / f"claim_{name}.json"


def load(out: pathlib.Path, name: str) -> list[Record]:
    """The records of a claim."""
    file = path(out, name)
    return json.loads(file.read_text())["records"] if file.exists() else []


def add(out: pathlib.Path, name: str, record: Record) -> None:
    """Puts a record in the place of the one of the same arm and seed; processes may do so at once."""
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        kept = {(one["arm"], one["seed"]): one for one in load(out, name)}
        kept[record["arm"], record["seed"]] = record
        lines = ",\n".join(json.dumps(kept[key]) for key in sorted(kept))
        temporary = path(out, name).with_suffix(".tmp")
        temporary.write_text(f'{{"claim": {json.dumps(name)}, "records": [\n{lines}\n]}}\n')
        os.replace(temporary, path(out, name))


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """One process at a time: a lock on the folder itself, which leaves no file behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def current(claim: claim_lib.Claim, records: list[Record], steps: int) -> dict[str, list[Record]]:
    """Records by arm, in the claim's order and by seed, of the arms as they are written now."""
    found: dict[str, list[Record]] = {}
    for arm in claim.arms:
        wanted = claim_lib.identity(claim, arm, steps or claim_lib.configured(claim, arm).num_train_steps)
        mine = [one for one in records if one["arm"] == arm.name and all(one[key] == value for key, value in wanted.items())]
        if mine:
            found[arm.name] = sorted(mine, key=lambda one: one["seed"])
    return found


def report(claim: claim_lib.Claim, out: pathlib.Path, steps: int) -> str:
    """Writes the table and the picture of a claim; returns the table."""
    records = load(out, claim.name)
    arms = current(claim, records, steps)
    if not arms:
        raise SystemExit(f"{path(out, claim.name)} has no record of claim {claim.name}: run it first")
    stale = sorted({one["arm"] for one in records} - set(arms))
    every = [one for mine in arms.values() for one in mine]
    table = _table(claim, arms)
    title = f"{claim.title}: {claim.figure} on validation rows, mean of the seeds"
    curves = list(map(_line, arms, arms.values(), range(len(arms))))
    experiment.picture(out / f"claim_{claim.name}.svg", curves, x_label="step", y_label=claim.figure, title=title, labels=200)
    shared = ("date", "device", "python", "jax", "flax", "steps")
    words = {key: ", ".join(sorted({str(one[key]) for one in every})) for key in shared}
    lines = [
        f"# {claim.title}",
        claim.question,
        f"`python benchmarks/claims.py --claim={claim.name}`, {words['date']}, {words['device']}, Python {words['python']}, "
        f"jax {words['jax']}, flax {words['flax']}; {words['steps']} steps. Evaluated on "
        + (f"{claim.eval_batches} batches of the {claim.split} split." if claim.eval_batches else f"the whole {claim.split} split."),
        table,
        "Means over the seeds and their standard errors; arms are compared seed by seed. On a CPU, ms are of processor time.",
        f"All arms: {_fields(claim.changes) or 'as the presets are'}.",
        "\n".join(f"- {arm.name}: `{arm.config}` {_fields(arm.changes)}".rstrip() for arm in claim.arms if arm.name in arms),
        f"![{claim.title}](claim_{claim.name}.svg)",
    ]
    if stale:
        lines.insert(5, f"Not shown, since made with other settings: {', '.join(stale)}.")
    (out / f"claim_{claim.name}.md").write_text("\n\n".join(lines) + "\n")
    return table


def _fields(changes: claim_lib.Changes) -> str:
    return ", ".join(f"{field} = {value}" for field, value in changes.items())


def _table(claim: claim_lib.Claim, arms: dict[str, list[Record]]) -> str:
    """One row per arm: mean, each seed, its standard error, and against the reference over the seeds that both have."""
    figure, reference = claim.figure, claim.reference or claim.arms[0].name
    base = {one["seed"]: one["figures"][figure] for one in arms.get(reference, [])}
    against = f"{'ratio to' if claim.ratio else 'difference to'} {reference}"
    columns = {"arm": "", "parameters": ",", figure: ".4g", "each seed": "", "standard error": ".2g", against: ""}
    columns |= dict(claim.shown) | {"ms / step": ".0f"}
    rows = []
    for name, mine in arms.items():
        values = [one["figures"][figure] for one in mine]
        row: dict[str, Any] = {"arm": name, "parameters": mine[0]["parameters"], figure: statistics.mean(values)}
        row["each seed"] = ", ".join(f"{value:.4g}" for value in values)
        row["standard error"] = standard_error(values)
        pairs = [(one["figures"][figure], base[one["seed"]]) for one in mine if one["seed"] in base]
        if name != reference and pairs:
            compared = [a / b if claim.ratio else a - b for a, b in pairs]
            error = standard_error(compared)
            sign = "" if claim.ratio else "+"
            row[against] = format(statistics.mean(compared), f"{sign}.3f") + ("" if error is None else f" ± {error:.3f}")
        for key in claim.shown:
            found = [one["figures"][key] for one in mine if one["figures"].get(key) is not None]
            row[key] = statistics.mean(found) if found else None
        row["ms / step"] = 1e3 * statistics.median(one["seconds_per_step"] for one in mine)
        rows.append(row)
    return crossover.show(rows, columns)


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _line(name: str, records: list[Record], colour: int) -> charts.Line:
    """The mean learning curve of an arm; from the fifth on colours come again, with points."""
    steps = [step for step, _ in records[0]["course"]]
    values = np.mean([[value for _, value in one["course"]] for one in records], axis=0)
    return charts.Line(name, np.array(steps, np.float64), values, colour % 4, points=colour >= 4)

"""Does the input pipeline of images keep the step fed? Images per second of the pipeline alone, and the loop beside the bare step.

    python benchmarks/image_input.py

First the loaders of several sets, as their configs augment them and as an evaluation reads them: digits, faces, the generated
look-up task, clips of moving digits, and folders of PNG and JPEG files that are generated on the fly (375 x 500 pixels, in colour)
with ImageNet's recipe at 224 pixels. Then, for some configs on digits, the loop (data, a line of metrics every 10 steps, a
checkpoint every 100) beside the bare compiled step on one fixed batch, which is timed before and after.

On a CPU the pipeline and the step share the cores, so that no time of the pipeline is hidden behind the step. Therefore beside
the wall clock the time of the CPU is given: seconds of all threads of this process, which other programs on the machine disturb
less. Three minutes on one core.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import experiment
import jax
import numpy as np
from loop_overhead import ROOT
from PIL import Image

from attnlab.data.images.dataset import ImageData, open_images
from attnlab.training import cli, loop
from attnlab.training.build import build
from attnlab.training.mesh import global_batch
from attnlab.training.metrics import MetricsWriter

FLAGS = (
    ("batches", 30, "batches of each loader that are timed"),
    ("steps", 120, "steps of the loop"),
    ("bare", 30, "bare steps, before the loop and again after it"),
)
SETS = {
    "digits, 28 pixels": "vit.py:mnist",
    "faces, 56 x 48 pixels": "vit.py:faces",
    "lookup, 32 pixels in colour": "vit.py:lookup",
    "moving digits, 6 frames of 32 pixels": "uniformer.py:video_mnist",
}
LOOPS = ("moat.py:mnist", "vit.py:mnist")


class Stopwatch:
    """Seconds since it was made: by the wall clock, and of the CPU in all threads of this process."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Returns (wall, CPU)."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def config_of(spec: str) -> Any:
    """Returns the config of a file of configs/ and a preset."""
    return cli.load_config(f"{ROOT / 'configs'}/{spec}")


def rates(data: ImageData, batch_size: int, batches: int, augment: bool) -> tuple[float, float]:
    """Images of the train split per second of the wall clock, and of the CPU."""
    loader = data.loader("train", batch_size=batch_size, seed=0, shuffle=True, repeat=True, augment=augment)
    for _ in range(max(8, min(60, loader.rows_per_epoch // batch_size + 1))):  # small sets keep their decoded images
        next(loader)
    watch = Stopwatch()
    for _ in range(batches):
        next(loader)
    wall, cpu = watch.read()
    loader.close()
    return batches * batch_size / wall, batches * batch_size / cpu


def folder_of(path: pathlib.Path, suffix: str) -> str:
    """Writes 2 classes of 60 pictures, random blots with some noise; returns the name of the set."""
    rng = np.random.default_rng(0)
    for number in range(120):
        blots = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(blots) + rng.normal(0, 6, (375, 500, 3))
        place = path / f"class{number % 2}" / f"{number}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(place)
    return f"folder:{path}"


def pipelines(batches: int) -> list[dict[str, Any]]:
    """The loaders of all sets."""
    rows = []

    def add(name: str, config: Any, batches: int) -> None:
        data = open_images(config)
        wall, cpu = rates(data, config.batch_size, batches, True)
        plain = rates(data, config.batch_size, batches, False)[1]
        rows.append({"set": name, "augmented_per_wall_second": wall, "augmented": cpu, "evaluation": plain})
        print(rows[-1], flush=True)

    for name, spec in SETS.items():
        add(name, config_of(spec), batches)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".png", ".jpg"):
            config = config_of("vit.py:ti16")
            config.data.name, config.data.num_classes = folder_of(pathlib.Path(folder) / suffix[1:], suffix), 0
            config.data.workers, config.batch_size = 0, 16
            add(f"{suffix[1:].upper()} files of 375 x 500 at 224 pixels", config, max(1, batches // 3))
    return rows


def bare(step: Any, state: Any, batch: Any, steps: int) -> tuple[float, float, Any]:
    """Seconds per step, by the wall clock and of the CPU, and the state."""
    watch = Stopwatch()
    for _ in range(steps):
        state, out = step(state, batch)
    jax.block_until_ready(out)
    wall, cpu = watch.read()
    return wall / steps, cpu / steps, state


def looped(config: Any) -> tuple[float, float]:
    """Seconds per step of the whole loop, by the wall clock and of the CPU, after its first ten steps."""
    marks, write, watch = [], MetricsWriter.write, Stopwatch()

    def marking(writer: MetricsWriter, step: int, values: dict[str, Any]) -> None:
        write(writer, step, values)
        if "step_seconds" in values:
            marks.append((step, *watch.read()))

    with tempfile.TemporaryDirectory() as workdir, mock.patch.object(MetricsWriter, "write", marking):
        loop.train(config, workdir)
    first, last = marks[0], marks[-1]
    return tuple((last[i] - first[i]) / (last[0] - first[0]) for i in (1, 2))


def overhead(spec: str, steps: int, bare_steps: int) -> dict[str, Any]:
    """The loop of one config beside its bare step."""
    config = config_of(spec)
    config.num_train_steps, config.log_every_steps, config.optimizer.warmup_steps = steps, 10, 1
    config.eval_every_steps, config.checkpoint_every_steps = 10 * steps, 100
    data = open_images(config)
    run = build(config, outputs=data.outputs)
    loader = data.loader("train", batch_size=config.batch_size, seed=0, shuffle=True, repeat=True)
    batch = global_batch(next(loader), {name: spec.sharding for name, spec in run.batch_spec.items()}, config.batch_size)
    loader.close()
    with run.context():
        step = run.train_step.lower(run.abstract_state, run.batch_spec).compile()
        _, _, state = bare(step, run.init_state(), batch, 5)
        wall, cpu, state = bare(step, state, batch, bare_steps)
    whole_wall, whole_cpu = looped(config)
    with run.context():  # once more: the loop lies between two measurements
        again, again_cpu, _ = bare(step, state, batch, bare_steps)
    wall, cpu = statistics.mean((wall, again)), statistics.mean((cpu, again_cpu))
    row = {"config": spec, "batch_size": config.batch_size, "bare_wall_ms": 1e3 * wall, "loop_wall_ms": 1e3 * whole_wall,
           "bare_cpu_ms": 1e3 * cpu, "loop_cpu_ms": 1e3 * whole_cpu, "pipeline_cpu_ms": 1e3 * config.batch_size / rates(
               data, config.batch_size, 30, True)[1]}  # fmt: skip
    print(row, flush=True)
    return row


def table(sets: list[dict[str, Any]], loops: list[dict[str, Any]]) -> str:
    """Both tables as Markdown."""
    lines = [
        "| set | images per CPU second, augmented | by the wall clock | as an evaluation reads them, per CPU second |",
        "|---|---|---|---|",
    ]
    for row in sets:
        figures = (row[key] for key in ("augmented", "augmented_per_wall_second", "evaluation"))
        lines.append(f"| {row['set']} | " + " | ".join(f"{figure:,.0f}" for figure in figures) + " |")
    lines += [
        "",
        "| config, images a step | bare step, CPU | loop, CPU | more | of that the pipeline | bare step, wall | loop, wall | more |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in loops:
        more = {clock: 100 * (row[f"loop_{clock}_ms"] / row[f"bare_{clock}_ms"] - 1) for clock in ("cpu", "wall")}
        share = 100 * row["pipeline_cpu_ms"] / row["bare_cpu_ms"]
        cells = [
            f"`{row['config']}`, {row['batch_size']}",
            *(f"{row[f'{what}_cpu_ms']:.1f} ms" for what in ("bare", "loop")), f"{more['cpu']:+.1f} %", f"{share:.1f} %",
            *(f"{row[f'{what}_wall_ms']:.1f} ms" for what in ("bare", "loop")), f"{more['wall']:+.1f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiment.integers(parser, FLAGS)
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    parser.add_argument("--loops", default=",".join(LOOPS), help="configs whose loop is timed (default %(default)s)")
    options = parser.parse_args()
    if min(options.batches, options.bare) < 1 or options.steps < 30:
        parser.error("--batches and --bare need 1 or more, --steps 30 or more")
    sets = pipelines(options.batches)
    loops = [overhead(spec, options.steps, options.bare) for spec in filter(None, options.loops.split(","))]
    sizes = {name: getattr(options, name) for name, _, _ in FLAGS}
    figures = {"sets": sets, "loops": loops}
    experiment.save("image_input", "Input of images: its speed, and the loop beside the step", options.out, sizes, figures,
                    table(sets, loops))  # fmt: skip


if __name__ == "__main__":
    main()

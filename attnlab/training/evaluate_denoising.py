"""How eval.py looks at a diffusion model: the error of its noise, and samples of every class."""

from __future__ import annotations

import html
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis import images
from attnlab.analysis.page import CSS
from attnlab.inference.denoising import contact_sheet, denoise
from attnlab.training.evaluate import Options, Restored
from attnlab.training.progress import si

CLASSES, PER_CLASS = 10, 8  # of the samples
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class DenoisingEvaluation:
    """The task's figures, and samples by the implicit sampler as `config.diffusion` says.

    Attributes:
        figures: those of the task.
    """

    def __init__(self, restored: Restored, options: Options):
        self.folder, self.run, self.data, self.variables = restored.folder, restored.run, restored.dataset, restored.variables
        self.options, self.notes = options, restored.notes
        self.figures: dict[str, Any] = dict(restored.figures)

    def table(self) -> str:
        """The figures as text for a terminal."""
        figures, run = self.figures, self.run
        of = " (moving average)" if figures["parameters"] == "ema" else ""
        return "\n".join(
            [
                f"{figures['split']} split, step {figures['step']}{of}: {figures['images']:,} images of {self.data.name}, "
                f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
                f"  loss            {figures['loss']:9.4f} (squared error of the noise)",
                f"  evaluation      {si(figures['images_per_second'], 'images/s')}",
                *(f"  note: {note}" for note in self.notes),
            ]
        )

    def samples(self) -> np.ndarray:
        """Draws pictures [classes * 8, Y, X, C] uint8, eight of each of the first ten classes in a row."""
        task, variables = self.run.task, self.variables
        collections = {name: tree for name, tree in variables.items() if name != "params"}
        labels = jnp.repeat(jnp.arange(min(CLASSES, task.num_classes), dtype=jnp.int32), PER_CLASS)
        options = {"steps": task.options.sample_steps, "guidance": task.options.guidance, "no_class": task.num_classes}

        def draw(variables: Any, rng: jax.Array) -> jax.Array:
            def predict(*inputs: jax.Array) -> jax.Array:
                return task.predict_noise(variables["params"], collections, *inputs)

            return denoise(predict, rng, labels, task.image_shape, task.schedule, limit=1.0, **options)

        with self.run.context():
            drawn = np.asarray(jax.jit(draw)(variables, jax.random.key(self.options.seed)))
        return np.stack([self.data.normalise.undo(image) for image in drawn])

    def write_report(self) -> pathlib.Path:
        """Writes `report.html`, and `samples.png` beside it, into the run's folder."""
        folder = pathlib.Path(self.folder)
        sheet = contact_sheet(self.samples(), PER_CLASS)
        (folder / "samples.png").write_bytes(images.picture_png(sheet))
        task, figures = self.run.task, self.figures
        names = ", ".join(self.data.class_names[:CLASSES])
        facts = [
            ("data", self.data.describe()),
            ("parameters", f"{self.run.num_params():,}"),
            ("split", f"{figures['split']}, {figures['images']:,} images"),
            ("squared error of the noise", f"{figures['loss']:.4f}"),
            ("seen in training", f"{figures['step']:,} steps"),
            ("sampling", f"{task.options.sample_steps} steps, guidance {task.options.guidance:g}, seed {self.options.seed}"),
        ]
        listed = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)
        title = html.escape(folder.resolve().name)
        width = 4 * sheet.shape[1]
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{title}</title><style>{CSS}</style>'
            f'<main><h1>{title}</h1><dl class="facts">{listed}</dl><h2>Samples</h2>'
            f'<p class="note">One row of each class: {html.escape(names)}.</p>'
            f'<div class="scroll"><img class="map" style="filter:none" width="{width}" alt="samples of each class" '
            f'src="{images.data_uri(sheet)}"></div></main></html>\n'
        )
        path = folder / "report.html"
        path.write_text(page, encoding="utf-8")
        return path

"""How eval.py looks at an image classifier: accuracy by class, confusion, mistakes, and what its layers attend to."""

from __future__ import annotations

import heapq
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.analysis import image_report, selection, series
from attnlab.analysis.image_report import MapView, Mistake
from attnlab.nn.feature_gates import gate_weights
from attnlab.training import config as config_lib
from attnlab.training import workdir
from attnlab.training.evaluate import Options, Restored
from attnlab.training.mesh import data_shard, global_batch
from attnlab.training.progress import si

MAX_MISTAKES = 24
MAP_IMAGES, MAX_LAYERS = 3, 6  # shown by default
LOAD_IMAGES = 64  # for the loads of heads


class ImageEvaluation:
    """Accuracy by class and the confusion matrix, beside the task's own figures.

    Attributes:
        figures: those of the task, `class_accuracy` (name to share) and `worst_class`.
        confusion: counts [C, C], rows = true classes.
        mistakes: the misclassified images that the model is surest of.
    """

    def __init__(self, restored: Restored, options: Options):
        self.folder, self.run, self.data, self.variables = restored.folder, restored.run, restored.dataset, restored.variables
        self.options, self.notes = options, restored.notes
        self.confusion, self.mistakes = self._predict()
        totals = self.confusion.sum(1)
        shares = {
            name: float(self.confusion[i, i] / totals[i]) for i, name in enumerate(self.data.class_names) if totals[i]
        }
        self.figures: dict[str, Any] = {**restored.figures, "class_accuracy": shares}
        if shares:
            self.figures["worst_class"] = min(shares, key=shares.get)

    def table(self) -> str:
        """The figures as text for a terminal."""
        figures, run = self.figures, self.run
        of = " (moving average)" if figures["parameters"] == "ema" else ""
        shares = sorted(figures["class_accuracy"].items(), key=lambda item: item[1])
        shown = shares if len(shares) <= 10 else shares[:10]
        return "\n".join(
            [
                f"{figures['split']} split, step {figures['step']}{of}: {figures['images']:,} images of {self.data.name}, "
                f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
                f"  loss            {figures['loss']:9.4f} nats/image",
                f"  accuracy        {100 * figures['accuracy']:8.2f} %",
                f"  within five     {100 * figures['accuracy_top5']:8.2f} %",
                f"  evaluation      {si(figures['images_per_second'], 'images/s')}",
                "  accuracy by class" + ("" if len(shown) == len(shares) else f" (the lowest 10 of {len(shares)})"),
                *(f"    {name[:24]:<24} {100 * share:8.2f} %" for name, share in shown),
                *(f"  note: {note}" for note in self.notes),
            ]
        )

    def write_report(self) -> pathlib.Path:
        """Writes `report.html` into the run's folder."""
        folder, config, figures = pathlib.Path(self.folder), self.run.config, self.figures
        attention, routes, notes = self._maps()
        loads, images = self._loads()
        model, batch = self.run.task.describe(config)
        trained = workdir.facts(self.folder)
        percent = {"accuracy": "accuracy", "accuracy_top5": "right within five guesses"}
        page = image_report.ImageReport(
            title=folder.resolve().name,
            summary=f"{config.model.name}, {model}: {self.run.num_params():,} parameters",
            facts=[
                ("trained on", f"{trained['num_devices']} x {trained['device']}" if "device" in trained else "not recorded"),
                ("data", self.data.describe()),
                ("batch", batch),
                ("seen in training", f"{figures['step']:,} steps, {figures['step'] * config.batch_size:,} images"),
                ("optimizer", f"{config.optimizer.name}, {config.optimizer.learning_rate:g}, {config.optimizer.schedule}"),
                ("compute", f"{config.model.dtype}, seed {config.seed}"),
            ],
            figures=[
                ("split", f"{figures['split']}, {figures['images']:,} images"),
                *((name, f"{100 * figures[key]:.2f} %") for key, name in percent.items()),
                ("loss, nats per image", f"{figures['loss']:.4f}"),
                ("evaluation", si(figures["images_per_second"], "images/s")),
            ],
            class_names=self.data.class_names,
            confusion=self.confusion,
            metrics=series.read_metrics(folder / "metrics.jsonl"),
            mistakes=self.mistakes,
            attention=attention,
            routes=routes,
            gates={name: np.asarray(weights) for name, weights in gate_weights(self.variables["params"]).items()},
            loads=loads,
            loads_of=f"{images} images",
            config=config_lib.to_json(config),
            notes=[*self.notes, *notes],
        )
        return image_report.write(page, folder / "report.html")

    def _predict(self) -> tuple[np.ndarray, list[Mistake]]:
        """Runs over the same batches as the figures."""
        run, task, config = self.run, self.run.task, self.run.config
        shardings = {name: spec.sharding for name, spec in run.eval_batch_spec.items()}
        index, count = data_shard(shardings["images"], config.batch_size)
        loader = self.data.loader(
            self.options.split, batch_size=config.batch_size, seed=0, shuffle=self.options.eval_batches is not None,
            repeat=False, shard_index=index, shard_count=count,
        )  # fmt: skip
        names, reader = self.data.class_names, self.data.reader(self.options.split)
        everywhere = NamedSharding(run.mesh, PartitionSpec())

        def predict(variables, batch):
            collections = {name: tree for name, tree in variables.items() if name != "params"}
            shares = jax.nn.softmax(task.predict(variables["params"], collections, batch["images"]))
            return shares.argmax(-1), shares.max(-1), batch["labels"], batch["mask"]

        # Every process gets the whole batch's answers: their labels are not only its own.
        compiled = jax.jit(predict, out_shardings=everywhere)
        confusion = np.zeros((len(names), len(names)), np.int64)
        worst: list[tuple[float, int, Mistake]] = []
        with run.context():
            for batch in itertools.islice(loader, self.options.eval_batches):
                answers = compiled(self.variables, global_batch(batch, shardings, config.batch_size))
                guesses, shares, labels, mask = map(np.asarray, answers)
                np.add.at(confusion, (labels[mask], guesses[mask]), 1)
                mine = slice(index * len(batch["mask"]), (index + 1) * len(batch["mask"]))
                wrong = np.flatnonzero((guesses != labels)[mine] & mask[mine])
                for row in wrong.tolist():
                    share, guess = float(shares[mine][row]), int(guesses[mine][row])
                    picture = self.data.picture(batch["images"][row])
                    record = int(batch["record"][row])
                    mistake = Mistake(picture, names[batch["labels"][row]], names[guess], share, reader.name(record % len(reader)))
                    heapq.heappush(worst, (share, -record, mistake))
                    if len(worst) > MAX_MISTAKES:
                        heapq.heappop(worst)
        loader.close()
        return confusion, [mistake for _, _, mistake in sorted(worst, key=lambda item: -item[0])]

    def _maps(self) -> tuple[list[MapView], list[MapView], list[str]]:
        """What the layers sow about the first images of the split: attention, routes, and notes where there is nothing."""
        model = self.run.task.model
        if not hasattr(model, "capture_attention"):
            return [], [], ["No attention maps: this model has none to show."]
        if len(self.data.image_shape) == 4:
            return [], [], ["No attention maps: those over the frames of a clip are not drawn."]
        batch = self._first(MAP_IMAGES)
        pictures = [self.data.picture(image) for image in batch["images"][batch["mask"]]]
        sown = self._sown(batch, lambda found: found)
        attention = self._views(selection.by_layer(sown, "attention", 4), pictures, image_report.received)
        routes = self._views(selection.by_layer(sown, "route_index", 3), pictures, _chosen)
        notes = [] if attention else ["No attention maps: no layer of this model sows weights over a whole map."]
        return attention, routes, notes

    def _loads(self) -> tuple[list[selection.HeadLoads], int]:
        """The loads of the heads in layers that choose among them, and of how many images."""
        if not hasattr(self.run.task.model, "capture_attention"):
            return [], 0
        batch = self._first(LOAD_IMAGES)
        means = self._sown(batch, lambda found: selection.head_means(found, batch["mask"][:, None]))
        return selection.head_loads(means), int(batch["mask"].sum())

    def _first(self, count: int) -> dict[str, np.ndarray]:
        """Returns a batch of some images of the split, the same on every process."""
        loader = self.data.loader(self.options.split, batch_size=count, seed=1, shuffle=True, repeat=False)
        batch = next(loader)
        loader.close()
        return batch

    def _sown(self, batch: dict[str, np.ndarray], keep: Any) -> Any:
        """What the layers sow about a batch, as `keep` reduces it; nothing else is computed, and nothing compiled for no result."""
        model = self.run.task.model.clone(capture_attention=True)

        def apply(variables: Any, images: jax.Array) -> Any:
            return keep(model.apply(variables, images, mutable=["intermediates"])[1].get("intermediates", {}))

        with self.run.context():
            everywhere = NamedSharding(self.run.mesh, PartitionSpec())
            compiled = jax.jit(apply, out_shardings=everywhere)
            shapes = jax.eval_shape(compiled, self.variables, batch["images"])
            return compiled(self.variables, batch["images"]) if jax.tree.leaves(shapes) else shapes

    def _views(self, layers: list[tuple[str, np.ndarray]], pictures: list[np.ndarray], to_map: Any) -> list[MapView]:
        if self.options.layers is not None:
            layers = [layers[i] for i in self.options.layers if i < len(layers)]
        elif len(layers) > MAX_LAYERS:
            layers = [layers[i] for i in np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int)]
        views = []
        for row, picture in enumerate(pictures):
            for name, values in layers:
                found = to_map(values[row], picture.shape[:2])
                if found is not None:
                    views.append(MapView(picture, found, name))
        return views


def _chosen(index: np.ndarray, image_size: tuple[int, int]) -> np.ndarray | None:
    """Routes [P, k] of one image as a map of how many regions choose each one."""
    grid = image_report.grid_of(len(index), image_size)
    return None if grid is None else np.bincount(index.reshape(-1), minlength=len(index)).reshape(grid).astype(float)

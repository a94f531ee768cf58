"""The loop around the one train step: data in, figures out, evaluation and checkpoints in between."""

from __future__ import annotations

import collections
import math
import os
import platform
import signal
import threading
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from attnlab import __version__, registry
from attnlab.data import Dataset
from attnlab.errors import field_error
from attnlab.training import validation, warm_start, workdir
from attnlab.training.build import Run, build
from attnlab.training.checkpoint import Checkpoints
from attnlab.training.mesh import data_shard, global_batch
from attnlab.training.metrics import MetricsWriter
from attnlab.training.progress import Progress, binary_size, duration, si
from attnlab.training.topology import CHIPS

Pending = collections.namedtuple("Pending", ["step", "metrics", "batch"])
_FATAL = ("loss", "grad_norm", "param_norm")


class NonFiniteLoss(RuntimeError):
    """The loss, the gradient or the parameters stopped being finite; names the step, the batch and the way back."""


class StopSignal:
    """SIGTERM (pre-emption) or SIGINT asks the loop to save and leave; a second SIGINT interrupts at once.

    With several processes the decision has to fall at the same step everywhere: JAX's coordination service watches
    SIGTERM there and answers with a common step.
    """

    def __init__(self):
        self.name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
        return self.name is not None


def train(config: ml_collections.ConfigDict, workdir_path: str) -> dict[str, Any]:
    """Trains the run of a config in a folder, from its newest checkpoint when there is one.

    Returns:
        The figures of the last evaluation, with `step` and `finished`.

    Raises:
        ConfigError: bad input, before compute starts.
        NonFiniteLoss: training diverged.
        CheckpointError: a checkpoint could not be written.
    """
    lead = jax.process_index() == 0
    build(config)  # every check that needs no data, before anything is written
    notes = workdir.prepare(workdir_path, config, write=lead)
    dataset = registry.get("task", config.task).open_data(config)
    _check_same_data(config, dataset)
    run = build(config, outputs=dataset.outputs)
    checkpoints = Checkpoints(workdir_path, config, report=print if lead else lambda _: None)
    try:
        return _Loop(run, dataset, checkpoints, workdir_path, notes, lead).run()
    finally:
        checkpoints.close()


class _Loop:
    def __init__(self, run: Run, dataset: Dataset, checkpoints: Checkpoints, folder: str, notes: list[str], lead: bool):
        self.config, self.run_, self.dataset, self.checkpoints = run.config, run, dataset, checkpoints
        self.folder, self.notes, self.lead = folder, notes, lead
        self.say = (lambda line: print(line, flush=True)) if lead else (lambda line: None)
        self.shardings = {name: spec.sharding for name, spec in run.batch_spec.items()}
        index, count = data_shard(next(iter(self.shardings.values())), self.config.batch_size)
        self.loader = dataset.loader(
            "train",
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shuffle=True,
            repeat=True,
            shard_index=index,
            shard_count=count,
        )
        self.last_eval: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        state, start = self._restore_or_init()
        self._header(start)
        if start >= self.config.num_train_steps:
            self.say(f"nothing to do: step {start} of {self.config.num_train_steps} is done")
            return {"step": start, "finished": True}
        step_fn = self._compile()
        writer = MetricsWriter(self.folder, resume_step=start) if self.lead else None
        try:
            with StopSignal() as stop:
                return self._steps(step_fn, state, start, writer, stop)
        finally:
            self.loader.close()
            if writer:
                writer.close()

    def _steps(self, step_fn, state, start: int, writer: MetricsWriter | None, stop: StopSignal) -> dict[str, Any]:
        config, total = self.config, self.config.num_train_steps
        self.progress = Progress(start, total, enabled=self.lead)
        self.writer = writer
        self.flops = self.run_.task.flops_per_step(self.run_.abstract_state.params)
        begin = time.perf_counter()
        first, last = config.profile_steps or (0, 0)
        pending: Pending | None = None
        batch = next(self.loader)
        saved = start
        for step in range(start + 1, total + 1):
            if step == first:
                jax.profiler.start_trace(os.path.join(self.folder, "profile"))
            state, metrics = self._dispatch(step_fn, state, batch)
            current = Pending(step, metrics, batch)
            stopping = stop.asked(step)
            save = step % config.checkpoint_every_steps == 0 or step == total or stopping
            position = self.loader.get_state() if save else None
            if step < total and not stopping:
                batch = next(self.loader)  # while the device computes
            if pending is not None:
                self._report(pending)
            pending = current
            if step == start + 1:
                self._report(pending)
                pending = None
                self.progress.note(f"first step after {duration(time.perf_counter() - begin)}")
                self.progress.interval(step)
            if last and step == last:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                self.progress.note(f"profile of steps {first} to {last}: {os.path.join(self.folder, 'profile')}")
            evaluate = step % config.eval_every_steps == 0 or step == total
            if (save or evaluate) and pending is not None:
                self._report(pending)  # nothing non-finite is ever saved
                pending = None
            pause = time.perf_counter()
            if save:
                self.checkpoints.save(step, state, {"data": position, "fingerprint": self.dataset.fingerprint})
                saved = step
            if evaluate and not stopping:
                self._evaluate(step, state)
            if save or evaluate:
                self.progress.paused(time.perf_counter() - pause)
            if stopping:
                self.checkpoints.wait()
                self.progress.note(f"{stop.name}: saved step {saved}; the same command goes on from there")
                return {"step": step, "finished": step == total, **self.last_eval}
        self.checkpoints.wait()
        self.progress.note(
            f"done: {total} steps in {duration(time.perf_counter() - begin)}; "
            f"checkpoint {saved} in {self.checkpoints.directory}"
        )
        return {"step": total, "finished": True, **self.last_eval}

    def _dispatch(self, step_fn, state, batch):
        with self.run_.context():
            return step_fn(state, global_batch(batch, self.shardings, self.config.batch_size))

    def _report(self, pending: Pending) -> None:
        """Reads a step's metrics, which by now are computed, and shows them at the logging cadence."""
        step, metrics, batch = pending
        fatal = {name: float(value) for name, value in jax.device_get({key: metrics[key] for key in _FATAL}).items()}
        if not all(map(math.isfinite, fatal.values())):
            self._diverged(step, fatal, batch)
        if step % self.config.log_every_steps and step != self.config.num_train_steps:
            return
        seconds = self.progress.interval(step)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        unit, units = self.run_.task.unit, self.run_.task.units_per_step
        rate = self.flops / seconds
        peak = _peak_flops(self.run_.mesh.devices.flat[0])
        values |= {f"{unit}_per_second": units / seconds, "step_seconds": seconds, "model_flops_per_second": rate}
        if peak:
            values["mfu"] = rate / (peak * self.run_.mesh.size)
        if self.writer:
            self.writer.write(step, values)
        use = f"{100 * values['mfu']:.1f}% MFU" if peak else si(rate, "FLOP/s")
        self.progress.line(step, f"loss {values['loss']:.4f}  {si(units / seconds)} {unit}/s  {use}")

    def _evaluate(self, step: int, state: Any) -> None:
        figures = validation.evaluate(self.run_, state, self.dataset, "validation", self.config.eval_batches)
        self.last_eval = {f"eval/{name}": value for name, value in figures.items()}
        if self.writer:
            self.writer.write(step, self.last_eval)
        self.progress.note(f"step {step}: validation {self.run_.task.summary(figures)}")

    def _diverged(self, step: int, fatal: dict[str, float], batch: dict[str, Any]) -> None:
        self.checkpoints.wait()
        good = self.checkpoints.steps()
        back = f"step {good[-1]} in {self.checkpoints.directory}" if good else "none was written yet"
        found = ", ".join(f"{name} = {value}" for name, value in fatal.items())
        raise NonFiniteLoss(
            f"step {step}: not finite ({found}). Batch: {self.loader.describe(batch)}. Last good checkpoint: {back}. "
            "Lower config.optimizer.learning_rate or config.optimizer.clip_norm, or look at that batch."
        )

    def _restore_or_init(self) -> tuple[Any, int]:
        restored = self.checkpoints.restore(self.run_.abstract_state)
        if restored is None:
            state = self.run_.init_state()
            if self.config.init_from:
                state = warm_start.load(self.run_, state, self.config.init_from)
                self.say(f"parameters of {self.config.init_from}")
            return state, 0
        state, step, extra = restored
        self.loader.set_state(extra["data"])
        return state, step

    def _compile(self) -> Any:
        begin = time.perf_counter()
        with self.run_.context():
            compiled = self.run_.train_step.lower(self.run_.abstract_state, self.run_.batch_spec).compile()
        memory = compiled.memory_analysis()
        line = f"compiled in {duration(time.perf_counter() - begin)}"
        if memory is not None:
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            line += (
                f"; memory per device {binary_size(held + memory.temp_size_in_bytes)} "
                f"(state and batch {binary_size(memory.argument_size_in_bytes)}, "
                f"temporaries {binary_size(memory.temp_size_in_bytes)})"
            )
        self.say(line)
        return compiled

    def _header(self, start: int) -> None:
        config, run = self.config, self.run_
        device = run.mesh.devices.flat[0]
        mesh = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1) or "one device"
        model, batch = run.task.describe(config)
        processes = jax.process_count()
        facts = {
            "attnlab": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": device.device_kind,
            "num_devices": run.mesh.size,
            "num_processes": processes,
            "num_params": run.num_params(),
            "data": config.data.name,
            "data_fingerprint": self.dataset.fingerprint,
            "outputs": self.dataset.outputs,
        }
        if self.lead:
            self.dataset.save(self.folder)
            workdir.record(self.folder, config, facts)
        self.say(
            f"attnlab {__version__}, jax {jax.__version__}: {self.folder}\n"
            f"  devices  {run.mesh.size} x {device.device_kind} ({device.platform}), {processes} "
            f"process{'es' if processes > 1 else ''}, mesh {mesh}\n"
            f"  model    {config.model.name}, {model}: {si(run.num_params())} parameters\n"
            f"  data     {self.dataset.describe()}\n"
            f"  step     {batch} = {si(run.task.units_per_step)} {run.task.unit}, "
            f"{si(run.task.flops_per_step(run.abstract_state.params), 'FLOP')}; {config.num_train_steps} steps"
        )
        if start:
            self.say(f"resumed from step {start}")
        for note in self.dataset.notes:
            self.say(f"  note: {note}")
        for note in self.notes:
            self.say(f"  changed since the run began: {note}")


def _check_same_data(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """Every process must see the same content, or the global batch is a mixture that no restart can repeat."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = np.array([int(dataset.fingerprint[start : start + 8], 16) for start in (0, 8, 16, 24)], np.uint32)
    different = np.flatnonzero((multihost_utils.process_allgather(mine) != mine).any(axis=-1))
    if different.size:
        raise field_error(
            "config.data.name", config.data.name,
            f"has other content in process {jax.process_index()} than in process {different[0]}",
            "Give every process the same files",
        )  # fmt: skip


def _peak_flops(device: jax.Device) -> float:
    """bfloat16 FLOP/s of a device that the chip table knows, else 0."""
    return next((chip.peak_flops for chip in CHIPS.values() if chip.device_kind == device.device_kind), 0.0)

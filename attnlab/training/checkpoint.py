"""Checkpoints of a run: asynchronous, atomic, kept by policy, with the data iterator's position inside (Orbax)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath

from attnlab.errors import ConfigError

Report = Callable[[str], None]


class CheckpointError(RuntimeError):
    """Writing a checkpoint failed; names the step, the cause and the last good checkpoint."""


class Checkpoints:
    """The folder `<workdir>/checkpoints`.

    A step's folder appears under its final name only when it is complete. The newest `checkpoint.keep` stay, and every
    multiple of `checkpoint.keep_every`.
    """

    def __init__(self, workdir: str, config: ml_collections.ConfigDict, *, report: Report = print, read_only: bool = False):
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        self._report = report
        self._read_only = read_only
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.checkpoint.keep,
                keep_period=config.checkpoint.keep_every or None,
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=not read_only,
            ),
            item_names=("state", "extra"),
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.directory.exists():
            return []
        return sorted(self._manager.all_steps(read=True))

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns when the state is copied off the devices.

        Raises:
            CheckpointError: this write, or the one before it, failed.
        """
        try:
            self.wait()
            self._saving = step
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
            )
        except CheckpointError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when the write in progress is complete.

        Raises:
            CheckpointError: it failed.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def restore(self, abstract_state: Any, *, step: int | None = None) -> tuple[Any, int, dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read, onto the shardings of `abstract_state`.

        A damaged one is reported, moved to `<workdir>/damaged_checkpoints` (unless read-only) and the one before it is
        tried. Call it outside of `jax.set_mesh`.

        Returns:
            (state, step, extra), or None when there is no checkpoint.

        Raises:
            ConfigError: the named step does not exist, every checkpoint is damaged, or the newest one is of another
                model.
        """
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise ConfigError(f"{self.directory} has no checkpoint of step {step}. It has {steps or 'none'}.")
            steps = [step]
        damaged = []
        for candidate in reversed(steps):
            try:
                self._check_structure(candidate, abstract_state)
                restored = self._manager.restore(
                    candidate,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state), extra=ocp.args.JsonRestore()
                    ),
                )
            except ConfigError:
                raise
            except Exception as error:  # Orbax, TensorStore and JSON each raise their own kinds
                damaged.append(candidate)
                self._report(f"checkpoint {candidate} is damaged ({_root_cause(error)})")
                continue
            if damaged:
                self._report(f"using checkpoint {candidate} instead")
                self._set_aside(damaged)
            return restored["state"], candidate, restored["extra"]
        if steps:
            raise ConfigError(
                f"no checkpoint in {self.directory} can be read (tried {steps[::-1]}). "
                "Restore the folder from a backup, or start over in another --workdir."
            )
        return None

    def close(self) -> None:
        """Waits for the write in progress and releases the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_structure(self, step: int, abstract_state: Any) -> None:
        """A readable checkpoint with other shapes is of another model, not damaged."""
        metadata = ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / "state")
        saved = _shapes(getattr(metadata, "tree", metadata))
        wanted = _shapes(abstract_state)
        different = [key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key)]
        different.sort(key=lambda key: (not key.startswith("params/"), key))
        if different:
            lines = [f"  {key}: saved {saved.get(key, 'absent')}, config {wanted.get(key, 'absent')}" for key in different]
            raise ConfigError(
                f"checkpoint {step} in {self.directory} is of another model. Use its config, or another --workdir.\n"
                + "\n".join(lines[:5])
                + (f"\n  and {len(lines) - 5} more" if len(lines) > 5 else "")
            )

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints out of the way of the steps to come; nothing is deleted."""
        if self._read_only or jax.process_index() != 0:
            return
        aside = self.directory.parent / "damaged_checkpoints"
        aside.mkdir(exist_ok=True)
        for step in steps:
            target = aside / f"{step}.{len(list(aside.glob(f'{step}.*')))}"
            (self.directory / str(step)).rename(target)
            self._report(f"moved the damaged checkpoint {step} to {target}")
        self._manager.reload()

    def _failed(self, error: Exception) -> CheckpointError:
        step, self._saving = self._saving, None
        good = [done for done in self.steps() if done != step]
        kept = f"the last good checkpoint is step {good[-1]}" if good else "there is no earlier checkpoint"
        return CheckpointError(
            f"checkpoint of step {step} in {self.directory} could not be written ({_root_cause(error)}); {kept}. "
            "Free space or mend the folder, then start the same command again: it resumes there."
        )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:240]}"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape") and leaf.shape is not None
    }

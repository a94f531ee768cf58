"""Whole runs: they learn, resume bit for bit, stop politely, and lose nothing when things break."""

import json
import pathlib
import random
import signal
import time

import jax
import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.training import loop, metrics
from attnlab.training.build import build
from attnlab.training.checkpoint import Checkpoints


def losses(workdir):
    """Step -> loss of every logged step, each step once."""
    lines = [line for line in metrics.read(pathlib.Path(workdir) / "metrics.jsonl") if "loss" in line]
    steps = [line["step"] for line in lines]
    assert len(steps) == len(set(steps)), "a step is logged twice"
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def undisturbed(make_tiny, tmp_path_factory):
    """The workdir of the tiny run, never interrupted."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = loop.train(make_tiny(), str(workdir))
    assert result["finished"]
    assert result["eval/bits_per_byte"] > 0
    return workdir


def restored(workdir, config, step=None):
    run = build(config)
    checkpoints = Checkpoints(str(workdir), config, read_only=True)
    state, step, _ = checkpoints.restore(run.abstract_state, step=step)
    checkpoints.close()
    return state, step


def assert_same_state(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_writes_what_tools_read(undisturbed, tiny):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "tokens_per_second", "learning_rate", "grad_norm"} <= lines[0].keys()
    assert losses(undisturbed).keys() == set(range(1, 13))
    assert losses(undisturbed)[12] < losses(undisturbed)[1]
    assert json.loads((undisturbed / "config.json").read_text())["model"]["dim"] == 32
    assert len(json.loads((undisturbed / "run.json").read_text())["data_fingerprint"]) == 64
    assert sorted(int(path.name) for path in (undisturbed / "checkpoints").iterdir()) == [6, 9, 12]
    assert list((undisturbed / "tensorboard").glob("events.out.tfevents.*"))


def test_pre_emption_saves_and_the_resumed_run_is_the_same(undisturbed, tiny, tmp_path, monkeypatch, capsys):
    for stop_at in (4, 5):  # between checkpoints, twice
        asked = loop.StopSignal.asked

        def at(self, step, stop_at=stop_at):
            self.name = "SIGTERM" if step == stop_at else None
            return self.name is not None

        monkeypatch.setattr(loop.StopSignal, "asked", at)
        assert loop.train(tiny(), str(tmp_path)) == {"step": stop_at, "finished": False}
        assert f"SIGTERM: saved step {stop_at}" in capsys.readouterr().out
        monkeypatch.setattr(loop.StopSignal, "asked", asked)
    loop.train(tiny(), str(tmp_path))
    assert "resumed from step 5" in capsys.readouterr().out
    assert losses(tmp_path) == losses(undisturbed)
    assert_same_state(restored(tmp_path, tiny())[0], restored(undisturbed, tiny())[0])
    assert loop.train(tiny(), str(tmp_path))["finished"]
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"data.packing": "packed", "grad_accum": 2, "ema_decay": 0.9},
        {"model.pattern": ("sigmoid", "softmax"), "model.remat": "full", "loss_chunk": 8, "data.workers": 1},
        {"model.dropout": 0.1, "model.scan_layers": False, "model.mixer": "sigmoid"},
    ],
    ids=["packed", "pattern", "dropout"],
)
def test_other_settings_resume_bit_for_bit(tiny, tmp_path, changes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"num_train_steps": 6, "eval_every_steps": 100} | changes
    loop.train(tiny(**changes), str(whole))
    # The same schedule, cut at step 3 by removing what came later, as a kill would leave it.
    loop.train(tiny(**changes), str(parts))
    for path in (parts / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    loop.train(tiny(**changes), str(parts))
    assert losses(parts) == losses(whole)
    assert_same_state(restored(parts, tiny(**changes))[0], restored(whole, tiny(**changes))[0])


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty_folder"])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(undisturbed, tiny, tmp_path, capsys, damage):
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "12"
    files = [path for path in (newest / "state").rglob("d/*") if path.is_file()]
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        if damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            for position in range(len(content) // 4, len(content), 97):
                content[position] ^= 0xFF
            path.write_bytes(content)
        elif damage == "delete":
            path.unlink()
    if damage == "empty_folder":
        shutil.rmtree(newest / "state")
    loop.train(tiny(), str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "checkpoint 12 is damaged" in out
    assert "using checkpoint 9" in out
    assert (tmp_path / "run" / "damaged_checkpoints" / "12.0").exists()
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_all_checkpoints_damaged_changes_nothing(undisturbed, tiny, tmp_path):
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run")
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for folder in folders:
        shutil.rmtree(folder / "state")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* can be read"):
        loop.train(tiny(), str(tmp_path / "run"))
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == folders


def test_workdir_of_another_config_is_refused(undisturbed, tiny):
    before = (undisturbed / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"config\.model\.dim: the run has 32, now 64"):
        loop.train(tiny(**{"model.dim": 64}), str(undisturbed))
    assert (undisturbed / "config.json").read_text() == before


def test_unwritable_workdir(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        loop.train(tiny(), str(tmp_path / "file" / "run"))
    with pytest.raises(ConfigError, match=r"--workdir=gs://bucket/run is an address.*Mount"):
        loop.train(tiny(), "gs://bucket/run")


def test_checkpoint_of_another_model_names_the_arrays(undisturbed, tiny):
    with pytest.raises(ConfigError, match=r"params/embed/embedding: saved \(320, 32\), config \(320, 64\)"):
        restored(undisturbed, tiny(**{"model.dim": 64}))
    with pytest.raises(ConfigError, match="no checkpoint of step 7"):
        restored(undisturbed, tiny(), step=7)


def test_divergence_names_step_batch_and_way_back(tiny, tmp_path, monkeypatch):
    changes = {"optimizer.clip_norm": 0.0, "checkpoint_every_steps": 2}
    loop.train(tiny(**changes, num_train_steps=4), str(tmp_path))
    restore = Checkpoints.restore

    def poisoned(self, abstract_state, **kwargs):
        state, step, extra = restore(self, abstract_state, **kwargs)
        return state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params)), step, extra

    monkeypatch.setattr(Checkpoints, "restore", poisoned)
    with pytest.raises(loop.NonFiniteLoss) as error:
        loop.train(tiny(**changes), str(tmp_path))
    monkeypatch.undo()
    assert "step 5: not finite" in str(error.value)
    assert "Batch: text:" in str(error.value) and "sha256" in str(error.value)
    assert "Last good checkpoint: step 4" in str(error.value)
    assert restored(tmp_path, tiny(**changes))[1] == 4


def test_infinite_learning_rate_stops_the_command(run_python, tiny_flags, tmp_path):
    flags = tiny_flags(tmp_path, **{"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0})
    process = run_python(flags, check=False)
    assert process.returncode == 1
    assert "not finite" in process.stderr and "none was written yet" in process.stderr
    assert "Traceback" not in process.stderr


FULL_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = sys.argv[1:]
runpy.run_path("train.py", run_name="__main__")
"""


def test_full_disk_during_a_checkpoint_keeps_the_earlier_ones(run_python, tiny_flags, tmp_path):
    run_python(tiny_flags(tmp_path, num_train_steps=3))
    flags = tiny_flags(tmp_path, num_train_steps=9)
    process = run_python(["-c", FULL_DISK, *flags], check=False, env={"JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert process.returncode == 1, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("error: checkpoint of step")
    assert "could not be written" in last and "last good checkpoint is step 3" in last
    assert "resumed from step 3" in run_python(flags).stdout
    assert losses(tmp_path).keys() == set(range(1, 10))


def test_sigterm_and_sigint_save_and_exit_cleanly(start_python, run_python, tiny_flags, tmp_path):
    flags = tiny_flags(tmp_path, num_train_steps=4000, checkpoint_every_steps=100_000, eval_every_steps=100_000)
    for number in (signal.SIGTERM, signal.SIGINT):
        with start_python(flags) as process:
            for line in process.stdout:
                if line.startswith("step"):
                    break
            process.send_signal(number)
            out = process.stdout.read()
        assert process.returncode == 0, out
        assert f"{signal.Signals(number).name}: saved step" in out


def test_killed_at_random_moments_resumes_bit_for_bit(start_python, run_python, tiny_flags, tmp_path):
    """SIGKILL, twenty times: before the first step, between steps, while checkpoints are written."""
    fields = {"num_train_steps": 150, "checkpoint_every_steps": 2, "eval_every_steps": 1000, "log_every_steps": 1}
    run_python(tiny_flags(tmp_path / "whole", **fields))
    rng = random.Random(0)
    flags = tiny_flags(tmp_path / "killed", **fields)
    kills = 0
    while kills < 20:
        with start_python(flags) as process:
            deadline = None
            for line in process.stdout:  # from the first step on, so that most kills meet training
                if line.startswith("step") and deadline is None:
                    deadline = time.monotonic() + rng.random() * 0.15
                if deadline is not None and time.monotonic() > deadline:
                    process.kill()
                    break
            process.stdout.read()
        if process.returncode == 0:
            break  # finished between two kills: enough of them below
        assert process.returncode == -signal.SIGKILL
        kills += 1
    out = run_python(flags).stdout
    assert kills >= 10
    assert "resumed from step" in out or "nothing to do" in out
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")

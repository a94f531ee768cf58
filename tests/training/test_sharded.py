"""Eight forced devices equal one; checkpoints move between meshes; two processes train, one is killed, both resume."""

import json
import pathlib
import signal
import socket

import numpy as np
import pytest

EIGHT_EQUALS_ONE = """
import json, sys
import jax, numpy as np
from attnlab.training import cli
from attnlab.training.build import build
from attnlab.training.checkpoint import Checkpoints
from attnlab.training.mesh import global_batch

MESHES = {
    "data": dict(data=8), "fsdp": dict(data=1, fsdp=8), "tensor": dict(data=1, tensor=8),
    "data x fsdp x tensor": dict(data=2, fsdp=2, tensor=2), "context": dict(data=2, context=4),
}

def config(mesh):
    config = cli.load_config("configs/lm.py:smoke")
    config.num_train_steps, config.seq_len, config.batch_size = 20, 16, 8
    config.model.dim, config.model.num_heads, config.model.pattern = 32, 8, ("sigmoid", "softmax")
    for axis, size in mesh.items():
        config.mesh[axis] = size
    return config

def losses(run):
    rng = np.random.default_rng(0)
    shardings = {name: spec.sharding for name, spec in run.batch_spec.items()}
    state, found = run.init_state(), []
    with run.context():
        for _ in range(20):
            tokens = rng.integers(0, 256, (8, 17), dtype=np.int32)
            batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": tokens[:, 1:] >= 0}
            state, metrics = run.train_step(state, global_batch(batch, shardings, 8))
            found.append(float(metrics["loss"]))
    return state, found

results = {"one": losses(build(config({}), devices=jax.devices()[:1]))[1]}
runs, states = {name: build(config(mesh)) for name, mesh in MESHES.items()}, {}
for name, run in runs.items():
    states[name], results[name] = losses(run)

# A checkpoint of one mesh, restored onto others.
checkpoints = Checkpoints(sys.argv[1], config({}))
checkpoints.save(20, states["fsdp"], {"data": {}})
checkpoints.wait()
for name in ("tensor", "data x fsdp x tensor"):
    state, step, _ = checkpoints.restore(runs[name].abstract_state)
    for found, expected, spec in zip(*map(jax.tree.leaves, (state, states["fsdp"], runs[name].abstract_state))):
        assert found.sharding == spec.sharding
        np.testing.assert_array_equal(found, expected)
checkpoints.close()
print(json.dumps(results))
"""


def test_eight_devices_equal_one_on_every_mesh(run_python, tmp_path):
    process = run_python(["-c", EIGHT_EQUALS_ONE, str(tmp_path)], devices=8, timeout=600, quickly=True)
    results = json.loads(process.stdout.splitlines()[-1])
    one = results.pop("one")
    assert one[-1] < one[0]
    assert len(results) == 5
    for name, losses in results.items():
        np.testing.assert_allclose(losses, one, rtol=2e-5, err_msg=name)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(workdir):
    lines = map(json.loads, (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture
def start_two(start_python, tiny_flags):
    def start(workdir, **fields):
        port = free_port()
        flags = tiny_flags(workdir, **fields)
        return [
            start_python(
                [*flags, f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"], devices=2
            )
            for index in range(2)
        ]

    return start


def test_two_processes_train_and_resume_after_one_is_killed(start_two, run_python, tiny_flags, tmp_path):
    fields = {"num_train_steps": 20, "checkpoint_every_steps": 3, "eval_every_steps": 20, "mesh.fsdp": 2}
    first = start_two(tmp_path / "killed", **fields)
    with first[0], first[1]:
        for line in first[0].stdout:
            if line.startswith("step 7"):  # the checkpoint of step 6 was begun, so that of step 3 is whole
                break
        first[1].send_signal(signal.SIGKILL)
        # Its peer cannot go on: it fails by itself, or its launcher ends it.
        first[0].send_signal(signal.SIGKILL)
        for process in first:
            process.stdout.read()
    again = start_two(tmp_path / "killed", **fields)
    with again[0], again[1]:
        outputs = [process.stdout.read() for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert "2 processes" in outputs[0] and "resumed from step" in outputs[0]
    assert "step" not in outputs[1].replace("--process_id", "")  # one process speaks
    run_python(tiny_flags(tmp_path / "alone", **fields), devices=4)
    together, alone = losses(tmp_path / "killed"), losses(tmp_path / "alone")
    assert together.keys() == alone.keys() == set(range(1, 21))
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=2e-5)


def test_processes_that_see_other_text_are_refused(start_python, tiny_flags, tmp_path):
    port, processes = free_port(), []
    for index in range(2):
        folder = tmp_path / f"text{index}"
        folder.mkdir()
        for number in range(20):
            (folder / f"{number}.txt").write_text(f"file {number} of process {index}\n" * 50)
        flags = tiny_flags(tmp_path / "run", **{"data.name": f"text:{folder}"})
        flags += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"]
        processes.append(start_python(flags, devices=2))
    with processes[0], processes[1]:
        outputs = [process.stdout.read() for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "config.data.name" in outputs[1] and "Give every process the same files" in outputs[1]

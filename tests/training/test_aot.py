"""Compiles small models for every accelerator family; no hardware is needed, each test runs in a process of its own."""

import json

import pytest

from attnlab.errors import ConfigError
from attnlab.training import aot
from attnlab.training.config import base

TINY = [
    "train.py", "--config=configs/lm.py:smoke", "--config.model.dtype=bfloat16", "--config.model.num_layers=3",
    "--config.model.remat=full", "--config.batch_size=8",
]  # fmt: skip
# One process for several chips: most of the time is start-up.
SWEEP = """
import json
from attnlab.training import aot_environment
aot_environment.prepare("gpu:h100:8")
import jax, jax.numpy as jnp
from attnlab.training import aot, cli, topology
from attnlab.training.build import build

config = cli.load_config("configs/lm.py:smoke").unlock()
config.model.dtype, config.model.num_layers, config.mesh.data, config.mesh.fsdp = "bfloat16", 1, 2, -1
for spec in ("tpu:v4:2x2x1", "tpu:v5p:2x2x1", "tpu:v6e:2x2", "tpu:tpu7x:2x2x1", "gpu:h100:8"):
    target = topology.parse(spec)
    devices = target.devices()
    report = aot.analyse(build(config, devices=devices), target)
    report["kinds"] = sorted({device.device_kind for device in devices})
    if target.chip.platform == "tpu":  # what the compiler itself says of its memory
        where = jax.sharding.SingleDeviceSharding(devices[0])
        huge = jax.ShapeDtypeStruct((2**30, 1024), jnp.float32, sharding=where)
        try:
            jax.jit(lambda x: x + 1).trace(huge).lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as error:
            report["refusal"] = aot.refused_bytes(str(error))
    print("REPORT", json.dumps(report))
"""


def test_a_step_that_fits(run_python, tmp_path):
    process = run_python(
        [*TINY, "--config.mesh.data=2", "--config.mesh.fsdp=-1", "--aot=tpu:v5e:2x2", f"--workdir={tmp_path}"]
    )
    report = json.loads((tmp_path / "aot.json").read_text())
    assert report["topology"] == "tpu:v5e:2x2"
    assert report["num_devices"] == 4
    assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}
    assert report["fits"] is True
    assert 0 < report["bytes_per_device"] < report["hbm_bytes"] == int(15.75 * 2**30)
    breakdown = report["breakdown"]
    assert sum(breakdown.values()) == report["bytes_per_device"]
    # float32 parameters over two devices, twice that for the moments of adamw
    assert 2 * report["num_params"] <= breakdown["parameters"] <= 2.2 * report["num_params"]
    assert breakdown["optimizer"] == pytest.approx(2 * breakdown["parameters"], rel=0.01)
    # one more forward pass for the recomputation, minus what it need not repeat
    executed = report["flops_per_device"] * report["num_devices"] / report["model_flops_per_step"]
    assert 1.0 < executed < 1.5
    assert {axis for row in report["collectives"] for axis in row["axes"]} == {"data", "fsdp"}
    assert all(row["count"] >= 1 and row["wire_bytes"] > 0 for row in report["collectives"])
    fast, slow = report["roofline"]["step_seconds"]
    assert 0 < fast <= slow
    assert report["roofline"]["assumptions"]
    assert report["config"]["model"]["num_layers"] == 3
    for words in ("memory per device", "collectives per step", "roofline of a step", "fits:", "assumes:", "TPU v5 lite"):
        assert words in process.stdout


def test_a_step_that_does_not_fit(run_python, tmp_path):
    arguments = ["--config.batch_size=16384", "--config.seq_len=1024", "--config.model.remat=none"]
    process = run_python([*TINY, *arguments, "--aot=tpu:v5e:2x2", f"--workdir={tmp_path}"], check=False)
    assert process.returncode == 1, process.stderr[-3000:]
    report = json.loads((tmp_path / "aot.json").read_text())
    assert report["fits"] is False
    assert report["bytes_per_device"] > report["hbm_bytes"]
    assert report["flops_per_device"] > 0
    assert "RESOURCE_EXHAUSTED" in report["compiler_message"]
    fields = {item["field"] for item in report["advice"]}
    assert {"model.remat", "grad_accum"} <= fields
    assert "does not fit" in process.stdout
    assert "too much on each device" in process.stdout
    assert "--config.model.remat=full" in process.stdout
    assert "Traceback" not in process.stderr


def test_every_family_compiles_and_its_memory_is_what_the_compiler_says(run_python):
    process = run_python(["-c", SWEEP])
    reports = [json.loads(line[7:]) for line in process.stdout.splitlines() if line.startswith("REPORT ")]
    assert [report["num_devices"] for report in reports] == [4, 4, 4, 8, 8]
    for report in reports:
        assert report["kinds"] == [report["device_kind"]]
        assert report["fits"]
        assert sum(report["breakdown"].values()) == report["bytes_per_device"]
        assert report["collectives"]
        assert 0.9 < report["flops_per_device"] * report["num_devices"] / report["model_flops_per_step"] < 1.2
        assert report["roofline"]["step_seconds"][0] > 0
        if "tpu" in report["topology"]:
            assert report["refusal"][1] == report["hbm_bytes"], report["topology"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--aot=tpu:v5x:2x2"], "unknown chip 'v5x'"),
        (["--aot=tpu:v5e"], "Write for example tpu:v5e:16x16"),
        (["--aot=tpu:v5e:3x3"], "Slices are 1x1, 2x2"),
        (["--aot=tpu:v5e:2x2", "--config.mesh.fsdp=3"], "config.mesh"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(run_python, arguments, expected):
    process = run_python([*TINY, *arguments], check=False)
    assert process.returncode == 2, process.stderr[-3000:]
    assert expected in process.stderr
    assert "Traceback" not in process.stderr
    assert "compiling" not in process.stdout


def test_an_unknown_topology_is_refused_before_the_compiler_is_looked_for():
    with pytest.raises(ConfigError, match="did you mean 'v5"):
        aot.run(base(), "tpu:v5ee:2x2", None)

import os
import subprocess
import sys

import pytest

from attnlab.errors import ConfigError
from attnlab.training import aot_environment, topology


@pytest.mark.parametrize(
    ("spec", "devices", "kind"),
    [
        ("tpu:v5e:16x16", 256, "TPU v5 lite"),
        ("tpu:v5e:1x1", 1, "TPU v5 lite"),
        ("tpu:v4:2x2x1", 4, "TPU v4"),
        ("tpu:v5p:4x4x4", 64, "TPU v5"),
        ("TPU:V6E:2x4", 8, "TPU v6 lite"),
        ("tpu:tpu7x:2x2x1", 8, "TPU7x"),
        ("gpu:h100:8", 8, "NVIDIA H100 80GB HBM3"),
        ("gpu:h100:16", 16, "NVIDIA H100 80GB HBM3"),
    ],
)
def test_specifications_are_read(spec, devices, kind):
    parsed = topology.parse(spec)
    assert parsed.num_devices == devices
    assert parsed.chip.device_kind == kind


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("tpu:v5e", "PLATFORM:CHIP:SHAPE"),
        ("", "tpu:v5e:16x16"),
        ("npu:v5e:2x2", "did you mean 'tpu'"),
        ("tpu:v5x:2x2", "did you mean 'v5"),
        ("tpu:h100:8", "Chips with a compiler here: v4, v5e, v5p, v6e, tpu7x"),
        ("gpu:h10:8", "did you mean 'h100'"),
        ("tpu:v5e:16by16", "is not a shape"),
        ("tpu:v5e:0x4", "is not a shape"),
        ("tpu:v5e:256", "wants 2 sizes and '256' has 1"),
        ("tpu:v5p:4x4", "wants 3 sizes and '4x4' has 2"),
        ("tpu:v5e:32x32", "no slice of v5e has 32x32 chips"),
        ("tpu:v4:64x64x64", "no slice of v4"),
        ("gpu:h100:12", "1 to 8, or for a multiple of 8"),
    ],
)
def test_a_bad_specification_is_one_message_with_the_fix(spec, expected):
    with pytest.raises(ConfigError) as error:
        topology.parse(spec)
    assert expected in str(error.value)
    assert "--aot=" in str(error.value)


def test_gpu_memory_is_the_share_that_jax_takes(monkeypatch):
    h100 = topology.parse("gpu:h100:8")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert h100.memory_per_device()[0] == int(0.75 * h100.chip.hbm_bytes)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    bytes_, why = h100.memory_per_device()
    assert bytes_ == int(0.9 * h100.chip.hbm_bytes)
    assert "90%" in why


def test_a_torus_closes_only_at_full_length():
    assert topology.parse("tpu:v5e:8x16").wraps(1)
    assert not topology.parse("tpu:v5e:8x16").wraps(0)
    assert topology.parse("tpu:v5p:4x4x8").wraps(2)
    assert not topology.parse("tpu:v5p:2x2x4").wraps(2)


@pytest.mark.parametrize(("platform", "package"), [("tpu", "libtpu"), ("cuda", "jax-cuda12-plugin")])
def test_a_missing_compiler_names_the_extra(monkeypatch, platform, package):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"attnlab\[test\]") as error:
        topology.require_compiler(platform)
    assert package in str(error.value)


@pytest.mark.parametrize("set_by_user", [None, "cpu", "tpu,cpu"])
def test_the_environment_is_prepared_whatever_the_user_set(set_by_user):
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    if set_by_user is not None:
        environment["JAX_PLATFORMS"] = set_by_user
    code = (
        "import sys; from attnlab.training import aot_environment; aot_environment.prepare('gpu:h100:8');"
        "assert 'jax' not in sys.modules; import os, jax;"
        "assert jax.default_backend() == 'cpu'; assert 'autotune_level=0' in os.environ['XLA_FLAGS']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_the_environment_can_still_be_prepared_after_the_import_of_jax():
    code = (
        "import jax; from attnlab.training import aot_environment; aot_environment.prepare('tpu:v5e:2x2');"
        "assert jax.default_backend() == 'cpu'"
    )
    environment = os.environ | {"JAX_PLATFORMS": "tpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_flags_of_the_user_are_kept(monkeypatch):
    for name in (*aot_environment._VALUES, *aot_environment._DEFAULTS):
        monkeypatch.setenv(name, "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    aot_environment.prepare("gpu:h100:8")
    assert os.environ["XLA_FLAGS"].split()[0] == "--xla_force_host_platform_device_count=8"
    aot_environment.prepare("gpu:h100:8")
    assert os.environ["XLA_FLAGS"].count("autotune") == 1

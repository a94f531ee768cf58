import pytest

from attnlab.training import aot, aot_report, topology
from attnlab.training.cli import load_config
from attnlab.training.config import base

from .conftest import ROOT

GIB = 2**30


@pytest.fixture(scope="module")
def config():
    config = base()
    config.batch_size, config.seq_len, config.loss_chunk = 64, 4096, 0
    config.data.tokenizer = "bpe:32768"
    return config


def advice(config, mesh=None, spec="tpu:v5e:2x4", needed=30 * GIB, **parts):
    mesh = {"data": 8, "fsdp": 1, "tensor": 1, "context": 1} | (mesh or {})
    sizes = {"parameters": GIB, "optimizer": 2 * GIB, "ema": 0, "collections": 0, "batch": 2**20, "temporaries": 26 * GIB} | parts
    target = topology.parse(spec)
    return aot_report.advise(config, mesh, sizes, needed, target.memory_per_device()[0], target)


def test_large_temporaries_advise_recomputation_smaller_chunks_and_accumulation(config):
    found = advice(config)
    assert {item["field"] for item in found} >= {"model.remat", "loss_chunk", "grad_accum", "batch_size"}
    savings = [item["saves_bytes"] for item in found]
    assert savings == sorted(savings, reverse=True)
    assert all(item["text"].startswith("--config.") for item in found)


def test_what_is_done_already_is_not_advised(config):
    done = config.copy_and_resolve_references()
    done.model.remat, done.loss_chunk, done.batch_size = "full", 512, 8
    fields = {item["field"] for item in advice(done, {"data": 1, "fsdp": 8})}
    assert not fields & {"model.remat", "loss_chunk", "grad_accum", "batch_size", "ema_decay"}
    assert fields >= {"mesh.tensor", "mesh.context"}


def test_a_large_state_advises_sharding_first(config):
    found = advice(config, parameters=8 * GIB, optimizer=16 * GIB, temporaries=9 * GIB, needed=33 * GIB)
    assert found[0]["field"] == "mesh.data=1 --config.mesh.fsdp"
    assert "enough by itself" in found[0]["text"]


def test_a_state_too_large_for_all_devices_advises_more_of_them(config):
    found = advice(config, {"data": 1, "fsdp": 8}, parameters=8 * GIB, optimizer=16 * GIB, needed=60 * GIB)
    assert found[-1]["field"] == "aot"
    assert found[-1]["value"] >= 32


def test_an_average_of_the_parameters_may_be_given_up(config):
    assert "ema_decay" in {item["field"] for item in advice(config, ema=GIB)}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("vit.py:b16", {"model.remat", "grad_accum", "batch_size"}),
        ("mavit.py:small", {"model.remat", "grad_accum", "ema_decay"}),
        ("hard_attention_gates.py:cifar", {"grad_accum", "batch_size"}),  # a model that cannot recompute
    ],
)
def test_models_of_images_are_advised_what_they_have(preset, expected):
    found = advice(load_config(f"{ROOT / 'configs' / preset}"), ema=GIB)
    fields = {item["field"] for item in found}
    assert fields >= expected and not fields & {"loss_chunk", "mesh.context"}
    assert ("model.remat" in fields) == ("model.remat" in expected)
    assert "--config.model.remat=True" in " ".join(item["text"] for item in found) or "mavit" not in preset


def test_gpus_are_told_of_the_memory_that_jax_leaves(config, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    found = advice(config, spec="gpu:h100:8", needed=70 * GIB)
    assert found[0]["field"] == "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert advice(config, spec="gpu:h100:8", needed=100 * GIB)[0]["field"] != "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.50G) exceeds "
            "available HBM (15.75G).",
            (int(22.5 * GIB), int(15.75 * GIB)),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 512.00M exceeds available HBM (256.00M).", (2**29, 2**28)),
        ("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.", (20 * GIB, int(15.75 * GIB))),
        ("INTERNAL: something else", (None, None)),
    ],
)
def test_the_refusal_of_the_compiler_is_read(message, expected):
    assert aot.refused_bytes(message) == expected


def test_figures_are_written_with_units():
    assert aot_report._bytes(3 * GIB) == "3.00 GiB"
    assert aot_report._bytes(12) == "12 B"
    assert aot_report._count(2.5e15).strip() == "2.50 P"
    assert aot_report._seconds(0.0123) == "12.30 ms"
    assert aot_report._seconds(2) == "2.00 s"
    assert aot_report._seconds(5e-6) == "5.0 us"

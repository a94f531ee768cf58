"""The runner of claims: its tables name configs that exist, and its records are merged, compared and told apart."""

import multiprocessing
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import claim_records
import claims
from claim import Arm, Claim, configured, identity

from attnlab.errors import ConfigError
from attnlab.training.config import validate

CLAIM = Claim("some", "Some claim", "", (Arm("a", "configs/lm.py:smoke"), Arm("b", "configs/lm.py:smoke", {"model.dim": 32})))


def record(arm, seed, loss, steps=20, **extra):
    return {
        "arm": arm.name, "seed": seed, **identity(CLAIM, arm, steps), "parameters": 10, "figures": {"loss": loss} | extra,
        "course": [[10, 2.0], [20, loss]], "training": {}, "seconds_per_step": 0.1, **claim_records.about("a device"),
    }  # fmt: skip


def test_every_arm_is_a_valid_config():
    names = set()
    for claim in claims.claims().values():
        assert len({arm.name for arm in claim.arms}) == len(claim.arms)
        for arm in claim.arms:
            validate(configured(claim, arm))
            names.add((claim.name, arm.name))
    assert ("moh", "all heads") in names


def test_unknown_field_is_an_error():
    with pytest.raises(ConfigError, match="num_layer"):
        configured(CLAIM, Arm("c", "configs/lm.py:smoke", {"model.num_layer": 1}))


def add(folder, seed):
    for arm in CLAIM.arms:
        claim_records.add(folder, "some", record(arm, seed, 1.0))


def test_records_of_processes_that_write_at_once_are_all_kept(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add, args=(tmp_path, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(claim_records.load(tmp_path, "some")) == 8
    claim_records.add(tmp_path, "some", record(CLAIM.arms[0], 2, 5.0))
    kept = {(one["arm"], one["seed"]): one["figures"]["loss"] for one in claim_records.load(tmp_path, "some")}
    assert len(kept) == 8 and kept["a", 2] == 5.0


def test_report_compares_by_seed_and_leaves_other_settings_out(tmp_path):
    first, second = CLAIM.arms
    for arm, seed, loss in ((first, 0, 1.0), (first, 1, 2.0), (second, 0, 1.5), (second, 1, 2.7), (second, 2, 9.0)):
        claim_records.add(tmp_path, "some", record(arm, seed, loss))
    row = claim_records.report(CLAIM, tmp_path, 0).splitlines()[-1]
    assert "+0.600 ± 0.100" in row  # over the two seeds that both arms have
    assert (tmp_path / "claim_some.md").exists() and (tmp_path / "claim_some.svg").exists()
    claim_records.add(tmp_path, "some", record(second, 2, 9.0, steps=7))
    assert "9" not in claim_records.report(CLAIM, tmp_path, 0).splitlines()[-1].split("|")[4]

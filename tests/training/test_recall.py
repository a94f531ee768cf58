"""The recall laboratory whole: a config learns to recall, resumes, and eval.py shows how far."""

import json
import re

import numpy as np
import pytest

from attnlab.errors import ConfigError
from attnlab.training import evaluate, loop
from attnlab.training.evaluate_recall import Recalled
from configs import recall


@pytest.fixture(scope="module")
def config():
    """One pair per row: its value is the answer, which a model finds without matching keys."""
    config = recall.get_config("smoke")
    with config.unlocked():
        config.data.mqar.update({"num_pairs": 1, "num_keys": 2, "num_questions": 4, "num_noise": 2, "eval_rows": 64})
        config.update({"num_train_steps": 180, "batch_size": 32, "log_every_steps": 20})
        config.update({"eval_every_steps": 90, "checkpoint_every_steps": 90})
        config.optimizer.learning_rate = 3e-3
        config.model.mixer_options.softmax.rope = False
    return config


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall") / "run"
    result = loop.train(config, str(folder))
    assert result["finished"] and result["eval/accuracy"] > 0.9
    return folder


@pytest.fixture(scope="module")
def evaluated(folder, config):
    return evaluate.main(str(folder), config, evaluate.Options(report=True))


def test_it_learned_and_the_lengths_are_beyond_training(evaluated, folder):
    assert evaluated["step"] == 180 and evaluated["tokens"] == 4 * 64 and "bits_per_byte" not in evaluated
    assert list(evaluated["lengths"]) == ["16", "32", "64", "128"]
    assert evaluated["lengths"]["16"] == pytest.approx(evaluated["accuracy"])  # two programs, the same rows
    assert evaluated["accuracy"] > 0.9
    assert json.loads((folder / "eval.json").read_text())["lengths"] == evaluated["lengths"]
    for length, buckets in evaluated["distances"].items():
        assert sum(questions for *_, questions in buckets) == 4 * 64
        assert all(first <= last and first < int(length) for first, last, *_ in buckets)
        mean = sum(accuracy * questions for *_, accuracy, questions in buckets) / (4 * 64)
        assert mean == pytest.approx(evaluated["lengths"][length])
    assert json.loads((folder / "recall.json").read_text())["task"] == "mqar"


def test_the_report_stands_alone(evaluated, folder):
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3 and "Accuracy over distance" in page and "T = 128" in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


def test_the_table_has_a_row_per_distance(folder, config, capsys):
    evaluate.main(str(folder), config, evaluate.Options(eval_batches=1))
    printed = capsys.readouterr().out
    assert re.search(r"accuracy, % +T = 16 +T = 32 +T = 64 +T = 128", printed)
    assert "8 to 15 back" in printed and "nats/question" in printed


def test_another_difficulty_is_another_run(folder, config):
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.data.mqar.num_values = 5
    with pytest.raises(ConfigError, match=r"config.data.mqar.num_values: the run has 4, .*5"):
        evaluate.main(str(folder), other, evaluate.Options())
    with pytest.raises(ConfigError, match=r"config.data.mqar.num_values: the run has 4, now 5"):
        loop.train(other, str(folder))


def test_distances_fall_into_powers_of_two():
    found = Recalled(16, np.array([1, 2, 3, 4, 7, 8]), np.array([True, True, False, True, True, False]))
    assert found.by_distance() == [(1, 1, 1.0, 1), (2, 3, 0.5, 2), (4, 7, 1.0, 2), (8, 15, 0.0, 1)]
    assert found.accuracy == pytest.approx(4 / 6)

"""A run on images from the command's point of view: trains, is evaluated, and shows itself."""

import json
import pathlib
import re

import pytest

from attnlab.errors import ConfigError
from attnlab.training import evaluate, workdir
from attnlab.training.cli import load_config
from attnlab.training.loop import train

from .conftest import ROOT


def config(**changes):
    config = load_config(f"{ROOT / 'configs' / 'vit.py'}:smoke")
    with config.unlocked():
        config.num_train_steps, config.optimizer.warmup_steps = 4, 1
        config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps, config.eval_batches = 2, 4, 2, 1
        config.model.num_layers, config.model.scan_layers, config.ema_decay = 1, False, 0.5
        config.model.mixer, config.model.num_heads, config.model.mixer_options.moh.top_k = "moh", 4, 1
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run"))
    return folder, train(config(), folder)


def test_training_reports(run):
    folder, last = run
    assert last["step"] == 4 and last["finished"] and 0 <= last["eval/accuracy"] <= 1 and last["eval/images"] == 16
    lines = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "loss" in line} == {2, 4}
    assert all(line["images_per_second"] > 0 for line in lines if "loss" in line)
    assert json.loads((pathlib.Path(folder) / "classes.json").read_text()) == ["red", "green", "blue", "yellow"]
    assert workdir.facts(folder)["outputs"] == 4


def test_evaluation_and_report(run, capsys):
    folder, _ = run
    figures = evaluate.main(folder, None, evaluate.Options(split="validation", eval_batches=2, report=True))
    assert figures["images"] == 32 and figures["parameters"] == "ema" and figures["images_per_second"] > 0
    shares = figures["class_accuracy"]
    assert set(shares) <= {"red", "green", "blue", "yellow"} and figures["worst_class"] == min(shares, key=shares.get)
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == figures and "accuracy by class" in out
    page = (pathlib.Path(folder) / "report.html").read_text(encoding="utf-8")
    for heading in ("Confusion matrix", "Misclassified images", "Attention over the images", "Loads of the heads", "Training"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count(">on</td>") == 2 and "1 of 2</td>" in page and "over 64 images of the split" in page
    assert page.count("data:image/png;base64,") >= 8 and "://" not in page
    counts = [int(count) for count in re.findall(r'title="(\d+) of \d+ \w+ taken for \w+"', page)]
    assert len(counts) == 16 and sum(counts) == 32


def test_other_data_are_refused(run):
    with pytest.raises(ConfigError, match=r"config.data.image_size: the run has 32, --config has 40"):
        evaluate.main(run[0], config(**{"data.image_size": 40}), evaluate.Options())

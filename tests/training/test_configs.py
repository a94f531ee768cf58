"""Every file of configs/: each preset is a valid run, and its smoke preset trains, evaluates and is read back by eval.py."""

import ast
import json
import os

import pytest

from attnlab.training import cli
from attnlab.training.config import validate

from .conftest import ROOT

FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def presets(name):
    """The presets that the file's docstring promises are those that its own error message lists."""
    with pytest.raises(Exception, match="there is no preset") as caught:
        cli.load_config(f"{ROOT / 'configs' / name}:no_such_preset")
    listed = str(caught.value).partition("known: ")[2] or str(caught.value)
    return [word.strip(" '.,?") for word in listed.split(",")] if "known: " in str(caught.value) else ["smoke"]


@pytest.mark.parametrize("name", FILES)
def test_presets_are_valid(name):
    path = ROOT / "configs" / name
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert f"configs/{name}" in doc, "the docstring shows the command"
    assert "smoke" in doc
    for target in (path, *(f"{path}:{preset}" for preset in presets(name))):
        validate(cli.load_config(os.fspath(target)))


@pytest.mark.parametrize("name", FILES)
def test_smoke_preset_trains_and_is_evaluated(name, run_python, corpus, cache_dir, tmp_path):
    fields = {"num_train_steps": 4, "log_every_steps": 2, "eval_every_steps": 4, "checkpoint_every_steps": 4, "eval_batches": 1}
    fields["optimizer.warmup_steps"] = 1
    if cli.load_config(f"{ROOT / 'configs' / name}:smoke").data.name == "stdlib":
        fields |= {"data.name": f"text:{corpus}", "data.dir": os.fspath(cache_dir / "data")}
    changes = [f"--config.{field}={value}" for field, value in fields.items()]
    flags = [f"--config=configs/{name}:smoke", f"--workdir={tmp_path}", *changes]
    run_python(["train.py", *flags], quickly=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "loss" in line} == {2, 4}
    evaluated = run_python(["eval.py", f"--workdir={tmp_path}", "--eval_batches=1", "--max_new_tokens=4"], quickly=True)
    assert json.loads(evaluated.stdout.splitlines()[-1])["step"] == 4

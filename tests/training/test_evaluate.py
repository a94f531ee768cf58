"""eval.py and its report on a tiny trained run."""

import json
import re
import shutil

import numpy as np
import pytest

from attnlab.data import open_text
from attnlab.errors import ConfigError
from attnlab.training import evaluate, loop, workdir
from configs import lm

FIGURES = {
    "step", "split", "loss", "bits_per_byte", "unigram_bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte",
    "accuracy", "perplexity", "tokens", "bytes", "tokens_per_second", "decode_tokens_per_second", "sample",
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = ["alpha", "beta", "gamma", "</script>", "<b>", "&amp;", "été"]
    random = np.random.default_rng(0)
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(random.choice(words, 120)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(texts, tmp_path_factory):
    config = lm.get_config("smoke")
    with config.unlocked():
        config.update({"num_train_steps": 12, "batch_size": 4, "seq_len": 32, "ema_decay": 0.5, "eval_batches": 2})
        config.update({"log_every_steps": 2, "eval_every_steps": 6, "checkpoint_every_steps": 6})
        config.data.name, config.data.dir = f"text:{texts}", str(tmp_path_factory.mktemp("cache"))
        config.model.update({"dim": 16, "pattern": ("sigmoid", "softmax"), "num_layers": 3})
    return config


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    loop.train(config, str(folder))
    return folder


@pytest.fixture(scope="module")
def evaluated(folder, config):
    options = evaluate.Options(temperature=1.0, report=True, num_samples=2, prompt="alpha </script>", max_new_tokens=20)
    return evaluate.main(str(folder), config, options)


def test_figures(evaluated, folder, config):
    assert set(evaluated) >= FIGURES
    assert evaluated["step"] == 12 and evaluated["split"] == "test" and evaluated["parameters"] == "ema"
    assert json.loads((folder / "eval.json").read_text()) == evaluated
    assert evaluated["perplexity"] == pytest.approx(np.exp(evaluated["loss"]))
    ratio = evaluated["tokens"] / evaluated["bytes"]
    assert evaluated["bits_per_byte"] == pytest.approx(evaluated["loss"] / np.log(2) * ratio, rel=1e-5)
    assert 0 < evaluated["accuracy"] < 1
    assert evaluated["xz_bits_per_byte"] < evaluated["unigram_bits_per_byte"] < 8
    assert len(evaluated["samples"]) == 2 and evaluated["prompt"] == "alpha </script>"
    size = sum(len(chunk) for chunk in open_text(config).raw_bytes("test"))
    assert evaluated["bytes"] == size


def test_report_shows_the_run(evaluated, folder):
    document = (folder / "report.html").read_text(encoding="utf-8")
    assert len(document) < 2_000_000 and not re.search(r"https?:|url\(", document)
    assert document.count('class="thumb"') == 3 * 2
    assert document.count("<script") == 2  # the page's own; hostile text in prompt and maps is escaped
    for part in ('id="figures"', 'id="curves"', 'id="sample"', 'id="attention"', 'id="heads"', 'id="config"', "tiny"):
        assert part in document, part
    assert "alpha &lt;/script&gt;" in document and "validation" in document and "L2 H1" in document
    assert f"{evaluated['bits_per_byte']:.3f}" in document and "moving average" in document


def test_command_line_ends_with_one_json_line_and_needs_no_config(run_python, folder):
    flags = ["--temperature=0", "--eval_batches=1", "--step=6", "--split=validation", "--prompt=", "--max_new_tokens=4"]
    *table, last = run_python(["eval.py", f"--workdir={folder}", *flags]).stdout.rstrip("\n").split("\n")
    figures = json.loads(last)
    assert set(figures) >= FIGURES
    assert figures["step"] == 6 and figures["split"] == "validation" and 0 < figures["tokens"] <= 4 * 32
    assert any("bits per byte" in line for line in table) and any("unigram" in line for line in table)


def test_command_line_says_what_is_wrong(run_python):
    process = run_python(["eval.py", "--workdir=/nowhere/run"], check=False)
    assert process.returncode == 2 and "holds no run" in process.stderr and "Traceback" not in process.stderr


def test_another_batch_size_is_the_same_model_and_changed_text_is_noted(folder, config, evaluated, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    facts = workdir.facts(folder)
    assert facts["data_fingerprint"]
    workdir.record(str(copy), workdir.read_config(str(folder)), facts | {"data_fingerprint": "0" * 64})
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.batch_size, other.num_train_steps = 2, 99
    result = evaluate.evaluate(str(copy), other, evaluate.Options(max_new_tokens=1))
    assert result.figures["loss"] == pytest.approx(evaluated["loss"], rel=1e-5)
    assert (result.figures["tokens"], result.figures["bytes"]) == (evaluated["tokens"], evaluated["bytes"])
    assert "the data differ from the run's" in result.table()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "--split = 'tset'"),
        ({"temperature": -1.0}, "--temperature = -1.0"),
        ({"top_p": 0.0}, "--top_p = 0.0"),
        ({"num_samples": 0}, "--num_samples = 0"),
        ({"max_new_tokens": -3}, "--max_new_tokens = -3"),
        ({"step": 5}, "no checkpoint of step 5. It has .6, 12."),
    ],
)
def test_bad_options_name_the_flag(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.evaluate(str(folder), None, evaluate.Options(**options))


def test_another_model_is_refused_with_the_field(folder, config):
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.model.dim, other.data.name, other.optimizer.learning_rate = 32, "stdlib", 1.0
    with pytest.raises(ConfigError, match=r"config\.data\.name") as caught:
        evaluate.run_config(str(folder), other)
    assert "config.model.dim: the run has 16" in str(caught.value) and "learning_rate" not in str(caught.value)


def test_missing_run_and_missing_checkpoint(folder, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        evaluate.evaluate(str(tmp_path / "absent"), None, evaluate.Options())
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="has no checkpoint"):
        evaluate.evaluate(str(tmp_path), None, evaluate.Options())

"""A run that is small enough to be trained many times."""

import os
import pathlib

import pytest

from attnlab.training import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def make_tiny(tiny_fields):
    """Makes the config of the tiny run: `make_tiny(num_train_steps=6, **{"model.mixer": "sigmoid"})`."""

    def make(**changes):
        config = cli.load_config(f"{ROOT / 'configs' / 'lm.py'}:smoke")
        config.update_from_flattened_dict(tiny_fields | changes)
        return config

    return make


@pytest.fixture
def tiny(make_tiny):
    """The same, by its short name."""
    return make_tiny


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A folder of text files: enough for a tiny run, with something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [f"file {number} line {line}: the quick brown fox jumps over the lazy dog\n" for line in range(30 + number)]
        (folder / f"part{number:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_fields(corpus, cache_dir) -> dict:
    """Fields of the tiny run, over `configs/lm.py:smoke`."""
    return {
        "data.name": f"text:{corpus}",
        "data.dir": os.fspath(cache_dir / "data"),
        "num_train_steps": 12,
        "batch_size": 4,
        "seq_len": 32,
        "log_every_steps": 1,
        "eval_every_steps": 6,
        "checkpoint_every_steps": 3,
        "eval_batches": 2,
        "model.num_layers": 2,
        "model.dim": 32,
        "optimizer.warmup_steps": 2,
    }


@pytest.fixture(scope="session")
def tiny_flags(tiny_fields):
    """The same on the command line of train.py."""

    def make(workdir, **changes):
        fields = tiny_fields | changes
        return ["train.py", "--config=configs/lm.py:smoke", f"--workdir={workdir}",
                *(f"--config.{name}={value}" for name, value in fields.items())]  # fmt: skip

    return make

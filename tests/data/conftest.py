"""Configs for data sets, a folder of small text files, and the standard library prepared once."""

import random
import types

import pytest

from attnlab.data import open_text

WORDS = [
    "attention",
    "query",
    "key",
    "value",
    "head",
    "mask",
    "window",
    "softmax",
    "sigmoid",
    "route",
    "cluster",
    "memory",
    "état",
    "注意",
    "∑",
]


def make_config(name, cache, **fields):
    data = {"name": name, "dir": str(cache), "tokenizer": "bytes", "packing": "windows", "workers": 0, **fields}
    return types.SimpleNamespace(data=types.SimpleNamespace(**data), seq_len=16, batch_size=4)


def write_files(folder, count, seed=0, lines=12):
    """Writes files of different random lines, so that no two are near-identical."""
    generator = random.Random(seed)
    for i in range(count):
        path = folder / f"part{i % 3}" / f"file{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(" ".join(generator.choices(WORDS, k=6)) + "\n" for _ in range(generator.randint(3, lines)))
        path.write_text(text, "utf-8")
    return folder


@pytest.fixture
def config():
    return make_config


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("texts"), 40)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("small_cache")


@pytest.fixture(scope="session")
def small(text_folder, small_cache):
    """Opens the small folder; keyword arguments are fields of config.data."""
    return lambda **fields: open_text(make_config(f"text:{text_folder}", small_cache, **fields))


@pytest.fixture(scope="session")
def stdlib(cache_dir):
    return open_text(make_config("stdlib", cache_dir / "attnlab"))

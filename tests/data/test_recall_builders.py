"""The recall tasks as TFDS sets: array_record files with the very rows that are made on the fly."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnlab.data.recall import LongRange, Mqar, Needle, SelectiveCopy, __main__, builders
from attnlab.data.recall.rows import GeneratedRows, PreparedRows
from attnlab.errors import ConfigError

TASKS = [Mqar(train_rows=12, eval_rows=5), SelectiveCopy(train_rows=12, eval_rows=5), LongRange(train_rows=12, eval_rows=5)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prepared_rows_are_the_generated_rows(task, tmp_path):
    folder = builders.prepared_folder(task, 128, tmp_path)
    assert builders.prepared_folder(dataclasses.replace(task, prepared=True), 128, tmp_path) == folder  # and only once
    for split, count in (("train", 12), ("validation", 5), ("test", 5)):
        prepared, generated = PreparedRows(folder, split, 128), GeneratedRows(task, split, 128)
        assert len(prepared) == len(generated) == count
        records = np.array([count - 1, -1, 0, count + 2])
        mine, theirs = prepared.read(records), generated.read(records)
        assert set(mine) == set(theirs) == {"inputs", "targets", "mask", "distance"}
        for name, array in mine.items():
            assert array.dtype == theirs[name].dtype
            np.testing.assert_array_equal(array, theirs[name])


def test_other_options_are_another_set(tmp_path):
    folders = {
        builders.prepared_folder(Mqar(train_rows=2, eval_rows=1, num_values=n), length, tmp_path)
        for n, length in ((8, 64), (9, 64), (8, 65))
    }
    assert len(folders) == 3
    builder = tfds.builder_from_directory(sorted(folders)[0])
    assert builder.info.metadata["task"] == "mqar" and builder.info.features["mask"].np_dtype == np.bool_


def test_needle_builder(tmp_path, text_folder):
    task = Needle(train_rows=4, eval_rows=2, haystack=f"text:{text_folder}")
    folder = builders.prepared_folder(task, 256, tmp_path / "tfds", str(tmp_path))
    tokens = task.texts(str(tmp_path))[1]
    for split in ("train", "test"):
        records = np.arange(2)
        mine = PreparedRows(folder, split, 256).read(records)
        for name, array in GeneratedRows(task, split, 256, tokens[split]).read(records).items():
            np.testing.assert_array_equal(mine[name], array)


def test_named_configs_are_registered_with_tfds(tmp_path):
    for name, vocab_size in (("mqar/t128", 65), ("mqar/t512-p64", 513), ("selective_copy/t128", 18), ("long_range/t128", 17)):
        builder = tfds.builder(f"recall_{name}", data_dir=tmp_path, file_format="array_record")
        assert builder.info.metadata["vocab_size"] == vocab_size
        assert builder.info.features["inputs"].shape[0] == builder.builder_config.seq_len


def test_command_line(tmp_path, capsys):
    arguments = ["long_range", f"--dir={tmp_path}", "--seq_len=96", "gap=20", "train_rows=6", "eval_rows=2"]
    assert __main__.main(arguments) == 0
    assert "rows train 6, validation 2, test 2; 17 ids" in capsys.readouterr().out
    for bad, message in (("gap=x", "'x' is not a int"), ("gab=1", "Did you mean 'gap'"), ("gap=90", "takes")):
        assert __main__.main([*arguments, bad]) == 2
        assert message in capsys.readouterr().err


def test_no_tensorflow():
    code = "import sys, attnlab.data.recall.builders; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_endless_set_cannot_be_prepared_by_options():
    with pytest.raises(ConfigError, match="prepared set has an end"):
        Mqar(prepared=True)

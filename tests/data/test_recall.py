"""Recall tasks: every answer stands in its row, the difficulty is what the options say, splits share no row."""

import dataclasses
import types

import numpy as np
import pytest

from attnlab.data.recall import (
    TASKS,
    GeneratedRows,
    LongRange,
    Mqar,
    Needle,
    SelectiveCopy,
    defaults,
    make_row,
    open_recall,
    split_of,
    task_of,
    vocab_size,
)  # fmt: skip
from attnlab.errors import ConfigError

SYNTHETIC = [
    Mqar(),
    Mqar(num_pairs=4, num_keys=4, num_updates=6, spread=0.7, num_questions=9, num_noise=5, power=0.3),
    SelectiveCopy(),
    SelectiveCopy(num_items=1, num_values=200),
    LongRange(),
    LongRange(num_pairs=3, shown=4, gap=20, num_noise=7, num_questions=0),
    Mqar(num_pairs=4, num_keys=4, num_updates=6, spread=0.7, num_noise=5, value_first=True),
    LongRange(num_pairs=3, shown=2, gap=20, value_first=True),
]


def names(tasks):
    return [f"{task.name}-{i}" for i, task in enumerate(tasks)]


def config_of(name, cache, seq_len=128, **fields):
    options = {key: fields.pop(key) for key in ("dir", "workers", "packing") if key in fields}
    data = types.SimpleNamespace(**{"name": name, "dir": str(cache), "workers": 0, name: fields, **options})
    return types.SimpleNamespace(data=data, seq_len=seq_len, batch_size=4)


def rows_of(task, count=40, length=128, split="train"):
    return [make_row(task, split, index, length) for index in range(count)]


def solve_pairs(task, inputs):
    """Reads a row from left to right with a dictionary; knows nothing of how it was made."""
    first_value = task.num_noise + task.num_keys
    known, answers, key, fetched = {}, {}, None, None
    for at, token in enumerate(inputs.tolist()):
        if task.value_first:
            if token >= first_value:
                fetched = token, at
            elif token >= task.num_noise:
                if fetched:
                    known[token], fetched = fetched, None
                else:
                    answers[at] = known[token]
        elif token >= first_value:
            known[key] = (token, at)
        elif token >= task.num_noise:
            key = token
            if at + 1 == len(inputs) or inputs[at + 1] < first_value:
                answers[at] = known[key]
    return answers


def solve_copy(task, inputs):
    seen = [(token, at) for at, token in enumerate(inputs.tolist()) if token > 1]
    return dict(zip(np.flatnonzero(inputs == 1).tolist(), seen, strict=True))


@pytest.mark.parametrize("task", SYNTHETIC, ids=names(SYNTHETIC))
def test_an_independent_reader_finds_the_same_answers(task):
    for row in rows_of(task):
        solved = (solve_copy if task.name == "selective_copy" else solve_pairs)(task, row.inputs)
        assert np.flatnonzero(row.mask).tolist() == sorted(solved)
        for at, (answer, stands) in solved.items():
            assert (row.targets[at], row.distance[at]) == (answer, at - stands)
        assert not row.targets[~row.mask].any() and not row.distance[~row.mask].any()
        assert row.inputs.min() >= 0 and row.inputs.max() < task.vocab_size
        assert [array.dtype for array in row] == [np.int32, np.int32, bool, np.int32]


def test_the_options_are_the_difficulty():
    row = make_row(Mqar(num_pairs=12, num_keys=20, num_values=7), "train", 0, 200)
    facts, rest = row.inputs[:24].reshape(12, 2), row.inputs[24:]
    assert len(set(facts[:, 0])) == 12 and set(facts[:, 0]) <= set(range(1, 21)) and set(facts[:, 1]) <= set(range(21, 28))
    assert sorted(rest[rest > 0]) == sorted(facts[:, 0]) and row.mask.sum() == 12
    spread = np.flatnonzero(make_row(Mqar(spread=1.0), "train", 0, 200).mask)
    assert spread.tolist() == list(range(192, 200))  # all noise lies between the facts
    near, far = (
        np.mean([row.distance[row.mask].mean() for row in rows_of(Mqar(power=power), length=512)]) for power in (0.01, 1.0)
    )
    assert near < far / 2
    again = Mqar(num_pairs=2, num_keys=2, num_values=64, num_updates=10)
    assert all(len(set(row.inputs[:24:2])) == 2 for row in rows_of(again))
    for row in rows_of(LongRange(gap=90), length=160):
        assert row.distance[row.mask].min() > 90
        assert not row.inputs[160 - 16 - 90 : 160 - 16].any()
    items = SelectiveCopy(num_items=5, num_values=3)
    assert all((row.inputs > 1).sum() == 5 and row.inputs[-5:].tolist() == [1] * 5 for row in rows_of(items))


def test_distances_grow_with_the_row():
    for task in (Mqar(), SelectiveCopy(), LongRange()):
        means = [np.mean([row.distance[row.mask].mean() for row in rows_of(task, length=length)]) for length in (128, 256, 512)]
        assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("task", SYNTHETIC[::2], ids=names(SYNTHETIC[::2]))
def test_rows_are_functions_of_seed_split_and_number(task):
    rows = GeneratedRows(task, "train", 128)
    batch = rows.read(np.array([5, -1, 3, 5]))
    for name, array in make_row(task, "train", 5, 128)._asdict().items():
        np.testing.assert_array_equal(batch[name][0], array)
        np.testing.assert_array_equal(batch[name][3], array)
        assert not batch[name][1].any()  # a padding row
    other = GeneratedRows(dataclasses.replace(task, seed=1), "train", 128).read(np.arange(4))
    assert not any((other["inputs"][i] == batch["inputs"][0]).all() for i in range(4))
    # endless: the next epoch is new; a fixed number of rows: it is the same
    fixed = GeneratedRows(dataclasses.replace(task, train_rows=10), "train", 128)
    assert (rows.row(3).inputs != rows.row(3 + len(rows)).inputs).any()
    assert (fixed.row(3).inputs == fixed.row(13).inputs).all() and len(fixed) == 10


def test_no_row_is_in_two_splits_even_where_few_rows_exist():
    tiny = SelectiveCopy(num_items=2, num_values=3, eval_rows=50)  # 9 * 15 different rows of 8 tokens
    found = {split: {row.inputs.tobytes() for row in rows_of(tiny, 300, 8, split)} for split in ("train", "validation", "test")}
    assert all(len(rows) >= 8 for rows in found.values()) and sum(map(len, found.values())) == len(set().union(*found.values()))
    assert {split_of(row.inputs) for row in rows_of(tiny, 50, 8, "test")} == {"test"}
    with pytest.raises(ConfigError, match=r"config.data.name = 'selective_copy'.*nearly all rows are alike.*Use more"):
        for split in ("train", "validation", "test"):
            make_row(SelectiveCopy(num_items=1, num_values=1), split, 0, 2)


def decode(ids):
    return bytes(ids[ids < 256].tolist()).decode("utf-8", errors="replace")


@pytest.mark.parametrize("needles", [1, 3])
def test_needle_lies_in_the_text_of_its_split(needles, cache_dir, text_folder):
    data = open_recall(
        config_of("needle", cache_dir / "recall", 300, num_needles=needles, num_digits=5, haystack=f"text:{text_folder}")
    )
    assert data.outputs == 257 and set(data.splits) == {"train", "validation", "test"}
    for split in data.splits:
        for index in range(6):
            row = data.rows(split, 300).row(index)
            text, question = decode(row.inputs).rsplit("\n", 1)
            name = question.removeprefix("The secret number of ").partition(" ")[0]
            lines = [line for line in text.split("\n") if line.endswith(".") and "The secret number of " in line]
            assert len(lines) == needles
            fact = next(line for line in lines if f" {name} is " in line)
            assert decode(row.targets[row.mask]) == fact[-6:-1] and row.mask[-5:].all() and row.mask.sum() == 5
            at = np.flatnonzero(row.mask)
            np.testing.assert_array_equal(row.inputs[at - row.distance[at]], row.targets[at])
            # without the needles, the row is a stretch of the split's own files
            whole = [line for line in text.split("\n")[1:-1] if line not in lines]
            own = decode(np.asarray(data._texts[1][split].stream))
            assert len(whole) >= 2 and all(line in own for line in whole)
    stream = data._texts[1]["train"].stream

    def mean_distance(a, b):
        task = Needle(shallowest=a, deepest=b, num_needles=needles)
        return np.mean([make_row(task, "train", index, 512, stream).distance.max() for index in range(8)])

    assert mean_distance(0.0, 0.1) > mean_distance(0.8, 0.9) + 150


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_do_not_depend_on_processes_and_resume(workers, tmp_path):
    data = open_recall(config_of("mqar", tmp_path, workers=workers))
    options = {"batch_size": 8, "seed": 3, "shuffle": True, "repeat": True}
    loader = data.loader("train", **options)
    batches = [next(loader) for _ in range(5)]
    state = loader.get_state()
    assert batches[0]["inputs"].shape == batches[0]["distance"].shape == (8, 128) and batches[0]["record"].shape == (8,)
    assert "mqar train, epoch 0" in loader.describe(batches[0])
    after = next(loader)
    loader.close()
    if workers:
        return
    for index in range(2):
        shard = data.loader("train", **options, shard_index=index, shard_count=2)
        shard.set_state(state)
        for name, value in next(shard).items():
            np.testing.assert_array_equal(value, after[name][4 * index : 4 * index + 4])
        shard.close()
    test = list(data.loader("test", batch_size=100, seed=0, shuffle=False, repeat=False, seq_len=256))
    assert [batch["mask"].any(1).sum() for batch in test] == [100] * 5 + [12]
    harder = open_recall(config_of("mqar", tmp_path, num_pairs=9)).loader("train", **options)
    with pytest.raises(ConfigError, match="made with other data"):
        harder.set_state(state)


def test_describes_and_saves_itself(tmp_path):
    data = open_recall(config_of("long_range", tmp_path, gap=32))
    assert "gap 32" in data.describe() and data.fingerprint[:12] in data.describe() and len(data.fingerprint) == 64
    data.save(tmp_path / "saved")
    assert '"gap": 32' in (tmp_path / "saved" / "recall.json").read_text()
    assert data.outputs == vocab_size(config_of("long_range", tmp_path)) == 17
    assert set(defaults()) == set(TASKS) and defaults("mqar")["mqar"]["num_pairs"] == 8


@pytest.mark.parametrize(
    ("name", "seq_len", "options", "message"),
    [
        ("mqar", 128, {"num_pairs": 0}, r"config.data.mqar.num_pairs = 0: must be at least 1"),
        ("mqar", 128, {"num_pairs": 40}, r"config.data.mqar.num_keys = 32: fewer than num_pairs = 40. Set at least 40"),
        ("mqar", 128, {"num_pair": 4}, r"config.data.mqar.num_pair = 4: no such option. Did you mean 'num_pairs'"),
        ("mqar", 128, {"num_pairs": 2.5}, r"config.data.mqar.num_pairs = 2.5: not a whole number"),
        ("mqar", 128, {"spread": 1.5}, r"config.data.mqar.spread = 1.5: is a share"),
        ("mqar", 128, {"power": 0.0}, r"config.data.mqar.power = 0.0: must be positive"),
        ("mqar", 16, {}, r"config.seq_len = 16: a row of mqar with these options takes 24 tokens. Set at least 24"),
        ("mqar", 128, {"prepared": True}, r"config.data.mqar.train_rows = 0: a prepared set has an end"),
        ("long_range", 64, {"gap": 64}, r"config.seq_len = 64: a row of long_range with these options takes 96 tokens"),
        ("selective_copy", 8, {}, r"config.seq_len = 8: a row of selective_copy"),
        ("needle", 512, {"shallowest": 0.9, "deepest": 0.1}, r"config.data.needle.shallowest = 0.9: not a share up to deepest"),
        ("needle", 512, {"num_needles": 99}, r"config.data.needle.num_needles = 99: there are 24 names"),
        ("needle", 40, {}, r"config.seq_len = 40: a row of needle"),
        ("mqar", 128, {"packing": "packed"}, r"config.data.packing = 'packed': rows of mqar are whole. Set \"windows\""),
        ("mqa", 128, {}, r"config.data.name = 'mqa': not a recall task, did you mean 'mqar'\?"),
    ],
)
def test_bad_options_are_one_message(name, seq_len, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        open_recall(config_of(name, tmp_path, seq_len, **options))


def test_a_haystack_shorter_than_a_row(tmp_path, text_folder):
    data = open_recall(config_of("needle", tmp_path, 128, haystack=f"text:{text_folder}"))
    with pytest.raises(ConfigError, match=r"config.seq_len = 100000: the test text of config.data.needle.haystack has \d+ tokens"):
        data.loader("test", batch_size=1, seed=0, shuffle=False, repeat=False, seq_len=100_000)
    assert task_of(config_of("needle", tmp_path)).haystack == "stdlib"

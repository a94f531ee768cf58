"""Batches: order, shards, exact resume, evaluation, identity, workers."""

import json
import random
import shutil

import numpy as np
import pytest

from attnlab.data import batch_spec, open_text
from attnlab.errors import ConfigError

TRAIN = {"batch_size": 8, "seq_len": 16, "seed": 3, "shuffle": True, "repeat": True}
VALIDATE = {"batch_size": 8, "seq_len": 16, "seed": 3, "shuffle": False, "repeat": False}


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return [{name: np.array(value) for name, value in batch.items()} for batch in batches]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("packing", ["windows", "packed"])
def test_shapes_and_dtypes_are_those_of_batch_spec(small, config, packing):
    (batch,) = take(small(packing=packing).loader("train", **{**TRAIN, "batch_size": 4}), 1)
    spec = batch_spec(config("nothing is opened", "", packing=packing))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == spec


def test_targets_are_the_next_tokens_of_the_files(small, text_folder):
    data = small()
    loader = data.loader("train", **TRAIN)
    for batch in take(loader, 5):
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    stream = b"\n".join(data.raw_bytes("train"))
    first = data.tokenizer.decode(batch["inputs"][0]).split(b"\n")
    assert all(line in stream for line in first)


@pytest.mark.parametrize("packing", ["windows", "packed"])
def test_every_epoch_holds_every_row_once_in_another_order(small, packing):
    loader = small(packing=packing).loader("train", **TRAIN)
    size = loader.rows_per_epoch
    records = np.concatenate([batch["record"] for batch in take(loader, 2 * size // 8 + 1)])
    first, second = records[:size], records[size : 2 * size]
    assert sorted(first) == list(range(size)) and sorted(second) == list(range(size, 2 * size))
    assert not np.array_equal(first, second - size)


def test_seeds_and_epochs_do_not_share_orders(small):
    data = small()
    size = data.loader("train", **TRAIN).rows_per_epoch
    order = {seed: data.loader("train", **{**TRAIN, "seed": seed, "batch_size": 1}) for seed in (0, 1)}
    zero, one = (np.concatenate([b["record"] for b in take(order[seed], 2 * size)]) for seed in (0, 1))
    assert not np.array_equal(zero[size:] - size, one[:size])


@pytest.mark.parametrize("packing", ["windows", "packed"])
def test_resume_at_random_steps_with_any_number_of_shards(small, packing):
    data = small(packing=packing)
    whole = take(data.loader("train", **TRAIN), 40)
    generator = random.Random(0)
    for shards in (1, 2, 4):
        saved = generator.randrange(1, 30)
        loader = data.loader("train", **TRAIN, shard_index=shards - 1, shard_count=shards)
        take(loader, saved)
        state = json.loads(json.dumps(loader.get_state()))
        for now in (1, 2, 4):
            parts = []
            for index in range(now):
                resumed = data.loader("train", **TRAIN, shard_index=index, shard_count=now)
                next(resumed)  # a loader that has run already goes back as well
                resumed.set_state(state)
                parts.append(take(resumed, 5))
            joined = [
                {name: np.concatenate([part[name] for part in step]) for name in step[0]}
                for step in zip(*parts, strict=True)
            ]
            assert_same(joined, whole[saved : saved + 5])


def test_workers_give_the_same_batches_and_resume(small):
    plain = take(small().loader("train", **TRAIN), 14)
    loader = small(workers=2).loader("train", **TRAIN)
    batches = [{k: np.array(v) for k, v in next(loader).items()} for _ in range(7)]
    assert_same(batches, plain[:7])
    state = json.loads(json.dumps(loader.get_state()))
    loader.close()
    threads = small().loader("train", **TRAIN)
    threads.set_state(state)
    assert_same(take(threads, 3), plain[7:10])
    loader.set_state(threads.get_state())
    assert_same(take(loader, 4), plain[10:14])


def test_workers_under_absl_app_take_no_accelerator(run_python, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        """
import os
import numpy as np
from absl import app
from attnlab.data.loader import Loader

class Rows:
    seq_len, keys = 2, ("inputs",)
    def __len__(self):
        return 10
    def read(self, records):
        import jax

        on_cpu = jax.config.jax_platforms == os.environ.get("JAX_PLATFORMS") == "cpu"
        return {"inputs": np.full((len(records), 2), os.getpid() if on_cpu else 0, np.int32)}

def main(_):
    loader = Loader(Rows(), {"data": "d", "split": "s"}, batch_size=2, seed=0, shuffle=True, repeat=True, workers=1)
    pid = int(next(loader)["inputs"][0, 0])
    assert "JAX_PLATFORMS" not in os.environ
    print("worker" if pid not in (0, os.getpid()) else "bad")
    loader.close()

if __name__ == "__main__":
    os.environ.pop("JAX_PLATFORMS", None)
    app.run(main)
"""
    )
    assert run_python([str(script)]).stdout == "worker\n"


@pytest.mark.parametrize("packing", ["windows", "packed"])
@pytest.mark.parametrize("batch_size", [8, 7])
def test_evaluation_predicts_every_token_once_and_pads_the_last_batch(small, packing, batch_size):
    data = small(packing=packing)
    loader = data.loader("validation", **{**VALIDATE, "batch_size": batch_size})
    batches = list(loader)
    assert len(batches) == loader.num_batches and all(batch["inputs"].shape == (batch_size, 16) for batch in batches)
    info = data.splits["validation"]
    assert sum(batch["mask"].sum() for batch in batches) == info.bytes + info.documents
    counted = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
    text = data.tokenizer.token_bytes[counted].sum()
    assert text == info.bytes == sum(map(len, data.raw_bytes("validation")))
    records = np.concatenate([batch["record"] for batch in batches])
    masks = np.concatenate([batch["mask"] for batch in batches])
    assert sorted(records[records >= 0]) == list(range(loader.rows_per_epoch)) and not masks[records < 0].any()
    assert list(loader) == []


def test_windows_in_order_are_the_text(small):
    data = small()
    batches = list(data.loader("test", **VALIDATE))
    counted = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
    assert data.tokenizer.decode(counted) == b"".join(data.raw_bytes("test"))


def test_describe_names_files_and_bytes(small, text_folder):
    data = small(tokenizer="bytes")
    loader = data.loader("train", **TRAIN)
    batch = next(loader)
    sentence = loader.describe(batch)
    assert sentence.startswith(f"{data.name} train, epoch 0, records {batch['record'][0]}, ")
    place = sentence.split("the first: ")[1].split(" | ")[0].split(", ")[0]
    name, _, span = place.split(" ")
    start, stop = map(int, span.split(":"))
    shown = (text_folder / name).read_bytes()[start:stop]
    row = data.tokenizer.decode([*batch["inputs"][0], batch["targets"][0, -1]])
    assert shown and shown in row
    assert loader.describe({**batch, "inputs": batch["inputs"] + 1})[-12:] != sentence[-12:]
    loader.close()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seq_len", {"seq_len": 32}),
        ("batch_size", {"batch_size": 4}),
        ("seed", {"seed": 4}),
        ("shuffle", {"shuffle": False}),
    ],
)
def test_state_of_another_order_is_refused(small, field, change):
    state = small().loader("train", **TRAIN).get_state()
    with pytest.raises(ConfigError, match=f"made with other data: {field} was .*, is "):
        small().loader("train", **{**TRAIN, **change}).set_state(state)
    with pytest.raises(ConfigError, match="packing was 'windows', is 'packed'"):
        small(packing="packed").loader("train", **TRAIN).set_state(state)


def test_resume_after_the_folder_has_moved(config, text_folder, tmp_path):
    copy = shutil.copytree(text_folder, tmp_path / "moved")
    here, there = (open_text(config(f"text:{path}", tmp_path)).loader("train", **TRAIN) for path in (text_folder, copy))
    batches = take(here, 3)
    there.set_state({**here.get_state(), "step": 1})
    assert_same(take(there, 2), batches[1:])


@pytest.mark.parametrize("state", [None, {}, {"version": 9, "step": 1}, {"version": 1, "step": "1"}])
def test_damaged_state_is_refused(small, state):
    with pytest.raises(ConfigError, match="state"):
        small().loader("train", **TRAIN).set_state(state)


def test_bad_sizes(small):
    data = small()
    with pytest.raises(ConfigError, match=r"config.batch_size = 8: .*multiple of 3"):
        data.loader("train", **TRAIN, shard_count=3)
    with pytest.raises(ConfigError, match=r"config.seq_len = 1000000: the train split .*fewer tokens"):
        data.loader("train", **{**TRAIN, "seq_len": 1_000_000})
    with pytest.raises(ConfigError, match=r"config.seq_len = 0"):
        data.loader("train", **{**TRAIN, "seq_len": 0})
    with pytest.raises(ConfigError, match=r"did you mean 'train'"):
        data.loader("trian", **TRAIN)
    with pytest.raises(ConfigError, match=r"config.data.workers = -1"):
        small(workers=-1).loader("train", **TRAIN)
    with pytest.raises(ValueError, match="shard_index"):
        data.loader("train", **TRAIN, shard_index=2, shard_count=2)

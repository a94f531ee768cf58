"""Prepared TFDS sets: found, split, read ahead or streamed."""

import os
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnlab.data import open_text, tfds_source
from attnlab.data.stdlib_code import quiet
from attnlab.data.streaming import StreamedRows
from attnlab.data.tokenizers import ByteTokenizer
from attnlab.errors import ConfigError

SPLITS = ("train", "validation", "test")


class TinyText(tfds.core.GeneratorBasedBuilder):
    """Documents that say their split and number."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=name) for name in ("whole", "train_only", "binary")
    ]
    url_infos = {}  # noqa: RUF012

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "title": tfds.features.Text(),
            "label": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        splits = SPLITS if self.builder_config.name == "whole" else ("train",)
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split):
        binary = self.builder_config.name == "binary"
        for i in range(200 if binary else 60):
            text = f"{split} document {i}: " + f"word{i} " * (i % 7 + 1)
            bad = binary and i == 4
            yield i, {"text": b"\xff\xfe" if bad else text, "title": f"title {i}", "label": i}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    with quiet():
        for name in ("whole", "train_only", "binary"):
            builder = TinyText(data_dir=folder, config=name, file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "tfds_cache"))


def test_named_splits_are_used(config, tfds_dir):
    data = open_text(config("tfds:tiny_text/whole", tfds_dir))
    assert {split: info.documents for split, info in data.splits.items()} == dict.fromkeys(SPLITS, 60)
    assert next(data.raw_bytes("test")) == b"test document 0: word0 " and data.notes == ()
    loader = data.loader("train", batch_size=2, seq_len=20, seed=0, shuffle=True, repeat=True)
    assert "tfds:tiny_text/whole train #" in loader.describe(next(loader))
    assert not (tfds_dir / "tokens").exists()  # that folder may be read-only


def test_missing_splits_are_held_out_of_train_and_said(config, tfds_dir):
    data = open_text(config("tfds:tiny_text/train_only:1.0.0", tfds_dir))
    assert [info.documents for info in data.splits.values()] == [54, 3, 3]
    assert "validation" in data.notes[0] and "train[90%:95%]" in data.notes[0]
    texts = [text for split in SPLITS for text in data.raw_bytes(split)]
    assert len(set(texts)) == 60
    assert data.fingerprint != open_text(config("tfds:tiny_text/whole", tfds_dir)).fingerprint


def test_another_feature(config, tfds_dir):
    data = open_text(config("tfds:tiny_text/whole", tfds_dir, feature="title"))
    assert next(data.raw_bytes("train")) == b"title 0"
    with pytest.raises(ConfigError, match=r"config.data.feature = 'titel'.*did you mean 'title'"):
        open_text(config("tfds:tiny_text/whole", tfds_dir, feature="titel"))
    with pytest.raises(ConfigError, match=r"config.data.feature = 'label': it holds int,"):
        open_text(config("tfds:tiny_text/whole", tfds_dir, feature="label"))


def test_missing_sets_say_how_to_prepare_them(config, tfds_dir, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"not prepared in .*did you mean 'tiny_text/whole'.*download_and_prepare"):
        open_text(config("tfds:tiny_txt/whole", tfds_dir))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"not prepared in .*config.data.dir to DIR"):
        open_text(config("tfds:lm1b", ""))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    assert open_text(config("tfds:tiny_text/whole", "")).splits


def test_a_set_in_another_file_format(config, tmp_path):
    with quiet():
        builder = TinyText(data_dir=tmp_path, config="whole", file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    info = builder.data_path / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ConfigError, match=r'random-access format.*file_format="array_record"'):
        open_text(config("tfds:tiny_text/whole", tmp_path))


def test_documents_that_are_no_text(config, tfds_dir):
    with pytest.raises(ConfigError, match=r"#4 is not UTF-8 text.*config.data.errors"):
        open_text(config("tfds:tiny_text/binary", tfds_dir))
    data = open_text(config("tfds:tiny_text/binary", tfds_dir, errors="skip"))
    assert len(list(data.raw_bytes("train"))) == 179


@pytest.mark.parametrize("packing", ["windows", "packed"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_large_sets_are_streamed_with_exact_resume(config, tfds_dir, monkeypatch, packing, tokenizer):
    monkeypatch.setattr(tfds_source, "STREAM_ABOVE_BYTES", 0)
    monkeypatch.setattr("attnlab.data.corpus.open_tokens", None)  # nothing is tokenized ahead
    data = open_text(config("tfds:tiny_text/whole", tfds_dir, packing=packing, tokenizer=tokenizer))
    options = {"batch_size": 4, "seq_len": 64, "seed": 1, "shuffle": True, "repeat": True}
    loader = data.loader("train", **options)
    batches = [next(loader) for _ in range(30)]
    assert "tfds:tiny_text/whole train #" in loader.describe(batches[0])
    loader.close()
    assert np.mean([batch["mask"].mean() for batch in batches]) > 0.7
    for index in range(2):
        shard = data.loader("train", **options, shard_index=index, shard_count=2)
        shard.set_state({**loader.get_state(), "step": 17})
        batch = next(shard)
        for name, value in batch.items():
            np.testing.assert_array_equal(value, batches[17][name][2 * index : 2 * index + 2])
        shard.close()
    texts = set(data.raw_bytes("train"))
    for row, mask in zip(batches[0]["targets"], batches[0]["mask"], strict=True):
        for part in split_at(row[mask], data.tokenizer.eos_id):
            assert any(data.tokenizer.decode(part) in text for text in texts)


def split_at(ids, eos):
    return np.split(ids, np.flatnonzero(ids == eos))


def test_a_bad_document_met_by_a_worker_is_the_same_error(config, tfds_dir, monkeypatch):
    monkeypatch.setattr(tfds_source, "STREAM_ABOVE_BYTES", 0)
    data = open_text(config("tfds:tiny_text/binary", tfds_dir, errors="skip", workers=1))
    data._source._skip = False
    loader = data.loader("train", batch_size=54, seq_len=8, seed=0, shuffle=False, repeat=True)
    with pytest.raises(ConfigError, match="#4 is not UTF-8 text"):
        next(loader)
    loader.close()


class Lines(types.SimpleNamespace):
    def __len__(self):
        return len(self.texts)

    def read(self, indices):
        return [self.texts[i] for i in indices]

    def document_name(self, index):
        return f"line {index}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [3, 30, 300])
def test_streamed_rows_of_short_and_long_documents(packed, length):
    texts = [bytes([65 + i % 26]) * length for i in range(50)]
    rows = StreamedRows(Lines(texts=texts), ByteTokenizer(), 32, packed=packed, random_crops=0, keep_partial=True)
    batch = rows.read(np.arange(len(rows)))
    assert batch["mask"].mean() > 0.85
    real = batch["targets"][batch["mask"]]
    assert len(set(real.tolist()) - {256}) == 26  # every document takes part
    if packed:
        for row in range(len(rows)):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                own = batch["segment_ids"][row] == segment
                letters = set(batch["targets"][row, own].tolist()) - {256}
                assert len(letters) <= 1
                np.testing.assert_array_equal(batch["positions"][row, own], np.arange(own.sum()))
    again = rows.read(np.arange(len(rows)) + len(rows))  # the next epoch: the same documents
    np.testing.assert_array_equal(batch["mask"], again["mask"])


def test_long_documents_give_other_stretches_in_each_epoch_and_fixed_ones_in_evaluation():
    texts = [os.urandom(1000) for _ in range(10)]
    for seed, same in ((5, False), (None, True)):
        rows = StreamedRows(
            Lines(texts=texts), ByteTokenizer(), 100, packed=False, random_crops=seed, keep_partial=True
        )
        one, two = (rows.read(np.arange(len(rows)) + epoch * len(rows))["inputs"] for epoch in (0, 1))
        assert np.array_equal(one, two) is same
        assert len(rows) == 100
        starts = [texts[0].find(row.astype(np.uint8).tobytes()) for row in one[1:10]]
        assert sorted(starts) == starts and -1 not in starts  # each row has its own part of the document

"""The standard library, files on disk, and what is said when they are not there."""

import json
import os
import types

import numpy as np
import pytest

from attnlab import data as data_module
from attnlab import registry
from attnlab.data import open_text
from attnlab.data.sources import Document, SplitInfo, open_source
from attnlab.data.storage import prepare_once
from attnlab.errors import ConfigError

SPLITS = ("train", "validation", "test")


def test_stdlib_is_split_by_file_without_leakage(stdlib):
    assert set(stdlib.splits) == set(SPLITS)
    texts = {split: list(stdlib.raw_bytes(split)) for split in SPLITS}
    total = sum(info.bytes for info in stdlib.splits.values())
    assert total > 5_000_000
    for split in SPLITS:
        info = stdlib.splits[split]
        assert len(texts[split]) == info.documents and sum(map(len, texts[split])) == info.bytes
        assert info.bytes / total == pytest.approx(0.9 if split == "train" else 0.05, abs=0.02)
    whole = [text for split in SPLITS for text in texts[split]]
    assert len(set(whole)) == len(whole)
    assert b"".join(texts["train"]).isascii() is False  # real text: some of it is not ASCII


def test_stdlib_windows_do_not_cross_splits(stdlib):
    validation = stdlib.tokenizer.encode(b"".join(stdlib.raw_bytes("validation")))
    loader = stdlib.loader("validation", batch_size=64, seq_len=256, seed=0, shuffle=False, repeat=False)
    batches = list(loader)
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(targets[targets != stdlib.tokenizer.eos_id], validation)


def test_stdlib_builder_records_its_content_hash(stdlib, cache_dir):
    from attnlab.data import stdlib_code

    plan = stdlib_code.split_plan()
    builder = stdlib_code.prepared_builder(cache_dir / "attnlab")
    assert builder.info.metadata["content_sha256"] == plan.content_sha256
    assert plan.content_sha256[:16] in str(builder.data_path)
    assert {split: len(builder.as_data_source(split)) for split in SPLITS} == {
        split: stdlib.splits[split].documents for split in SPLITS
    }
    names = {example["path"].decode() for split in SPLITS for example in builder.as_data_source(split)}
    assert "ast.py" in names and not any("test" in name.split("/") for name in names)
    assert not any("site-packages" in name or name.startswith("_sysconfigdata") for name in names)


def test_two_processes_prepare_at_once_without_tensorflow(start_python, tmp_path):
    code = """
import json, sys, types
from attnlab.data import open_text
config = types.SimpleNamespace(data=types.SimpleNamespace(name="stdlib", dir=sys.argv[1], tokenizer="bytes"))
data = open_text(config)
loader = data.loader("train", batch_size=4, seq_len=32, seed=0, shuffle=True, repeat=True)
print(json.dumps([data.fingerprint, loader.describe(next(loader)), "tensorflow" in sys.modules]))
"""
    processes = [
        start_python(["-c", code, str(tmp_path)], env={"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"})
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second and first[2] is False
    assert not list(tmp_path.rglob("*incomplete*"))


def test_folder_file_and_glob(config, text_folder, tmp_path):
    folder = open_text(config(f"text:{text_folder}", tmp_path))
    glob = open_text(config(f"text:{text_folder}/**/*.txt", tmp_path))
    assert folder.splits == glob.splits and folder.fingerprint == glob.fingerprint
    one = tmp_path / "one.txt"
    one.write_bytes(b"".join(folder.raw_bytes("train")))
    data = open_text(config(f"text:{one}", tmp_path))
    assert "contiguous ranges" in data.notes[0]
    assert b"".join(b"".join(data.raw_bytes(split)) for split in SPLITS) == one.read_bytes()
    loader = data.loader("test", batch_size=1, seq_len=8, seed=0, shuffle=False, repeat=False)
    batch = next(loader)
    start = one.read_bytes().index(next(data.raw_bytes("test")))
    assert f"one.txt bytes {start}:" in loader.describe(batch)


def test_fingerprint_follows_the_content(config, text_folder, tmp_path):
    before = open_text(config(f"text:{text_folder}", tmp_path)).fingerprint
    extra = text_folder / "extra.txt"
    extra.write_text("a line of its own\n")
    try:
        assert open_text(config(f"text:{text_folder}", tmp_path)).fingerprint != before
    finally:
        extra.unlink()
    assert open_text(config(f"text:{text_folder}", tmp_path)).fingerprint == before


def test_summary_is_json_and_tells_sizes(small):
    summary = json.loads(json.dumps(small().summary()))
    assert (
        summary["tokenizer"] == "bytes"
        and summary["splits"]["train"]["bytes"] > 0
        and len(summary["fingerprint"]) == 64
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stdlb", "unknown data set, did you mean 'stdlib'"),
        ("txt:/tmp", "did you mean 'text'"),
        ("text:", "nothing follows 'text'"),
        ("text:/no/such/folder", "no such file or folder"),
        ("text:/no/such/*.txt", "no file matches the pattern"),
    ],
)
def test_names_of_nothing(config, tmp_path, name, message):
    with pytest.raises(ConfigError, match=r"config\.data\.name") as error:
        open_text(config(name, tmp_path))
    assert message in str(error.value) and repr(name) in str(error.value)


def test_empty_folder_and_too_little_text(config, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(ConfigError, match="the folder holds no files"):
        open_text(config(f"text:{folder}", tmp_path))
    (folder / "a.txt").write_text("")
    with pytest.raises(ConfigError, match="not enough text in 1 files"):
        open_text(config(f"text:{folder}", tmp_path))


def test_undecodable_files(config, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("a line\n" * 100)
    (folder / "latin.txt").write_bytes("é\n".encode("latin-1") * 10)
    (folder / "image.bin").write_bytes(b"\x00\x01\x02")
    (folder / ".hidden").write_bytes(b"\xff\xff")
    with pytest.raises(ConfigError, match=r"2 of 3 files are not UTF-8 text: image.bin, latin.txt.*config.data.errors"):
        open_text(config(f"text:{folder}", tmp_path))
    data = open_text(config(f"text:{folder}", tmp_path / "cache", errors="skip"))
    assert any("2 files that are not UTF-8 text left out" in note for note in data.notes)
    with pytest.raises(ConfigError, match=r"config.data.errors = 'skp': unknown, did you mean 'skip'"):
        open_text(config(f"text:{folder}", tmp_path, errors="skp"))


@pytest.mark.parametrize("name", ["stdlib", "text"])
def test_unwritable_cache_names_the_field(config, tmp_path, text_folder, name, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    (tmp_path / "file").write_text("")
    name = name if name == "stdlib" else f"text:{text_folder}"
    with pytest.raises(ConfigError, match=r"config.data.dir = .*cannot be written"):
        open_text(config(name, tmp_path / "file" / "cache"))


def test_failed_preparation_leaves_nothing_behind(config, text_folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("attnlab.data.corpus._write", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            open_text(config(f"text:{text_folder}", tmp_path))
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert open_text(config(f"text:{text_folder}", tmp_path)).splits


def test_a_file_that_goes_away_is_named(config, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "here.txt").write_text("a line\n" * 100)
    (folder / "gone.txt").symlink_to(folder / "here.txt")
    source = open_source(config(f"text:{folder}", tmp_path))
    (folder / "here.txt").unlink()
    with pytest.raises(ConfigError, match=r"config.data.name = .*(here|gone).txt cannot be read"):
        list(source.documents("train"))


def test_what_killed_preparations_left_is_removed(tmp_path):
    old, new = tmp_path / ".x.incomplete-1", tmp_path / ".x.incomplete-2"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    prepare_once(tmp_path / "x", lambda folder: None)
    assert not old.exists() and new.exists() and (tmp_path / "x").is_dir()


def test_default_cache_respects_the_environment(config, text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_text(config(f"text:{text_folder}", ""))
    assert list((tmp_path / "attnlab" / "tokens").iterdir())


def test_bad_packing_and_tokenizer_before_any_data(config, tmp_path):
    with pytest.raises(ConfigError, match=r"config.data.packing = 'window': unknown, did you mean 'windows'"):
        open_text(config("text:/no/such/folder", tmp_path, packing="window"))
    with pytest.raises(ConfigError, match=r"config.data.tokenizer"):
        open_text(config("text:/no/such/folder", tmp_path, tokenizer="chars"))
    with pytest.raises(ConfigError, match=r"config.data.packing"):
        data_module.batch_spec(config("stdlib", "", packing="dense"))


def test_an_outside_package_may_register_a_source(config, tmp_path, monkeypatch):
    class Counting:
        name, fingerprint, notes, streamed = "counting", "0" * 64, (), False
        splits = types.MappingProxyType({split: SplitInfo(1, 100) for split in SPLITS})

        def __init__(self, config):
            pass

        def documents(self, split):
            yield Document("numbers", 0, bytes(range(100)))

    monkeypatch.setattr(registry, "_registered", {})
    registry.register("data", "counting", Counting)
    loader = open_text(config("counting", tmp_path)).loader(
        "train", batch_size=1, seq_len=99, seed=0, shuffle=False, repeat=False
    )
    np.testing.assert_array_equal(next(loader)["targets"][0], np.arange(99))


def test_command_line_summary(text_folder, tmp_path, capsys):
    from attnlab.data.__main__ import main

    assert main(["--name", f"text:{text_folder}", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "fingerprint" in out and "validation: " in out
    assert main(["--name", "stdlb", "--dir", str(tmp_path)]) == 2
    assert "did you mean 'stdlib'" in capsys.readouterr().err

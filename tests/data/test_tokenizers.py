"""Bytes and BPE: lossless, exact sizes, saved and loaded, trained once."""

import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.data import load_tokenizer, vocab_size_of
from attnlab.data import tokenizers as module
from attnlab.data.tokenizers import ByteTokenizer, train_bpe
from attnlab.errors import ConfigError

TEXTS = [
    "".join(f"def f{i}(query, key):\n    return softmax(query @ key) * {i}\n" for i in range(200)).encode(),
    "état 注意 <|endoftext|> <s> \t\r\n".encode() * 20,
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 320)


@settings(deadline=None, max_examples=150)
@given(st.text())
def test_round_trip_of_any_text(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text.encode("utf-8"))
        assert ids.dtype == np.int32 and tokenizer.eos_id not in ids
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert tokenizer.decode(ids) == text.encode("utf-8")
        assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("text", [*TEXTS, b"<|endoftext|>", b"\x00\x7f"])
def test_round_trip_of_text_that_looks_special(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_bytes_takes_invalid_utf8_and_bpe_says_so(bpe):
    everything = bytes(range(256))
    assert ByteTokenizer().decode(ByteTokenizer().encode(everything)) == everything
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        bpe.encode(everything)


def test_separators_stand_for_nothing(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = np.concatenate([[tokenizer.eos_id], tokenizer.encode(b"abc"), [tokenizer.eos_id]])
        assert tokenizer.decode(ids) == b"abc" and tokenizer.token_bytes[tokenizer.eos_id] == 0
        assert len(tokenizer.token_bytes) == tokenizer.vocab_size == tokenizer.eos_id + 1
        assert tokenizer.decode([]) == b""
        with pytest.raises(ValueError, match="token ids must be"):
            tokenizer.decode([tokenizer.vocab_size])


def test_long_texts_are_encoded_in_pieces(bpe, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 64)
    for text in (TEXTS[0], "é".encode() * 500, b""):
        for tokenizer in (bpe, ByteTokenizer()):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            np.testing.assert_array_equal(np.concatenate([[], *tokenizer.blocks(text)]), tokenizer.encode(text))


def test_bpe_has_exactly_the_asked_size_and_compresses(bpe):
    assert bpe.vocab_size == vocab_size_of("bpe:320") == 320 and bpe.spec == "bpe:320"
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    again = train_bpe(TEXTS, 320)
    np.testing.assert_array_equal(again.encode(TEXTS[0]), bpe.encode(TEXTS[0]))


def test_save_load_and_pickle(bpe, tmp_path):
    for tokenizer in (ByteTokenizer(), bpe):
        tokenizer.save(tmp_path / tokenizer.spec)
        for other in (load_tokenizer(tmp_path / tokenizer.spec), pickle.loads(pickle.dumps(tokenizer))):
            assert other.spec == tokenizer.spec
            np.testing.assert_array_equal(other.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))
    with pytest.raises(ConfigError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "nowhere")


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(ConfigError, match=r'bpe:5000.*too small, it yields only \d+ tokens. Use "bpe:\d+" or less'):
        train_bpe([b"a few words, a few words"], 5000)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte", "did you mean 'bytes'"),
        ("bpe", "vocabulary size is missing"),
        ("bpe:1e3", "missing"),
        ("bpe:256", "257"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ConfigError, match=f"config.data.tokenizer = '{spec}': .*{message}"):
        vocab_size_of(spec)


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"attnlab\[data\]"):
        train_bpe(TEXTS, 300)


def test_trained_on_the_train_split_and_cached(small, small_cache):
    data = small(tokenizer="bpe:300")
    assert data.tokenizer.vocab_size == 300
    assert list((small_cache / "tokenizers").glob("*-bpe300"))
    expected = train_bpe(data.raw_bytes("train"), 300)
    text = next(data.raw_bytes("test"))
    np.testing.assert_array_equal(data.tokenizer.encode(text), expected.encode(text))
    np.testing.assert_array_equal(small(tokenizer="bpe:300").tokenizer.encode(text), expected.encode(text))
    batch = next(data.loader("test", batch_size=64, seq_len=32, seed=0, shuffle=False, repeat=False))
    assert data.tokenizer.decode(batch["targets"][batch["mask"]]) == b"".join(data.raw_bytes("test"))

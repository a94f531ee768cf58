"""The cheap models' figures against hand-made values."""

import gzip

import pytest

from attnlab.data.baselines import baselines, entropy, gzip_bits, unigram, xz_bits


def test_entropy_of_known_distributions():
    assert entropy(b"abab" * 100) == pytest.approx(1.0)
    assert entropy(bytes(range(256))) == pytest.approx(8.0)
    assert entropy(b"aaaa") == 0.0


def test_unigram_is_smoothed_cross_entropy():
    # 3 a, 1 b, each of the 256 bytes counted once more: 4/260 and 2/260; an unseen byte 1/260
    assert unigram(b"aaab", b"a") == pytest.approx(6.022367813028454)
    assert unigram(b"aaab", b"b") == pytest.approx(7.022367813028454)
    assert unigram(b"aaab", b"z") == pytest.approx(8.022367813028454)
    assert unigram([b"aa", b"ab"], [b"a", b"z"]) == pytest.approx((6.022367813028454 + 8.022367813028454) / 2)


def test_order_of_the_figures_on_code(stdlib):
    test = b"".join(stdlib.raw_bytes("test"))
    figures = baselines(stdlib.raw_bytes("train"), test)
    assert figures["xz"] < figures["gzip"] < figures["entropy"] <= figures["unigram"] < 5
    assert figures["gzip"] == gzip_bits([test]) == 8 * len(gzip.compress(test, 9, mtime=0)) / len(test)


@pytest.mark.parametrize("function", [entropy, gzip_bits, xz_bits])
def test_empty_text(function):
    with pytest.raises(ValueError, match="empty text"):
        function(b"")

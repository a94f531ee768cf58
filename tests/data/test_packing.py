"""Windows and packed rows as functions of any set of documents."""

import types

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.data.packing import PackedRows, WindowRows, plan_rows

EOS = 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=40), min_size=1, max_size=12)


def token_array(documents):
    stream = np.array([EOS] + [token for document in documents for token in [*document, EOS]], np.uint16)
    offsets = np.cumsum([1] + [len(document) + 1 for document in documents])

    class Tokens(types.SimpleNamespace):
        def __len__(self):
            return len(stream)

    return Tokens(stream=stream, offsets=offsets, num_documents=len(documents))


@settings(deadline=None, max_examples=80)
@given(DOCUMENTS, st.integers(1, 24))
def test_packed_rows_hold_every_document_and_nothing_else(documents, seq_len):
    rows = PackedRows(token_array(documents), seq_len, EOS)
    batch = rows.read(np.arange(len(rows)))
    found = []
    for r in range(len(rows)):
        segments, mask = batch["segment_ids"][r], batch["mask"][r]
        np.testing.assert_array_equal(mask, segments > 0)
        assert np.all(np.diff(segments[mask]) >= 0) and not mask[mask.sum() :].any()  # padding only at the end
        np.testing.assert_array_equal(np.unique(segments[mask]), np.arange(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            np.testing.assert_array_equal(batch["positions"][r, own], np.arange(own.sum()))
            # inside a segment each target is the next input: no target comes from another document
            np.testing.assert_array_equal(batch["inputs"][r, own][1:], batch["targets"][r, own][:-1])
            found.append((tuple(batch["inputs"][r, own]), tuple(batch["targets"][r, own])))
        assert np.all(batch["inputs"][r, ~mask] == EOS) and np.all(batch["positions"][r, ~mask] == 0)
    expected = []
    for document in documents:
        sequence = [EOS, *document, EOS]
        for start in range(0, len(sequence) - 1, seq_len):
            piece = sequence[start : start + seq_len + 1]
            expected.append((tuple(piece[:-1]), tuple(piece[1:])))
    assert sorted(found) == sorted(expected)


@settings(deadline=None, max_examples=80)
@given(DOCUMENTS, st.integers(1, 24))
def test_windows_predict_every_token_once(documents, seq_len):
    tokens = token_array(documents)
    rows = WindowRows(tokens, seq_len, EOS, keep_partial=True)
    batch = rows.read(np.arange(len(rows)))
    np.testing.assert_array_equal(batch["targets"][batch["mask"]], tokens.stream[1:])
    np.testing.assert_array_equal(batch["inputs"][batch["mask"]], tokens.stream[:-1])
    whole = WindowRows(tokens, seq_len, EOS, keep_partial=False)
    assert len(whole) == (len(tokens) - 1) // seq_len
    assert whole.read(np.arange(len(whole)))["mask"].all()


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.integers(2, 24))
def test_spans_name_the_tokens_of_a_row(documents, seq_len):
    tokens = token_array(documents)
    for rows in (WindowRows(tokens, seq_len, EOS, True), PackedRows(tokens, seq_len, EOS)):
        for record in range(len(rows)):
            named = [token for d, a, b in rows.spans(record) for token in [*documents[d], EOS][a:b]]
            batch = rows.read(np.array([record]))
            shown = batch["targets"][0][batch["mask"][0]].tolist()
            assert named == shown or named == [batch["inputs"][0, 0], *shown]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 32))
def test_plan_fits_and_wastes_less_than_half(lengths, capacity):
    lengths = np.array(lengths)
    starts = np.cumsum(lengths) - lengths
    start, size, rows = plan_rows(starts, lengths, capacity)
    assert size.sum() == lengths.sum() and size.max() <= capacity
    covered = np.sort(np.concatenate([np.arange(a, a + n) for a, n in zip(start, size, strict=True)]))
    np.testing.assert_array_equal(covered, np.arange(lengths.sum()))
    filled = np.add.reduceat(size, rows[:-1])
    assert filled.max() <= capacity
    assert len(filled) == 1 or np.sort(filled)[:2].sum() > capacity  # any two rows together would not fit in one


def test_padding_records_are_masked():
    tokens = token_array([[1, 2, 3], [4, 5]])
    for rows in (WindowRows(tokens, 4, EOS, True), PackedRows(tokens, 4, EOS)):
        batch = rows.read(np.array([0, -1]))
        assert batch["mask"][0].any() and not batch["mask"][1].any()
        assert np.all(batch["inputs"][1] == EOS)

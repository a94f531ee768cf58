"""The report page: self-contained, well formed, and safe with any text in it."""

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from attnlab.analysis import attention, charts, images, report, text

HOSTILE = "</script><script>alert(\"x\")</script> & 'q' <!-- \x00 \u202e"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that every element is closed in order and collects what the tests ask about."""

    def __init__(self, document):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.references, self.text = [], [], [], []
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [
            value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)


def views(labels, layers=3, heads=4):
    length = len(labels)
    weights = np.tril(np.random.default_rng(0).random((layers, 1, heads, length, length))).astype(np.float32)
    statistics = {name: np.asarray(value) for name, value in attention.head_statistics(weights).items()}
    profile, edges = attention.strength_profile(weights)
    return report.HeadViews(
        labels, weights[1:, 0, ::2], (1, 2), (0, 2), statistics, (0, 1, 2), ("softmax", "sigmoid", "softmax"),
        np.asarray(profile)[:, 0], edges,
    )  # fmt: skip


def full_report(hostile="plain"):
    steps = np.arange(1, 40)
    return report.Report(
        title=f"run {hostile}",
        summary=hostile,
        facts=[("device", hostile), (hostile, "1")],
        figures={
            "step": 39, "split": "test", "loss": 1.5, "bits_per_byte": 2.1, "unigram_bits_per_byte": 4.7,
            "gzip_bits_per_byte": 2.4, "xz_bits_per_byte": 2.0, "perplexity": 4.5, "accuracy": 0.5, "tokens": 1000,
            "bytes": 1000, "tokens_per_second": 1e4, "decode_tokens_per_second": 500.0,
        },
        metrics={
            "loss": (steps, 5.0 / steps), "eval/bits_per_byte": (steps[::10], 7.0 / steps[::10]),
            "tokens_per_second": (steps, 100.0 + steps), "learning_rate": (steps, 1e-3 / steps),
            "grad_norm": (steps, np.where(steps == 3, np.nan, 1.0)),
        },
        bits_per_nat=1 / np.log(2),
        attention=views([*text.token_labels(b"ab\n <", bytes, None), hostile]),
        samples=[(hostile, hostile)],
        decoding=hostile,
        config=json.dumps({"name": hostile}),
        notes=[hostile],
    )  # fmt: skip


def test_page_is_well_formed_and_loads_nothing(tmp_path):
    path = report.write(full_report(), tmp_path / "report.html")
    document = path.read_text(encoding="utf-8")
    page = Page(document)
    assert page.references and all(value.startswith("data:image/png;base64,") for value in page.references)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", document)
    assert "link" not in page.tags and "iframe" not in page.tags
    assert "default-src 'none'" in document
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    written = " ".join(page.text)
    for word in (
        "2.100",
        "4.700",
        "gzip",
        "xz",
        "unigram",
        "bits per byte",
        "Entropy",
        "Mean distance",
        "Row mass",
        "L1 H2",
    ):
        assert word in written, word
    assert document.count('class="thumb"') == 4


def test_hostile_text_stays_text():
    plain, hostile = (Page(report.render(full_report(kind))) for kind in ("plain", HOSTILE))
    assert hostile.tags == plain.tags
    scripts = re.findall(r"<script", report.render(full_report(HOSTILE)))
    assert len(scripts) == 2
    data = re.search(r'id="maps-data">(.*?)</script>', report.render(full_report(HOSTILE)), re.S).group(1)
    assert json.loads(data)["tokens"][-1] == HOSTILE


def test_empty_report_still_is_a_page():
    document = report.render(report.Report("empty", ""))
    Page(document)
    assert "metrics.jsonl is missing" in document


def test_short_runs_and_bad_values_draw():
    one = full_report()
    one.metrics = {"loss": (np.array([1]), np.array([np.nan])), "grad_norm": (np.array([5]), np.array([2.0]))}
    document = report.render(one)
    Page(document)
    assert "1 logged losses are not finite" in document


def test_large_model_stays_small():
    labels = text.token_labels(bytes(range(32, 128)), bytes, None)
    many = views(labels, layers=24, heads=16)
    many.mixers, many.all_layers = ("softmax",) * 24, tuple(range(24))
    many.maps = many.maps[:3, :8]
    many.layers, many.heads = (0, 1, 2), tuple(range(8))
    page = full_report()
    page.attention = many
    assert len(report.render(page).encode()) < 2_000_000


def test_png_decodes_to_the_entries():
    values = np.random.default_rng(1).random((5, 7))
    visible = np.ones((5, 7), bool)
    visible[0, 1:] = False
    entries = images.quantise(values, 1.0, visible)
    raw = base64.b64decode(images.data_uri(entries).split(",")[1])
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at : at + 8])
        data = raw[at + 8 : at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + size
    pixels = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, 8)
    np.testing.assert_array_equal(pixels[:, 1:], entries)
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (7, 5)
    assert (entries[0, 1:] == 0).all() and (entries[1:] > 0).all()
    np.testing.assert_allclose(((entries[1:] - 1.0) / 254) ** 2, values[1:], atol=0.005)


def test_colour_map_gets_darker_all_the_way():
    colours = images.palette()[1:].astype(float) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert np.all(np.diff(luminance) < 2e-3) and luminance[0] > 0.9 and luminance[-1] < 0.05
    assert np.all(np.diff(luminance[::8]) < 0)
    assert len(np.unique(images.palette()[1:], axis=0)) > 250


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.3, 9.7), (-2e-5, 3e-5), (0, 123456), (1, 1.0001)])
def test_ticks_are_round_and_inside(low, high):
    marks = charts.ticks(low, high, 5)
    assert 2 <= len(marks) <= 12
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_edge_labels_do_not_overlap():
    steps = np.array([0, 10])
    lines = [charts.Line(f"line {i}", steps, np.array([1.0, 1.0 + 0.001 * i]), colour=i % 4) for i in range(6)]
    drawing = charts.line_chart(lines, x_label="x", y_label="y", title="t", references=[("r", 1.0)])
    levels = sorted(float(y) for y in re.findall(r'class="label[^>]*y="([\d.]+)"', drawing))
    assert len(levels) == 7 and min(np.diff(levels)) > charts.TEXT


def test_token_labels_show_what_cannot_be_seen():
    tokens = [*b"a\n\t \x00\xc3", 256]
    assert text.token_labels(tokens, bytes, 256) == ["a", "⏎", "⇥", "·", "␀", "c3", "␄"]
    assert text.readable("é\x00\n".encode() + b"\xff") == "é␀\n\ufffd"

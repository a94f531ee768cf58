"""The page of an image classifier: pictures that decode to what they show, maps over images, many classes, escaping."""

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest

from attnlab.analysis import image_report, images
from attnlab.analysis.image_report import ImageReport, MapView, Mistake, grid_of, received

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_decode_to_themselves(channels):
    picture = RNG.integers(0, 256, (5, 9, channels), np.uint8)
    content = base64.b64decode(images.data_uri(picture).partition(",")[2])
    decoded = np.asarray(PIL.Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decoded.reshape(picture.shape), picture)


@pytest.mark.parametrize(
    ("count", "size", "grid"),
    [(49, (28, 28), (7, 7)), (42, (56, 48), (7, 6)), (8, (8, 16), (2, 4)), (50, (28, 28), None), (7, (28, 28), None)],
)
def test_grid_of(count, size, grid):
    assert grid_of(count, size) == grid


def test_what_positions_receive():
    weights = RNG.random((2, 6, 6))
    np.testing.assert_allclose(received(weights, (8, 12)), weights.mean((0, 1)).reshape(2, 3))
    with_token = RNG.random((2, 7, 7))
    np.testing.assert_allclose(received(with_token, (8, 12)), with_token[:, 0, 1:].mean(0).reshape(2, 3))
    assert received(RNG.random((1, 11, 11)), (8, 12)) is None


def page(classes, **parts):
    confusion = np.eye(classes, dtype=int) * 5
    confusion[0, 1] = 3
    names = [f"<{i}>" for i in range(classes)]
    return image_report.render(
        ImageReport("run", "a model", [("data", "d & e")], [("accuracy", "50 %")], names, confusion, {}, **parts)
    )


def test_few_classes_have_a_matrix():
    text = page(3)
    cells = [int(count or 0) for count in re.findall(r"<td title=[^>]*>(\d*)</td>", text)]
    assert cells == [5, 3, 0, 0, 5, 0, 0, 0, 5]
    assert "62.5 %" in text and "d &amp; e" in text and "<0>" not in text
    assert "<h2>Misclassified images</h2>" not in text and "<h2>Training</h2>" not in text


def test_many_classes_have_a_list():
    text = page(image_report.MAX_CLASSES + 1)
    assert "Confused classes" in text and "<td>&lt;0&gt;</td><td>&lt;1&gt;</td><td class=\"n\">3</td>" in text
    assert text.count("<tr><td>") == 1


def test_pictures_on_the_page(tmp_path):
    picture = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    view = MapView(picture, RNG.random((2, 2)), "layer 1")
    mistakes = [Mistake(picture, "cat", "dog", 0.9, "a<b>.png")]
    text = page(3, mistakes=mistakes, attention=[view], routes=[view], config="{}", notes=["be careful"])
    assert text.count("data:image/png") == 5 and "a&lt;b&gt;.png" in text and "be careful" in text
    for heading in ("Misclassified images", "Attention over the images", "Routed regions", "Config"):
        assert f"<h2>{heading}</h2>" in text
    written = image_report.write(ImageReport("r", "", [], [], ["a"], np.ones((1, 1), int), {}), tmp_path / "report.html")
    assert written.read_text("utf-8").startswith("<!doctype html>") and list(tmp_path.iterdir()) == [written]

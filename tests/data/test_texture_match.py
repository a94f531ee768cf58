"""The generated set of real textures: what decides the class, and that splits share no piece of a photograph."""

import importlib.util
import pickle

import ml_collections
import numpy as np
import pytest

from attnlab.data.images import open_images
from attnlab.data.images.texture_match import TEXTURES, TextureMatchSource
from attnlab.errors import ConfigError
from attnlab.methods.image_classification import ImageClassification


def interior(image, frame):
    """The ten by ten pixels inside the frame of a grey level: float [100], standardised."""
    framed = (image[..., 0] == frame).astype(int)
    rows = np.lib.stride_tricks.sliding_window_view(framed, (1, 12)).sum((2, 3)) == 12
    # The first row that is followed by a second one eleven pixels below.
    top, left = next((y, x) for y, x in np.argwhere(rows) if y + 11 < 32 and rows[y + 11, x])
    piece = image[top + 1 : top + 11, left + 1 : left + 11, 0].astype(np.float32)
    return (piece - piece.mean()) / piece.std()


def closest(photograph, pieces):
    """The largest correlation of each piece with any place of a photograph, either way round."""
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (10, 10)).reshape(-1, 100)
    windows = windows - windows.mean(1, keepdims=True)
    windows /= windows.std(1, keepdims=True) + 1e-3
    turned = np.stack([pieces[:, ::y, ::x] for y in (1, -1) for x in (1, -1)]).reshape(-1, 100)
    return (windows @ turned.T / 100).max(0).reshape(4, -1).max(0)


def test_class_is_texture_and_match():
    source = TextureMatchSource()
    assert source.class_names[:2] == ("grass, other", "grass, same") and source.splits["test"] == 4000
    reader = pickle.loads(pickle.dumps(source.reader("test")))
    examples = [reader.read(index) for index in range(16)]
    pieces = np.stack([interior(image, frame) for image, _ in examples for frame in (255, 0)])
    found = {split: np.stack([closest(photo, pieces) for photo in source.reader(split)._photographs]) for split in ("test", "train")}
    question, partner = found["test"].argmax(0).reshape(-1, 2).T
    assert found["test"].max(0).min() > 0.97  # clipped and rounded, but there
    assert (found["train"].max(0) < 0.97).mean() > 0.8  # the rest: plain bricks, where noise decides
    labels = np.array([label for _, label in examples])
    np.testing.assert_array_equal(labels, 2 * question + (question == partner))
    assert len(set(question)) == len(TEXTURES) and len(set(labels % 2)) == 2


def test_images_are_functions_of_split_and_index():
    config = ml_collections.ConfigDict()
    ImageClassification.defaults(config)
    config.data.update({"name": "texture_match", "channels": 1})
    data = open_images(config)
    one, again, other = (data.reader(split).read(7).image for split in ("train", "train", "test"))
    np.testing.assert_array_equal(one, again)
    assert one.shape == (32, 32, 1) and one.dtype == np.uint8 and not np.array_equal(one, other)
    batch = next(data.loader("train", batch_size=8, seed=0, shuffle=True, repeat=True))
    assert data.outputs == 6 and batch["images"].shape == (8, 32, 32, 1)


def test_missing_wheel_is_named_as_pip_knows_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wheel 'scikit-image', .* not installed.*attnlab\[images\].*--no-deps scikit-image"):
        TextureMatchSource()

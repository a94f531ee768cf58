"""Transforms, RandAugment and mixing: shapes, types, determinism, and what each does to an image."""

import numpy as np
import PIL.Image
import pytest

from attnlab.data.images.mixing import Mix
from attnlab.data.images.policy import GEOMETRIC, OPERATIONS, RandAugment
from attnlab.data.images.transforms import (
    Channels,
    Flip,
    Normalise,
    Pipeline,
    RandomErasing,
    RandomResizedCrop,
    ResizeAndCrop,
    Shift,
    resize,
)

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
GREY = COLOUR[..., :1]
RANDOM = [RandomResizedCrop((8, 8)), Shift(3), Flip(), RandAugment(), RandAugment(3, 10.0, 0.0, 1.0, ("rotate", "scale"), (0, 0, 0))]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("image", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("transform", RANDOM, ids=lambda transform: type(transform).__name__)
def test_random_transforms_repeat_by_seed(transform, image):
    one, two = transform(image, rng(5)), transform(image, rng(5))
    np.testing.assert_array_equal(one, two)
    assert one.dtype == np.uint8 and one.shape[-1] == image.shape[-1]
    assert any(not np.array_equal(transform(image, rng(seed)), one) for seed in range(10))


@pytest.mark.parametrize("image", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_size_and_type(name, image):
    image = image.repeat(2, 0).repeat(2, 1)  # equalisation needs some pixels
    strong = RandAugment(1, 10.0, 0.0, 1.0, (name,), (7,) * image.shape[-1])(image, rng())
    assert strong.shape == image.shape and strong.dtype == np.uint8
    changes_nothing = (name == "auto_contrast", name == "color" and image.shape[-1] == 1)  # full range; no colour
    assert any(changes_nothing) or not np.array_equal(strong, image)


@pytest.mark.parametrize("name", [*GEOMETRIC, "brightness", "solarize_add"])
def test_no_strength_changes_nothing(name):
    for seed in range(3):
        np.testing.assert_array_equal(RandAugment(1, 0.0, 0.0, 1.0, (name,), (0, 0, 0))(COLOUR, rng(seed)), COLOUR)


def test_operations_happen_with_their_probability():
    policy = RandAugment(1, 5.0, 0.0, 0.3, ("invert",), (0, 0, 0))
    done = np.mean([not np.array_equal(policy(COLOUR, rng(seed)), COLOUR) for seed in range(300)])
    assert abs(done - 0.3) < 0.08


def test_resize_and_crop():
    np.testing.assert_array_equal(ResizeAndCrop((12, 12))(COLOUR, rng()), COLOUR[:, 4:16])
    want = np.asarray(PIL.Image.fromarray(COLOUR).resize((10, 6), PIL.Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(ResizeAndCrop((6, 10))(COLOUR, rng()), want)
    assert ResizeAndCrop((6, 6), 0.875)(COLOUR, rng()).shape == (6, 6, 3)
    assert ResizeAndCrop((30, 31), 1.0, "bilinear")(GREY, rng()).shape == (30, 31, 1)


def test_random_crops_cover_what_they_are_asked_for():
    whole = RandomResizedCrop((12, 20), (1.0, 1.0), (20 / 12, 20 / 12))
    np.testing.assert_array_equal(whole(COLOUR, rng()), COLOUR)
    impossible = RandomResizedCrop((6, 6), (1.0, 1.0), (0.1, 0.1))  # falls back on the middle
    assert impossible(COLOUR, rng()).shape == (6, 6, 3)
    part = RandomResizedCrop((6, 10), (0.25, 0.25), (20 / 12, 20 / 12), "nearest")
    crops = {part(COLOUR, rng(seed)).tobytes() for seed in range(20)}
    places = [COLOUR[top : top + 6, left : left + 10].tobytes() for top in range(7) for left in range(11)]
    assert len(crops) > 5 and crops <= set(places)


def test_shift_and_flip():
    assert {Shift(1)(COLOUR, rng(seed)).tobytes() for seed in range(80)} == {
        np.pad(COLOUR, ((1, 1), (1, 1), (0, 0)))[top : top + 12, left : left + 20].tobytes() for top in range(3) for left in range(3)
    }
    np.testing.assert_array_equal(Flip(1.0)(COLOUR, rng()), COLOUR[:, ::-1])
    np.testing.assert_array_equal(Flip(0.0)(COLOUR, rng()), COLOUR)


def test_channels_and_normalisation():
    np.testing.assert_array_equal(Channels(3)(GREY, rng()), np.repeat(GREY, 3, -1))
    luma = np.asarray(PIL.Image.fromarray(COLOUR).convert("L"), int)
    assert np.abs(Channels(1)(COLOUR, rng())[..., 0].astype(int) - luma).max() <= 1
    normalise = Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    values = normalise(COLOUR, rng())
    np.testing.assert_allclose(values[..., 1], (COLOUR[..., 1] / 255 - 0.4) / 0.3, rtol=1e-5)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(normalise.undo(values), COLOUR)


def test_erasing():
    image = np.full((16, 16, 3), 9, np.float32)
    shares = []
    for seed in range(200):
        erased = RandomErasing(0.5)(image, rng(seed)) != 9
        rows, columns = erased.any((1, 2)), erased.any((0, 2))
        assert erased.sum() == 3 * rows.sum() * columns.sum(), "one rectangle"
        shares.append(erased[..., 0].mean())
    assert 0.4 < np.mean(np.array(shares) > 0) < 0.6 and max(shares) < 0.4
    assert (image == 9).all(), "the original stays"


def test_a_pipeline_is_comparable():
    assert Pipeline((Flip(), Shift(2))) == Pipeline((Flip(), Shift(2))) != Pipeline((Flip(),))
    assert resize(COLOUR, (12, 20), "bilinear") is COLOUR


def batch_of(count=8):
    images = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 10, 10, 2), np.float32)
    labels = np.arange(count, dtype=np.int32)
    return {"images": images, "labels": labels, "other_labels": labels.copy(), "mix": np.ones(count, np.float32),
            "mask": np.ones(count, bool)}  # fmt: skip


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_say_what_is_in_the_image(kind):
    batch = Mix(0.8 * (kind == "mixup"), 1.0 * (kind == "cutmix"))(batch_of(), [(3, i) for i in range(4)])
    expected = batch["mix"] * batch["labels"] + (1 - batch["mix"]) * batch["other_labels"]
    np.testing.assert_allclose(batch["images"].mean((1, 2, 3)), expected, atol=1e-5)
    np.testing.assert_array_equal(batch["other_labels"], [1, 0, 3, 2, 5, 4, 7, 6])
    assert (batch["mix"][::2] == batch["mix"][1::2]).all() and len(set(batch["mix"].tolist())) > 2
    values = [len(np.unique(image)) for image in batch["images"]]
    assert max(values) <= (1 if kind == "mixup" else 2)


def test_pairs_left_alone():
    plain = batch_of()
    batch = Mix(probability=0.0)(batch_of(), [(0, i) for i in range(4)])
    np.testing.assert_array_equal(batch["images"], plain["images"])
    masked = batch_of(2)
    masked["mask"][1] = False
    assert Mix()(masked, [(0, 0)])["mix"].tolist() == [1.0, 1.0]

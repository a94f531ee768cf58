"""Video made of real digits: two of them in a clip, one moves; the class is the one that moves, or where it moves to.

A single frame does not tell: the motion decides. (Who knows the two digits and guesses is right in half of the cases; of the eight
directions a frame says nothing.) Clips are functions of (split, index), composed when they are read from the digits of the same
split of `mnist_5k`; nothing else is stored.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from attnlab.data.images.sources import Example, Reader, WheelSource
from attnlab.errors import field_error, nearest

DIGIT = 14  # pixels per side: those of MNIST, halved
_SPLITS = {"train": 20_000, "validation": 1_000, "test": 2_000}
_VERSION = b"moving digits 1"
CLASSES = ("digit", "direction")
DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")


class MovingDigitsSource:
    """An `ImageSource` whose images are clips uint8 [frames, H, W, 1], of the size of config.data.

    Args:
        config: the whole config.
        classes: of `CLASSES`: "digit", or "direction" (then the digit does not reach the border, where it would turn).

    Raises:
        ConfigError: unknown classes, fewer than two frames, or images in which two digits have no room.
    """

    channels = 1
    splits = _SPLITS
    notes = ()

    def __init__(self, config: Any, classes: str = "digit"):
        if classes not in CLASSES:
            problem = f"unknown classes of clips, {nearest(classes, CLASSES)}"
            raise field_error("config.data.name", f"moving_digits:{classes}", problem, 'Use "moving_digits:direction"')
        self._directions = classes == "direction"
        self.name = "moving_digits" + ":direction" * self._directions
        size, self.frames = int(config.data.image_size), int(config.data.frames)
        self._size = (size, int(config.data.image_width) or size)
        if self.frames < 2:
            raise field_error("config.data.frames", self.frames, "a clip of moving digits needs some", "Set 2 or more, say 8")
        if min(self._size) < 2 * DIGIT:
            raise field_error("config.data.image_size", self._size, "two digits have no room", f"Set {2 * DIGIT} or more")
        self._digits = WheelSource(config, "mnist_5k")
        self.class_names = DIRECTIONS if self._directions else self._digits.class_names
        said = _VERSION + f" {self._size} {self.frames} {self._digits.fingerprint}".encode() + b" direction" * self._directions
        self.fingerprint = hashlib.sha256(said).hexdigest()

    def reader(self, split: str) -> MovingDigitsReader:
        """Returns the clips of a split."""
        return MovingDigitsReader(self._digits.reader(split), split, self.frames, self._size, self._directions)


class MovingDigitsReader:
    """Composes the clips of one split.

    Args:
        digits: single digits of 28 x 28.
        split: its name.
        frames: per clip.
        size: (height, width).
        directions: the class is the direction.
    """

    def __init__(self, digits: Reader, split: str, frames: int, size: tuple[int, int], directions: bool):
        self._digits, self._split, self._frames, self._size, self._directions = digits, split, frames, size, directions

    def __len__(self) -> int:
        return _SPLITS[self._split]

    def name(self, index: int) -> str:
        """Returns how messages call a clip."""
        return f"moving_digits {self._split} #{index}"

    def read(self, index: int) -> Example:
        """Returns a clip [frames, H, W, 1] and its class."""
        rng = np.random.default_rng([*_VERSION, list(_SPLITS).index(self._split), index])
        moving = self._digits.read(int(rng.integers(len(self._digits))))
        while (still := self._digits.read(int(rng.integers(len(self._digits))))).label == moving.label:
            pass
        room = np.array(self._size) - DIGIT
        place, rest = rng.uniform(0, room), rng.uniform(0, room)
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 2.5)  # pixels per frame
        label = moving.label
        if self._directions:
            label = int(rng.integers(len(DIRECTIONS)))
            angle = (label + rng.uniform(-0.2, 0.2)) * np.pi / 4
            speed = min(speed, room.min() / (self._frames - 1))
        step = speed * np.array([np.sin(angle), np.cos(angle)])
        if self._directions:  # the same place in the part of the room from which the way ends inside it
            way = (self._frames - 1) * step
            place = np.maximum(-way, 0) + place / room * (room - np.abs(way))
        clip = np.zeros((self._frames, *self._size, 1), np.uint8)
        rests, moves = _halved(still.image), _halved(moving.image)
        for frame in clip:
            for at, digit in ((rest, rests), (place, moves)):
                top, left = np.rint(at).astype(int)
                window = frame[top : top + DIGIT, left : left + DIGIT]
                np.maximum(window, digit, out=window)
            place = place + step
            outside = (place < 0) | (place > room)
            place = np.where(place < 0, -place, np.where(place > room, 2 * room - place, place))
            step = np.where(outside, -step, step)
        return Example(clip, label)


def _halved(image: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels."""
    height, width, channels = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3)).astype(np.uint8)

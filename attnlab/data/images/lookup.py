"""A generated set for content-based look-up: near structure AND a match far away decide the class.

An image of 32 x 32 pixels has 4 x 4 patches. Every patch shows one of eight patterns (four grey dots on a grid of 3 x 3) in a frame
of one of four colours, with noise. One patch, framed in white, is the question: it shows one of four patterns that are keys, and
the class is the colour of the one other patch, anywhere, with that key. Every key is there once besides, each in another colour;
the eleven patches that are left show other patterns in any colour and mean nothing. So a window of one patch knows nothing of
the answer, its place says nothing either, and no count of colours or patterns is better than a guess: 0.25.

Images are functions of (split, index), made when they are read: nothing is stored, nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from attnlab.data.images.sources import Example

SIZE, GRID = 32, 4
PATCH = SIZE // GRID
CLASSES = ("red", "green", "blue", "yellow")
_TINTS = np.array([[1.0, 0.25, 0.25], [0.25, 1.0, 0.25], [0.3, 0.3, 1.0], [1.0, 1.0, 0.2]], np.float32)
_SPLITS = {"train": 50_000, "validation": 2_000, "test": 4_000}
_KEYS, _PATTERNS = len(CLASSES), 8
_NOISE = 20.0  # of 255
_VERSION = b"lookup 4"


class LookupSource:
    """See the module's description; an `ImageSource`."""

    name = "lookup"
    class_names = CLASSES
    channels = 3
    splits = _SPLITS
    notes = ()
    fingerprint = hashlib.sha256(_VERSION).hexdigest()

    def reader(self, split: str) -> LookupReader:
        """Returns the images of a split."""
        return LookupReader(split)


class LookupReader:
    """Makes the images of one split."""

    def __init__(self, split: str):
        self._split = split
        self._dots = np.kron(_patterns(), np.ones((2, 2), np.float32))  # coarse dots: four pixels say the same

    def __len__(self) -> int:
        return _SPLITS[self._split]

    def name(self, index: int) -> str:
        """Returns how messages call an image."""
        return f"lookup {self._split} #{index}"

    def read(self, index: int) -> Example:
        """Returns an image and the colour of the patch that the framed one asks for."""
        rng = np.random.default_rng([*_VERSION, list(_SPLITS).index(self._split), index])
        count = GRID * GRID
        places = rng.permutation(count)
        question, known = places[0], places[1 : 1 + _KEYS]
        patterns = rng.integers(_KEYS, _PATTERNS, count)
        colours = rng.integers(len(CLASSES), size=count)
        patterns[known], colours[known] = np.arange(_KEYS), rng.permutation(len(CLASSES))
        asked = patterns[question] = rng.integers(_KEYS)
        frames = 220.0 * _TINTS[colours]
        frames[question] = 255.0
        patches = np.broadcast_to(frames[:, None, None], (count, PATCH, PATCH, 3)).copy()
        patches[:, 1:-1, 1:-1] = (20.0 + 200.0 * self._dots[patterns])[..., None]
        grid = patches.reshape(GRID, GRID, PATCH, PATCH, 3).swapaxes(1, 2).reshape(SIZE, SIZE, 3)
        noisy = grid + _NOISE * rng.standard_normal(grid.shape, np.float32)
        return Example(np.rint(np.clip(noisy, 0, 255)).astype(np.uint8), int(colours[known[asked]]))


def _patterns() -> np.ndarray:
    """Patterns of four dots, any two of which differ in at least four places: float32 [8, 3, 3]."""
    chosen: list[np.ndarray] = []
    for places in itertools.combinations(range(9), 4):
        pattern = np.isin(np.arange(9), places)
        if len(chosen) < _PATTERNS and all((pattern != other).sum() >= 4 for other in chosen):
            chosen.append(pattern)
    return np.stack(chosen).reshape(_PATTERNS, 3, 3).astype(np.float32)

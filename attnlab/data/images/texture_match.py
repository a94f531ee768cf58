"""A generated set of real textures: what one patch is made of, AND whether a far one is made of the same.

Four patches lie on a ground of noise, one in each quarter of the image, at random places: crops of photographs of grass, gravel
and brick. The one framed in white is the question; the one framed in black, in the opposite quarter, is its partner; the
two without a frame mean nothing. The class is the texture of the question, times whether its partner has the same (one of two
times). Every crop has the same mean and contrast: only its small structure tells what it is.

A guess is right in 1/6 of the images, the right texture alone in 1/2; with how often each texture occurs, but not which patch
is the partner, in 13/18. More takes the match of the two places.

The photographs (CC0) are read from the wheel scikit-image. Splits draw their crops from columns of them that do not overlap.
Images are functions of (split, index), made when they are read: nothing is stored.
"""

from __future__ import annotations

import hashlib
import io

import numpy as np

from attnlab.data.images import wheels
from attnlab.data.images.sources import Example, pillow_missing

SIZE, PATCH = 32, 12  # pixels a side; of a patch with its frame
TEXTURES = ("grass", "gravel", "brick")
CLASSES = tuple(f"{texture}, {relation}" for texture in TEXTURES for relation in ("other", "same"))
_ZOOM = (4, 1, 4)  # pixels a side that become one: at these scales ten pixels tell the three apart
_SHA256 = "77e92655a85833858a260a9c75d4b3430d2e68238ff9388a9356d78ccff298bd"
_COLUMNS = {"train": (0.0, 0.625), "validation": (0.625, 0.75), "test": (0.75, 1.0)}  # shares of the photographs' width
_SPLITS = {"train": 50_000, "validation": 2_000, "test": 4_000}
_GROUND, _CONTRAST = 20.0, 45.0  # standard deviations, of 255
_VERSION = b"texture match 1"


class TextureMatchSource:
    """See the module's description; an `ImageSource`.

    Raises:
        ConfigError: the wheel or Pillow is missing, or the wheel has other photographs.
    """

    name = "texture_match"
    class_names = CLASSES
    channels = 1
    splits = _SPLITS
    notes = ()
    fingerprint = hashlib.sha256(_VERSION + _SHA256.encode()).hexdigest()

    def __init__(self):
        self._photographs = photographs()

    def reader(self, split: str) -> TextureMatchReader:
        """Returns the images of a split."""
        begin, end = _COLUMNS[split]
        return TextureMatchReader(
            split, tuple(photo[:, int(begin * photo.shape[1]) : int(end * photo.shape[1])] for photo in self._photographs)
        )


class TextureMatchReader:
    """Makes the images of one split.

    Args:
        split: its name.
        photographs: float32 [H, W] by texture, what the split may show of them.
    """

    def __init__(self, split: str, photographs: tuple[np.ndarray, ...]):
        self._split, self._photographs = split, photographs

    def __len__(self) -> int:
        return _SPLITS[self._split]

    def name(self, index: int) -> str:
        """Returns how messages call an image."""
        return f"texture_match {self._split} #{index}"

    def read(self, index: int) -> Example:
        """Returns an image, the texture of the patch framed in white and whether the one framed in black has it too."""
        rng = np.random.default_rng([*_VERSION, list(_SPLITS).index(self._split), index])
        textures = rng.integers(len(TEXTURES), size=4)
        same = int(rng.integers(2))
        textures[1] = (textures[0] + (0 if same else rng.integers(1, len(TEXTURES)))) % len(TEXTURES)
        quarter, half = int(rng.integers(4)), SIZE // 2
        image = 128.0 + _GROUND * rng.standard_normal((SIZE, SIZE), np.float32)
        # Quarters by the bits (row, column): the opposite one has both of them flipped.
        for texture, place, frame in zip(textures, (0, 3, 1, 2), (255.0, 0.0, None, None), strict=True):
            row, column = divmod(quarter ^ place, 2)
            top, left = half * np.array([row, column]) + rng.integers(half - PATCH + 1, size=2)
            patch = image[top : top + PATCH, left : left + PATCH]
            if frame is not None:
                patch[:] = frame
            patch[1:-1, 1:-1] = self._crop(rng, self._photographs[texture])
        return Example(np.rint(np.clip(image, 0, 255)).astype(np.uint8)[..., None], 2 * int(textures[0]) + same)

    def _crop(self, rng: np.random.Generator, photograph: np.ndarray) -> np.ndarray:
        """Returns a random piece, possibly mirrored, of the mean and contrast that all have."""
        side = PATCH - 2
        top, left = (int(rng.integers(length - side + 1)) for length in photograph.shape)
        flip = rng.integers(2, size=2) * 2 - 1
        crop = photograph[top : top + side, left : left + side][:: flip[0], :: flip[1]]
        return 128.0 + _CONTRAST / (crop.std() + 1e-3) * (crop - crop.mean())


def photographs() -> tuple[np.ndarray, ...]:
    """Returns the photographs of `TEXTURES`, made smaller: float32 [H, W] each."""
    files = [f"data/{texture}.png" for texture in TEXTURES]
    contents = wheels.read("texture_match", "skimage", files, _SHA256, distribution="scikit-image")
    try:
        from PIL import Image
    except ImportError as error:
        raise pillow_missing("texture_match") from error
    found = []
    for content, zoom in zip(contents, _ZOOM, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(content)), np.float32)
        height, width = (length // zoom for length in pixels.shape)
        found.append(pixels.reshape(height, zoom, width, zoom).mean((1, 3)))
    return tuple(found)

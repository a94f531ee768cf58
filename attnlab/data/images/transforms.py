"""Transforms of one image, each a function of (image, generator): the same generator gives the same image, always.

Images are uint8 [H, W, C] until `Normalise`, float32 after it. Every transform is a small frozen dataclass, so that a pipeline
can be pickled into worker processes, compared and printed; as callables of (element, rng) they are also what Grain's
`random_map` takes. What only cuts, pads or flips needs numpy alone; what interpolates uses Pillow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from attnlab.errors import field_error

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as Pillow


class Transform(Protocol):
    """What a step of a pipeline is."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Maps an image [H, W, C] to another one, drawing from the generator what is left to chance."""


@dataclasses.dataclass(frozen=True)
class Channels:
    """Grey images to `channels` = 3 by repetition; colour to 1 by its luma."""

    channels: int

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns [H, W, channels]."""
        if image.shape[-1] == self.channels:
            return image
        if self.channels == 3:
            return np.repeat(image, 3, axis=-1)
        return np.rint(image.astype(np.float32) @ _GREY).astype(np.uint8)[..., None]


@dataclasses.dataclass(frozen=True)
class ResizeAndCrop:
    """The shorter side to size / fraction, then the middle: what an image is evaluated on.

    Attributes:
        size: (height, width) of the result.
        fraction: of the resized image that is kept.
        interpolation: of `INTERPOLATIONS`.
    """

    size: tuple[int, int]
    fraction: float = 1.0
    interpolation: str = "bicubic"

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns [height, width, C]."""
        scale = max(wanted / self.fraction / have for wanted, have in zip(self.size, image.shape[:2], strict=True))
        rows, columns = (
            max(wanted, round(scale * have)) for wanted, have in zip(self.size, image.shape[:2], strict=True)
        )
        image = resize(image, (rows, columns), self.interpolation)
        top, left = (rows - self.size[0]) // 2, (columns - self.size[1]) // 2
        return image[top : top + self.size[0], left : left + self.size[1]]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized (Szegedy et al., 2014, arXiv 1409.4842); ten tries, then the middle.

    Attributes:
        size: (height, width) of the result.
        scale: least and largest share of the area.
        ratio: least and largest width over height, drawn evenly in its logarithm.
        interpolation: of `INTERPOLATIONS`.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns [height, width, C]."""
        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
                break
        else:
            rows = min(height, round(width / self.ratio[0]))
            columns = min(width, round(height * self.ratio[1]))
            top, left = (height - rows) // 2, (width - columns) // 2
        return resize(image, self.size, self.interpolation, (left, top, left + columns, top + rows))


@dataclasses.dataclass(frozen=True)
class Shift:
    """Moves the image by up to `pixels` in both directions and fills with zeros (a random crop of the padded image)."""

    pixels: int

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns [H, W, C]."""
        height, width = image.shape[:2]
        most = self.pixels
        padded = np.zeros((height + 2 * most, width + 2 * most, image.shape[2]), image.dtype)  # np.pad takes ten times as long
        padded[most : most + height, most : most + width] = image
        top, left = rng.integers(2 * self.pixels + 1, size=2)
        return padded[top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True)
class Flip:
    """Left to right, with a probability."""

    probability: float = 0.5

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns [H, W, C]."""
        return image[:, ::-1] if rng.random() < self.probability else image


@dataclasses.dataclass(frozen=True)
class Normalise:
    """(image / 255 - mean) / std by channel, float32."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns [H, W, C] float32."""
        mean, std = (np.asarray(value, np.float32) for value in (self.mean, self.std))
        return (image.astype(np.float32) / np.float32(255) - mean) / std

    def undo(self, image: np.ndarray) -> np.ndarray:
        """Returns the uint8 image of a normalised one, for pictures."""
        restored = image * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return np.rint(np.clip(restored, 0, 1) * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Noise of N(0, 1) in place of a random rectangle of a normalised image (Zhong et al., 2017, arXiv 1708.04896).

    Attributes:
        probability: that there is one.
        area: least and largest share of the image.
        ratio: least height over width; its inverse is the largest.
    """

    probability: float
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: float = 0.3

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns [H, W, C]."""
        if rng.random() >= self.probability:
            return image
        height, width, channels = image.shape
        for _ in range(10):
            area = height * width * rng.uniform(*self.area)
            ratio = math.exp(rng.uniform(math.log(self.ratio), -math.log(self.ratio)))
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < rows < height and 0 < columns < width:
                top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
                image = image.copy()
                image[top : top + rows, left : left + columns] = rng.standard_normal((rows, columns, channels), np.float32)
                break
        return image


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Transforms one after another."""

    transforms: tuple[Any, ...]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns what the last one makes of the image."""
        for transform in self.transforms:
            image = transform(image, rng)
        return image


def resize(
    image: np.ndarray, size: tuple[int, int], interpolation: str, box: Sequence[float] | None = None
) -> np.ndarray:
    """Resizes a uint8 image (or the part of it within box = (left, top, right, bottom)) to (height, width), antialiased."""
    whole = box is None or tuple(box) == (0, 0, image.shape[1], image.shape[0])
    if whole and image.shape[:2] == tuple(size):
        return image
    filters = pillow().Resampling
    resized = to_pillow(image).resize((size[1], size[0]), filters[interpolation.upper()], box=box)
    return from_pillow(resized)


def to_pillow(image: np.ndarray):
    """uint8 [H, W, 1 or 3] as a Pillow image of mode L or RGB."""
    return pillow().fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def from_pillow(image) -> np.ndarray:
    """A Pillow image of mode L or RGB as uint8 [H, W, C]."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def pillow():
    """Returns the module PIL.Image.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise field_error(
            "config.data", "...", "resizing and other transforms of images need Pillow, which is not installed",
            'Install it with pip install "attnlab[images]"',
        ) from error  # fmt: skip
    return PIL.Image

"""RandAugment: a few random operations of one common strength (Cubuk et al., 2019, arXiv 1909.13719).

Strength m = 0..10 means the same for every operation ("increasing"): 0 leaves the image nearly as it is. The ranges are those of
the recipes that write "rand-m9-mstd0.5-inc1": rotation to 30 degrees, shear to 0.3, shifts to 45 % of the side, enhancement
factors 1 +- 0.9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from attnlab.data.images.transforms import from_pillow, pillow, to_pillow

MAX_STRENGTH = 10.0


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """`layers` operations drawn from `operations`, each done with a probability.

    Attributes:
        layers: operations per image.
        strength: m.
        deviation: of m from operation to operation (normal, cut to 0..10).
        probability: of each of the chosen ones.
        operations: names of `OPERATIONS`; () = all.
        fill: grey level or colour of what geometric operations uncover, 0..255 by channel.
    """

    layers: int = 2
    strength: float = 9.0
    deviation: float = 0.5
    probability: float = 0.5
    operations: tuple[str, ...] = ()
    fill: tuple[int, ...] = (124, 116, 104)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Maps uint8 [H, W, C] to the same."""
        names = self.operations or tuple(OPERATIONS)
        picture, channels = None, image.shape[-1]
        for index in rng.integers(len(names), size=self.layers).tolist():
            chance, noise, sign = rng.random(), rng.standard_normal(), 1 if rng.random() < 0.5 else -1
            if chance >= self.probability:
                continue
            level = min(max(self.strength + self.deviation * noise, 0.0), MAX_STRENGTH) / MAX_STRENGTH
            picture = to_pillow(image) if picture is None else picture
            picture = OPERATIONS[names[index]](picture, level, sign, self.fill[0] if channels == 1 else tuple(self.fill))
        return image if picture is None else from_pillow(picture)


def _affine(coefficients: Callable) -> Callable:
    def apply(picture, level, sign, fill):
        image = pillow()
        data = coefficients(sign * level, *picture.size)
        return picture.transform(picture.size, image.Transform.AFFINE, data, image.Resampling.BILINEAR, fillcolor=fill)

    return apply


def _rotate(picture, level, sign, fill):
    return picture.rotate(sign * level * 30.0, pillow().Resampling.BILINEAR, fillcolor=fill)


def _enhance(kind: str) -> Callable:
    def apply(picture, level, sign, fill):
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(picture).enhance(max(0.1, 1.0 + sign * 0.9 * level))

    return apply


def _ops(function: Callable) -> Callable:
    def apply(picture, level, sign, fill):
        from PIL import ImageOps

        return function(ImageOps, picture, level)

    return apply


def _add_and_solarise(ops, picture, level):
    """Adds up to 110 to the values below 128."""
    table = [min(255, value + int(level * 110)) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


# (picture, strength 0..1, sign, fill) -> picture
OPERATIONS: dict[str, Callable] = {
    "auto_contrast": _ops(lambda ops, picture, level: ops.autocontrast(picture)),
    "equalize": _ops(lambda ops, picture, level: ops.equalize(picture)),
    "invert": _ops(lambda ops, picture, level: ops.invert(picture)),
    "rotate": _rotate,
    "posterize": _ops(lambda ops, picture, level: ops.posterize(picture, max(1, 4 - int(level * 4)))),
    "solarize": _ops(lambda ops, picture, level: ops.solarize(picture, 256 - int(level * 256))),
    "solarize_add": _ops(_add_and_solarise),
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "shear_x": _affine(lambda s, width, height: (1, 0.3 * s, -0.15 * s * height, 0, 1, 0)),
    "shear_y": _affine(lambda s, width, height: (1, 0, 0, 0.3 * s, 1, -0.15 * s * width)),
    "translate_x": _affine(lambda s, width, height: (1, 0, 0.45 * s * width, 0, 1, 0)),
    "translate_y": _affine(lambda s, width, height: (1, 0, 0, 0, 1, 0.45 * s * height)),
    "scale": _affine(lambda s, width, height: _zoom(1 - 0.3 * s, width, height)),
}
# What keeps a drawn sign legible.
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "scale")


def _zoom(factor: float, width: int, height: int) -> tuple[float, ...]:
    """About the middle."""
    return (factor, 0, (1 - factor) * width / 2, 0, factor, (1 - factor) * height / 2)

"""Mixup and cutmix of neighbouring rows of a batch.

Rows 2i and 2i + 1 are mixed with each other, both with the same share, drawn for the pair. So a row's partner is already there,
and the result does not depend on how many processes share a batch, as long as each has an even number of rows.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mix:
    """Mixup (Zhang et al., 2017, arXiv 1710.09412) or cutmix (Yun et al., 2019, arXiv 1905.04899) of a batch.

    Attributes:
        mixup: alpha of the share's Beta(alpha, alpha); 0 = no mixup.
        cutmix: alike.
        probability: that a pair is mixed at all.
        switch: that it is by cutmix, where both are on.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5

    def __call__(self, batch: dict[str, np.ndarray], seeds: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Mixes the pairs of a batch in place.

        Args:
            batch: `images` [b, H, W, C], `labels`, `other_labels` int32 [b], `mix` float32 [b], `mask` bool [b], b even; rows of
                mask False, and their partners, stay as they are.
            seeds: of each pair's generator, b / 2 of them.
        """
        images, labels = batch["images"], batch["labels"]
        for pair, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            by_cutmix = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch)
            one, two = 2 * pair, 2 * pair + 1
            if rng.random() >= self.probability or not (batch["mask"][one] and batch["mask"][two]):
                continue
            alpha = self.cutmix if by_cutmix else self.mixup
            share = float(rng.beta(alpha, alpha))
            if by_cutmix:
                rows, columns = _box(images.shape[1:3], share, rng)
                swapped = images[one, rows, columns].copy()
                images[one, rows, columns] = images[two, rows, columns]
                images[two, rows, columns] = swapped
                share = 1.0 - swapped.shape[0] * swapped.shape[1] / (images.shape[1] * images.shape[2])
            else:
                first, second = images[one].copy(), images[two].copy()
                images[one] = share * first + (1 - share) * second
                images[two] = share * second + (1 - share) * first
            batch["mix"][one : two + 1] = share
            batch["other_labels"][one], batch["other_labels"][two] = labels[two], labels[one]
        return batch


def _box(size: tuple[int, int], share: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """A rectangle of the image's shape and of the area 1 - share, its middle anywhere; what lies outside is cut off."""
    slices = []
    for length in size:
        cut, middle = int(length * math.sqrt(1.0 - share)), int(rng.integers(length))
        slices.append(slice(max(middle - cut // 2, 0), min(middle + cut // 2, length)))
    return slices[0], slices[1]

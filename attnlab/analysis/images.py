"""Heat maps as tiny palette PNGs and pictures as plain ones, written with zlib alone, and the colour map they share.

The colour map is sequential with falling lightness (pale yellow to deep blue in OKLCH), so that it reads in grey and
for every kind of colour vision. Palette entry 0 is transparent: a masked cell is drawn as masked, not as zero.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib

import numpy as np

LEVELS = 255  # palette entries 1..255 hold values from 0 to the scale's maximum


def palette() -> np.ndarray:
    """Returns the colour map: [256, 3] uint8; entry 0 is the (transparent) masked colour."""
    colours = [(0, 0, 0)]
    for i in range(LEVELS):
        t = i / (LEVELS - 1)
        lightness = 0.975 - 0.715 * t
        chroma = 0.012 + 0.118 * math.sin(math.pi * (0.04 + 0.76 * t))
        hue = math.radians(105 + 165 * t**0.8)
        colours.append(_oklch_to_rgb(lightness, chroma, hue))
    return np.array(colours, np.uint8)


def quantise(values: np.ndarray, maximum: float, visible: np.ndarray | None = None) -> np.ndarray:
    """Values to palette entries on a square-root scale: entry = 1 + round(254 sqrt(value / maximum)), masked = 0.

    Args:
        values: [rows, columns], >= 0; larger than `maximum` is drawn as the maximum.
        maximum: value of the last entry, > 0.
        visible: [rows, columns] bool; False = masked.
    """
    share = np.clip(np.nan_to_num(values, nan=0.0, posinf=maximum) / maximum, 0.0, 1.0)
    entries = 1 + np.round((LEVELS - 1) * np.sqrt(share)).astype(np.uint8)
    return entries if visible is None else np.where(visible, entries, 0).astype(np.uint8)


def png(entries: np.ndarray) -> bytes:
    """Encodes palette entries [rows, columns] uint8 as a PNG (8-bit palette, no filter, one IDAT chunk)."""
    return _encode(entries.astype(np.uint8)[..., None], 3, [(b"PLTE", palette().tobytes()), (b"tRNS", b"\x00")])


def picture_png(image: np.ndarray) -> bytes:
    """Encodes a picture [rows, columns, 1 or 3] uint8, grey or RGB, as a PNG."""
    return _encode(image, 0 if image.shape[-1] == 1 else 2, [])


def data_uri(entries: np.ndarray) -> str:
    """The PNG of palette entries [rows, columns], or of a picture [rows, columns, 1 or 3], as a `data:` URI for HTML."""
    content = png(entries) if entries.ndim == 2 else picture_png(entries)
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _encode(pixels: np.ndarray, colour_type: int, before: list[tuple[bytes, bytes]]) -> bytes:
    """Writes [rows, columns, channels] uint8, without filters, in one IDAT chunk."""
    rows, columns, channels = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, columns * channels)], axis=1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, colour_type, 0, 0, 0)),
        *before,
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    out = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        out.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(out)


def _oklch_to_rgb(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """OKLCH to 8-bit sRGB, clipped (Ottosson, "A perceptual color space for image processing", 2020)."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    encoded = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in (max(c, 0.0) for c in linear))
    return tuple(round(255 * min(1.0, c)) for c in encoded)

"""Splits files into train, validation and test so that nothing of one leaks into another.

Identical files are kept once. Near-identical files (at least half of their distinct non-blank lines in common,
estimated by MinHash) form a group and a group goes to one split as a whole. Groups are taken in the order of a hash of
their first path, so the split does not depend on the machine, and small changes of the files move few of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.05  # share of the bytes in validation, and again in test
MIN_GROUPS = 10  # below this many distinct files, each file is cut into contiguous ranges instead
_BANDS, _ROWS = 21, 3  # MinHash bands: two files with half of their lines in common meet with probability 0.94
_SIMILAR = 0.5


@dataclasses.dataclass(frozen=True)
class Part:
    """The bytes `start:stop` of the file `path` (relative, "/" separated)."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """Which bytes belong to which split.

    Attributes:
        parts: split name to parts, in path order.
        content_sha256: hash over the sorted paths and contents of the files that are kept.
        by_range: whether each file was cut into ranges (too few files to split by file).
        empty: number of files without any text.
        duplicates: number of files dropped because an identical one is kept (near-identical ones too when by_range).
    """

    parts: Mapping[str, Sequence[Part]]
    content_sha256: str
    by_range: bool
    empty: int
    duplicates: int

    def bytes(self, split: str) -> int:
        """Returns the number of bytes of a split."""
        return sum(part.stop - part.start for part in self.parts[split])


def split_files(paths: Iterable[str], read: Callable[[str], bytes | None]) -> SplitPlan:
    """Splits by file, about 90/5/5 by bytes; with fewer than `MIN_GROUPS` distinct files each is cut 90/5/5 by range.

    Args:
        paths: relative paths.
        read: returns the content of a path, or None to leave the file out. Called once per file.

    Returns:
        the plan; a split may be empty when there is almost no text.
    """
    kept: list[str] = []
    sizes: list[int] = []
    cuts: list[tuple[int, int]] = []
    signatures: list[np.ndarray] = []
    seen: set[bytes] = set()
    whole = hashlib.sha256()
    empty = duplicates = 0
    for path in sorted(paths):
        content = read(path)
        if content is None:
            continue
        if not content.strip():
            empty += 1
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        encoded = path.encode("utf-8", "surrogateescape")
        whole.update(len(encoded).to_bytes(8, "big") + encoded + len(content).to_bytes(8, "big") + digest)
        kept.append(path)
        sizes.append(len(content))
        cuts.append((_cut(content, 1 - 2 * HELD_OUT), _cut(content, 1 - HELD_OUT)))
        signatures.append(_signature(content))

    groups = _groups(signatures)
    by_range = len(groups) < MIN_GROUPS
    parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
    if by_range:
        duplicates += len(kept) - len(groups)  # of near-identical files only the first: their ranges would overlap
        for first, *_ in groups:
            bounds = (0, *cuts[first], sizes[first])
            for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False):
                if stop > start:
                    parts[split].append(Part(kept[first], start, stop))
    else:
        assigned = _assign([[kept[i] for i in group] for group in groups], [sum(sizes[i] for i in g) for g in groups])
        for group, split in zip(groups, assigned, strict=True):
            parts[split].extend(Part(kept[i], 0, sizes[i]) for i in group)
    for split_parts in parts.values():
        split_parts.sort(key=lambda part: part.path)
    return SplitPlan(parts, whole.hexdigest(), by_range, empty, duplicates)


def _cut(content: bytes, share: float) -> int:
    """Returns an index near `share` of the content: the start of a line, else of a character."""
    position = int(len(content) * share)
    line = content.find(b"\n", position, position + 4096)
    if line >= 0 and line + 1 < len(content):
        return line + 1
    while position < len(content) and content[position] & 0xC0 == 0x80:
        position += 1
    return position


_MULTIPLY, _ADD = np.random.default_rng(20170612).integers(0, 1 << 63, (2, _BANDS * _ROWS), dtype=np.uint64) * 2 + 1


def _signature(content: bytes) -> np.ndarray:
    """Returns the MinHash signature [63] uint64 of the set of stripped, non-blank lines."""
    lines = {zlib.crc32(stripped) for line in content.split(b"\n") if (stripped := line.strip())}
    hashes = np.fromiter(lines, np.uint64, len(lines))
    smallest = np.full(len(_MULTIPLY), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(hashes), 1024):  # bounded memory for huge files
        # multiply-shift hashing: wrapping 64-bit products, whose high bits decide the minimum
        mixed = hashes[start : start + 1024] * _MULTIPLY[:, None] + _ADD[:, None]
        smallest = np.minimum(smallest, mixed.min(1))
    return smallest


def _groups(signatures: Sequence[np.ndarray]) -> list[list[int]]:
    """Returns the connected components of "similar", each sorted, ordered by their first index."""
    parent = list(range(len(signatures)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    table = np.stack(signatures) if signatures else np.zeros((0, _BANDS * _ROWS), np.uint64)
    for band in range(_BANDS):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for i, row in enumerate(table[:, band * _ROWS : (band + 1) * _ROWS]):
            buckets[row.tobytes()].append(i)
        for members in buckets.values():
            # In a huge bucket, comparing with the first few is enough: members that meet also meet in other bands.
            for position, i in enumerate(members[:-1] if len(members) <= 256 else members[:4]):
                others = np.asarray(members[position + 1 :])
                alike = (table[others] == table[i]).mean(1) >= _SIMILAR
                for j in others[alike]:
                    a, b = sorted((root(i), root(int(j))))
                    parent[b] = a
    components: dict[int, list[int]] = defaultdict(list)
    for i in range(len(signatures)):
        components[root(i)].append(i)
    return [components[key] for key in sorted(components)]


def _assign(groups: Sequence[Sequence[str]], sizes: Sequence[int]) -> list[str]:
    """Gives each group a split: test and validation are filled up to their share in hash order, the rest is train."""
    order = sorted(
        range(len(groups)), key=lambda i: hashlib.sha256(groups[i][0].encode("utf-8", "surrogateescape")).digest()
    )
    target = HELD_OUT * sum(sizes)
    assigned = ["train"] * len(groups)
    free = list(order)
    for split in ("test", "validation"):
        filled = 0
        # Small groups first, so that no single file makes up a held-out split where there is a choice.
        for limit in (target / 4, target):
            for i in list(free):
                if filled < target and sizes[i] <= limit:
                    assigned[i] = split
                    filled += sizes[i]
                    free.remove(i)
            if filled >= target / 2:
                break
        if not filled:
            smallest = min(free, key=lambda i: (sizes[i], groups[i][0]))
            assigned[smallest] = split
            free.remove(smallest)
    return assigned

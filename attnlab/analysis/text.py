"""Tokens as text that a reader can see: one short label per token, whole samples without invisible characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_NAMED = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·"}


def token_labels(ids: Sequence[int], decode: Callable[[Sequence[int]], bytes], eos_id: int | None) -> list[str]:
    """One label per token: its text with whitespace and control characters made visible; `␄` ends a document.

    Bytes that are not UTF-8 by themselves (part of a longer character) are shown as hex.
    """
    labels = []
    for token in ids:
        if eos_id is not None and int(token) == eos_id:
            labels.append("␄")
            continue
        raw = bytes(decode([int(token)]))
        try:
            labels.append("".join(map(_visible, raw.decode("utf-8"))))
        except UnicodeDecodeError:
            labels.append(raw.hex())
    return labels


def readable(raw: bytes) -> str:
    """Bytes as text: invalid UTF-8 becomes U+FFFD, control characters other than newline and tab become pictures."""
    text = bytes(raw).decode("utf-8", errors="replace")
    return "".join(c if c in "\n\t" or c.isprintable() or c == " " else _visible(c) for c in text)


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}"

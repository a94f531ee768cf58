"""Errors that a user can act on: each is one message that names the field, the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Bad input found before (or instead of) compute; the entry points print it without a traceback and exit with 2."""


def field_error(field: str, value: object, problem: str, fix: str) -> ConfigError:
    """Builds the one message of a bad field.

    Args:
        field: dotted name as the user types it, for example `config.mesh.fsdp`.
        value: the value that was found.
        problem: what is wrong with it, a clause without a full stop.
        fix: what to do, an imperative sentence without a full stop.
    """
    return ConfigError(f"{field} = {value!r}: {problem}. {fix}.")


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a hint for a misspelt name: the closest known one, else the list of all known names."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names) if names else "none are known"

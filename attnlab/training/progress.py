"""What the terminal shows: the header of a run and its progress line."""

from __future__ import annotations

import sys
import time


def si(value: float, unit: str = "") -> str:
    """1234567 -> '1.23M'; with a unit '1.23 Munit'."""
    space = " " if unit else ""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.3g}{space}{prefix}{unit}" if scaled < 999.5 else f"{scaled:.0f}{space}{prefix}{unit}"
    return f"{value:.3g}{space}{unit}"


def binary_size(count: float) -> str:
    """Bytes in binary units: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def duration(seconds: float) -> str:
    """Seconds as '42s', '3m05s', '2h07m' or '3d04h'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


class Progress:
    """Prints the progress of a run: one line that renews itself on a terminal, plain lines elsewhere (logs of pods).

    Times of evaluations and checkpoints (`paused`) do not count as training time: the tokens/s are those of the steps,
    while the ETA contains them at the rate seen so far.
    """

    def __init__(self, start: int, total: int, *, enabled: bool = True):
        self.total, self._start, self._enabled = total, start, enabled
        self._begin = self._mark = time.perf_counter()
        self._mark_step, self._paused = start, 0.0
        self._live = sys.stdout.isatty()
        self._dirty = False

    def paused(self, seconds: float) -> None:
        """Takes `seconds` out of the current interval."""
        self._paused += seconds

    def interval(self, step: int) -> float:
        """Returns seconds per step since the last call (or the start) and begins a new interval."""
        now = time.perf_counter()
        seconds = max(now - self._mark - self._paused, 1e-9) / max(step - self._mark_step, 1)
        self._mark, self._mark_step, self._paused = now, step, 0.0
        return seconds

    def eta(self, step: int) -> float:
        """Seconds to go at the overall rate so far."""
        done = step - self._start
        return (time.perf_counter() - self._begin) / done * (self.total - step) if done else float("inf")

    def line(self, step: int, text: str) -> None:
        """Shows the progress line."""
        if not self._enabled:
            return
        width = len(str(self.total))
        line = f"step {step:>{width}}/{self.total} {100 * step / self.total:3.0f}%  {text}  eta {duration(self.eta(step))}"
        if self._live:
            print(f"\r\x1b[2K{line}", end="", flush=True)
            self._dirty = True
        else:
            print(line, flush=True)

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if not self._enabled:
            return
        if self._dirty:
            print()
            self._dirty = False
        print(text, flush=True)

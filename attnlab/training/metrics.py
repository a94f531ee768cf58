"""Where figures go: `<workdir>/metrics.jsonl` always, TensorBoard event files beside it."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from typing import Any


class MetricsWriter:
    """Appends one JSON object per line and mirrors the numbers to TensorBoard.

    A resumed run starts from its checkpoint: lines of later steps, which the killed run had already written, are
    dropped, and so is a last line that was cut short. The file of a resumed run therefore reads like an undisturbed one.
    """

    def __init__(self, workdir: str, *, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self._rewind(resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            os.path.join(workdir, "tensorboard"), purge_step=resume_step + 1 if resume_step else None, flush_secs=10
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line of `step`; the line is in the file when this returns."""
        line = {"step": step, **values, "time": round(time.time(), 3)}
        # JSON has no NaN; null keeps the file readable by every parser.
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for key, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._board.close()

    def _rewind(self, resume_step: int) -> None:
        if not self.path.exists():
            return
        kept = [json.dumps(line) + "\n" for line in read(self.path) if line["step"] <= resume_step]
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the lines of a metrics file; a line cut short by a kill is left out."""
    lines = []
    for text in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]

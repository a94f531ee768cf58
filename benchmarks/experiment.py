"""What the small experiments behind docs/results.md share: their flags, their result files, and pictures."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import flax
import jax

from attnlab.analysis import charts, page

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def integers(parser: argparse.ArgumentParser, flags: Iterable[tuple[str, int, str]]) -> None:
    """Adds a flag per (name, default, meaning)."""
    for name, default, meaning in flags:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")


def picture(path: pathlib.Path, lines: list[charts.Line], **options: Any) -> None:
    """Writes a line chart that needs no page around it."""
    chart = charts.line_chart(lines, **options)
    chart = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(chart.replace(">", f"><style><![CDATA[{page.CSS}]]></style>", 1) + "\n")


def save(name: str, title: str, out: pathlib.Path, sizes: dict[str, Any], figures: dict[str, Any], text: str, end: str = "") -> None:
    """Prints the text; writes it as NAME.md and the figures as NAME.json, under what ran, when, and on what.

    Args:
        name: of the script and its files.
        title: of the text.
        out: folder of the results.
        sizes: flags and their values.
        figures: what was measured.
        text: tables.
        end: text that is written but not printed: pictures.
    """
    device, today = jax.devices()[0].device_kind, datetime.date.today().isoformat()
    versions = {"python": sys.version.split()[0], "jax": jax.__version__, "flax": flax.__version__}
    command = "python benchmarks/" + " ".join([f"{name}.py", *sys.argv[1:]])
    about = {"date": today, "device": device, **versions, "command": command}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({**about, **sizes, **figures}) + "\n")
    head = f"`{command}`, {today}, {device}, " + ", ".join(f"{package} {version}" for package, version in versions.items())
    listed = ", ".join(f"{key} {value}" for key, value in sizes.items())
    (out / f"{name}.md").write_text(f"# {title}\n\n{head}.\n\n{listed}.\n\n{text}\n{end}")
    print(text)

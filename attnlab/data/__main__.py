"""`python -m attnlab.data --name stdlib`: prepares a data set and says what is in it."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import types

from attnlab.data.text import open_text
from attnlab.errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Prepares, prints a summary and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnlab.data", description=__doc__)
    parser.add_argument("--name", default="stdlib", help="stdlib, tfds:NAME/CONFIG or text:PATH")
    parser.add_argument("--dir", default="", help="as config.data.dir")
    parser.add_argument("--tokenizer", default="bytes", help="bytes or bpe:VOCAB")
    parser.add_argument("--feature", default="text", help="text feature of a tfds set")
    parser.add_argument("--errors", default="strict", help="strict or skip: files that are not UTF-8 text")
    fields = vars(parser.parse_args(arguments))
    start = time.perf_counter()
    try:
        data = open_text(types.SimpleNamespace(data=types.SimpleNamespace(**fields)))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{data.name}: fingerprint {data.fingerprint}, opened in {time.perf_counter() - start:.1f} s")
    for split, info in data.splits.items():
        size = "" if info.bytes is None else f", {info.bytes:,} bytes"
        print(f"  {split}: {info.documents:,} documents{size}")
    for note in data.notes:
        print(f"  note: {note}")
    first = next(data.raw_bytes("train"))
    for line in itertools.islice((line for line in first.decode("utf-8").splitlines() if line.strip()), 3):
        print(f"  | {line[:100]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

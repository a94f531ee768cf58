"""How eval.py looks at a language model on text: beside simple codes, with a continuation and the report page."""

from __future__ import annotations

import itertools
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np

from attnlab import data
from attnlab.analysis.text import readable
from attnlab.data import baselines
from attnlab.inference.decode import generate
from attnlab.training.build import Run
from attnlab.training.evaluate import Options, Restored
from attnlab.training.progress import si

BASELINE_BYTES = 64 << 20  # of each split, at most; xz takes about a second per mebibyte


class TextEvaluation:
    """Bits per byte beside unigram, gzip and xz, and continuations of a prompt.

    Attributes:
        figures: those of the task, and these.
        samples: (prompt, continuation) pairs, readable.
    """

    def __init__(self, restored: Restored, options: Options):
        self.folder, self.run, self.text, self.variables = restored.folder, restored.run, restored.dataset, restored.variables
        self.options = options
        measured = restored.figures
        self.samples, decode_rate, sample_notes = _samples(self.run, self.text, self.variables, options)
        self.notes = (*restored.notes, *sample_notes)
        self.figures: dict[str, Any] = {
            **measured,
            "perplexity": math.exp(min(measured["loss"], 700.0)),
            **_baselines(self.text, options.split),
            "decode_tokens_per_second": decode_rate,
            "prompt": self.samples[0][0],
            "sample": self.samples[0][1],
        }
        if len(self.samples) > 1:
            self.figures["samples"] = [new for _, new in self.samples]

    def table(self) -> str:
        """The figures and samples as text for a terminal."""
        figures, run = self.figures, self.run
        device = run.mesh.devices.flat[0].device_kind
        codes = [("this model", figures["bits_per_byte"])] + [
            (name, figures[f"{name}_bits_per_byte"]) for name in ("unigram", "gzip", "xz")
        ]
        of = " (moving average)" if figures["parameters"] == "ema" else ""
        lines = [
            f"{figures['split']} split, step {figures['step']}{of}: {figures['tokens']:,} tokens, "
            f"{figures['bytes']:,} bytes, {run.mesh.size} x {device}",
            f"  loss            {figures['loss']:9.4f} nats/token",
            f"  perplexity      {figures['perplexity']:9.3f}",
            f"  accuracy        {100 * figures['accuracy']:8.2f} %",
            f"  evaluation      {si(figures['tokens_per_second'], 'tokens/s')}",
            f"  decoding        {si(figures['decode_tokens_per_second'], 'tokens/s')}",
            "  bits per byte",
            *(f"    {name:<13} {value:9.4f}" for name, value in sorted(codes, key=lambda pair: pair[1])),
            *(f"  note: {note}" for note in self.notes),
        ]
        for number, (prompt, new) in enumerate(self.samples):
            if number == 0:
                lines += ["prompt:", _indented(prompt)]
            lines += [f"continuation{f' {number + 1}' if len(self.samples) > 1 else ''}:", _indented(new)]
        return "\n".join(lines)

    def write_report(self) -> pathlib.Path:
        """Writes the page of `run_report`."""
        from attnlab.training import run_report

        return run_report.write(self.folder, self, self.options)


def document_tokens(text: data.TextData, split: str, count: int, least_bytes: int = 200) -> np.ndarray:
    """The first `count` tokens of the split's first document of some length, [<= count] int32."""
    longest = b""
    for document in itertools.islice(text.raw_bytes(split), 50):
        if len(document) > len(longest):
            longest = document
        if len(longest) >= least_bytes:
            break
    return text.tokenizer.encode(longest[: 16 * count].decode("utf-8", errors="ignore"))[:count]


def _baselines(text: data.TextData, split: str) -> dict[str, float]:
    values = baselines.baselines(_limited(text.raw_bytes("train")), b"".join(_limited(text.raw_bytes(split))))
    return {f"{name}_bits_per_byte": values[name] for name in ("unigram", "gzip", "xz")}


def _limited(chunks):
    left = BASELINE_BYTES
    for chunk in chunks:
        yield bytes(chunk[:left])
        left -= len(chunk)
        if left <= 0:
            return


def _samples(run: Run, text: data.TextData, variables: Any, options: Options):
    """Returns (((prompt, continuation), ...), new tokens per second of a second, compiled call, notes)."""
    tokenizer, trained = text.tokenizer, run.config.seq_len
    if options.prompt is None:
        prompt = document_tokens(text, options.split, max(1, min(trained // 2, 200)))
    else:
        prompt = tokenizer.encode(options.prompt)
    # documents follow a separator in training, and an empty prompt needs a first token
    ids = np.concatenate([[tokenizer.eos_id], prompt]).astype(np.int32)
    wanted = options.max_new_tokens or max(1, min(trained - len(ids), 256))
    notes = []
    if len(ids) + wanted > trained:
        notes.append(f"prompt and continuation have {len(ids) + wanted} tokens, the model was trained on {trained}")

    def decode():
        result = generate(
            run.task.model,
            variables,
            np.repeat(ids[None], options.num_samples, axis=0),
            max_new_tokens=wanted,
            rng=jax.random.key(options.seed),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )
        return jax.device_get(result)

    with run.context():
        decode()  # compiles
        start = time.perf_counter()
        result = decode()
        seconds = time.perf_counter() - start
    shown = readable(tokenizer.decode(prompt))
    new = [readable(tokenizer.decode(row[:length])) for row, length in zip(result.tokens, result.lengths, strict=True)]
    return tuple((shown, one) for one in new), float(result.lengths.sum()) / seconds, notes


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines() or [""])

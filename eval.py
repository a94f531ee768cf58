"""Evaluates a trained run.

python eval.py --workdir=runs/small
    loss, bits per byte beside unigram, gzip and xz, speed, a continuation; the last line is one JSON object.

python eval.py --workdir=runs/small --report --prompt="def main(" --temperature=0.7
    the same, and runs/small/report.html: curves, attention maps, head statistics, the continuation.
"""

from absl import flags

from attnlab.training import cli

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run. --config may be left out: the folder holds it.")
_SPLIT = flags.DEFINE_string("split", "test", "Split to evaluate on: train, validation or test.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest good one when left out.")
_EVAL_BATCHES = flags.DEFINE_integer("eval_batches", None, "Batches, drawn over the split; all of it when left out.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; the start of a document of the split when left out.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Tokens to draw; up to the trained length when left out."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k likeliest tokens; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "Keep the likeliest tokens of this mass; 1 keeps all.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Continuations of the prompt.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the continuations.")
_REPORT = flags.DEFINE_bool("report", False, "Write <workdir>/report.html.")
_LAYERS = flags.DEFINE_list("layers", None, "Layers of the report's attention maps, as 0,3.")
_HEADS = flags.DEFINE_list("heads", None, "Heads of the report's attention maps, as 0,1.")


def main() -> int:
    """Returns the exit code."""
    from attnlab.errors import ConfigError
    from attnlab.training import evaluate

    if _WORKDIR.value is None:
        raise ConfigError("--workdir is missing. Name the folder of a run, for example --workdir=runs/small.")
    options = evaluate.Options(
        **{flag.name: flag.value for flag in (_SPLIT, _STEP, _EVAL_BATCHES, _PROMPT, _MAX_NEW_TOKENS, _TEMPERATURE)},
        **{flag.name: flag.value for flag in (_TOP_K, _TOP_P, _NUM_SAMPLES, _SEED, _REPORT)},
        layers=evaluate.numbers("layers", _LAYERS.value),
        heads=evaluate.numbers("heads", _HEADS.value),
    )
    evaluate.main(_WORKDIR.value, _CONFIG.value, options)
    return 0


if __name__ == "__main__":
    cli.run(main)

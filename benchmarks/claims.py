"""Does a paper's claim show at a small size? Trains the arms of a claim from several seeds and tabulates what came out.

    python benchmarks/claims.py --list
    python benchmarks/claims.py --claim=moh                         # all arms, three seeds, then the report
    python benchmarks/claims.py --claim=moh --arms="MHA;75 %" --seeds=0,1
    python benchmarks/claims.py --claim=moh --report                # the tables again from the records that are there

Every arm and seed that ends is written at once to `benchmarks/results/claim_NAME.json`, so that parts of a claim can be run by
several processes, and what is there already is not run again (`--again` does). The claims are tables in `benchmarks/claims_*.py`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import pathlib
import sys
import time

import experiment  # before attnlab: puts the project on the path
from claim import Claim, Trainer
from claim_records import about, add, current, load, report

from attnlab.errors import ConfigError, nearest
from attnlab.training.progress import duration


def claims() -> dict[str, Claim]:
    """The claims of all tables (`CLAIMS`, a tuple) beside this file, by name."""
    here = pathlib.Path(__file__).resolve().parent
    tables = [importlib.import_module(file.stem).CLAIMS for file in sorted(here.glob("claims_*.py"))]
    return {claim.name: claim for table in tables for claim in table}


class Clock:
    """Prints where the runs are and how long the rest will take, by the time per step so far.

    Args:
        runs: how many arms x seeds there are.
    """

    def __init__(self, runs: int):
        self.runs, self.done = runs, 0.0
        self.begin = time.perf_counter()

    def tell(self, name: str, steps: int, step: int, words: str) -> None:
        """A line about a step."""
        done = self.done + step / steps
        left = (time.perf_counter() - self.begin) * (self.runs - done) / done
        print(f"{name} step {step:5}: {words} ({duration(left)} left)", flush=True)


def run(claim: Claim, options: argparse.Namespace, names: list[str], seeds: list[int]) -> None:
    """Trains what has no record yet."""
    arms = [arm for arm in claim.arms if arm.name in names]
    records = [] if options.again else load(options.out, claim.name)
    known = {name: {one["seed"] for one in mine} for name, mine in current(claim, records, options.steps).items()}
    todo = [(arm, [seed for seed in seeds if seed not in known.get(arm.name, ())]) for arm in arms]
    clock = Clock(sum(len(missing) for _, missing in todo))
    for arm, missing in todo:
        if not missing:
            print(f"{arm.name}: every seed has its record", flush=True)
            continue
        trainer = Trainer(claim, arm, options.steps)
        for seed in missing:
            label = f"{arm.name:24} seed {seed}"
            record = trainer.train(seed, functools.partial(clock.tell, label, trainer.steps))
            add(options.out, claim.name, record | about(options.device))
            clock.done += 1
            told = ", ".join(f"{key} {value:.4g}" for key, value in record["figures"].items() if isinstance(value, int | float))
            print(f"{label} ends: {told}; {1e3 * record['seconds_per_step']:.0f} ms per step", flush=True)


def main() -> None:
    """Runs a claim, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", default="", help="which (--list)")
    parser.add_argument("--list", action="store_true", help="claims and their arms")
    parser.add_argument("--arms", default="", help="only these, separated by semicolons")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, separated by commas (default 0,1,2)")
    parser.add_argument("--steps", type=int, default=0, help="of training; 0 = the arms' own")
    parser.add_argument("--again", action="store_true", help="run also what has a record")
    parser.add_argument("--report", action="store_true", help="run nothing: tabulate the records")
    parser.add_argument("--device", default="", help="how the records name the machine (default: as found)")
    parser.add_argument("--out", type=pathlib.Path, default=experiment.RESULTS, help="folder of the results")
    options = parser.parse_args()
    known = claims()
    if options.list:
        for claim in known.values():
            print(f"{claim.name}: {claim.title}\n" + "\n".join(f"    {arm.name:24} {arm.config}" for arm in claim.arms))
        return
    if options.claim not in known:
        parser.error(f"--claim={options.claim}: {nearest(options.claim, known)}")
    claim = known[options.claim]
    every = [arm.name for arm in claim.arms]
    names = [name.strip() for name in options.arms.split(";")] if options.arms else every
    for name in names:
        if name not in every:
            parser.error(f"--arms: {name!r} is unknown; {nearest(name, every)}")
    if not all(seed.strip().isdigit() for seed in options.seeds.split(",")) or options.steps < 0:
        parser.error(f"--seeds={options.seeds} --steps={options.steps}: seeds are numbers as in 0,1,2; steps are 0 or more")
    logging.disable(logging.ERROR)  # the libraries' own words
    try:
        if not options.report:
            run(claim, options, names, [int(seed) for seed in options.seeds.split(",")])
        print(report(claim, options.out, options.steps))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

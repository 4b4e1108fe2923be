"""Run every fuzz target, and the command line, for a while, and print how often each was run.

    python -m tests.fuzz [--minutes N] [--seed N] [--only TARGET...] [--without-cli]

What fails is written to standard output as a line of hexadecimal digits with the target's name, to be run again by
`python -m tests.fuzz --value TARGET HEX`. The exit status is 1 then.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
import traceback

from tests.fuzz import command_line
from tests.fuzz.targets import TARGETS, Target, clean_up

# A run that takes longer than this, or lets the process grow by more than this, has failed.
MOST_SECONDS = 5.0
MOST_KIB = 400 << 10
MOST_FAILURES = 5


def _attempt(name: str, target: Target, value: bytes) -> str | None:
    """Run a target once; the end of the traceback of what went wrong, None where nothing did."""
    began = time.monotonic()
    try:
        target.run(value)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error)[-4:])
    took = time.monotonic() - began
    return f"it took {took:.1f} seconds" if took > MOST_SECONDS else None


def _run(name: str, target: Target, seconds: float, seed: int) -> tuple[int, int]:
    """Run one target for some seconds; how often, and how often it failed."""
    dice = random.Random(f"{seed} {name}")
    runs = failures = 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + seconds
    while time.monotonic() < end and failures < MOST_FAILURES:
        value = target.value(dice)
        wrong = _attempt(name, target, value)
        runs += 1
        if wrong is None and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > size + MOST_KIB:
            wrong, size = "it takes too much memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if wrong is not None:
            failures += 1
            print(f"FAILED {name} {value.hex()}\n{wrong}", flush=True)
    return runs, failures


def main() -> int:
    """Read the command line, fuzz, and say what came of it."""
    parser = argparse.ArgumentParser(description="Fuzz every parser and the command line.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--without-cli", action="store_true")
    parser.add_argument("--value", nargs=2, metavar=("TARGET", "HEX"))
    asked = parser.parse_args()
    if asked.value:
        TARGETS[asked.value[0]].run(bytes.fromhex(asked.value[1]))
        return 0
    names = asked.only or list(TARGETS)
    with_cli = not asked.without_cli and asked.only is None
    # What costs more gets more, up to a limit; the command line a quarter of all.
    weights = {name: min(TARGETS[name].cost, 10) for name in names}
    rest = asked.minutes * 60 * (0.75 if with_cli else 1.0)
    print(f"fuzzing {len(names)} parsers for {asked.minutes} minutes with seed {asked.seed}", flush=True)
    failed = 0
    try:
        for name in names:
            seconds = rest * weights[name] / sum(weights.values())
            runs, failures = _run(name, TARGETS[name], seconds, asked.seed)
            failed += failures
            print(f"{name:18} {runs:9} runs {seconds:7.1f} s {failures:3} failed", flush=True)
    finally:
        clean_up()
    if with_cli:
        seconds = asked.minutes * 60 * 0.25
        runs, wrong = command_line.fuzz(seconds, asked.seed)
        failed += len(wrong)
        for line in wrong:
            print(f"FAILED command line: {line}", flush=True)
        print(f"{'command line':18} {runs:9} runs {seconds:7.1f} s {len(wrong):3} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

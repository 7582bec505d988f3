"""``scripts/attack``: the fuzzer for as long as wanted, or one mutation again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.attacks import fuzz

_BATCH = 50


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/attack", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (1)")
    parser.add_argument("--target", action="append", choices=fuzz.TARGETS, help="attack this only; may be repeated")
    parser.add_argument("--seed", type=int, help="begin with this one (default: the time)")
    parser.add_argument("--number", type=int, help="the one mutation of that number and seed")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    targets = args.target or list(fuzz.TARGETS)
    print(f"seed {seed}", flush=True)
    end = time.monotonic() + 60 * args.minutes
    counts: Counter[str] = Counter()
    wrong, first = 0, 0
    while True:
        for name in targets:
            numbers = range(first, first + _BATCH) if args.number is None else range(args.number, args.number + 1)
            with tempfile.TemporaryDirectory() as place:
                for outcome in fuzz.attack(name, seed, numbers, Path(place)):
                    counts[outcome.verdict.kind] += 1
                    if not outcome.fine or args.number is not None:
                        wrong += not outcome.fine
                        print(outcome, flush=True)
            if args.number is not None or time.monotonic() > end:
                told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
                print(f"{counts.total()} mutations: {told}; {wrong} wrong")
                return 1 if wrong else 0
        first += _BATCH


if __name__ == "__main__":
    sys.exit(main())

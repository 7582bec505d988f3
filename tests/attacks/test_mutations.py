"""The fuzzer of `tests.attacks.fuzz` for as long as a test may take; `scripts/attack` runs it for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks import fuzz

QUICK = 5


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_few_mutations(tmp_path: Path, target: str) -> None:
    run(tmp_path, target, range(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_two_hundred_mutations(tmp_path: Path, target: str) -> None:
    run(tmp_path, target, range(QUICK, 200))


def run(place: Path, target: str, numbers: range) -> None:
    print(f"seed {fuzz.SEED}")
    wrong = [str(outcome) for outcome in fuzz.attack(target, fuzz.SEED, numbers, place) if not outcome.fine]
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)

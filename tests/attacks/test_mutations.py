"""The fuzzer of `tests.attacks.fuzz` for as long as a test may take; `scripts/attack` runs it for longer."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks import configs, formats, fuzz
from tests.slow_cases import slow_but

QUICK = 3


@pytest.mark.parametrize("target", slow_but(list(fuzz.TARGETS)[::3], fuzz.TARGETS))
def test_a_few_mutations(tmp_path: Path, target: str) -> None:
    run(tmp_path, target, range(QUICK))


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_two_hundred_mutations(tmp_path: Path, target: str) -> None:
    run(tmp_path, target, range(QUICK, 40 if fuzz.TARGETS[target].few else 200))


def run(place: Path, target: str, numbers: range) -> None:
    print(f"seed {fuzz.SEED}")
    wrong = [str(outcome) for outcome in fuzz.attack(target, fuzz.SEED, numbers, place) if not outcome.fine]
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)


def cases(place: Path) -> str:
    """A digest of some mutations of every target, made in this folder."""
    out = hashlib.sha256()
    runs: dict[str, Path] = {}
    for name, target in fuzz.TARGETS.items():
        if target.format in ("spec", *configs.MAKERS, *formats.PLACED):
            continue  # mutations of text that lies in no folder, or that says where it lies
        if target.format not in runs:
            runs[target.format] = formats.make(target.format, place / target.format)
        for number in range(20):
            path, raw = fuzz.mutated(runs[target.format], name, fuzz.SEED, number)
            out.update(f"{name} {path.relative_to(place)} ".encode() + raw)
    return out.hexdigest()


@pytest.mark.slow
def test_a_seed_means_the_same_in_any_folder_and_process(tmp_path: Path) -> None:
    here = cases(tmp_path / "here")
    code = f"from tests.attacks.test_mutations import *; print(cases(Path({str(tmp_path / 'a much longer name')!r})))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=formats.OLDER.parents[3])
    assert found.stdout.split()[-1:] == [here]  # DeepSpeed tells of itself before

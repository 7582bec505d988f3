"""Sizes and counts in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ucp.inspection.display import scalar_text
from ucp.units import counted, each_text, took

PACKAGE = Path(__file__).resolve().parents[1] / "ucp"


def test_one_is_no_plural() -> None:
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert counted(2, "entry", "entries") == "2 entries"


def test_sizes_alike_are_told_once() -> None:
    assert each_text(264_100, 264_300) == "264 kB each"
    assert each_text(198_000, 264_000) == "198 kB to 264 kB each"


def test_what_was_only_planned_took_no_time_to_write() -> None:
    assert [took(0.12, planned=planned) for planned in (False, True)] == [" in 0.1 s", "; planned in 0.1 s"]


def test_a_count_is_no_fraction() -> None:
    assert [scalar_text(value) for value in (40.0, 0.5, 3, "x")] == ["40", "0.5", "3", "x"]


@pytest.mark.parametrize("room", ["cli", "inspection", "repair", "changes", "merging/combine.py"])
def test_plurals_are_counted(room: str) -> None:
    """No "1 files": what may be one goes through `counted`."""
    path = PACKAGE / room
    things = "parameters|tensors|files|ranks|lines|layers|bytes|weights|checkpoints|modules|fragments|minutes|digests"
    for file in [path] if path.is_file() else path.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        # What comes after "of", or is compared with another number in a refusal, may be read as it is.
        found = re.findall(
            rf"(?<!of )(?<!the )\{{(?:len\([^{{}}]*\)|self\.\w+|\w*count|minutes)\}} (?:more )?(?:{things})\b", text
        )
        assert found == [], file


@pytest.mark.parametrize(
    "room", ["loading", "saving", "conversion.py", "merging", "repair", "cli", "inspection/doctor.py"]
)
def test_sizes_are_told_in_one_unit(room: str) -> None:
    """What people read has sizes by `bytes_text`: no "0.000 GB", and no KiB in one place and kB in another."""
    path = PACKAGE / room
    for file in [path] if path.is_file() else path.rglob("*.py"):
        found = re.findall(
            r"\{[^{}]*(?:1e9|1e6|1024|>> ?10|>> ?20|>> ?30)[^{}]*\} ?(?:[KMG]i?B)", file.read_text(encoding="utf-8")
        )
        assert found == [], file

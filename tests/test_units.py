"""Sizes and counts in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ucp.units import counted

PACKAGE = Path(__file__).resolve().parents[1] / "ucp"


def test_one_is_no_plural() -> None:
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert counted(2, "entry", "entries") == "2 entries"


@pytest.mark.parametrize(
    "room", ["loading", "saving", "conversion.py", "merging", "repair", "cli", "inspection/doctor.py"]
)
def test_sizes_are_told_in_one_unit(room: str) -> None:
    """What people read has sizes by `bytes_text`: no "0.000 GB", and no KiB in one place and kB in another."""
    path = PACKAGE / room
    for file in [path] if path.is_file() else path.rglob("*.py"):
        found = re.findall(
            r"\{[^{}]*(?:1e9|1e6|1024|>> ?20|>> ?30)[^{}]*\} ?(?:[KMG]i?B)", file.read_text(encoding="utf-8")
        )
        assert found == [], file

"""The spot check that files are of one run, where they have to come from a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ucp
from ucp.formats.deepspeed.read import same_run
from ucp.formats.shared.builder import Builder
from ucp.storage.files import Files

SAVED = Path(__file__).parents[1] / "older/0.19.8-z1-bf16"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What the check tells the system of and what it reads, in this order: which, the file, the first byte."""
    found: list[tuple[str, str, int]] = []
    check, bits, will_read = same_run.check, Builder.bits, Files.will_read

    def noted(builder: Builder, *args: Any) -> None:
        with monkeypatch.context() as during:
            during.setattr(Files, "will_read", lambda files, path, first, last: say("told", files, path, first, last))
            during.setattr(Builder, "bits", lambda own, path, at, *rest: say("read", own, path, at, *rest))
            check(builder, *args)

    def say(which: str, own: Any, path: str, at: int, *rest: Any) -> Any:
        found.append((which, str(path), at))
        return (will_read if which == "told" else bits)(own, path, at, *rest)

    monkeypatch.setattr("ucp.formats.deepspeed.read.mp_rank.same_run.check", noted)
    return found


@pytest.mark.parametrize("cold", [True, False])
def test_all_spots_of_cold_files_are_asked_for_before_the_first_is_read(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, str, int]], cold: bool
) -> None:
    """The disk would be waited for twice for each of them."""
    monkeypatch.setattr(
        "ucp.storage.read_ahead.cached_bytes", lambda _, between: 0 if cold else sum(b - a for a, b in between)
    )
    ucp.open(SAVED).close()
    reads = [call[1:] for call in calls if call[0] == "read"]
    told = [call[1:] for call in calls if call[0] == "told"]
    assert len({path for path, _ in reads}) == 3  # two ranks' masters and the model's weights
    assert calls[: len(told)] == [("told", *spot) for spot in told]
    assert sorted(told) == (sorted(reads) if cold else [])

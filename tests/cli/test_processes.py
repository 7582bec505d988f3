"""How many processes share a command's work. That they do is in tests/merging/test_combine.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ucp import limits
from ucp.cli import processes
from ucp.errors import BadArgument


@pytest.fixture
def large(tmp_path: Path) -> str:
    (tmp_path / "step1").mkdir()
    for folder in (tmp_path, tmp_path / "step1"):
        with open(folder / "model.safetensors", "wb") as file:
            os.truncate(file.fileno(), 3 * limits.BYTES_PER_PROCESS)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("asked", "sources", "environment", "wanted"),
    [
        (None, ("{large}",), {}, 3),
        (None, ("{large}@step1",), {}, 3),
        (None, ("{large}", "{large}"), {}, 4),
        (None, ("{large}/nothing", "s3://bucket/run"), {}, 1),
        (None, (), {}, 1),
        (2, ("{large}",), {}, 2),
        (None, ("{large}",), {"RANK": "1", "WORLD_SIZE": "2"}, 1),
        (2, ("{large}",), {"RANK": "1", "WORLD_SIZE": "2"}, 1),
    ],
)
def test_count(
    large: str,
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    sources: tuple[str, ...],
    environment: dict[str, str],
    wanted: int,
) -> None:
    monkeypatch.setattr(limits, "processors", lambda: 4)
    assert processes.count(asked, [each.format(large=large) for each in sources], environment) == wanted


def test_another_number_than_the_launcher_s_is_refused() -> None:
    with pytest.raises(BadArgument, match="a launcher has started 2 processes already"):
        processes.count(3, (), {"RANK": "0", "WORLD_SIZE": "2"})


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "processors", lambda: 8)
    assert [processes.threads(n) for n in (1, 2, 8, 16)] == [9, 5, 2, 2]


def test_one_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is done by then, so that it is no error."""
    monkeypatch.setattr(limits, "PROCESS_END_SECONDS", 0.0)
    with processes.shared(["--version"], 2) as team:
        assert (team.process, team.processes) == (0, 2)

"""How many processes share a command's work. That they do is in tests/merging/test_combine.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ucp import limits
from ucp.catalog import Catalog, TrainingState
from ucp.cli import processes
from ucp.errors import BadArgument, DamagedCheckpoint, ProcessLost
from ucp.parallel.mesh import Layout
from ucp.storage.files import Files
from ucp.storage.partial import CHECKPOINT, JOURNAL, TEAM
from ucp.transfer.reader import Reader
from ucp.transfer.targets import TargetFile
from ucp.transfer.team import Team
from ucp.transfer.team_write import Writing, write_following, write_leading


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
    given = [each.format(large=large) for each in sources]
    assert processes.count(asked, given, "out", environment) == wanted
    if asked is None:
        assert processes.count(asked, given, "s3://bucket/out", environment) == 1


def test_another_number_than_the_launcher_s_is_refused() -> None:
    with pytest.raises(BadArgument, match="a launcher has started 2 processes already"):
        processes.count(3, (), "out", {"RANK": "0", "WORLD_SIZE": "2"})


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "processors", lambda: 8)
    assert [processes.threads(n) for n in (1, 2, 8, 16)] == [8, 4, 1, 1]


def test_one_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is done by then, so that it is no error."""
    monkeypatch.setattr(limits, "PROCESS_END_SECONDS", 0.0)
    with processes.shared(["--version"], 2) as team:
        assert (team.process, team.processes) == (0, 2)


def writing(folder: Path) -> Writing:
    """Work that needs no source: one file of literals."""
    catalog = Catalog("none", str(folder), Layout(), (), {}, {}, TrainingState())
    file = TargetFile("file", 8, ((0, b"12345678"),), ())
    return Writing(Reader(catalog, Files()), (file,), "0" * 32, lambda: None)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    for name in (CHECKPOINT, JOURNAL, TEAM):
        (tmp_path / "part" / name).mkdir(parents=True)
    return tmp_path / "part"


def killed(team: Team) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def failing(team: Team) -> int:
    raise DamagedCheckpoint("model.bin: the bytes went bad\nand so on")


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (killed, "process 1 of this command was ended by signal 9 before"),
        (failing, "process 1 of this command ended with exit code 3 .*: model.bin: the bytes went bad"),
        (lambda team: 2, "process 1 of this command ended with exit code 2 "),
    ],
)
def test_one_that_dies_before_it_joins_is_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch, part: Path, job: Callable[[Team], int], message: str
) -> None:
    monkeypatch.setattr(processes, "may_fork", lambda: True)
    began = time.monotonic()
    with pytest.raises(ProcessLost, match=message), processes.shared([], 2, job) as team:
        write_leading(writing(part), part, team)
    assert time.monotonic() - began < 20  # of `limits.TEAM_JOIN_SECONDS`


def test_so_is_one_that_was_started_anew(part: Path) -> None:
    with pytest.raises(ProcessLost, match="exit code 2 before"), processes.shared(["merge", "--nonsense"], 2) as team:
        write_leading(writing(part), part, team)


def test_copies_share_the_work(monkeypatch: pytest.MonkeyPatch, part: Path) -> None:
    monkeypatch.setattr(processes, "may_fork", lambda: True)

    def follow(team: Team) -> int:
        write_following(writing(part), part, team)
        return 0

    with processes.shared([], 3, follow) as team:
        write_leading(writing(part), part, team)
    assert (part / CHECKPOINT / "file").read_bytes() == b"12345678"


def test_a_copy_whose_parent_is_gone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, part: Path) -> None:
    monkeypatch.setattr(processes, "may_fork", lambda: True)
    parent = os.getppid

    def orphaned(team: Team) -> int:
        os.getppid = lambda: 1
        try:
            write_following(writing(part), part, team)
        finally:
            os.getppid = parent
        return 0

    def wait() -> None:
        with processes.shared([], 2, orphaned) as team:
            while True:
                team.watch()
                time.sleep(0.01)

    with pytest.raises(ProcessLost, match="the process that started this one is gone"):
        wait()


def test_no_copy_of_a_process_with_other_threads_or_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert processes.may_fork() == (sys.platform == "linux")
    monkeypatch.setitem(sys.modules, "torch", processes)
    assert not processes.may_fork()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert not processes.may_fork()


def test_nothing_that_lies_in_the_working_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a checkpoint that somebody else wrote, and Python looks there first for what a program imports."""
    for name in ("universal_checkpoint", "ucp", "argparse", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nraise SystemExit(7)\n")
    started = []
    real = subprocess.Popen

    def noted(*given: Any, **named: Any) -> Any:
        started.append(real(*given, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    with processes.shared(["merge", "--help"], 2):
        assert started[0].wait(60) == 0
    assert not (tmp_path / "run").exists()

"""Progress: lines in a log, a bar on a terminal, nothing of what is short and on ranks other than the first."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from ucp import limits
from ucp.progress import ProgressBar, watching


def test_progress_in_a_log_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ucp.progress.time.monotonic", lambda: now[0])
    with ProgressBar(False, "verifying") as bar:
        for second in range(60):
            now[0] += 1
            bar(second * 10**9, 60 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 60 // limits.PROGRESS_LOG_SECONDS
    assert lines[0] == "verifying  23%  14.00 of 60.00 GB, 933 MB/s, 0:49 left"


@pytest.mark.parametrize(("variable", "value", "lines"), [("RANK", "0", 1), ("RANK", "1", 0), ("UCP_PROGRESS", "0", 0)])
def test_only_the_first_rank_shows_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, lines: int
) -> None:
    now = [0.0]
    monkeypatch.setattr("ucp.progress.time.monotonic", lambda: now[0])
    monkeypatch.setenv(variable, value)
    with ProgressBar(False) as bar:
        now[0] += 20
        bar(1, 2)
    assert len(capsys.readouterr().err.splitlines()) == lines


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("PATIENCE", 0.05), ("LOG", 0.0), ("REDRAW", 0.01)):
        monkeypatch.setattr(limits, f"PROGRESS_{name}_SECONDS", seconds)


def test_what_is_watched_is_told_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    with caplog.at_level(logging.INFO, "ucp"), watching("loading", lambda: 7 * 10**9, 10**10):
        time.sleep(0.3)
    assert caplog.messages
    assert caplog.messages[0].startswith("loading  70%  7.00 of 10.00 GB, ")


def test_stderr_has_it_where_no_log_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    with watching("loading", lambda: 99, 10):  # more than there is: an estimate
        time.sleep(0.3)
    assert capsys.readouterr().err.startswith("ucp: loading  90%  ")


@pytest.mark.parametrize(("total", "shown"), [(0, True), (100, False)])
def test_nothing_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int, shown: bool
) -> None:
    quick(monkeypatch)
    with watching("loading", lambda: 1, total, shown):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_what_is_short_stays_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with watching("loading", lambda: 1, 100):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_an_error_passes_through_and_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    quick(monkeypatch)

    def fail() -> None:
        with watching("loading", lambda: 1, 100):
            time.sleep(0.2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not [thread for thread in threading.enumerate() if thread.name == "ucp-progress"]


def on_a_terminal(columns: int) -> str:
    """What a save shows on a terminal of so many columns; 0: one that does not know its size."""
    program = "import time; from ucp import limits, progress; limits.PROGRESS_PATIENCE_SECONDS = 0.1\n"
    program += "done = iter(range(100000))\n"
    program += "with progress.watching('saving', lambda: next(done) * 10**6, 10**10): time.sleep(1)"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", program], stderr=slave, check=True, cwd=root)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    return shown


@pytest.mark.parametrize("columns", [0, 160])
def test_a_bar_on_a_terminal(columns: int) -> None:
    shown = on_a_terminal(columns)
    assert shown.count("\r[") >= 3
    assert shown.count("\n") == 1
    assert "] saving   0%  0.00 of 10.00 GB" in shown
    assert shown.rstrip().endswith("MB/s")
    assert f"[{'#' * 30}] saving 100%  10.00 of 10.00 GB" in shown


def test_a_bar_fits_its_terminal() -> None:
    shown = on_a_terminal(80)
    assert " left" in shown
    assert max(map(len, shown.split("\r"))) < 80
    assert f"[{'#' * 10}] saving 100%  10.00 of 10.00 GB" in shown

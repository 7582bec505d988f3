"""Saves in the background: a copy of what was there, errors that come back, and processes that leave."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.saving import save_jobs as jobs
from ucp.errors import DestinationError, SaveFailed, Unsupported
from ucp.saving import commit, writer
from ucp.saving.background import Saver, finish_all
from ucp.saving.late import LateNumbers
from ucp.saving.retention import Keep

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The writing, and all after it, begins when it is set."""
    event = threading.Event()

    def later(send: Callable[..., None]) -> Callable[..., None]:
        def sends(*args: Any) -> None:
            assert event.wait(30)
            send(*args)

        return sends

    for name in ("send", "send_packed"):
        monkeypatch.setattr(writer.WriterProcess, name, later(getattr(writer.WriterProcess, name)))
    return event


def state(seed: int) -> tuple[dict[tuple[str, str], torch.Tensor], jobs.Source]:
    values = jobs.values(seed, small=True)
    return values, jobs.source(values, 0, 1, seed)


def test_numbers_that_come_late_are_those_of_the_save(tmp_path: Path, gate: threading.Event) -> None:
    _, made = state(1)
    names = sorted(made.parameters)[:2]
    steps = {(names[0], "step"): torch.tensor(3.0), (names[1], "step"): torch.tensor([7], dtype=torch.int64)}
    saver = Saver()
    saver.save(replace(made, late=LateNumbers(steps)), tmp_path, "now")
    for step in steps.values():
        step += 1
    gate.set()
    saver.wait()
    with ucp.open(tmp_path) as checkpoint:
        found = [checkpoint.parameters[name].scalars["step"] for name in names]
    assert found == [3.0, 7]
    assert list(map(type, found)) == [float, int]


def test_what_changes_after_the_save_is_not_in_it(tmp_path: Path, gate: threading.Event) -> None:
    values, made = state(1)
    saver = Saver()
    saver.save(made, tmp_path, "now")
    assert saver.pending == str(tmp_path / "now")
    assert not (tmp_path / "now").exists()
    threading.Timer(0.2, gate.set).start()
    saver.hold()
    for holding in made.holdings:
        holding.tensor.zero_()
    saver.wait()
    assert saver.pending is None
    assert jobs.digest_of(tmp_path) == jobs.digest(values)
    assert set(os.listdir(tmp_path)) == {"now", "latest"}


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: threading.Event) -> None:
    reports: list[Any] = []
    saver = Saver(reports.append)
    (first, made), (second, others) = state(1), state(2)
    saver.save(made, tmp_path, "same")
    threading.Timer(0.2, gate.set).start()
    saver.save(others, tmp_path, "same")
    assert len(reports) == 1
    saver.wait()
    assert [report.tag for report in reports] == ["same", "same"]
    assert set(reports[0].seconds) == {"prepare", "copy", "digest", "write", "commit"}
    assert 0 < reports[0].seconds["write"] < reports[0].wall
    assert jobs.digest_of(tmp_path) == jobs.digest(second) != jobs.digest(first)


def test_saves_that_come_too_fast_can_be_skipped(
    tmp_path: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(policy="skip")
    (first, made), (_, others) = state(1), state(2)
    assert saver.save(made, tmp_path, "first")
    assert not saver.save(others, tmp_path, "second")
    assert f"second was not saved: the save of {tmp_path / 'first'} is still under way" in caplog.text
    gate.set()
    saver.wait()
    assert set(os.listdir(tmp_path)) == {"first", "latest"}
    assert jobs.digest_of(tmp_path) == jobs.digest(first)
    assert saver.save(others, tmp_path, "second")
    saver.wait()
    assert (tmp_path / "latest").read_text() == "second"


def test_failures_come_back_once(tmp_path: Path, gate: threading.Event) -> None:
    values, made = state(1)
    saver = Saver()

    def fail() -> None:
        gate.clear()
        saver.save(made, tmp_path, "now")
        for folder in tmp_path.glob(".ucp-tmp-*"):
            for path in folder.rglob("*"):
                path.rmdir()
            folder.rmdir()
        gate.set()

    fail()
    with pytest.raises(DestinationError, match="cannot be written: No such file"):
        saver.wait()
    saver.wait()
    fail()
    with pytest.raises(DestinationError, match="cannot be written: No such file"):
        saver.save(made, tmp_path, "next")
    assert os.listdir(tmp_path) == []
    saver.save(made, tmp_path, "next")
    saver.wait()
    assert jobs.digest_of(tmp_path) == jobs.digest(values)


def test_what_cannot_be_stored_is_told_at_once(tmp_path: Path) -> None:
    _, made = state(1)
    saver = Saver()
    with pytest.raises(Unsupported, match="rank 0's socket"):
        saver.save(
            jobs.Source(made.layout, made.parameters, made.holdings, made.training_state, {"socket": object()}),
            tmp_path,
            "x",
        )
    assert os.listdir(tmp_path) == []


def test_the_other_ranks_learn_how_it_ended(tmp_path: Path) -> None:
    """By files alone: here each rank is a call."""
    values = jobs.values(3, small=True)
    made = [jobs.source(values, rank, 2, 3) for rank in range(2)]

    def begin() -> commit.Session:
        session = commit.begin(tmp_path, "now", 2)
        for rank in range(2):
            jobs.write_share(session, rank, made[rank])
        return session

    for _ in range(2):  # a new tag, and one that exists
        session = begin()
        with pytest.raises(SaveFailed, match=r"was not published by rank 0 within 0\.1 seconds"):
            commit.await_verdict(session, 0.1)
        commit.commit(session, watched=True)
        commit.await_verdict(session, 0.1)
    session = begin()
    session.receipt(1).unlink()
    with pytest.raises(SaveFailed, match=r"1 of 2 ranks \(1\) left no receipt"):
        commit.commit(session, timeout=0.1, watched=True)
    with pytest.raises(SaveFailed, match=r"1 of 2 ranks \(1\) left no receipt"):
        commit.await_verdict(session, 20)
    assert jobs.digest_of(tmp_path) == jobs.digest(values)
    begin()
    assert len(os.listdir(tmp_path)) == 3  # the failure's note went with it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_writer_that_dies_is_told_and_replaced(tmp_path: Path, gate: threading.Event, number: signal.Signals) -> None:
    values, made = state(1)
    saver = Saver()
    saver.save(made, tmp_path, "now")
    assert saver.writer is not None
    first = saver.writer
    os.kill(first, number)
    gate.set()
    saver.hold()  # nobody waits for a copy that will not be
    with pytest.raises(SaveFailed, match=f"the process that writes .number {first}. was ended by {number.name}"):
        saver.wait()
    assert list(tmp_path.glob("[!.]*")) == []
    saver.save(made, tmp_path, "now")
    saver.wait()
    assert saver.writer != first
    assert jobs.digest_of(tmp_path) == jobs.digest(values)
    assert set(os.listdir(tmp_path)) == {"now", "latest"}


def test_a_writer_that_cannot_be_started_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "get_executable", lambda: "/nowhere/python")
    with pytest.raises(
        SaveFailed, match=r"the process that writes \(/nowhere/python\) cannot be started: No such file"
    ):
        Saver().save(state(1)[1], tmp_path, "now")
    assert os.listdir(tmp_path) == []


def test_a_writer_without_its_program_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\nexit 7\n")
    interpreter.chmod(0o700)
    monkeypatch.setattr(writer, "get_executable", lambda: str(interpreter))
    saver = Saver()
    saver.save(state(1)[1], tmp_path, "now")
    with pytest.raises(SaveFailed, match="ended with code 7"):
        saver.wait()


def test_what_the_writer_logs_is_logged_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = Saver()
    with caplog.at_level("INFO", "ucp"):
        for step in range(3):
            saver.save(state(1)[1], tmp_path, f"step{step}", keep=Keep(2))
        saver.wait()
    assert f"{tmp_path / 'step0'} was removed: newer checkpoints are kept instead" in caplog.text


def test_the_writer_goes_with_its_saver(tmp_path: Path) -> None:
    saver = Saver()
    saver.save(state(1)[1], tmp_path, "now")
    saver.wait()
    process = saver.writer
    assert process is not None
    assert "libtorch" not in Path(f"/proc/{process}/maps").read_text()
    os.kill(process, signal.SIGTERM)  # as a scheduler sends it to all processes of a job
    assert saver.save(state(1)[1], tmp_path, "now")
    saver.wait()
    assert saver.writer == process
    del saver
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


PROGRAM = """
import os, sys, time
import torch

import ucp
from pathlib import Path
from tests.saving import save_jobs as jobs
from ucp.saving.background import Saver
from ucp.saving.staging import Copying
folder, what = Path(sys.argv[1]), sys.argv[2]
arriving = Copying.arriving
Copying.arriving = lambda *args: (time.sleep(0.5), arriving(*args))[1]
saver = Saver()
saver.save(jobs.source(jobs.values(4, small=True), 0, 1, 4), folder, "now")
if what == "fail":
    os.rename(next(folder.glob(".ucp-tmp-*")), folder / "elsewhere")
print("saved", flush=True)
if what == "stay":
    time.sleep(60)
"""


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), what],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    return process


def test_only_the_first_rank_says_that_it_waits(caplog: pytest.LogCaptureFixture) -> None:
    class Pending(Saver):
        pending = "runs/step7"  # type: ignore[assignment]

    class Other(Pending):
        loudness = logging.DEBUG  # type: ignore[assignment]

    first, other = Pending(), Other()
    with caplog.at_level(logging.INFO):
        finish_all()
    assert caplog.messages == ["waiting for the save of runs/step7 before leaving"]
    del first, other


@pytest.mark.slow
def test_leaving_waits(tmp_path: Path) -> None:
    process = start(tmp_path, "leave")
    assert not (tmp_path / "now").exists()
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"waiting for the save of {tmp_path / 'now'} before leaving" in text
    assert jobs.digest_of(tmp_path) == jobs.digest(jobs.values(4, small=True))


@pytest.mark.slow
def test_leaving_tells_of_a_failure(tmp_path: Path) -> None:
    process = start(tmp_path, "fail")
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a save failed in the background" in text
    assert "DestinationError" in text


@pytest.mark.slow
def test_termination_finishes_the_save(tmp_path: Path) -> None:
    process = start(tmp_path, "stay")
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - started < 50
    assert jobs.digest_of(tmp_path) == jobs.digest(jobs.values(4, small=True))

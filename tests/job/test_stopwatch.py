"""Seconds by stage add up to the time that has passed."""

from __future__ import annotations

import time

import pytest

from ucp.job.stopwatch import Stopwatch, stages_text


def test_stages_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    assert watch.timed("read", lambda: passes(0.5) or 7) == 7
    passes(0.25)
    with pytest.raises(KeyError):
        watch.timed("apply", lambda: passes(2) or {}["nothing"])
    watch.timed("read", lambda: passes(0.5))
    assert watch.with_wait() == {"read": 1.0, "apply": 2.0, "wait": 0.25}
    assert watch.passed == 3.25


def test_in_words() -> None:
    assert stages_text({"plan": 0.1, "read": 1.9, "apply": 0.001, "wait": 0.31}) == (
        "2.31 s (plan 0.10, read 1.90, wait 0.31)"
    )
    assert stages_text({"plan": 0.0, "read": 0.2}) == "0.20 s"

"""Seconds by stage add up to the time that has passed."""

from __future__ import annotations

import time

import pytest

from ucp.job.stopwatch import Stopwatch, stages_text


def test_stages_and_waiting() -> None:
    began = time.perf_counter()
    watch = Stopwatch()
    assert watch.timed("read", lambda: time.sleep(0.02) or 7) == 7
    time.sleep(0.03)
    with pytest.raises(KeyError):
        watch.timed("apply", lambda: {}["nothing"])
    watch.timed("read", lambda: time.sleep(0.02))
    seconds = watch.with_wait()
    passed = time.perf_counter() - began
    assert [*seconds] == ["read", "apply", "wait"]
    assert seconds["read"] >= 0.04
    assert seconds["wait"] >= 0.03
    assert passed - 0.01 < sum(seconds.values()) <= passed


def test_in_words() -> None:
    assert stages_text({"plan": 0.1, "read": 1.9, "apply": 0.001, "wait": 0.31}) == (
        "2.31 s (plan 0.10, read 1.90, wait 0.31)"
    )
    assert stages_text({"plan": 0.0, "read": 0.2}) == "0.20 s"

"""How many processors count: those that the process may run on, within its control groups' shares."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from ucp import limits


def test_the_control_groups_smallest_limit_counts(tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    groups = ["0::/job/step"]
    assert limits.control_group_quota(tmp_path, groups) == math.inf
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "job" / "cpu.max").write_text("250000 100000\n")
    assert limits.control_group_quota(tmp_path, groups) == 2.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert limits.control_group_quota(tmp_path, groups) == 0.5


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    groups = ["4:cpu,cpuacct:/job", "3:memory:/job", "0::/"]
    inner = tmp_path / "cpu,cpuacct" / "job"
    inner.mkdir(parents=True)
    (inner / "cpu.cfs_period_us").write_text("100000\n")
    (inner / "cpu.cfs_quota_us").write_text("-1\n")
    assert limits.control_group_quota(tmp_path, groups) == math.inf
    (inner / "cpu.cfs_quota_us").write_text("400000\n")
    assert limits.control_group_quota(tmp_path, groups) == 4


@pytest.mark.parametrize(("quota", "found"), [(math.inf, 3), (2.5, 3), (1.5, 2), (0.2, 1)])
def test_processors(monkeypatch: pytest.MonkeyPatch, quota: float, found: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
    monkeypatch.setattr(limits, "processor_quota", lambda: quota)
    assert limits.processors() == found

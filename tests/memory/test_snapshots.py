"""Snapshots in memory that outlive their trainers, of real engines on real ranks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import ucp
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.truth import compare
from tests.memory import jobs

pytestmark = pytest.mark.slow

FOUR = ("a", "a", "b", "b")


def test_what_was_killed_resumes_from_memory_on_any_ranks(ranks: RankPool, tmp_path: Path, keepers: Path) -> None:
    case, folder = Case(stage=1, dp=4), str(tmp_path / "run")
    truth = ranks.run(jobs.train, case, folder, str(keepers), FOUR, 2, {}, world_size=4)[0]
    assert not (tmp_path / "run").exists()
    with ucp.open(f"memory://{folder}") as checkpoint:
        assert checkpoint.verify() > 0
        assert checkpoint.training_state.global_steps == 2
    for stage, dp in ((3, 2), (1, 1), (1, 4)):
        target = case.but(stage=stage, dp=dp)
        path, steps, found = ranks.run(
            jobs.resume, target, folder, str(keepers), FOUR[:: 4 // dp], {"every": 0}, world_size=dp
        )[0]
        assert path == f"memory://{folder}/global_step2"
        assert steps == 2
        assert compare(found, truth) == []


def test_killed_with_its_snapshots_goes_on_from_the_last_step(ranks: RankPool, tmp_path: Path, keepers: Path) -> None:
    """And where the program ends normally, no keeper and no socket is left."""
    case, folder = Case(stage=2, dp=2), str(tmp_path / "run")
    nodes, memory = ("a", "b"), {}
    whole = ranks.run(jobs.train, case, str(tmp_path / "w"), str(keepers), nodes, 4, memory, end=True, world_size=2)[0]
    outcome = ranks.attempt(jobs.train, case, folder, str(keepers), nodes, 2, memory, killed=True, world_size=2)
    assert [failure.kind for failure in outcome.failures] == ["died", "died"]
    truth = ranks.run(jobs.train, case, folder, str(keepers), nodes, 2, memory, end=True, world_size=2)[0]
    assert compare(truth, whole) == []
    deadline = time.monotonic() + 10
    while list(keepers.glob("*-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(keepers.glob("*-*")) == []

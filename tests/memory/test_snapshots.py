"""Snapshots in memory that outlive their trainers, of real engines on real ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import ucp
from tests.deepspeed.test_pipe import piped
from tests.engines import pipe_models
from tests.engines.configs import Case
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankPool
from tests.engines.truth import compare
from tests.memory import jobs
from tests.memory.nodes import wait_for
from ucp.memory import control
from ucp.storage.kept import places

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


def test_from_memory_under_another_kind_of_parallelism(ranks: RankPool, tmp_path: Path, keepers: Path) -> None:
    folder, case = str(tmp_path / "run"), Case(stage=1, dp=1, accumulation=2)
    spec = tmp_path / "pipe.yaml"
    spec.write_text(pipe_models.SPEC)
    given = folder, str(keepers), ("a", "a"), str(spec)
    trained, tensors = PipeCase(pp=0, case=case.but(dp=2)), PipeCase(pp=1, tp=2, case=case)
    _, truth = ranks.run(jobs.train_parallel, trained, *given, 2, world_size=2)[0]
    for target in (tensors, PipeCase(pp=2, case=case)):
        path, found = ranks.run(jobs.train_parallel, target, *given, 0, world_size=2)[0]
        assert path == f"memory://{folder}/global_step2"
        assert compare(piped(found, target), piped(truth, trained)) == []


def test_killed_with_its_snapshots_goes_on_from_the_last_step(ranks: RankPool, tmp_path: Path, keepers: Path) -> None:
    """And where the program ends normally, no keeper and no socket is left. Every second snapshot is on disk, too."""
    case, folder = Case(stage=2, dp=2), str(tmp_path / "run")
    nodes, memory = ("a", "b"), {"persist_every": 2}
    whole = ranks.run(jobs.train, case, str(tmp_path / "w"), str(keepers), nodes, 4, {}, end=True, world_size=2)[0]
    outcome = ranks.attempt(jobs.train, case, folder, str(keepers), nodes, 2, memory, killed=True, world_size=2)
    assert [failure.kind for failure in outcome.failures] == ["died", "died"]
    truth = ranks.run(jobs.train, case, folder, str(keepers), nodes, 2, memory, end=True, world_size=2)[0]
    assert compare(truth, whole) == []
    assert sorted(path.name for path in (tmp_path / "run").glob("global_step*")) == ["global_step2", "global_step4"]
    with ucp.open(folder) as checkpoint:
        assert checkpoint.training_state.global_steps == 4
        assert checkpoint.verify() > 0
    deadline = time.monotonic() + 10
    while list(keepers.glob("*-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(keepers.glob("*-*")) == []


def test_a_node_lost_with_its_ranks_and_its_keeper(ranks: RankPool, tmp_path: Path, keepers: Path) -> None:
    """Four nodes with one parity: what is left resumes on three ranks, with the bits of all four. Of those three two
    more are lost, so that the last one goes on from the older step that is on disk."""
    case, folder, nodes = Case(stage=1, dp=4), str(tmp_path / "run"), ("a", "b", "c", "d")
    memory = {"redundancy": 1, "persist_every": 2}
    truth = ranks.run(jobs.train, case, folder, str(keepers), nodes, 3, memory, world_size=4)[0]
    wait_for(lambda: all(one["generations"][0]["protected"] for one in control.statuses()))
    # On each node two generations of S bytes, and the parity of the newest one.
    held = control.statuses()
    kept = sum(one["bytes"] for one in held) / held[0]["generations"][0]["bytes"]
    assert 2 + 1 / 3 <= kept <= 1.03 * (2 + 1 / 3)
    lose("a")
    target = case.but(stage=3, dp=3)
    path, steps, found = ranks.run(
        jobs.resume, target, folder, str(keepers), ("b", "c", "d"), {**memory, "every": 0}, world_size=3
    )[0]
    assert (path, steps) == (f"memory://{folder}/global_step3", 3)
    assert compare(found, truth) == []
    lose("b", "c")
    path, steps, _ = ranks.run(
        jobs.resume, case.but(dp=1), folder, str(keepers), ("d",), {**memory, "every": 0}, world_size=1
    )[0]
    assert (path, steps) == (f"{folder}/global_step2", 2)


def lose(*nodes: str) -> None:
    """These nodes' keepers."""
    for note in places.notes():
        if note.node in nodes:
            os.kill(note.pid, signal.SIGKILL)


def test_training_goes_on_when_a_keeper_dies(ranks: RankPool, tmp_path: Path, keepers: Path) -> None:
    """It is started again, and the next snapshot is in it."""
    case, folder = Case(stage=2, dp=2), str(tmp_path / "run")
    truth, steps = ranks.run(jobs.lose_keeper, case, folder, str(keepers), ("a", "b"), world_size=2)[0]
    assert steps == 3
    found = ranks.run(jobs.resume, case, folder, str(keepers), ("a", "b"), {"every": 0}, world_size=2)[0]
    assert found[1] == 3
    assert compare(found[2], truth) == []

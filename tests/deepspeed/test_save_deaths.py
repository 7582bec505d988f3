"""Training ranks killed with SIGKILL while they save: what is loaded afterwards is one of the two states saved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import ucp
from tests.deepspeed import save_jobs
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.saving.save_jobs import Death, digest_of

pytestmark = pytest.mark.slow

CASES = [(Case(stage=1, dp=2, frozen=True), True), (Case(stage=3, dp=4, frozen=True), False)]


@pytest.mark.parametrize(("case", "background"), CASES, ids=["z1-dp2-in the background", "z3-dp4-synchronous"])
def test_the_old_state_or_the_new_one(ranks: RankPool, tmp_path: Path, case: Case, background: bool) -> None:
    """The first rank dies at some steps of the save, and another one at some; the others are killed soon after.

    In the background it is the rank or its writer: then the rank is told.
    """
    start = tmp_path / "start"
    ranks.run(save_jobs.save_at, case, str(start), 1, None, background, world_size=case.dp)
    old = digest_of(start)
    whole = tmp_path / "whole"
    shutil.copytree(start, whole)
    counts: list[int] = ranks.run(save_jobs.save_at, case, str(whole), 2, None, background, world_size=case.dp)
    new = digest_of(whole)
    assert old != new
    deaths = [Death(0, n) for n in range(case.dp, counts[0], 3)]
    deaths += [Death(1, n) for n in range(1, counts[1], 3)]
    assert len(deaths) >= 10
    found = set()
    for k, death in enumerate(deaths):
        folder = tmp_path / f"run{k}"
        shutil.copytree(start, folder)
        outcome = ranks.attempt(
            save_jobs.save_at, case, str(folder), 2, death, background, world_size=case.dp, grace=0.3
        )
        told = [f"{f.kind} {f.type_name}" for f in outcome.failures if f.rank == death.rank]
        writer = background and death.operation % 2 == 0
        assert any(text.endswith("WriterLost") if writer else text.startswith("died") for text in told)
        digest = digest_of(folder)
        assert digest in (old, new)
        found.add(digest)
        with ucp.open(folder) as checkpoint:
            assert checkpoint.verify() > 0
            assert checkpoint.training_state.global_steps == (1 if digest == old else 2)
        assert {path.name for path in folder.glob("[!.]*")} <= {"global_step1", "global_step2", "latest"}
    assert found == {old, new}
    # The next run resumes from what is there, and its save clears up.
    last = tmp_path / f"run{len(deaths) - 1}"
    ranks.run(save_jobs.resume_and_save, case, str(last), world_size=case.dp)
    assert all(not name.startswith(".") for name in os.listdir(last))

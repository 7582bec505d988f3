"""What runs with every release of DeepSpeed, in a minute: stages 1 and 3, loaded and saved both ways, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.deepspeed import smoke_jobs
from tests.deepspeed.agree import differences
from tests.engines import load_jobs, resume
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.sources import Sources
from tests.engines.truth import compare, known

pytestmark = [pytest.mark.slow, pytest.mark.smoke]

STAGE1 = Case(stage=1, dp=2, dtype="bf16", groups=2, frozen=True)
STAGE3 = Case(stage=3, dp=3, dtype="bf16", groups=2, frozen=True)


@pytest.mark.parametrize(("first", "second"), [(STAGE1, STAGE3), (STAGE3, STAGE1)], ids=["1-3-1", "3-1-3"])
def test_there_and_back(ranks: RankPool, sources: Sources, tmp_path: Path, first: Case, second: Case) -> None:
    """Stock DeepSpeed saves; the other stage resumes and saves in our format; the first stage goes on from that as if
    nothing had been between, once under the plugin and once under stock DeepSpeed, from converted files."""
    run = sources.get(first)
    ours, native = str(tmp_path / "ours"), str(tmp_path / "native")
    job = smoke_jobs.load_and_save
    there = ranks.run(job, second.but(seed=5), run.folder, run.tag, ours, world_size=second.dp)[0]
    assert differences(known(run.truth), known(there)) == []
    back = ranks.run(load_jobs.resume, first.but(seed=5), ours, run.tag, run.steps, world_size=first.dp)[0]
    assert compare(known(run.truth), known(back.truth)) == []
    assert back.further == run.further
    assert compare(known(run.truth_after), known(back.truth_after)) == []

    ucp.convert(ours, native, to="deepspeed", layout=f"dp={first.dp},zero={first.stage}")
    stock = ranks.run(resume.resume, first.but(seed=5), native, None, run.steps, world_size=first.dp)[0]
    assert differences(known(run.truth), known(stock.truth)) == []
    assert stock.further == run.further

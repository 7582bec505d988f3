"""The table of parallelisms, every cell: a run under each kind resumes under each other, its state equal to the bit.

One model everywhere, two ranks each; losses and larger layouts are tested with the kinds' own models. Experts, which
this model lacks, have a row and a column of their own in `test_moe_load.py` and `test_moe_auto.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deepspeed import every_layout_jobs
from tests.deepspeed.agree import differences
from tests.deepspeed.test_pipe import piped
from tests.engines import pipe_models
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelRun, ParallelSources
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankPool
from tests.engines.truth import Truth

pytestmark = pytest.mark.slow

TRAINED = Case(stage=1, dp=2, accumulation=2)
KINDS = {
    "ZeRO-1": PipeCase(pp=0, case=TRAINED),
    "ZeRO-2": PipeCase(pp=0, case=TRAINED.but(stage=2)),
    "ZeRO-3": PipeCase(pp=0, case=TRAINED.but(stage=3)),
    "TP": PipeCase(pp=1, tp=2, case=TRAINED.but(dp=1)),
    "PP": PipeCase(pp=2, case=TRAINED.but(dp=1)),
    "SP": PipeCase(pp=0, case=TRAINED),
    "DP": PipeCase(pp=0, case=TRAINED.but(stage=0)),
}


def sp_of(kind: str) -> int:
    return 2 if kind == "SP" else 1


@pytest.fixture(scope="module")
def runs(ranks: RankPool, pipes: ParallelSources, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParallelRun]:
    """A run under each kind, saved by DeepSpeed."""
    out = {kind: pipes.get(pipe) for kind, pipe in KINDS.items() if kind != "SP"}
    folder = str(tmp_path_factory.mktemp("sp"))
    job = every_layout_jobs.train_sequence_parallel
    out["SP"] = ranks.run(job, KINDS["SP"], 2, folder, world_size=2)[0]
    return out


@pytest.fixture(scope="module")
def resumed(
    ranks: RankPool, runs: dict[str, ParallelRun], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Truth]]:
    """What an engine of a kind holds after resuming from each of the runs, one after the other."""
    spec = tmp_path_factory.mktemp("spec") / Path("pipe.yaml")
    spec.write_text(pipe_models.SPEC)
    known: dict[str, dict[str, Truth]] = {}

    def of(kind: str) -> dict[str, Truth]:
        if kind not in known:
            folders = [runs[source].folder for source in KINDS]
            pipe = KINDS[kind].but(seed=5)
            job = every_layout_jobs.load_each
            found = ranks.run(job, pipe, sp_of(kind), folders, {"spec": str(spec)}, world_size=2)[0]
            known[kind] = dict(zip(KINDS, found, strict=True))
        return known[kind]

    return of


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_resumes(
    runs: dict[str, ParallelRun], resumed: Callable[[str], dict[str, Truth]], source: str, target: str
) -> None:
    saved = piped(runs[source].truth, KINDS[source])
    assert differences(saved, piped(resumed(target)[source], KINDS[target])) == []

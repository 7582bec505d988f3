"""One state has one digest: live under every layout and framework, and in every form of file.

The state is what DeepSpeed saved; its digest is computed from that program's own files.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.deepspeed import digest_jobs as jobs
from tests.deepspeed.test_every_layout import KINDS, sp_of
from tests.engines import moe, pipe_models
from tests.engines.configs import Case
from tests.engines.fsdp import Mesh
from tests.engines.moe import MoeCase, MoeSources
from tests.engines.parallel_runs import ParallelSources
from tests.engines.pool import RankPool
from tests.engines.sources import train
from ucp.inspection.digests import digests_of

pytestmark = pytest.mark.slow(seconds=20)

SOURCE = Case(stage=1, dp=2, groups=2)
EXPERTS = MoeCase(Case(stage=1, dp=4), ep=2)


def of_files(path: Path, **options: object) -> jobs.Found:
    """Computed from the files; what is recorded in them is the same."""
    with ucp.open(path, **options) as checkpoint:
        found = jobs.nameless(digests_of(checkpoint, compute=True))
        recorded = digests_of(checkpoint)
        assert jobs.nameless(recorded) == found
        assert {t.recorded for t in recorded.tensors} == {checkpoint.format == "universal"}
    return found


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("digests") / "run"
    run = ranks.run(train, SOURCE, str(folder), steps=2, further=0, world_size=SOURCE.dp)[0]
    return folder, run.tag


def test_in_every_form_of_file(saved: tuple[Path, str], tmp_path: Path) -> None:
    source = saved[0] / saved[1]
    wanted = of_files(source)
    assert len(wanted) > 10
    for to, options in {
        "universal": {},
        "dcp": {},
        "deepspeed-universal": {},
        "deepspeed": {"layout": "dp=3,zero=3", "ds_config": {}},
    }.items():
        ucp.convert(source, tmp_path / to, to=to, **options)
        assert of_files(tmp_path / to) == wanted, to
    ucp.convert(source, tmp_path / "virtual", virtual=True, digests=True)
    assert of_files(tmp_path / "virtual") == wanted


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_live_at_every_stage(ranks: RankPool, saved: tuple[Path, str], dp: int) -> None:
    wanted = of_files(saved[0] / saved[1])
    cases = [SOURCE.but(stage=stage, dp=dp, seed=3) for stage in range(4)]
    for found in ranks.run(jobs.engines, cases, str(saved[0]), saved[1], world_size=dp):
        assert found == [wanted] * 4


def test_live_under_fsdp2(ranks: RankPool, saved: tuple[Path, str]) -> None:
    wanted = of_files(saved[0] / saved[1])
    for meshes, world in (([Mesh(2, seed=1), Mesh(1, tp=2, seed=1)], 2), ([Mesh(2, replicas=2, seed=1)], 4)):
        for found in ranks.run(jobs.fsdp, meshes, str(saved[0] / saved[1]), world_size=world):
            assert found == [wanted] * len(meshes)


def test_live_under_every_kind_of_parallelism(ranks: RankPool, pipes: ParallelSources, tmp_path: Path) -> None:
    spec = tmp_path / "pipe.yaml"
    spec.write_text(pipe_models.SPEC)
    run = pipes.get(KINDS["ZeRO-1"])
    wanted = of_files(Path(run.folder))
    cases = [(KINDS[kind].but(seed=5), sp_of(kind)) for kind in ("TP", "PP", "SP", "ZeRO-3")]
    for found in ranks.run(jobs.kinds, cases, run.folder, str(spec), world_size=2):
        assert found == [wanted] * len(cases)


def test_live_with_experts(moe_sources: MoeSources) -> None:
    run = moe_sources.get(EXPERTS, universal=False)
    wanted = of_files(Path(run.folder) / run.tag)
    cases = [MoeCase(Case(stage=stage, dp=4, seed=5), ep=ep) for stage, ep in ((1, 2), (2, 4), (0, 1))]
    for found in moe_sources.pool.run(
        jobs.experts, cases, run.folder, run.tag, world_size=4, preload=moe.preload(cases[0], ours=True)
    ):
        assert found == [wanted] * 3

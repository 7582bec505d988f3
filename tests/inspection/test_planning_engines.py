"""What a plan says of every rank is what a real engine of that layout then reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ucp
from tests.engines import autoep, moe, pipe_models, tp_models, tp_runs
from tests.engines.autoep import AutoCase
from tests.engines.configs import Case
from tests.engines.moe import MoeCase
from tests.engines.pipe_runs import PipeCase
from tests.engines.tp_runs import TpCase
from tests.inspection import jobs
from ucp.inspection.planning import plan
from ucp.parallel.mesh import parse_layout

if TYPE_CHECKING:
    from tests.engines.moe import MoeSources
    from tests.engines.parallel_runs import ParallelSources
    from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow

TRAINED = Case(stage=1, dp=1, accumulation=2)
OPTIONS = TRAINED.but(groups=2, frozen=True)
FOUR = Case(stage=1, dp=4)
TIED = {"embed": [0, 7]}


def planned(folder: str, layout: str, **how: Any) -> list[int]:
    with ucp.open(folder) as checkpoint:
        return [rank.bytes for rank in plan(checkpoint, parse_layout(layout), **how).ranks]


@pytest.mark.parametrize(
    ("source", "target", "layout", "partition"),
    [
        (PipeCase(pp=2, case=OPTIONS.but(dp=2)), PipeCase(pp=2, case=OPTIONS.but(dp=2)), "dp=2,pp=2,zero=1", [0, 4, 8]),
        (
            PipeCase(pp=2, case=OPTIONS.but(dp=2)),
            PipeCase(pp=2, method="parameters", case=OPTIONS.but(dp=2)),
            "dp=2,pp=2,zero=1",
            None,
        ),
        (PipeCase(pp=1, case=TRAINED), PipeCase(pp=3, method="parameters", case=TRAINED), "dp=1,pp=3,zero=1", None),
        (
            PipeCase(pp=1, case=TRAINED),
            PipeCase(pp=2, method="parameters", case=TRAINED.but(stage=0, dp=2)),
            "dp=2,pp=2,zero=0",
            None,
        ),
        # from one module without stages, whose names are others, and with tensor parallelism
        (
            PipeCase(pp=0, case=OPTIONS.but(stage=2, dp=2)),
            PipeCase(pp=2, tp=2, case=OPTIONS),
            "dp=1,pp=2,tp=2,zero=1",
            [0, 4, 8],
        ),
    ],
    ids=["itself", "by-parameters", "three-stages", "stage-0", "from-plain-with-tp"],
)
def test_pipelines(
    ranks: RankPool,
    pipes: ParallelSources,
    tmp_path: Path,
    source: PipeCase,
    target: PipeCase,
    layout: str,
    partition: list[int] | None,
) -> None:
    (tmp_path / "pipe.yaml").write_text(pipe_models.SPEC)
    spec = str(tmp_path / "pipe.yaml") if target.tp > 1 or not source.pp else None
    run = pipes.get(source)
    pipeline = {"tied": TIED} if partition is None else {"tied": TIED, "partition": partition}
    section = {} if spec is None else {"spec": spec}
    read = ranks.run(jobs.bytes_loaded, "pipe", target, run.folder, section, world_size=target.world_size)
    assert planned(run.folder, layout, spec=spec, ds_config={"pipeline": pipeline}) == read


@pytest.mark.parametrize(
    ("target", "layout"),
    [
        (MoeCase(FOUR, ep=4), "dp=4,ep=4,zero=1"),
        (MoeCase(FOUR.but(stage=2), ep=2), "dp=4,ep=2,zero=2"),
        (MoeCase(FOUR.but(stage=0), ep=2), "dp=4,ep=2,zero=0"),
        (MoeCase(FOUR.but(dp=2), ep=1), "dp=2,zero=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_experts(moe_sources: MoeSources, target: MoeCase, layout: str) -> None:
    run = moe_sources.get(MoeCase(FOUR, ep=2))
    read = moe_sources.pool.run(
        jobs.bytes_loaded,
        "moe",
        target,
        run.folder,
        {},
        world_size=target.case.dp,
        preload=moe.preload(target, ours=True),
    )
    assert planned(run.folder, layout) == read


def test_stacked_experts(ranks: RankPool, tmp_path: Path) -> None:
    source, target = AutoCase(FOUR.but(model="llama"), ep=2), AutoCase(FOUR.but(stage=3, model="llama"), ep=4)
    preload = ("transformers.models.mixtral.modeling_mixtral", "ucp.deepspeed")
    ranks.run(autoep.train, source, str(tmp_path), world_size=4, preload=preload)
    read = ranks.run(jobs.bytes_loaded, "auto", target, str(tmp_path), {}, world_size=4, preload=preload)
    assert planned(str(tmp_path), "dp=4,ep=4,zero=3") == read


@pytest.mark.parametrize(("tp", "dp", "stage"), [(2, 1, 1), (4, 1, 2)])
def test_tensor_parallelism(ranks: RankPool, sliced: ParallelSources, tp: int, dp: int, stage: int) -> None:
    """Three heads of keys on two ranks are cut unevenly; on four ranks one has none."""
    run = sliced.get(TpCase(kv_heads=3, case=Case(stage=1, dp=2, dtype="bf16")))
    target = TpCase(kv_heads=3, tp=tp, case=Case(stage=stage, dp=dp, dtype="bf16"))
    read = ranks.run(
        jobs.bytes_loaded, "tp", target, run.folder, {}, world_size=target.world_size, preload=tp_runs.PRELOAD
    )
    config = tp_models.llama(0, 3, False).config.to_dict()
    assert planned(run.folder, f"dp={dp},tp={tp},zero={stage}", model_config=config) == read

"""DeepSpeed to FSDP2 and back, on real training: every weight, optimizer state, step and hyperparameter bit-equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.deepspeed.agree import IMPLEMENTATION, differences
from tests.engines import load_jobs, parallel_runs, pipe_models
from tests.engines.configs import Case
from tests.engines.fsdp import Mesh, State
from tests.engines.parallel_runs import ParallelSources
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankError, RankPool
from tests.engines.runs import CLIENT_STATE, STEPS
from tests.engines.sources import train
from tests.engines.tp_runs import PRELOAD, TpCase
from tests.engines.truth import Truth, known
from tests.torchdist import crossing_jobs
from tests.torchdist import dtensor_jobs as jobs

pytestmark = pytest.mark.slow


def holds(truth: Truth, state: State) -> list[str]:
    """What of an engine's state an FSDP2 run does not hold."""
    lines = []
    for name, states in truth.params.items():
        for kind, tensor in {**states, "step": torch.tensor(float(truth.scalars[name]["step"]))}.items():
            if not torch.equal(state.params[name][kind], tensor):
                lines.append(f"{name} {kind}")
    lines += [name for name, tensor in truth.frozen.items() if not torch.equal(state.params[name]["param"], tensor)]
    lines += [name for name, tensor in truth.buffers.items() if not torch.equal(state.buffers[name], tensor)]
    theirs = [{k: v for k, v in g.items() if k not in IMPLEMENTATION} for g in truth.groups]
    for group in state.groups:
        options = {k: v for k, v in group.items() if k not in IMPLEMENTATION and k in theirs[0]}
        options["betas"] = list(options["betas"])
        if options not in [{**g, "betas": list(g["betas"])} for g in theirs]:
            lines.append(f"group {options}")
    return lines


@pytest.mark.parametrize(
    ("source", "mesh", "flat", "target"),
    [
        (Case(stage=1, dp=4, groups=2), Mesh(2, seed=1), False, Case(stage=3, dp=3, groups=2, seed=2)),
        (
            Case(stage=3, dp=2, groups=3, frozen=True),
            Mesh(1, tp=2, groups=3, frozen=True, seed=1),
            True,
            Case(stage=2, dp=2, groups=3, frozen=True, seed=2),
        ),
    ],
    ids=["zero1-dp4-fsdp2-zero3-dp3", "zero3-dp2-tp2-zero2-dp2"],
)
def test_there_and_back(ranks: RankPool, tmp_path: Path, source: Case, mesh: Mesh, flat: bool, target: Case) -> None:
    first = ranks.run(train, source, str(tmp_path / "source"), steps=STEPS, further=3, world_size=source.dp)[0]
    assert first.truth is not None
    path = str(tmp_path / "source" / first.tag)
    found = ranks.run(jobs.cross, mesh, path, str(tmp_path / "fsdp" / "step3"), flat, world_size=mesh.ranks)
    for run in found:
        for state in run.states.values():
            assert holds(first.truth, state) == []
        assert run.further == pytest.approx(first.further, rel=1e-5)
        assert run.extra == (STEPS, STEPS * 12, CLIENT_STATE)
    back = ranks.run(load_jobs.resume, target, str(tmp_path / "fsdp" / "step3"), None, STEPS, 3, world_size=target.dp)[
        0
    ]
    assert back.truth is not None
    assert differences(first.truth, back.truth, rest=not flat) == []
    assert back.further == pytest.approx(first.further, rel=1e-5)


PIPELINE = PipeCase(pp=2, case=Case(stage=1, dp=2, accumulation=2, groups=2, frozen=True))
SLICED = PipeCase(pp=2, tp=2, case=Case(stage=1, dp=1, accumulation=2))


@pytest.mark.parametrize(("source", "back"), [(PIPELINE, SLICED), (SLICED, PIPELINE)], ids=["pp2-dp2", "tp2-pp2"])
def test_from_pipelines_and_back(
    ranks: RankPool, pipes: ParallelSources, tmp_path: Path, source: PipeCase, back: PipeCase
) -> None:
    """Stages, and slices of them, become one module under FSDP2, and a pipeline of the other kind again."""
    spec = tmp_path / "pipe.yaml"
    spec.write_text(pipe_models.SPEC)
    back = replace(back, case=source.case.but(dp=back.case.dp, seed=5))
    run = pipes.get(source)
    truth = known(run.truth)
    target = str(tmp_path / "fsdp" / "step3")
    for crossed in ranks.run(crossing_jobs.through, source, run.folder, target, 3, str(spec), world_size=2):
        for state in (crossed.state, crossed.by_dcp):
            params = {pipe_models.pipeline_name(name): states for name, states in state.params.items()}
            buffers = {pipe_models.pipeline_name(name): buffer for name, buffer in state.buffers.items()}
            assert holds(truth, State(params, buffers, state.groups)) == []
        assert (crossed.step, crossed.clip_grad) == (STEPS, 1.0)  # DeepSpeed's default
        assert crossed.further == pytest.approx(run.further, rel=1e-5)
    loaded = ranks.run(parallel_runs.resume, back, target, {"spec": str(spec)}, 1, world_size=back.world_size)[0]
    assert differences(truth, known(loaded.truth)) == []
    assert loaded.further == pytest.approx(run.further, rel=1e-5)


def test_from_tensor_parallelism_and_back(ranks: RankPool, sliced: ParallelSources, tmp_path: Path) -> None:
    """AutoTP's Llama, three key heads on two ranks, under FSDP2 on three ranks, and under AutoTP at another stage."""
    source = TpCase(kv_heads=3, case=Case(stage=1, dp=2, groups=3, frozen=True))
    run = sliced.get(source)
    truth = known(run.truth)
    target = str(tmp_path / "fsdp" / "step3")
    job = crossing_jobs.through
    for crossed in ranks.run(job, source, run.folder, target, len(run.further), world_size=3, preload=PRELOAD):
        assert holds(truth, crossed.state) == []
        assert holds(truth, crossed.by_dcp) == []
        assert crossed.further == pytest.approx(run.further, rel=1e-5)
    back = source.but(stage=3, dp=1, seed=5)
    section, world = {"spec": "llama"}, back.world_size
    loaded = ranks.run(parallel_runs.resume, back, target, section, 1, world_size=world, preload=PRELOAD)[0]
    assert differences(truth, known(loaded.truth)) == []
    assert loaded.further == pytest.approx(run.further, rel=1e-5)


def test_a_tied_model_from_stock_dcp(ranks: RankPool, tmp_path: Path) -> None:
    """torch's state dicts have a tied parameter under each of its names: equal copies are one, others refused."""
    whole, other = str(tmp_path / "whole"), str(tmp_path / "other")
    saves = [(jobs.shared_model, jobs.save_dcp, whole), (jobs.drifted, jobs.save_dcp, other)]
    saved = ranks.run(jobs.save, Mesh(2, tied=True), saves, world_size=2)[0].states["saved"]
    for stage, dp in ((1, 2), (3, 3)):
        case = Case(stage=stage, dp=dp, groups=2, tied=True, seed=2)
        back = ranks.run(load_jobs.resume, case, whole, None, STEPS, 0, world_size=dp)[0]
        assert back.truth is not None
        assert holds(back.truth, saved) == []
    with pytest.raises(RankError, match=r"'head\.weight' is tied to 'embed\.weight' here.*different values.*param"):
        ranks.run(load_jobs.resume, case, other, None, STEPS, 0, world_size=dp)
    with pytest.raises(RankError, match=r"'model\.head\.weight' and 'model\.embed\.weight' are one tensor here"):
        ranks.run(jobs.load, Mesh(2, tied=True), [(jobs.shared_model, jobs.load_ucp, other)], world_size=2)

"""Merges of what real engines saved, and engines that go on from them; the truth is in the engines' own buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engines import load_jobs
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.runs import Run
from tests.engines.sources import Sources, preload_for
from tests.engines.truth import known
from ucp.merging import merge

pytestmark = pytest.mark.slow

SHARES = (0.5, 0.3, 0.2)
CASES = [
    Case(stage=1, dtype="bf16", dp=2, seed=0),
    Case(stage=3, dtype="bf16", dp=2, seed=1),
    Case(stage=2, dtype="bf16", dp=3, seed=2),
]


@pytest.fixture(scope="module")
def runs(sources: Sources) -> list[Run]:
    return [sources.get(case) for case in CASES]


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The weighted sum, in float64 and rounded once."""
    total = SHARES[0] * tensors[0].double()
    for share, tensor in zip(SHARES[1:], tensors[1:], strict=True):
        total += share * tensor.double()
    return total.to(tensors[0].dtype)


@pytest.mark.parametrize(("stage", "dp"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_training_goes_on_from_a_merge(ranks: RankPool, runs: list[Run], stage: int, dp: int, tmp_path: Path) -> None:
    paths = [f"{run.folder}@{run.tag}" for run in runs]
    merge(paths, tmp_path / "merged", weights=SHARES, normalize=False)
    case = CASES[0].but(stage=stage, dp=dp, seed=7)
    found = ranks.run(
        load_jobs.resume, case, str(tmp_path / "merged"), None, 0, world_size=dp, preload=preload_for(case)
    )[0]
    truth = known(found.truth)
    assert len(truth.params) > 5
    for name, states in truth.params.items():
        given = [known(run.truth).params[name]["param"] for run in runs]
        assert torch.equal(states["param"], mean(given)), name
        assert not any(tensor.any() for state, tensor in states.items() if state != "param"), name
    for name, buffer in truth.buffers.items():
        if buffer.is_floating_point():
            assert torch.equal(buffer, mean([known(run.truth).buffers[name] for run in runs])), name
    assert all(loss == loss for loss in found.further)


def test_states_of_one_source_come_along(ranks: RankPool, runs: list[Run], tmp_path: Path) -> None:
    paths = [f"{run.folder}@{run.tag}" for run in runs]
    merge(paths, tmp_path / "merged", weights=SHARES, normalize=False, optimizer=2)
    case = CASES[0].but(stage=3, dp=2, seed=7)
    found = ranks.run(
        load_jobs.resume, case, str(tmp_path / "merged"), None, runs[2].steps, world_size=2, preload=preload_for(case)
    )[0]
    truth = known(found.truth)
    for name, states in truth.params.items():
        source = known(runs[2].truth).params[name]
        for state in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(states[state], source[state]), name
        assert torch.equal(states["param"], mean([known(run.truth).params[name]["param"] for run in runs])), name
    assert truth.counters["global_steps"] == runs[2].steps

"""The norms that an engine records are those of the gradients: by plain SGD, of the weights' change over the rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ucp
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankPool
from tests.engines.truth import known
from tests.repair import norm_jobs
from ucp.repair import repair

pytestmark = pytest.mark.slow
RATE = 5e-2


@pytest.mark.parametrize("pipe", [PipeCase(pp=4, method="type:block", blocks=8), PipeCase(pp=2, blocks=4)])
def test_recorded_norms(ranks: RankPool, tmp_path: Path, pipe: PipeCase) -> None:
    dp = 1 if pipe.pp == 4 else 2
    case = pipe.but(stage=1, dp=dp, accumulation=2, optimizer="plain_sgd", clip=1e6)
    found = ranks.run(norm_jobs.step_and_save, case, str(tmp_path), world_size=case.world_size)[0]
    before, after = map(known, found)
    with ucp.open(tmp_path) as checkpoint:
        state = checkpoint.training_state.client_state
    assert state["mine"] == 1
    squares: dict[str, float] = {}
    for name, states in before.params.items():
        layer = name.split(".")[0]
        if layer.isdigit():
            change = (states["param"].double() - after.params[name]["param"].double()) / RATE
            squares[layer] = squares.get(layer, 0.0) + float(change.square().sum())
    assert state["ucp_gradient_norms"].keys() == squares.keys()
    for layer, norm in state["ucp_gradient_norms"].items():
        assert norm == pytest.approx(squares[layer] ** 0.5, rel=1e-4), layer
    if pipe.pp == 4:
        (tmp_path / "last" / "rank-00002-of-00004.safetensors").unlink()
        report = repair(tmp_path, tmp_path / "fixed")
        a, b = (state["ucp_gradient_norms"][layer] ** 2 for layer in ("4", "8"))
        with ucp.open(tmp_path / "fixed", allow_approximate=True) as fixed:
            left, right = (after.params[f"{layer}.down.weight"]["param"].double() for layer in (4, 8))
            assert torch.equal(fixed.read("6.down.weight"), ((a * left + b * right) / (a + b)).float())
        assert not report.warnings

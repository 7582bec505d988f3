"""Experts in the stages of a pipeline: DeepSpeed's own files of all stages, put together, and live."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ucp
from tests.deepspeed import moe_parallel_jobs as jobs
from tests.engines import releases
from tests.engines.pool import RankError, RankPool

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [1, 0])
def test_files_of_stages_with_experts(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    """Two stages of two ranks. Each stage counts its layers of experts from 0, and has an optimizer's files of its
    own."""
    truth, losses = ranks.run(jobs.in_stages, str(tmp_path / "stock"), stage, world_size=4)[0]
    assert len([name for name in truth if "deepspeed_experts" in name]) >= 16
    releases.skip_unreadable(str(tmp_path / "stock"))
    ucp.convert(tmp_path / "stock", tmp_path / "universal")
    for folder in ("stock", "universal"):
        with ucp.open(tmp_path / folder) as checkpoint:
            assert (checkpoint.layout.pp, checkpoint.layout.ep) == (2, 2)
            held = {name for name, info in checkpoint.parameters.items() if info.kind == "parameter"}
            assert held == truth.keys()
            for name, states in truth.items():
                assert checkpoint.parameters[name].states.keys() == states.keys()
                for state, value in states.items():
                    assert torch.equal(checkpoint.read(name, state), value), (name, state)
    targets = [("stock", stage, 2, 2), ("universal", 1 - stage, 2, 2), ("again", stage, 1, 4), ("less", 1, 2, 1)]
    for k, (source, zero, stages, ep) in enumerate(targets):
        saved = ("again", "", "less", "")[k] or f"last{k}"
        found, complete, further = ranks.run(
            jobs.live_in_stages, str(tmp_path / source), str(tmp_path / saved), zero, stages, ep, world_size=4
        )[0]
        assert complete
        assert found.keys() == truth.keys()
        for name, states in truth.items():
            assert all(torch.equal(found[name][state], value) for state, value in states.items()), (name, source)
        with ucp.open(tmp_path / saved) as checkpoint:
            for name, states in truth.items():
                assert all(torch.equal(checkpoint.read(name, s), value) for s, value in states.items()), (name, saved)
        if source == "stock":
            assert further == losses
    split = {"zero_optimization": {"stage": 1 - stage}, "pipeline": {"partition": [0, 2, 4]}}
    with ucp.open(tmp_path / "stock") as checkpoint:
        config = {**checkpoint.training_state.config, **split}
    where = f"dp=2,pp=2,ep=1,zero={1 - stage}"
    ucp.convert(tmp_path / "stock", tmp_path / "written", to="deepspeed", layout=where, ds_config=config)
    found = ranks.run(jobs.stock_in_stages, str(tmp_path / "written"), 1 - stage, 2, 1, world_size=4)[0]
    assert found.keys() == truth.keys()
    for name, states in truth.items():
        assert all(torch.equal(found[name][state], value) for state, value in states.items()), name
    (file,) = tmp_path.glob("stock/*/layer_0_expert_3_mp_rank_01_model_states.pt")
    file.unlink()
    with pytest.raises(ucp.UcpError, match=r"layer_0_expert_3_mp_rank_01_model_states.pt' is missing"):
        ucp.open(tmp_path / "stock")


def test_only_the_last_stage_has_experts(ranks: RankPool, tmp_path: Path) -> None:
    """One stage's model file is whole, the other's is in layer files. DeepSpeed trains this at stage 0 only: with ZeRO
    its ranks wait for each other at the gradients' norm."""
    truth, _ = ranks.run(jobs.in_stages, str(tmp_path / "stock"), 0, True, world_size=4)[0]
    with ucp.open(tmp_path / "stock") as checkpoint:
        assert (checkpoint.layout.pp, checkpoint.layout.ep) == (2, 2)
        assert {name for name, info in checkpoint.parameters.items() if info.kind == "parameter"} == truth.keys()
        for name, states in truth.items():
            assert all(torch.equal(checkpoint.read(name, s), value) for s, value in states.items()), name
        dense, experts = checkpoint.training_state.param_groups
        assert {"0.weight", "2.weight"} < set(dense.names)
        assert all("deepspeed_experts" in name for name in experts.names)
    source, save = str(tmp_path / "stock"), str(tmp_path / "ours")
    found, complete, _ = ranks.run(jobs.live_in_stages, source, save, 0, 1, 4, True, world_size=4)[0]
    assert complete
    assert found.keys() == truth.keys()
    for name, states in truth.items():
        assert all(torch.equal(found[name][state], value) for state, value in states.items()), name
    with pytest.raises(RankError, match="2 param groups on tp rank 0 of pipeline stage 1 and 1 on"):
        ranks.run(jobs.live_in_stages, source, save, 0, 2, 2, True, world_size=4)
    (file,) = tmp_path.glob("stock/*/layer_01-model_states.pt")
    file.unlink()
    with pytest.raises(ucp.UcpError, match="no splits of its 1 layers make"):
        ucp.open(tmp_path / "stock")

"""Experts in the stages of a pipeline: DeepSpeed's own files of all stages, put together, and live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed import moe_parallel_jobs as jobs
from tests.deepspeed.moe_read import check_read
from tests.engines import releases
from tests.engines.pool import RankPool
from ucp.inspection.planning import plan
from ucp.parallel.mesh import parse_layout

pytestmark = pytest.mark.slow


def planned(folder: Path, zero: int, stages: int, ep: int) -> list[int]:
    """What a plan says that each of four ranks reads, with the four layers divided evenly."""
    layout = parse_layout(f"dp={4 // stages},pp={stages},ep={ep},zero={zero}")
    split = {"pipeline": {"partition": [*range(0, 5, 4 // stages)]}}
    with ucp.open(folder) as checkpoint:
        return [rank.bytes for rank in plan(checkpoint, layout, ds_config=split).ranks]


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
            check_read(checkpoint, truth)
    targets = [("stock", stage, 2, 2), ("universal", 1 - stage, 2, 2), ("again", stage, 1, 4), ("less", 1, 2, 1)]
    for k, (source, zero, stages, ep) in enumerate(targets):
        saved = ("again", "", "less", "")[k] or f"last{k}"
        every = ranks.run(
            jobs.live_in_stages, str(tmp_path / source), str(tmp_path / saved), zero, stages, ep, world_size=4
        )
        found, complete, further, _ = every[0]
        assert complete
        assert planned(tmp_path / source, zero, stages, ep) == [nbytes for *_, nbytes in every]
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
    found, _ = ranks.run(jobs.stock_in_stages, str(tmp_path / "written"), 1 - stage, 2, 1, world_size=4)[0]
    assert found.keys() == truth.keys()
    for name, states in truth.items():
        assert all(torch.equal(found[name][state], value) for state, value in states.items()), name
    (file,) = tmp_path.glob("stock/*/layer_0_expert_3_mp_rank_01_model_states.pt")
    file.unlink()
    with pytest.raises(ucp.UcpError, match=r"layer_0_expert_3_mp_rank_01_model_states.pt' is missing"):
        ucp.open(tmp_path / "stock")


def test_only_the_last_stage_has_experts(ranks: RankPool, tmp_path: Path) -> None:
    """One stage's model file is whole, the other's is in layer files, and one has a param group less. DeepSpeed trains
    this at stage 0 only: with ZeRO its ranks wait for each other at the gradients' norm, and do not here, where each
    stage takes the norm of its own."""
    truth, losses = ranks.run(jobs.in_stages, str(tmp_path / "stock"), 0, True, world_size=4)[0]
    of_zero, _ = ranks.run(jobs.in_stages, str(tmp_path / "zero"), 1, True, world_size=4)[0]
    for folder, expected in (("stock", truth), ("zero", of_zero)):
        with ucp.open(tmp_path / folder) as checkpoint:
            assert (checkpoint.layout.pp, checkpoint.layout.ep) == (2, 2)
            held = {name for name, info in checkpoint.parameters.items() if info.kind == "parameter"}
            assert held == expected.keys()
            for name, states in expected.items():
                assert all(torch.equal(checkpoint.read(name, s), value) for s, value in states.items()), name
            dense, experts = checkpoint.training_state.param_groups
            assert {"0.weight", "2.weight"} < set(dense.names)
            assert all("deepspeed_experts" in name for name in experts.names)
            assert checkpoint.training_state.lr_scheduler["base_lrs"] == [1e-3, 1e-3]
    # (source, ZeRO stage, pipeline stages, ranks that share experts)
    for source, zero, stages, ep in (("stock", 0, 2, 2), ("0-2-2", 1, 1, 4), ("1-1-4", 0, 4, 1), ("0-4-1", 1, 2, 2)):
        save = f"{zero}-{stages}-{ep}"
        every = ranks.run(
            jobs.live_in_stages, str(tmp_path / source), str(tmp_path / save), zero, stages, ep, True, world_size=4
        )
        found, complete, further, _ = every[0]
        assert complete
        if stages == 1 or not zero:
            assert planned(tmp_path / source, zero, stages, ep) == [nbytes for *_, nbytes in every]
        assert found.keys() == truth.keys()
        with ucp.open(tmp_path / save) as checkpoint:
            assert checkpoint.layout.ep == ep
            assert checkpoint.training_state.lr_scheduler["base_lrs"] == [1e-3, 1e-3]
            assert [len(group.names) for group in checkpoint.training_state.param_groups] == [7, 20]
            for name, states in truth.items():
                assert all(torch.equal(found[name][state], value) for state, value in states.items()), (name, save)
                assert all(torch.equal(checkpoint.read(name, s), value) for s, value in states.items()), (name, save)
        if save == "0-2-2":
            assert further == losses
        elif stages == 2:  # elsewhere the ranks' batches are others
            assert further == pytest.approx(losses, rel=0, abs=5e-5)
    split = {"zero_optimization": {"stage": 0}, "pipeline": {"partition": [0, 3, 4]}}
    with ucp.open(tmp_path / "0-2-2") as checkpoint:
        config = {**checkpoint.training_state.config, **split}
    how: Any = {"to": "deepspeed", "ds_config": config}
    ucp.convert(tmp_path / "1-1-4", tmp_path / "written", layout="dp=2,pp=2,ep=1,zero=0", **how)
    found, further = ranks.run(jobs.stock_in_stages, str(tmp_path / "written"), 0, 2, 1, True, world_size=4)[0]
    assert found.keys() == truth.keys()
    for name, states in truth.items():
        assert all(torch.equal(found[name][state], value) for state, value in states.items()), name
    assert further == pytest.approx(losses, rel=0, abs=5e-5)
    with ucp.open(tmp_path / "1-1-4") as checkpoint:
        by_parameters = plan(checkpoint, parse_layout("dp=2,pp=2,ep=1,zero=0"), ds_config={})
    assert by_parameters.stages == (0, 3, 4)
    how["ds_config"] = {**config, "zero_optimization": {"stage": 1}}
    with pytest.raises(ucp.UcpError, match="stage 0 would have no experts, and others some"):
        ucp.convert(tmp_path / "1-1-4", tmp_path / "no", layout="dp=2,pp=2,ep=1,zero=1", **how)
    (file,) = tmp_path.glob("stock/*/layer_01-model_states.pt")
    file.unlink()
    with pytest.raises(ucp.UcpError, match="no splits of its 1 layers make"):
        ucp.open(tmp_path / "stock")

"""Checkpoints of models with DeepSpeed's own experts, read from their files, against what all the ranks held."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ucp
from tests.engines.configs import Case
from tests.engines.moe import MoeCase, MoeSources
from tests.engines.truth import known
from tests.formats.deepspeed.read.test_matrix import check_parameters, check_regions, check_tensors
from ucp.errors import DamagedCheckpoint, UcpError, Unsupported

pytestmark = pytest.mark.slow

FOUR = Case(stage=1, dp=4)
CASES = [
    MoeCase(FOUR, ep=2),
    MoeCase(FOUR, ep=4),
    MoeCase(FOUR, ep=1),
    MoeCase(FOUR.but(dp=2), ep=1),
    MoeCase(FOUR.but(dp=2), ep=2),
    MoeCase(FOUR.but(stage=2, dtype="bf16", groups=2), ep=4, frozen=True),
    MoeCase(FOUR.but(stage=2, dtype="bf16", scheduler=True), ep=2, data_first=True),
    MoeCase(FOUR.but(dtype="bf16_optimizer"), ep=2, frozen=True),
    MoeCase(FOUR.but(round_robin=True, groups=2), ep=2, later_ep=4, data_first=True),
    MoeCase(FOUR.but(stage=2, parameter_alignment=True, dtype="bf16"), ep=1, later_ep=2),
    MoeCase(FOUR.but(elastic=True), ep=2),
    MoeCase(FOUR.but(optimizer="sgd", legacy_files=True), ep=2),
    MoeCase(FOUR.but(stage=0), ep=2),
    MoeCase(FOUR.but(stage=0, dtype="bf16", groups=2), ep=4),
    MoeCase(FOUR.but(stage=0, dtype="bf16"), ep=2, data_first=True, frozen=True),
    MoeCase(FOUR.but(stage=0, optimizer="plain_sgd"), ep=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_everything_read_is_what_the_ranks_held(moe_sources: MoeSources, case: MoeCase) -> None:
    run = moe_sources.get(case)
    truth = known(run.truth)
    with ucp.open(run.folder) as checkpoint:
        ep = max(case.ep, case.later_ep or 1)
        assert str(checkpoint.layout) == f"dp={case.case.dp}," + (f"ep={ep}," if ep > 1 else "") + (
            f"zero={case.case.stage}"
        )
        check_tensors(checkpoint, truth)
        check_regions(checkpoint, truth)
        check_parameters(checkpoint, truth)
        groups = checkpoint.training_state.param_groups
        assert [sorted(group.names) for group in groups] == [list(group["names"]) for group in truth.groups]
        for group, held in zip(groups, truth.groups, strict=True):
            if not case.case.elastic:
                assert {k: v for k, v in dict(group.options or {}).items() if k in ("lr", "weight_decay", "moe")} == {
                    k: held[k] for k in ("lr", "weight_decay", "moe") if k in held
                }
        assert "num_experts" not in checkpoint.training_state.client_state


def refusal(folder: Path, kind: type[UcpError]) -> str:
    with pytest.raises(kind) as caught:
        ucp.open(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def edit(folder: Path, name: str, change: Callable[[dict], None]) -> None:
    held = torch.load(folder / name, weights_only=False)
    change(held)
    torch.save(held, folder / name)


EP2 = MoeCase(FOUR, ep=2)


def test_a_missing_expert(moe_sources: MoeSources, tmp_path: Path) -> None:
    folder = moe_sources.copy(EP2, tmp_path / "copy")
    without(folder, "layer_1_expert_2_mp_rank_00_model_states.pt")
    text = refusal(folder, DamagedCheckpoint)
    assert "layer_1_expert_2_mp_rank_00_model_states.pt" in text
    assert "layer 1 has 4 experts" in text


def test_experts_in_each_others_place(moe_sources: MoeSources, tmp_path: Path) -> None:
    folder = moe_sources.copy(EP2, tmp_path / "copy")
    rename(folder, "layer_0_expert_1_mp_rank_00_model_states.pt", "kept")
    rename(folder, "layer_0_expert_3_mp_rank_00_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt")
    rename(folder, "kept", "layer_0_expert_3_mp_rank_00_model_states.pt")
    assert re.search("layer_0_expert_1.*holds 'first.*experts.3.*of another expert", refusal(folder, DamagedCheckpoint))


def test_one_expert_too_many(moe_sources: MoeSources, tmp_path: Path) -> None:
    folder = moe_sources.copy(EP2, tmp_path / "copy")
    rename(
        folder,
        "layer_0_expert_3_mp_rank_00_model_states.pt",
        "layer_2_expert_0_mp_rank_00_model_states.pt",
    )
    (folder / "layer_0_expert_3_mp_rank_00_model_states.pt").write_bytes(
        (folder / "layer_2_expert_0_mp_rank_00_model_states.pt").read_bytes()
    )
    assert re.search(r"layer_2_expert_0.*\[4, 4\] experts", refusal(folder, DamagedCheckpoint))


def test_ranks_optimizer_files_in_each_others_place(moe_sources: MoeSources, tmp_path: Path) -> None:
    """Every name and shape fits; that the masters are other experts' is seen in their values."""
    folder = moe_sources.copy(EP2, tmp_path / "copy")
    first, second = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    rename(folder, first, "kept")
    rename(folder, second, first)
    rename(folder, "kept", second)
    assert "files of two runs or of two steps are mixed" in refusal(folder, DamagedCheckpoint)


def test_another_number_of_partitions(moe_sources: MoeSources, tmp_path: Path) -> None:
    folder = moe_sources.copy(EP2, tmp_path / "copy")

    def change(held: dict) -> None:
        held["optimizer_state_dict"]["partition_count"] = [4, 4]

    for rank in range(4):
        edit(folder, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", change)
    assert re.search("group 1 was cut into 4 partitions by 4 .* does not fit", refusal(folder, DamagedCheckpoint))


def test_a_missing_expert_parallel_optimizer_file(moe_sources: MoeSources, tmp_path: Path) -> None:
    case = MoeCase(FOUR.but(stage=0), ep=2)
    for rank, text in ((0, "expp_rank_0_mp_rank_00"), (1, "'ep_size_2', but there are files of 1 expert-parallel")):
        folder = moe_sources.copy(case, tmp_path / str(rank))
        without(folder, f"expp_rank_{rank}_mp_rank_00_optim_states.pt")
        assert text in refusal(folder, DamagedCheckpoint)


def test_replicas_that_have_drifted_apart(moe_sources: MoeSources, tmp_path: Path) -> None:
    """At stage 0 every expert-parallel rank's file has the states of all that are no experts."""
    folder = moe_sources.copy(MoeCase(FOUR.but(stage=0), ep=2), tmp_path / "copy")

    def change(held: dict) -> None:
        held["optimizer"]["state"][0]["exp_avg"] += 1

    edit(folder, "expp_rank_1_mp_rank_00_optim_states.pt", change)
    with pytest.raises(UcpError, match=r"'embed.weight'.*exp_avg.*drifted apart"):
        ucp.open(folder)


def test_what_is_not_supported(moe_sources: MoeSources, tmp_path: Path) -> None:
    folder = moe_sources.copy(EP2, tmp_path / "old")
    rename(folder, "layer_0_expert_0_mp_rank_00_model_states.pt", "expert_0_mp_rank_00_model_states.pt")
    assert "'expert_0_mp_rank_00_model_states.pt' is of DeepSpeed before 0.5" in refusal(folder, Unsupported)
    folder = moe_sources.copy(MoeCase(FOUR.but(stage=0), ep=2), tmp_path / "several")

    def change(held: dict) -> None:
        held["optimizer"]["param_groups"].append({**held["optimizer"]["param_groups"][1], "name": "ep_size_4"})

    edit(folder, "expp_rank_0_mp_rank_00_optim_states.pt", change)
    assert "spread over different numbers of ranks (ep_size_2, ep_size_4)" in refusal(folder, Unsupported)


def test_cut_experts_of_its_own_layers_are_refused(moe_sources: MoeSources, tmp_path: Path) -> None:
    """Files of one rank are given the look of two slices' that each wrote all experts."""
    folder = moe_sources.copy(MoeCase(FOUR.but(dp=2), ep=2), tmp_path / "cut")
    model = folder / "mp_rank_00_model_states.pt"
    found = torch.load(model, weights_only=False)
    found.update(mp_world_size=2, checkpoint_parallel_dimensions={"pp_degree": 1, "tp_degree": 2})
    torch.save(found, model)
    for path in list(folder.glob("*mp_rank_00*")):
        torch.save(torch.load(path, weights_only=False), path.with_name(path.name.replace("mp_rank_00", "mp_rank_01")))
    with pytest.raises(Unsupported, match="several tensor-parallel ranks wrote the same experts"):
        ucp.open(tmp_path / "cut")
    del found["checkpoint_parallel_dimensions"]
    torch.save(found, model)
    with pytest.raises(Unsupported, match="does not say whether its ranks were stages or slices"):
        ucp.open(tmp_path / "cut")

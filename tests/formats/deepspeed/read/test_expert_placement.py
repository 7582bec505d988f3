"""Experts that are not spread evenly, or held by several ranks: read as the placement in AutoEP's files says it.

DeepSpeed's format has such placements (``checkpoint/autoep_affine.py``), and 0.19.8 trains even ones alone. So files
that it wrote are cut anew here, with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.engines import releases
from tests.engines.autoep import AutoCase
from tests.engines.configs import Case
from tests.engines.moe import MoeSources
from tests.engines.truth import known
from tests.formats.deepspeed.read.test_matrix import check_tensors
from ucp.errors import DamagedCheckpoint
from ucp.inspection.verify import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not releases.knows("autoep_folding"), reason=releases.without("has no AutoEP")),
]

UNEVEN = [[2, 0, 3], [1]]
COPIED = [[0, 1, 3], [3, 2]]


@pytest.fixture
def made(auto_sources: MoeSources) -> MoeSources:
    return auto_sources


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*/*{kind}_states.pt"))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    found = torch.load(path, weights_only=False)
    change(found)
    torch.save(found, path)


def recut(folder: Path, placement: Sequence[Sequence[int]], stage: int) -> None:
    """Give each of two ranks these experts, in this order."""
    models = [path for path in files(folder, "model") if "expert" not in path.name]
    shapes = torch.load(models[0], weights_only=False)["param_shapes"]
    group = next(g for g, held in enumerate(shapes) if any(".experts." in name for name in held))

    def buffers(found: Any) -> list[tuple[Any, Any]]:
        state = found["optimizer_state_dict"]
        masters = state["single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"]
        inner = state["base_optimizer_state" if stage < 3 else "optimizer_state_dict"]["state"][group]
        return [(masters, group), *((inner, key) for key in ("exp_avg", "exp_avg_sq"))]

    whole: list[dict[str, torch.Tensor]] = []
    both = [buffers(torch.load(path, weights_only=False)) for path in files(folder, "optim")]
    for parts in zip(*both, strict=True):
        flats, at = [held[key] for held, key in parts], 0
        whole.append({})
        for name, shape in shapes[group].items():
            cut = [flat[at : at + prod(shape)].view(*shape) for flat in flats]
            whole[-1][name], at = torch.cat(cut), at + prod(shape)

    for rank, path in enumerate(files(folder, "optim")):

        def change(found: Any, rank: int = rank) -> None:
            for (held, key), tensors in zip(buffers(found), whole, strict=True):
                held[key] = torch.cat([tensor[placement[rank]].flatten() for tensor in tensors.values()])
            found["optimizer_state_dict"].pop("param_slice_mappings", None)

        edit(path, change)
    for rank, path in enumerate(models):

        def describe(found: Any, rank: int = rank) -> None:
            for name, shape in found["param_shapes"][group].items():
                found["param_shapes"][group][name] = torch.Size((len(placement[rank]), *shape[1:]))
            for layer in found["ds_autoep_layers"]:
                layer["expert_placement"]["ranks"] = [
                    {"rank": r, "experts": list(experts)} for r, experts in enumerate(placement)
                ]

        edit(path, describe)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("placement", [UNEVEN, COPIED], ids=["uneven", "copied"])
def test_as_the_placement_says(made: MoeSources, tmp_path: Path, stage: int, placement: list[list[int]]) -> None:
    case = AutoCase(Case(stage=stage, dp=2, model="llama"), ep=2)
    run = made.get(case)
    made.copy(case, tmp_path / "cut")
    recut(tmp_path / "cut", placement, stage)
    with ucp.open(tmp_path / "cut") as checkpoint:
        check_tensors(checkpoint, known(run.truth))
    assert verify(tmp_path / "cut").whole


def test_copies_that_differ(made: MoeSources, tmp_path: Path) -> None:
    case = AutoCase(Case(stage=1, dp=2, model="llama"), ep=2)
    made.copy(case, tmp_path / "cut")
    recut(tmp_path / "cut", COPIED, 1)

    def drift(found: Any) -> None:
        found["optimizer_state_dict"]["single_partition_of_fp32_groups"][1].data[: 24 * 16] += 1

    edit(files(tmp_path / "cut", "optim")[1], drift)
    with pytest.raises(ucp.UcpError, match=r"experts\.w1.*drifted apart"):
        ucp.open(tmp_path / "cut")


@pytest.mark.parametrize("placement", [[[0, 1], [2]], [[0, 0, 1], [2, 3]], [[0, 1], [2, 4]]])
def test_placements_of_other_experts(made: MoeSources, tmp_path: Path, placement: list[list[int]]) -> None:
    case = AutoCase(Case(stage=1, dp=2, model="llama"), ep=2)
    made.copy(case, tmp_path / "cut")

    def describe(found: Any) -> None:
        for layer in found["ds_autoep_layers"]:
            layer["expert_placement"]["ranks"] = [{"rank": r, "experts": e} for r, e in enumerate(placement)]

    edit(next(path for path in files(tmp_path / "cut", "model") if "expert" not in path.name), describe)
    with pytest.raises(DamagedCheckpoint, match=r"each on one rank at least, and on none twice"):
        ucp.open(tmp_path / "cut")

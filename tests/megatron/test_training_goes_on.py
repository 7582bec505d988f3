"""A run goes on under the other framework: the same losses as if it had stayed, with the same data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.engines.megatron import families
from tests.engines.megatron.cases import Case
from tests.engines.megatron.launch import launch
from tests.megatron import deepspeed_jobs
from tests.optional import skip_without

if TYPE_CHECKING:
    from tests.engines.pool import RankPool

skip_without("deepspeed")
pytestmark = pytest.mark.slow

FAMILY = "llama"
ALLOWED = {"fp32": 5e-5, "bf16": 4e-3}


@pytest.fixture(scope="module")
def stories(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the folder of each type: the losses of a run that stays and of one that changes, there and back."""
    folder = tmp_path_factory.mktemp("stories")
    config = families.transformers_model(FAMILY).config.to_dict()
    there, back = [], []
    for kind in ALLOWED:
        case = vars(Case(tp=2, bf16=kind == "bf16"))
        path = folder / kind
        path.mkdir()
        stays = ranks.run(deepspeed_jobs.train, FAMILY, kind == "bf16", 0, 5, "", str(path / "deepspeed"), world_size=2)
        torch.save(stays[0][2:], path / "deepspeed stays")
        opening = {"spec": FAMILY, "model_config": config}
        goes = {"do": "train", "case": case, "family": FAMILY, "first": 2, "opening": opening}
        there.append({**goes, "steps": 3, "load": str(path / "deepspeed"), "losses": str(path / "deepspeed goes")})
        back.append(
            {
                **goes,
                "steps": 5,
                "load": str(path / "deepspeed"),
                "saved": str(path / "megatron"),
                "losses": str(path / "megatron stays"),
            }
        )
    launch([*there, *back], folder)
    for kind in ALLOWED:
        path = folder / kind
        losses = ranks.run(deepspeed_jobs.train, FAMILY, kind == "bf16", 4, 3, str(path / "megatron"), world_size=2)
        torch.save(losses[0], path / "megatron goes")
        torch.save(torch.load(path / "megatron stays")[2:], path / "megatron stays")
    return folder


@pytest.mark.parametrize("kind", ALLOWED)
@pytest.mark.parametrize("source", ["deepspeed", "megatron"])
def test_losses_are_those_of_the_run_that_stays(stories: Path, source: str, kind: str) -> None:
    stays, goes = (torch.load(stories / kind / f"{source} {what}") for what in ("stays", "goes"))
    assert len(stays) == len(goes) == 3
    assert max(abs(a - b) for a, b in zip(stays, goes, strict=True)) <= ALLOWED[kind]

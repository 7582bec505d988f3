"""Files that DeepSpeed 0.18 names under sequence parallelism by its own mesh: rank 1's are model-parallel rank 1's by
their names, although nothing cuts the model; DeepSpeed itself does not find them again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ucp
from ucp.errors import DamagedCheckpoint

OLDER = Path(__file__).parents[1] / "older"
# Of two ranks each, by stage, with the engine's own truth.
SAVED = {1: OLDER / "0.18.9-z1-bf16", 2: OLDER / "0.18.9-z2-fp16", 3: OLDER / "0.18.9-z3-bf16"}


def renamed(stage: int, into: Path, **said: int) -> Path:
    """As two ranks that share a sequence save it. said: put into model files."""
    shutil.copytree(SAVED[stage], into)
    for path in sorted(into.glob("*/*.pt")):
        saved = torch.load(path, weights_only=False)
        if "module" in saved:
            saved |= said
        own = path.with_name(path.name.replace("rank_1_mp_rank_00", "rank_1_mp_rank_01"))
        path.unlink()
        torch.save(saved, own)
    assert any("rank_1_mp_rank_01_optim" in path.name for path in into.glob("*/*.pt"))
    return into


@pytest.mark.parametrize("stage", SAVED)
def test_they_are_read_as_data_parallel_ranks(tmp_path: Path, stage: int) -> None:
    with ucp.open(SAVED[stage]) as before, ucp.open(renamed(stage, tmp_path / "run")) as found:
        assert (found.layout.dp, found.layout.tp) == (2, 1)
        assert found.parameters.keys() == before.parameters.keys()
        for name, info in before.parameters.items():
            assert found.parameters[name].states == info.states
            for state in info.states:
                assert torch.equal(found.read(name, state), before.read(name, state)), (name, state)


@pytest.mark.parametrize("stage", [1, 3])
def test_not_where_a_file_says_that_the_model_was_cut(tmp_path: Path, stage: int) -> None:
    with pytest.raises(
        DamagedCheckpoint, match=r"no model file of rank 1|'zero_pp_rank_0_mp_rank_01_model_states\.pt' is missing"
    ):
        ucp.open(renamed(stage, tmp_path / "run", mp_world_size=2))


def test_nor_where_a_number_is_there_twice(tmp_path: Path) -> None:
    folder = renamed(2, tmp_path / "run")
    path = next(folder.glob("*/*rank_1_mp_rank_01_optim*"))
    torch.save(torch.load(path, weights_only=False), path.with_name(path.name.replace("mp_rank_01", "mp_rank_00")))
    with pytest.raises(DamagedCheckpoint, match="no model file of rank 1"):
        ucp.open(folder)

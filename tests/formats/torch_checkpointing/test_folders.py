"""Folders of PyTorch's torch_checkpointing, written by it: read as one, resumed on any number of ranks."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.engines.fsdp import Mesh, differences
from tests.engines.pool import RankPool
from tests.formats import foreign_jobs
from ucp.errors import DamagedCheckpoint, UnsafePickle, Unsupported
from ucp.inspection.listing import listing
from ucp.inspection.verify import verify


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, foreign_jobs.Run]:
    folder = tmp_path_factory.mktemp("torch_checkpointing")
    return folder, ranks.run(foreign_jobs.torch_checkpointing_saves, str(folder), Mesh(dp=2), world_size=2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["told", "bare"])
def test_it_is_read_as_one_and_resumes_on_any_number_of_ranks(
    ranks: RankPool, saved: tuple[Path, foreign_jobs.Run], form: str, tmp_path: Path
) -> None:
    folder, run = saved
    with ucp.open(folder / form) as opened:
        assert opened.format == "torch-checkpointing"
        assert (opened.layout.dp, opened.training_state.global_steps) == (2, foreign_jobs.STEPS)
        for name, states in run.state.params.items():
            for state in opened.parameters[name].states:
                assert torch.equal(opened.read(name, state), states[state].detach()), (name, state)
            assert {*opened.parameters[name].states, *opened.parameters[name].scalars} == states.keys()
        assert opened.training_state.lr_scheduler["last_epoch"] == foreign_jobs.STEPS
        loaders = [{"dp_rank_0": 7}, {"dp_rank_1": 7}]
        assert opened.training_state.client_state["of_ranks"] == {"loader": loaders}
    assert verify(folder / form).whole
    for count in (2, 3):
        resumed = ranks.run(foreign_jobs.resume, str(folder / form), Mesh(dp=count), world_size=count)[0]
        assert differences(run.state, resumed.state) == []
        if count == 2:
            assert resumed.further == run.further
    ucp.convert(folder / form, tmp_path / "dcp", "dcp")
    with ucp.open(tmp_path / "dcp") as copy:
        for name, states in run.state.params.items():
            assert torch.equal(copy.read(name), states["param"].detach())


def made(folder: Path, world: int = 2) -> Path:
    """A save of plain tensors and metadata, as the library names its files."""
    folder.mkdir()
    for rank in range(world):
        torch.save({"w": torch.ones(3)}, folder / f"model_{rank}.pt")
        torch.save(5, folder / f"step_{rank}.pt")
    layouts = dict.fromkeys(range(world))
    told = {"model": {"nested_path_to_metadata": {}, "rank_to_layout_info": layouts}}
    write(folder, {"world_size": world, "version": "2.0", "metadata": told})
    return folder


def write(folder: Path, metadata: Any) -> None:
    (folder / "metadata.pkl").write_bytes(pickle.dumps(metadata))


def change(**to: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        write(folder, {**pickle.loads((folder / "metadata.pkl").read_bytes()), **to})

    return apply


def layout(path: str, kind: str) -> dict[str, Any]:
    own = {"file_path": path, "serialization_format": {"type": kind}}
    return {"model": {"nested_path_to_metadata": {}, "rank_to_layout_info": {0: own, 1: None}}}


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda f: (f / "model_1.pt").unlink(), DamagedCheckpoint, "'model_1.pt' is missing"),
        (lambda f: (f / "step_0.pt").unlink(), DamagedCheckpoint, "'step_0.pt' is missing"),
        (lambda f: shutil.copy(f / "step_0.pt", f / "step_2.pt"), DamagedCheckpoint, "of another save"),
        (lambda f: torch.save({"v": torch.ones(3)}, f / "model_1.pt"), DamagedCheckpoint, "other entries"),
        (lambda f: swap(f / "step_0.pt", f / "step_1.pt"), DamagedCheckpoint, "'step_1.pt', as its archive says"),
        (lambda f: shutil.copy(f / "model_0.pt", f / "model_1.pt"), DamagedCheckpoint, "as its archive says"),
        (lambda f: (f / "metadata.pkl").unlink(), Unsupported, "not, say, of two epochs"),
        (change(world_size="two"), DamagedCheckpoint, "not torch_checkpointing's metadata"),
        (change(world_size=1 << 40), DamagedCheckpoint, "not torch_checkpointing's metadata"),
        (change(world_size=3), DamagedCheckpoint, "'model_2.pt' is missing"),
        (change(metadata=[1]), DamagedCheckpoint, "not torch_checkpointing's metadata"),
        (change(version="9.0"), Unsupported, "is of version '9.0'"),
        (change(metadata=layout("../x.pt", "TorchSerialization")), Unsupported, "layout of its own"),
        (change(metadata=layout("model_0.pt", "JsonSerialization")), Unsupported, "layout of its own"),
        (change(metadata={"other": {}}), DamagedCheckpoint, "item 'other'"),
        (change(version=print), UnsafePickle, "print"),
        (lambda f: (f / "metadata.pkl").write_bytes(b"\x80\x04"), DamagedCheckpoint, "metadata.pkl"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(
    harm: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "step-5")
    harm(folder)
    with pytest.raises(error, match=message):
        ucp.open(folder)


def test_ranks_that_have_different_values_of_a_whole_tensor(tmp_path: Path) -> None:
    folder = made(tmp_path / "step-5")
    with ucp.open(folder) as opened:
        assert opened.catalog.unchecked == ()
    torch.save({"w": torch.tensor([1.0, 1.0, 2.0])}, folder / "model_1.pt")
    with ucp.open(folder) as opened:
        assert opened.catalog.unchecked == (
            "ranks have different values of 1 whole tensors ('model.w'); rank 0's are read",
        )


def test_a_folder_of_them_is_listed(tmp_path: Path) -> None:
    made(tmp_path / "run-a")
    shutil.copytree(tmp_path / "run-a", tmp_path / "run-b")
    assert {found.format for found in listing(tmp_path).checkpoints} == {"torch-checkpointing"}
    assert ucp.open(tmp_path / "run-a").read("w").tolist() == [1, 1, 1]

"""Accelerate's folders, written by Accelerate: one checkpoint each, resumed in any layout with its own next losses."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ucp
from tests.engines.fsdp import Mesh, differences
from tests.engines.pool import RankPool
from tests.formats import foreign_jobs
from tests.formats.foreign_programs import made_by
from ucp.errors import DamagedCheckpoint, UnsafePickle, Unsupported
from ucp.inspection.difference import diff
from ucp.inspection.verify import verify

pytestmark = pytest.mark.slow

FORMS = ["dcp", "full", "ranks"]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, foreign_jobs.Run]:
    folder = tmp_path_factory.mktemp("accelerate")
    return folder, ranks.run(foreign_jobs.accelerate_saves, str(folder), Mesh(dp=2), world_size=2)[0]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_read_as_one(saved: tuple[Path, foreign_jobs.Run], form: str) -> None:
    folder, run = saved
    with ucp.open(folder / form) as opened:
        assert opened.format == "accelerate"
        assert opened.unread == ()
        for name, states in run.state.params.items():
            for state in opened.parameters[name].states:
                assert torch.equal(opened.read(name, state), states[state].detach()), (name, state)
            assert {*opened.parameters[name].states, *opened.parameters[name].scalars} == states.keys()
        groups = opened.training_state.param_groups
        assert [list(group.names) for group in groups] == [group["names"] for group in run.state.groups]
        assert opened.training_state.lr_scheduler["last_epoch"] == foreign_jobs.STEPS
        assert opened.training_state.client_state["step"] == 4
        assert len(opened.training_state.extra["ranks"]) == 2
        own = torch.load(folder / form / "random_states_1.pkl", weights_only=False)
        assert torch.equal(opened.training_state.extra["ranks"][1]["rng"]["torch"], own["torch_manual_seed"])
    assert not [f for f in verify(folder / form).findings if f.fault]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [2, 3])
def test_it_resumes_on_any_number_of_ranks(
    ranks: RankPool, saved: tuple[Path, foreign_jobs.Run], form: str, count: int
) -> None:
    folder, run = saved
    resumed = ranks.run(foreign_jobs.resume, str(folder / form), Mesh(dp=count), world_size=count)[0]
    assert differences(run.state, resumed.state) == []
    if count == 2:
        assert resumed.further == run.further


@pytest.mark.parametrize("form", FORMS)
def test_it_becomes_deepspeeds(saved: tuple[Path, foreign_jobs.Run], form: str, tmp_path: Path) -> None:
    folder, _ = saved
    ucp.convert(folder / form, tmp_path / "native", "deepspeed", "dp=2,zero=1", ds_config={})
    ucp.convert(tmp_path / "native", tmp_path / "back")
    with ucp.open(folder / form) as ours, ucp.open(tmp_path / "back") as theirs:
        found = diff(ours, theirs)
    assert found.equal == found.compared > 20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: (path / "random_states_0.pkl").unlink(), "no such file of rank 0; a part is missing"),
        (lambda path: shutil.rmtree(path / "optimizer_0"), "has an lr scheduler's state and no optimizer's"),
        (lambda path: (path / "optimizer_0").rename(path / "optimizer_1"), "some are missing"),
        (lambda path: (path / "optimizer_0/.metadata").unlink(), "optimizer_0/.metadata: cannot be read"),
        (lambda path: (path / "pytorch_model_fsdp_0/__1_0.distcp").unlink(), "__1_0.distcp: cannot be read"),
    ],
)
def test_half_of_the_parts_is_refused(
    saved: tuple[Path, foreign_jobs.Run], tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    shutil.copytree(saved[0] / "dcp", tmp_path / "state")
    change(tmp_path / "state")
    with pytest.raises(DamagedCheckpoint, match=says):
        ucp.open(tmp_path / "state")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda path: (path / "optimizer_0_rank1.bin").unlink(),
            "has no 'optimizer_0_rank1.bin'; a rank's part",
        ),
        (
            lambda path: shutil.copy(path / "optimizer_0_rank0.bin", path / "optimizer_0_rank1.bin"),
            "was written as 'optimizer_0_rank0.bin', as its archive says",
        ),
        (
            lambda path: rewrite(path / "optimizer_0_rank0.bin", path / "optimizer_0_rank1.bin"),
            "hole|not covered|incomplete|of the same elements",
        ),
        (
            lambda path: rewrite(path / "pytorch_model_fsdp_0_rank0.bin", path / "optimizer_0_rank1.bin"),
            "other entries than 'optimizer_0_rank0.bin'",
        ),
    ],
)
def test_ranks_files_that_are_not_all(
    saved: tuple[Path, foreign_jobs.Run], tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    shutil.copytree(saved[0] / "ranks", tmp_path / "state")
    change(tmp_path / "state")
    with pytest.raises(DamagedCheckpoint, match=says):
        ucp.open(tmp_path / "state")


def test_a_ranks_file_by_itself_is_refused(saved: tuple[Path, foreign_jobs.Run]) -> None:
    with pytest.raises(Unsupported, match=r"a DTensor of one rank"):
        ucp.open(saved[0] / "ranks/pytorch_model_fsdp_0_rank0.bin")


def test_a_mesh_of_two_dimensions(ranks: RankPool, tmp_path: Path) -> None:
    """FSDP2 over tensor parallelism, whose lengths don't divide evenly."""
    run = ranks.run(foreign_jobs.accelerate_saves, str(tmp_path), Mesh(dp=2, tp=2), ("ranks",), world_size=4)[0]
    resumed = ranks.run(foreign_jobs.resume, str(tmp_path / "ranks"), Mesh(dp=3), world_size=3)[0]
    assert differences(run.state, resumed.state) == []
    # What both ranks of tensor parallelism hold is another step's on one of them.
    file = tmp_path / "ranks/pytorch_model_fsdp_0_rank1.bin"
    rewrite(file, file, lambda raw: bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(DamagedCheckpoint, match=r"rank1.bin: '\S+' is not what 'pytorch_model_fsdp_0_rank0.bin' has"):
        ucp.open(tmp_path / "ranks")


def rewrite(source: Path, to: Path, change: Callable[[bytes], bytes] = bytes) -> None:
    """The archive under another name, as torch would write it there, with right CRC-32s and changed tensors."""
    with zipfile.ZipFile(source) as file:
        records = [(name.partition("/")[2], file.read(name)) for name in file.namelist()]
    with zipfile.ZipFile(to, "w") as file:
        for name, raw in records:
            file.writestr(f"{to.stem}/{name}", change(raw) if name.startswith("data/") and raw else raw)


def test_one_process(foreign: Path) -> None:
    """Without FSDP: files, whose optimizer has numbers for names, told here by shapes."""
    path = made_by("accelerate", foreign)
    saved = torch.load(path / "optimizer.bin")
    with ucp.open(path) as opened:
        assert opened.unread == ()
        assert [group.names for group in opened.training_state.param_groups] == [("weight", "bias")]
        assert torch.equal(opened.read("weight", "exp_avg"), saved["state"][0]["exp_avg"])
        assert torch.equal(opened.read("bias", "exp_avg_sq"), saved["state"][1]["exp_avg_sq"])
        kept = opened.training_state.client_state
        assert kept["custom_checkpoint_0"]["best"] == 0.5
        assert torch.equal(kept["custom_checkpoint_0"]["seen"], torch.arange(3))
        assert kept["dl_state_dict"]["_num_yielded"] == 1


def test_a_sampler_is_an_object_of_accelerates(foreign: Path, tmp_path: Path) -> None:
    """It is pickled as it is, so it is named, and left out where that is asked."""
    from accelerate.data_loader import SeedableRandomSampler

    shutil.copytree(made_by("accelerate", foreign), tmp_path / "state")
    torch.save(
        SeedableRandomSampler(range(8), data_seed=3, generator=torch.Generator()), tmp_path / "state/sampler.bin"
    )
    with pytest.raises(UnsafePickle, match=r"SeedableRandomSampler.*--skip-unknown-objects"):
        ucp.open(tmp_path / "state")
    with ucp.open(tmp_path / "state", options={"skip_unknown_objects": True}) as opened:
        assert opened.training_state.client_state["sampler"]["initial_seed"] == 3
        assert opened.unread == ()

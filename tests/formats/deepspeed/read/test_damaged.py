"""Damaged, mixed and hostile DeepSpeed checkpoints: one clear line that names the file, and nothing is run."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.engines.configs import Case
from tests.engines.sources import Sources
from ucp.errors import DamagedCheckpoint, NotACheckpoint, UcpError, UnsafePickle

# Real checkpoints of two ranks, by stage.
OLDER = {p.name.split("-")[1]: p for p in sorted(Path(__file__).parents[1].glob("older/0.14.4-*")) if p.is_dir()}
TAG = "global_step3"


@pytest.fixture(params=sorted(OLDER))
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a checkpoint's folder; its tag is TAG."""
    shutil.copytree(OLDER[request.param], tmp_path / "saved")
    return tmp_path / "saved"


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / TAG).iterdir())


def refusal(folder: Path, kind: type[UcpError] = DamagedCheckpoint, tag: str | None = TAG) -> str:
    """The one line; the folder is left as it was."""
    before = snapshot(folder)
    with pytest.raises(kind) as caught:
        read_all(folder, tag)
    assert snapshot(folder) == before
    text = str(caught.value)
    assert "\n" not in text
    return text


def read_all(folder: Path, tag: str | None) -> None:
    with ucp.open(folder, tag=tag) as checkpoint:
        for name, info in checkpoint.parameters.items():
            for state in info.states:
                checkpoint.read(name, state)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def test_the_copies_are_whole(whole: Path) -> None:
    with ucp.open(whole) as checkpoint:
        assert checkpoint.layout.dp == 2
        assert checkpoint.parameters


@pytest.mark.parametrize("what", ["nothing", "a file", "other files", "an empty folder", "a folder of folders"])
def test_no_checkpoint_there(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "a file":
        path.write_bytes(b"\x80\x04N.")
    elif what != "nothing":
        path.mkdir()
    if what == "other files":
        (path / "readme.txt").write_text("hello")
    if what == "a folder of folders":
        (path / "global_step3").mkdir()
    with pytest.raises(NotACheckpoint, match=str(path)) as caught:
        ucp.open(path)
    assert "\n" not in str(caught.value)


def each_file(whole: Path) -> list[str]:
    assert len(files(whole)) >= 3
    return files(whole)


def test_a_missing_file_is_named(whole: Path) -> None:
    """Every file of the checkpoint in turn."""
    for name in each_file(whole):
        path = whole / TAG / name
        kept = path.read_bytes()
        path.unlink()
        text = refusal(whole)
        assert name in text or "model_states.pt" in text
        path.write_bytes(kept)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(whole: Path, keep: float) -> None:
    for name in each_file(whole):
        path = whole / TAG / name
        kept = path.read_bytes()
        path.write_bytes(kept[: int(keep * len(kept))])
        text = refusal(whole)
        assert name in text
        if not keep:
            assert "empty" in text or "0 bytes" in text or "has no bytes" in text, text
        path.write_bytes(kept)


def test_a_truncated_end_without_a_tag_falls_back_to_nothing_with_that_reason(whole: Path) -> None:
    name = files(whole)[0]
    path = whole / TAG / name
    path.write_bytes(path.read_bytes()[:-100])
    assert name in refusal(whole, tag=None)


@pytest.mark.parametrize("text", [b"not a pickle at all", b"PK\x03\x04 not a zip", b"\x80\x04", os.urandom(4096)])
def test_bytes_that_are_no_torch_file(whole: Path, text: bytes) -> None:
    for name in each_file(whole):
        path = whole / TAG / name
        kept = path.read_bytes()
        path.write_bytes(text)
        assert name in refusal(whole, UcpError)
        path.write_bytes(kept)


def test_a_torch_file_of_something_else(whole: Path) -> None:
    for name in each_file(whole):
        path = whole / TAG / name
        kept = path.read_bytes()
        for other in ([1, 2], {"weights": torch.zeros(2)}, torch.zeros(3)):
            torch.save(other, path)
            assert name in refusal(whole, UcpError)
        path.write_bytes(kept)


def test_a_file_of_one_rank_too_many(whole: Path) -> None:
    name = next(n for n in files(whole) if "zero_pp_rank_1" in n and "optim" in n)
    shutil.copy(whole / TAG / name, whole / TAG / name.replace("rank_1", "rank_2"))
    text = refusal(whole)
    assert name.replace("rank_1", "rank_2") in text
    assert "2 data-parallel ranks" in text
    assert "two runs are mixed" in text


def test_a_run_of_more_ranks_with_files_missing(whole: Path) -> None:
    """A gap in the ranks: the model file says two, rank 0's files were deleted."""
    for name in files(whole):
        if "zero_pp_rank_0" in name and "optim" in name:
            (whole / TAG / name).unlink()
            text = refusal(whole)
            assert name in text
            assert "1 of 2 optimizer files are missing" in text


def test_files_of_other_stages(tmp_path: Path) -> None:
    for a, b in (("z3", "z1"), ("z1", "z3"), ("z2", "z3")):
        folder = tmp_path / f"{a}{b}"
        shutil.copytree(OLDER[a], folder)
        for file in (OLDER[b] / TAG).iterdir():
            if "model_states" in file.name:
                shutil.copy(file, folder / TAG / file.name)
        text = refusal(folder)
        assert "mixed" in text
        assert str(folder) in text


def test_optimizer_files_of_another_stage_or_precision(tmp_path: Path) -> None:
    """Rank 1's file from a run of another kind, under the name it has to have."""
    for a, b in (("z1", "z3"), ("z3", "z1"), ("z2", "z1"), ("z1", "z2")):
        folder = tmp_path / f"{a}{b}"
        shutil.copytree(OLDER[a], folder)
        mine = next(p for p in (folder / TAG).iterdir() if "zero_pp_rank_1" in p.name and "optim" in p.name)
        theirs = next(p for p in (OLDER[b] / TAG).iterdir() if "zero_pp_rank_1" in p.name and "optim" in p.name)
        shutil.copy(theirs, mine)
        text = refusal(folder, UcpError)
        assert mine.name in text


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path, how: str) -> None:
        self.path, self.how = str(path), how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "open":
            return open, (self.path, "w")
        if self.how == "system":
            return os.system, (f"touch {self.path}",)
        if self.how == "eval":
            return eval, (f"open({self.path!r}, 'w').close()",)
        return getattr, (Path(self.path), "touch")


SAVERS: dict[str, Callable[[Any, Path], object]] = {
    "zip": lambda value, path: torch.save(value, path),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", ["open", "system", "eval", "getattr"])
@pytest.mark.parametrize("saver", sorted(SAVERS))
def test_a_pickle_that_would_run_code(whole: Path, tmp_path: Path, how: str, saver: str) -> None:
    planted = tmp_path / "planted"
    for name in each_file(whole):
        path = whole / TAG / name
        kept = path.read_bytes()
        for value in (Hostile(planted, how), {"optimizer_state_dict": {"x": Hostile(planted, how)}, "module": {}}):
            SAVERS[saver](value, path)
            text = refusal(whole, UnsafePickle if saver != "pickle" else UcpError)
            assert name in text
            assert not planted.exists()
        path.write_bytes(kept)
    # The files would indeed have done it.
    SAVERS["pickle"](Hostile(planted, "open"), path)
    pickle.loads(path.read_bytes()).close()
    assert planted.exists()


@pytest.mark.slow
class TestTodays:
    """The same faults where they need checkpoints of their own, by the DeepSpeed that the tests run."""

    def test_files_of_two_runs_of_one_layout(self, sources: Sources, tmp_path: Path) -> None:
        """Other weights in an optimizer file than in the model file."""
        for dtype in ("fp32", "bf16"):
            for stage in (1, 2):
                case = Case(stage=stage, dp=2, dtype=dtype)
                run, other = sources.copy(case, tmp_path / case.label), sources.get(case.but(seed=3))
                name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
                name = name if (Path(run.folder) / run.tag / name).exists() else f"bf16_{name}"
                shutil.copy(Path(other.folder) / other.tag / name, Path(run.folder) / run.tag / name)
                with pytest.raises(DamagedCheckpoint, match=name) as caught:
                    ucp.open(run.folder, tag=run.tag)
                assert "mixed" in str(caught.value)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_files_of_two_steps(self, sources: Sources, tmp_path: Path, stage: int) -> None:
        case = Case(stage=stage, dp=2)
        run, other = sources.copy(case, tmp_path / "run"), sources.get(case, steps=5)
        for name in sorted(os.listdir(Path(run.folder) / run.tag)):
            path = Path(run.folder) / run.tag / name
            kept = path.read_bytes()
            shutil.copy(Path(other.folder) / other.tag / name, path)
            with pytest.raises(DamagedCheckpoint, match=r"_states\.pt"):
                ucp.open(run.folder, tag=run.tag)
            path.write_bytes(kept)

    @pytest.mark.parametrize(("stage", "dp", "other"), [(1, 2, 3), (1, 3, 2), (3, 2, 4), (3, 3, 2), (2, 4, 3)])
    def test_files_of_runs_of_other_numbers_of_ranks(
        self, sources: Sources, tmp_path: Path, stage: int, dp: int, other: int
    ) -> None:
        """One file at a time, then all those that a smaller or larger run wrote over this one's."""
        case = Case(stage=stage, dp=dp)
        run, theirs = sources.copy(case, tmp_path / "run"), sources.get(case.but(dp=other))
        for name in sorted(set(os.listdir(Path(theirs.folder) / theirs.tag))):
            path = Path(run.folder) / run.tag / name
            kept = path.read_bytes() if path.exists() else None
            shutil.copy(Path(theirs.folder) / theirs.tag / name, path)
            with pytest.raises(DamagedCheckpoint, match=r"_states\.pt"):
                ucp.open(run.folder, tag=run.tag)
            if kept is None:
                path.unlink()
            else:
                path.write_bytes(kept)

    def test_a_smaller_run_saved_over_a_larger_one(self, sources: Sources, tmp_path: Path) -> None:
        """What really happens: the same tag again after a change of the number of ranks. Old files stay behind."""
        for stage in (1, 3):
            run = sources.copy(Case(stage=stage, dp=4), tmp_path / f"z{stage}")
            smaller = sources.get(Case(stage=stage, dp=2))
            shutil.copytree(Path(smaller.folder) / smaller.tag, Path(run.folder) / run.tag, dirs_exist_ok=True)
            with pytest.raises(
                DamagedCheckpoint, match=r"there is a file of rank 2, but .* 2 data-parallel ranks saved"
            ):
                ucp.open(run.folder, tag=run.tag)

    def test_flipped_sizes_in_a_model_file(self, sources: Sources, tmp_path: Path) -> None:
        """The model file of a model of another size."""
        run = sources.copy(Case(stage=2, dp=2), tmp_path / "run")
        other = sources.get(Case(stage=2, dp=2, frozen=True, groups=2))
        shutil.copy(
            Path(other.folder) / other.tag / "mp_rank_00_model_states.pt",
            Path(run.folder) / run.tag / "mp_rank_00_model_states.pt",
        )
        with pytest.raises(DamagedCheckpoint, match="two runs are mixed"):
            ucp.open(run.folder, tag=run.tag)


def test_what_zenflow_saved_is_refused(whole: Path) -> None:
    """Its masters are not the newest weights, and not all of its states are in files."""
    for path in (whole / TAG).glob("*model_states.pt"):
        found = torch.load(path, weights_only=False)
        found["ds_config"]["zero_optimization"]["zenflow"] = {"topk_ratio": 0.1}
        torch.save(found, path)
    assert "was saved under ZenFlow" in refusal(whole, UcpError)

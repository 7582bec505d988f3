"""Which checkpoints stay after a save: the newest, every n-th, what `latest` names, and all that is not ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ucp
from tests.saving import save_jobs as jobs
from ucp.saving import commit
from ucp.saving.retention import Keep
from ucp.saving.save import save, write_share


def made(step: int) -> jobs.Source:
    return jobs.source({("w", "param"): jobs.torch.full((3,), float(step))}, 0, 1, step)


def kept(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(made(step), tmp_path, f"global_step{step}", keep=Keep(2, 3))
        with ucp.open(tmp_path) as checkpoint:
            assert checkpoint.read("w").tolist() == [step] * 3
    assert kept(tmp_path) == ["global_step3", "global_step6", "global_step7", "latest"]


def test_one_is_enough(tmp_path: Path) -> None:
    for step in (5, 9, 2):  # a run may go back
        save(made(step), tmp_path, f"global_step{step}", keep=Keep(1))
    assert kept(tmp_path) == ["global_step2", "latest"]


def test_a_run_that_goes_back(tmp_path: Path) -> None:
    """What it goes on from stays, and what it has given up goes first."""
    for step in (1, 2, 3, 8, 9):
        save(made(step), tmp_path, f"global_step{step}")
    save(made(4), tmp_path, "global_step4", keep=Keep(3))
    assert kept(tmp_path) == ["global_step2", "global_step3", "global_step4", "latest"]


@pytest.mark.parametrize("hours", [-1, 1])
def test_no_clock_decides_what_stays(tmp_path: Path, hours: int) -> None:
    """The clock steps after every save, so that each seems to be older, or much newer, than the one before."""
    for step in range(1, 6):
        save(made(step), tmp_path, f"global_step{step}", keep=Keep(2))
        for path in (tmp_path / f"global_step{step}").iterdir():
            then = path.stat().st_mtime + hours * 3600 * step
            os.utime(path, (then, then))
    assert kept(tmp_path) == ["global_step4", "global_step5", "latest"]
    (tmp_path / "latest").unlink()
    with ucp.open(tmp_path) as checkpoint:
        assert checkpoint.read("w").tolist() == [5] * 3


def test_what_latest_names_stays(tmp_path: Path) -> None:
    save(made(1), tmp_path, "global_step1")
    for step in (2, 3):
        save(made(step), tmp_path, f"global_step{step}", latest=False, keep=Keep(1))
    assert kept(tmp_path) == ["global_step1", "global_step3", "latest"]


def test_other_things_are_left_alone(tmp_path: Path) -> None:
    others = ["global_step0", "best-1", "best-2", "global_step", "notes7", "global_step1x"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("")
    (tmp_path / "global_step99").symlink_to(tmp_path / "best-1")
    save(made(1), tmp_path, "best1")
    for step in (1, 2):
        save(made(step), tmp_path, f"global_step{step}", keep=Keep(1))
    assert kept(tmp_path) == sorted([*others, "best1", "global_step2", "global_step99", "latest"])


def test_nothing_goes_before_the_new_one_is_there(tmp_path: Path) -> None:
    save(made(1), tmp_path, "global_step1")
    session = commit.begin(tmp_path, "global_step2", 2, keep=Keep(1))
    write_share(session, 0, made(2))
    with pytest.raises(ucp.errors.SaveFailed):
        commit.commit(session, timeout=0.1)
    assert kept(tmp_path) == ["global_step1", "latest"]

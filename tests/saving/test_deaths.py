"""Ranks killed with SIGKILL at every step of a save: the old checkpoint or the new one, whole, and nothing else.

More than 280 deaths in all, by the counts that the tests assert: 4 times 28 or more, 3 times 40, 10 and 40.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ucp
from tests.saving import save_jobs as jobs
from tests.saving.save_jobs import Death
from ucp.errors import NotACheckpoint

WORLD = 3
OLD, NEW = (jobs.values(seed, small=True) for seed in (11, 12))
OLD_DIGEST, NEW_DIGEST = jobs.digest(OLD), jobs.digest(NEW)


def made(values: dict[tuple[str, str], jobs.torch.Tensor], seed: int) -> list[jobs.Source]:
    return [jobs.source(values, rank, WORLD, seed) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder whose flushes cost nothing: SIGKILL loses no file system's cache, so a disk would show nothing more."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def before(memory: Path) -> Path:
    """A folder with the old state under the tag 'old'."""
    assert jobs.save(memory / "before", "old", made(OLD, 11)).code == 0
    assert jobs.digest_of(memory / "before") == OLD_DIGEST
    return memory / "before"


def fresh(before: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=before.parent)) / "runs"
    shutil.copytree(before, folder)
    return folder


def check(folder: Path, tag: str, ended: jobs.Ended, again: bool) -> str:
    """Which of the two states is there now; with ``again`` that the next save works and leaves nothing lying about."""
    found = jobs.digest_of(folder)
    assert found in (OLD_DIGEST, NEW_DIGEST)
    if ended.code == 0:
        assert found == NEW_DIGEST
    if tag != "old":
        try:
            assert jobs.digest_of(folder, tag) == NEW_DIGEST
        except NotACheckpoint:
            assert found == OLD_DIGEST
        assert jobs.digest_of(folder, "old") == OLD_DIGEST
    with ucp.open(folder) as checkpoint:
        assert checkpoint.verify() > 0
        assert checkpoint.training_state.global_steps == (12 if found == NEW_DIGEST else 11)
    # What people glob for are checkpoints.
    assert {p.name for p in folder.glob("[!.]*")} <= {"old", tag, "latest"}
    if again:
        after = jobs.save(folder, tag, made(NEW, 12))
        assert after.code == 0, after.text
        assert jobs.digest_of(folder) == NEW_DIGEST
        assert set(os.listdir(folder)) == {"old", tag, "latest"}
    shutil.rmtree(folder.parent)
    return "new" if found == NEW_DIGEST else "old"


def deaths(before: Path, tag: str, rank: int, everyone: bool) -> list[str]:
    """The outcomes of dying before each operation of a save, one after the other, until none is left."""
    outcomes = []
    for operation in range(1000):
        folder = fresh(before)
        death = Death(rank, operation, everyone)
        ended = jobs.save(folder, tag, made(NEW, 12), death=death, timeout=0.4 if rank else 20)
        outcomes.append(check(folder, tag, ended, again=operation % 3 == 0))
        if ended.operations[rank] >= 0:
            assert rank or ended.code == 0, ended.text  # after another rank, the first one's patience may have ended
            return outcomes
        assert rank or ended.code == -9
    raise AssertionError("the save never ends")


@pytest.mark.slow(seconds=6)
@pytest.mark.parametrize("tag", ["new", "old"])
@pytest.mark.parametrize("everyone", [False, True], ids=["alone", "everyone"])
def test_the_first_rank_dies_at_every_step(before: Path, tag: str, everyone: bool) -> None:
    outcomes = deaths(before, tag, 0, everyone)
    assert len(outcomes) > 28
    # It is the old state up to one step, and the new one from there on.
    turn = outcomes.index("new")
    assert "old" not in outcomes[turn:]
    # With another tag there is more to do after the rename: `latest`.
    assert len(outcomes) - turn > 3 if tag == "old" else turn > 20


@pytest.mark.slow(seconds=6)
def test_another_rank_dies_at_every_step(before: Path) -> None:
    outcomes = deaths(before, "new", 1, everyone=False)
    assert len(outcomes) > 10
    assert outcomes[0] == "old"


@pytest.fixture(scope="module")
def alone(before: Path) -> Path:
    """A folder with the old state of one rank under the tag 'old'."""
    folder = before.parent / "alone"
    assert jobs.save_in_background(folder, "old", jobs.source(OLD, 0, 1, 11), None).code == 0
    return folder


@pytest.mark.slow(seconds=6)
@pytest.mark.parametrize("who", ["everyone", "the writer", "the trainer"])
def test_a_save_in_the_background_dies_at_every_step(alone: Path, who: str) -> None:
    """The training process and its writer, or one of them: the other one does not hang."""
    new = jobs.source(NEW, 0, 1, 12)
    died = 0
    for tag in ("new", "old"):
        outcomes = []
        for operation in range(1000):
            folder = fresh(alone)
            death = Death(0, operation, everyone=who == "everyone")
            ended = jobs.save_in_background(folder, tag, new, death, trainer_dies=who == "the trainer")
            outcomes.append(check(folder, tag, ended, again=operation % 8 == 0))
            if ended.operations[0] >= 0:
                break
            if who == "the writer":
                assert ended.code == 3
                assert "SaveFailed" in ended.text or "WriterLost" in ended.text
                assert "was ended by SIGKILL" in ended.text
            else:
                assert ended.code == -9
            died += 1
        turn = outcomes.index("new")
        assert "old" not in outcomes[turn:]
    assert died > 40


@pytest.mark.slow(seconds=6)
def test_all_ranks_are_killed_at_any_moment(before: Path) -> None:
    randomly = random.Random(5)
    folder = fresh(before)
    started = time.monotonic()
    jobs.save(folder, "new", made(NEW, 12))
    usual = time.monotonic() - started
    shutil.rmtree(folder.parent)
    for attempt in range(40):
        folder = fresh(before)
        tag = randomly.choice(["new", "old"])
        ended = jobs.save(folder, tag, made(NEW, 12), kill_all_after=randomly.uniform(0, 1.2 * usual))
        check(folder, tag, ended, again=attempt % 3 == 0)

"""Saves, commits, retention and conversions on a simulated disk: 10,000 schedules by seed.

Each ends in a whole checkpoint or the one before, checked element by element.

A schedule is: how many ranks save, in which order and how slow, under which tag, what is retained, at which operation
the power goes or the disk fails and for how long, when every clock steps by an hour, and what of the unflushed bytes
survives. A failure names its seed; ``UCP_SCHEDULE=seed`` runs that one alone.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from tests.attacks.simulated import PowerCut, SimulatedDisk, SteppingClock
from ucp.catalog import ParameterInfo, TrainingState
from ucp.errors import UcpError
from ucp.geometry import box
from ucp.parallel.mesh import Layout
from ucp.saving import commit
from ucp.saving.retention import Keep
from ucp.saving.save import write_share
from ucp.saving.source import Holding, Source
from ucp.storage import locations
from ucp.storage.dtypes import from_torch
from ucp.storage.locations import locate

SCHEDULES = 10_000
QUICK = 80
BATCHES = 20
WORLDS = (1, 1, 2, 3)
SHAPES = {"weight": (6, 4)}
HOUR = 3600
ELSEWHERE = ".ucp-tmp-step0-1-0000000001234567"  # another machine's save, under way


def values(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    made = np.random.default_rng(seed)
    return {
        (name, state): torch.from_numpy(np.asarray(made.standard_normal(shape), np.float32))
        for name, shape in SHAPES.items()
        for state in ("param", "exp_avg")
    }


def source(seed: int, rank: int, world: int) -> Source:
    """Rows of the matrix for each rank; what is small is held by all."""
    holdings, infos = [], {}
    for (name, state), tensor in values(seed).items():
        infos.setdefault(name, ParameterInfo(name, tuple(tensor.shape), {}, "parameter", {"step": seed}))
        everyone = tuple(range(world))
        if tensor.ndim == 2:
            rows = tensor.shape[0] // world
            mine = tensor[rank * rows : (rank + 1) * rows].contiguous()
            blocks = box([rank * rows, 0], mine.shape)
            holdings.append(Holding(name, state, tuple(tensor.shape), from_torch(tensor.dtype), mine, blocks, (rank,)))
        else:
            blocks = box([0] * tensor.ndim, tensor.shape)
            holdings.append(
                Holding(name, state, tuple(tensor.shape), from_torch(tensor.dtype), tensor, blocks, everyone)
            )
    state_of = TrainingState(global_steps=seed, client_state={"seed": seed})
    return Source(Layout(dp=world, zero=1), infos, holdings, state_of, {"rank": rank})


OLD, NEW = 11, 12
TRUTH = {seed: values(seed) for seed in (OLD, NEW)}
SOURCES = {(seed, world): [source(seed, r, world) for r in range(world)] for seed in (OLD, NEW) for world in WORLDS}


def save(folder: Path, tag: str, seed: int, world: int, order: list[int], slow: int, keep: Keep | None) -> None:
    """What `ucp.saving.save.save` does, on all ranks in turn. slow: how many ranks come after the commit."""
    session = commit.begin(folder, tag, world, keep=keep)
    failed: BaseException | None = None
    late = order[len(order) - slow :] if slow else []
    for rank in order[: len(order) - slow]:
        try:
            write_share(session, rank, SOURCES[seed, world][rank])
        except Exception as error:  # noqa: BLE001 - as a rank does it
            failed = failed or error
            commit.leave_failure(session, rank, error)
    try:
        if failed is not None:
            commit.abandon(session)
            raise failed
        commit.commit(session, timeout=-1.0)
    finally:
        for rank in late:
            with suppress(UcpError):
                write_share(session, rank, SOURCES[seed, world][rank])


def found(folder: Path, tag: str | None = None) -> int:
    """Which of the two states is there, every element compared; anything else fails."""
    with ucp.open(folder, tag=tag) as opened:
        seed = opened.training_state.global_steps
        assert seed in TRUTH
        truth = TRUTH[seed]
        assert set(opened.catalog.tensors) == set(truth)
        for key, tensor in truth.items():
            assert torch.equal(opened.read(*key), tensor), key
        assert opened.training_state.client_state == {"seed": seed}
        return int(seed)


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def before(memory: Path) -> Path:
    """A run's folder with the old state as 'step1'."""
    folder = memory / "before"
    save(folder, "step1", OLD, 2, [0, 1], 0, None)
    (folder / ELSEWHERE).mkdir()
    assert found(folder) == OLD
    return folder


@dataclass(frozen=True)
class Schedule:
    """One run's circumstances."""

    seed: int

    def run(self, before: Path, place: Path) -> str:
        """Returns what became of it. Raises AssertionError."""
        luck = random.Random(self.seed)
        shutil.copytree(before, place / "disk/run")
        simulated = SimulatedDisk(place / "disk", luck, no_exchange=luck.random() < 0.3)
        kind = luck.random()
        operations = luck.randrange(70)
        if kind < 0.55:
            simulated.cut_at = operations
        elif kind < 0.9:
            simulated.fail_at, simulated.fail_for = operations, luck.choice((1, 1, 3, 1000))
            simulated.error = luck.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES))
        world = luck.choice(WORLDS)
        tag = luck.choice(("step1", "step2"))
        keep = luck.choice((None, None, Keep(1), Keep(2)))
        slow = luck.choice((0, 0, 0, 1)) if world > 1 else 0
        order = luck.sample(range(world), world)
        simulated.step = luck.choice((0, -HOUR, HOUR))  # every clock: what code reads, and what files get
        simulated.step_at = luck.randrange(-1, 70)
        if simulated.step_at < 0:  # between the saves
            simulated.clock.seconds = simulated.step
        with simulated.clock.inserted():
            return self.saved(simulated, place, tag, world, order, slow, keep)

    def saved(
        self,
        simulated: SimulatedDisk,
        place: Path,
        tag: str,
        world: int,
        order: list[int],
        slow: int,
        keep: Keep | None,
    ) -> str:
        """Save on the simulated disk, and look at what is left."""
        luck = simulated.random
        returned = False
        try:
            with simulated.inserted():
                save(place / "disk/run", tag, NEW, world, order, slow, keep)
            returned = True
            how = "saved"
        except PowerCut:
            how = "power cut"
        except UcpError as error:
            how = type(error).__name__
        # After a save that returned the power may go, too: then nothing may be lost that was promised.
        lose_all = returned and luck.random() < 0.5
        simulated.image(place / "after", worst=lose_all)
        self.check(place / "after/run", tag, keep, returned, how)
        if luck.random() < 0.1:
            save(place / "after/run", "step3", NEW, 1, [0], 0, None)
            assert found(place / "after/run") == NEW
            left = {name for name in os.listdir(place / "after/run") if name.startswith(".")} - {ELSEWHERE}
            # What was set aside stays only where it is the one copy: its process, this one, is still alive.
            aside = [name for name in left if "-old-" in name and os.path.isdir(place / "after/run" / tag)]
            assert how != "power cut" or not aside, left
        return how

    def check(self, run: Path, tag: str, keep: Keep | None, returned: bool, how: str) -> None:
        state = found(run)
        if returned:
            assert state == NEW, "what was saved is lost"
        for name in sorted(os.listdir(run)):
            if name.startswith(".") or name == "latest":
                continue
            # Whatever has a plain name is one of the two, whole.
            assert tag in (name, "step1") or found(run, name) == OLD, name
        if tag != "step1" and (keep is None or keep.last > 1 or state == OLD):
            assert os.path.isdir(run / "step1"), "the old one is lost"
        assert (run / ELSEWHERE).is_dir(), "the save of another machine, which is under way, is lost"
        if how not in ("saved", "power cut") and not returned:
            pending = [name for name in os.listdir(run) if name.startswith(".ucp-tmp-") and name != ELSEWHERE]
            assert len(pending) <= 1, pending


def schedules(seeds: Iterable[int], before: Path, memory: Path) -> Counter[str]:
    """Run these; the first that goes wrong is named."""
    counts: Counter[str] = Counter()
    alone = os.environ.get("UCP_SCHEDULE")
    for seed in seeds if alone is None else [int(alone)]:
        place = Path(tempfile.mkdtemp(dir=memory))
        try:
            counts[Schedule(seed).run(before, place)] += 1
        except (AssertionError, UcpError, KeyError, OSError) as error:
            raise AssertionError(f"schedule {seed} (UCP_SCHEDULE={seed}): {error!r}") from error
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return counts


def test_some_saves(before: Path, memory: Path) -> None:
    counts = schedules(range(QUICK), before, memory)
    assert "UCP_SCHEDULE" in os.environ or min(counts[how] for how in ("saved", "power cut")) > 10, counts


@pytest.mark.slow(seconds=6)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_ten_thousand_saves(before: Path, memory: Path, batch: int) -> None:
    schedules(range(QUICK + batch, SCHEDULES, BATCHES), before, memory)


def converted(seed: int, before: Path, place: Path) -> str:
    """A conversion meets a fault; it or the next one is whole, and never half of one is there."""
    luck = random.Random(seed)
    shutil.copytree(before, place / "disk/run")
    simulated = SimulatedDisk(place / "disk", luck, no_exchange=luck.random() < 0.3)
    if luck.random() < 0.6:
        simulated.cut_at = luck.randrange(90)
    else:
        simulated.fail_at, simulated.fail_for = luck.randrange(90), luck.choice((1, 3, 1000))
        simulated.error = luck.choice((errno.ENOSPC, errno.EIO))
    simulated.step, simulated.step_at = luck.choice((0, -HOUR, HOUR)), luck.randrange(90)
    try:
        with simulated.clock.inserted(), simulated.inserted():
            ucp.convert(place / "disk/run", place / "disk/out", workers=1)
        how = "converted"
    except PowerCut:
        how = "power cut"
    except UcpError as error:
        how = type(error).__name__
    simulated.image(place / "after", worst=how == "converted" and luck.random() < 0.5)
    assert found(place / "after/run") == OLD
    if how == "converted" or (place / "after/out").exists():
        assert found(place / "after/out") == OLD
    else:
        ucp.convert(place / "after/run", place / "after/out", workers=1)
        assert found(place / "after/out") == OLD
    return how


@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_conversions(before: Path, memory: Path, count: int) -> None:
    for seed in range(count):
        place = Path(tempfile.mkdtemp(dir=memory))
        try:
            converted(seed, before, place)
        except (AssertionError, UcpError, KeyError, OSError) as error:
            raise AssertionError(f"conversion {seed}: {error!r}") from error
        finally:
            shutil.rmtree(place, ignore_errors=True)


def behind_a_url(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store, where every object is there or not and nothing is renamed: a save that replaces another."""
    luck = random.Random(seed)
    url, cut_at, done = locate(f"memory://schedules-{os.getpid()}-{seed}"), luck.randrange(30), 0
    save(url, "step1", OLD, 1, [0], 0, None)
    elsewhere = url / "step0/0123456789abcdef/rank-00000-of-00001.safetensors"
    locations.write(elsewhere, b"a save under way")
    clock = SteppingClock(luck.choice((0, -HOUR, HOUR)))  # the store's own clock is right
    fails = luck.choice((PowerCut(), OSError(errno.EIO, "the store fails")))

    def counted(name: str) -> None:
        real = getattr(locations, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == cut_at or (done > cut_at and isinstance(fails, PowerCut)):
                raise fails
            return real(*args, **kwargs)

        patch.setattr(locations, name, call)

    with monkeypatch.context() as patch, clock.inserted():
        for name in ("write", "remove", "remove_tree", "created"):
            counted(name)
        tag, returned = luck.choice(("step1", "step2")), False
        with suppress(PowerCut, UcpError, OSError):
            save(url, tag, NEW, 1, [0], 0, luck.choice((None, Keep(1))))
            returned = True
    state = found(url)
    assert state == NEW or not returned
    if tag == "step2" and state == OLD:
        assert found(url, "step1") == OLD
    assert locations.exists(elsewhere)


@pytest.mark.parametrize("count", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_saves_behind_a_url(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for seed in range(count):
        try:
            behind_a_url(seed, monkeypatch)
        except (AssertionError, UcpError, KeyError) as error:
            raise AssertionError(f"save behind a URL {seed}: {error!r}") from error


def test_a_full_disk_leaves_nothing(before: Path, memory: Path) -> None:
    """At whichever write the disk gets full and stays so, the folder of the failed save is gone at once."""
    for at in range(8, 60, 4):
        place = Path(tempfile.mkdtemp(dir=memory))
        shutil.copytree(before, place / "disk/run")
        simulated = SimulatedDisk(place / "disk", random.Random(at), fail_at=at, fail_for=10**6, only_writes=True)
        with simulated.inserted(), suppress(UcpError):
            save(place / "disk/run", "step2", NEW, 2, [0, 1], 0, None)
        assert [name for name in os.listdir(place / "disk/run") if name.startswith(".")] == [ELSEWHERE], at
        assert found(place / "disk/run") in TRUTH

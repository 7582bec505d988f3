"""A data loader's state on another number of ranks: which samples a whole run sees, counted one by one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, RandomSampler

import ucp
from tests.engines.pool import RankPool
from tests.job import loader_jobs
from ucp.errors import Mismatch
from ucp.job.data_loaders import kept_of, restored
from ucp.job.data_order import GlobalOrder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

LENGTH, BATCH = 240, 4
SAMPLERS = (StatefulDistributedSampler, DistributedSampler)
WORKERS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH))


def loaders(world: int, sampler: Any, workers: int = 0, shuffle: bool = False, **options: Any) -> list[Any]:
    made = []
    for rank in range(world):
        data = Numbers()
        order: Any
        if sampler is GlobalOrder:
            order = GlobalOrder(LENGTH, BATCH, rank=rank, world=world, seed=3, shuffle=shuffle)
        else:
            order = sampler(data, world, rank, shuffle=shuffle, seed=3)
        made.append(StatefulDataLoader(data, batch_size=BATCH, sampler=order, num_workers=workers, **options))
    return made


def drawn(ranks: list[Any], steps: int) -> tuple[list[int], list[dict[str, Any]]]:
    """The samples of so many steps of all ranks, and what each rank keeps then."""
    seen, kept = [], []
    for loader in ranks:
        batches = iter(loader)
        seen += [int(n) for _ in range(steps) for n in next(batches)]
        kept.append(kept_of(loader))
    return seen, kept


def rest(ranks: list[Any], kept: list[dict[str, Any]], steps: int | None = None) -> tuple[list[int], set[str]]:
    """The samples that ranks go on with: of so many steps, or of the rest of the epoch."""
    seen, notes = [], set()
    for rank, loader in enumerate(ranks):
        found = restored(kept, loader, rank, len(ranks))
        notes.add(found.note)
        loader.load_state_dict(found.state)
        batches = iter(loader)
        seen += [int(n) for b in (batches if steps is None else (next(batches) for _ in range(steps))) for n in b]
    return seen, notes


def order(shuffle: bool) -> list[int]:
    """The order that all ranks share, as torch makes it for one rank."""
    return list(DistributedSampler(Numbers(), 1, 0, shuffle=shuffle, seed=3))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("world", [3, 2, 4, 6])
@pytest.mark.parametrize("steps", [3, 4])
def test_the_samples_of_a_whole_epoch(world: int, sampler: Any, workers: int, steps: int) -> None:
    """From 4 ranks: after 48 samples, which 3, 2 and 6 ranks divide into steps, and after 64, which 3 and 6 do not."""
    shuffle = steps == 4
    before, kept = drawn(loaders(4, sampler, workers, shuffle), steps)
    seen = 4 * BATCH * steps
    assert sorted(before) == sorted(order(shuffle)[:seen])
    after, notes = rest(loaders(world, sampler, workers, shuffle), kept)
    left_out = -seen % (world * BATCH)
    assert left_out == (8 if steps == 4 and world in (3, 6) else 0)
    assert sorted(after) == sorted(order(shuffle)[seen + left_out :])
    (note,) = notes
    assert ("8 samples are left out" in note) == bool(left_out)
    assert note == "" if world == 4 else note.startswith(f"the data loader goes on at sample {seen + left_out} of")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_epoch_that_was_at_its_end(sampler: Any) -> None:
    for finished in (True, False):
        ranks = loaders(4, sampler)
        kept = []
        for loader in ranks:
            batches = iter(loader)
            for _ in range(15):
                next(batches)
            if finished:
                assert next(batches, None) is None
            kept.append(kept_of(loader))
        after, notes = rest(loaders(3, sampler), kept)
        assert sorted(after) == list(range(LENGTH))
        assert "begins an epoch" in notes.pop()


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", [3, 2, 4, 6])
def test_one_global_order_goes_on_with_any_number(world: int, workers: int) -> None:
    before, kept = drawn(loaders(4, GlobalOrder, workers, shuffle=True), 5)
    after, notes = rest(loaders(world, GlobalOrder, workers, shuffle=True), kept, 3)
    truth = iter(GlobalOrder(LENGTH, 1, rank=0, world=1, seed=3))
    assert sorted(before) == sorted(next(truth) for _ in range(80))
    assert sorted(after) == sorted(next(truth) for _ in range(3 * BATCH * world))
    assert notes == {""}


def test_a_global_order_by_itself() -> None:
    kept = []
    for rank in range(4):
        sampler = GlobalOrder(LENGTH, BATCH, rank=rank, world=4, seed=3)
        numbers = iter(sampler)
        for _ in range(3 * BATCH):
            next(numbers)
        kept.append({"dataloader": sampler.state_dict()})
    for world in (1, 3, 4):
        new = GlobalOrder(LENGTH, BATCH, rank=0, world=world, seed=3)
        new.load_state_dict(restored(kept, new, 0, world).state)
        numbers, fresh = iter(new), iter(GlobalOrder(LENGTH, BATCH, rank=0, world=world, seen=48, seed=3))
        assert [next(numbers) for _ in range(9)] == [next(fresh) for _ in range(9)]
    other = GlobalOrder(LENGTH, BATCH, rank=0, world=3, seed=4)
    with pytest.raises(Mismatch, match="its seed was 3, and it is 4"):
        restored(kept, other, 0, 3)
    inside = GlobalOrder(LENGTH, BATCH, rank=0, world=2)
    next(numbers := iter(inside))
    with pytest.raises(Mismatch, match="no whole number of batches"):
        GlobalOrder(LENGTH, BATCH, rank=0, world=3).load_state_dict(inside.state_dict())
    same = GlobalOrder(LENGTH, BATCH, rank=0, world=2)
    same.load_state_dict(inside.state_dict())
    assert [next(n) for n in [iter(same)] * 5] == [next(numbers) for _ in range(5)]


@pytest.mark.parametrize("workers", WORKERS)
def test_iterable_sets_are_refused(workers: int) -> None:
    def make() -> Any:
        return StatefulDataLoader(Stream(), batch_size=BATCH, num_workers=workers)

    _, kept = drawn([make() for _ in range(4)], 2)
    assert restored(kept, make(), 1, 4).state == kept[1]["dataloader"]
    with pytest.raises(Mismatch, match=r"an iterable data set's position \(Stream\).*GlobalOrder.*dataloader=None"):
        restored(kept, make(), 0, 3)


class Remembering(Numbers):
    def state_dict(self) -> dict[str, Any]:
        return {"cache": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("workers", WORKERS)
def test_states_of_data_sets_and_workers_are_refused(workers: int) -> None:
    def make(rank: int, world: int) -> Any:
        data = Remembering()
        sampler = StatefulDistributedSampler(data, world, rank, shuffle=False)
        return StatefulDataLoader(data, batch_size=BATCH, sampler=sampler, num_workers=workers)

    _, kept = drawn([make(rank, 4) for rank in range(4)], 2)
    with pytest.raises(Mismatch, match=r"a data set's or a worker's own state.*GlobalOrder"):
        restored(kept, make(0, 3), 0, 3)


class Every(DistributedSampler[int]):
    """Divides the samples in its own way, whatever its base does."""


def test_what_is_not_known_is_refused() -> None:
    class Own:
        def state_dict(self) -> dict[str, Any]:
            return {"position": 12}

    kept = [kept_of(Own())] * 4
    assert restored(kept, Own(), 3, 4).state == {"position": 12}
    with pytest.raises(Mismatch, match=r"the state of Own is not known to be one of 3; .*GlobalOrder"):
        restored(kept, Own(), 0, 3)
    for sampler in (None, RandomSampler(Numbers()), Every(Numbers(), 3, 0)):
        loader = StatefulDataLoader(Numbers(), batch_size=BATCH, sampler=sampler)
        _, kept = drawn([loader] * 4, 2)
        with pytest.raises(Mismatch, match=r"Sampler|Every"):
            restored(kept, loader, 0, 3)
    _, kept = drawn(loaders(4, DistributedSampler), 2)
    (other,) = loaders(1, DistributedSampler, shuffle=True)
    with pytest.raises(Mismatch, match="another order: shuffle was False and is True"):
        restored(kept, other, 0, 1)
    uneven = [*drawn(loaders(4, DistributedSampler), 2)[1][:3], *drawn(loaders(4, DistributedSampler), 3)[1][3:]]
    with pytest.raises(Mismatch, match="its ranks had drawn 8 to 12 samples"):
        restored(uneven, loaders(3, DistributedSampler)[0], 0, 3)
    with pytest.raises(Mismatch, match="it has no data loader's state"):
        restored([], loaders(3, DistributedSampler)[0], 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(2, 0), (0, 1)])
def test_other_workers(workers: tuple[int, int]) -> None:
    _, kept = drawn(loaders(4, DistributedSampler, workers[0]), 3)
    with pytest.raises(Mismatch, match="workers and this one has"):
        restored(kept, loaders(3, DistributedSampler, workers[1])[0], 0, 3)
    if workers[0]:
        after, _ = rest(loaders(3, DistributedSampler, 1), kept)
        assert sorted(after) == list(range(48, LENGTH))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [StatefulDistributedSampler, GlobalOrder])
def test_snapshots_that_are_seldom_taken(sampler: Any) -> None:
    _, kept = drawn(loaders(4, sampler, 2, snapshot_every_n_steps=2), 3)
    assert kept[0]["dataloader"]["_steps_since_snapshot"] == 1
    after, _ = rest(loaders(3, sampler, 2), kept, 16)
    assert sorted(after) == list(range(48, LENGTH))


def test_sampler_ranks_that_are_fewer_than_the_processes() -> None:
    """Two tensor-parallel ranks share each sampler's rank: 4 processes are 2 replicas, and become 4."""
    two = loaders(2, StatefulDistributedSampler)
    kept = [own for own in drawn(two, 6)[1] for _ in range(2)]
    after, _ = rest(loaders(4, StatefulDistributedSampler), kept)
    assert sorted(after) == list(range(48, LENGTH))
    assert restored(kept, loaders(2, StatefulDistributedSampler)[1], 1, 2).state == kept[2]["dataloader"]
    # What was saved by a release that kept no place: each rank is taken for a replica.
    bare = [{"dataloader": own["dataloader"]} for own in drawn(loaders(4, StatefulDistributedSampler), 3)[1]]
    after, _ = rest(loaders(3, StatefulDistributedSampler), bare)
    assert sorted(after) == list(range(48, LENGTH))


def test_in_one_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 2)
    (loader,) = loaders(1, StatefulDistributedSampler)
    drawn([loader], 3)
    ucp.save_training(tmp_path / "one", model=model, dataloader=loader)
    (again,) = loaders(1, StatefulDistributedSampler)
    with caplog.at_level(logging.WARNING, "ucp"):
        ucp.load_training(tmp_path / "one", model=model, dataloader=again)
    assert [int(n) for batch in again for n in batch] == list(range(12, LENGTH))
    assert not caplog.records


@pytest.mark.slow
def test_real_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """4 ranks save after 48 samples; 3 go on after them, and after 64 of an iterable set nobody does."""
    before = ranks.run(loader_jobs.save, str(tmp_path / "map"), 3, world_size=4)
    assert sorted(n for own in before for n in own) == list(range(48))
    after = ranks.run(loader_jobs.load, str(tmp_path / "map"), world_size=3)
    assert sorted(n for own in after for n in own) == list(range(48, LENGTH))
    ranks.run(loader_jobs.save, str(tmp_path / "stream"), 4, True, world_size=4)
    outcome = ranks.attempt(loader_jobs.load, str(tmp_path / "stream"), True, world_size=3)
    assert {f.type_name for f in outcome.failures} == {"ucp.errors.Mismatch"}
    assert "nothing was loaded: it has the data loader's states of 4 ranks, and 3 load" in outcome.failures[0].message

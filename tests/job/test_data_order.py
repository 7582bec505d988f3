"""No sample is seen twice or skipped, and the global order is the same, whatever the ranks and whenever they change."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ucp.errors import BadArgument
from ucp.job.data_order import GlobalOrder


def consumed(length: int, batch: int, world: int, seen: int, micro_steps: int) -> list[int]:
    """What all ranks read in so many micro-steps, in rank order within each."""
    ranks = [iter(GlobalOrder(length, batch, rank=r, world=world, seen=seen, seed=5)) for r in range(world)]
    return [index for _ in range(micro_steps) for rank in ranks for index in islice(rank, batch)]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=5),
)
def test_runs_on_any_ranks_go_through_one_order(length: int, runs: list[tuple[int, int, int]]) -> None:
    found: list[int] = []
    for batch, world, micro_steps in runs:
        found += consumed(length, batch, world, len(found), micro_steps)
    assert found == consumed(length, 1, 1, 0, len(found))
    for epoch in range(len(found) // length):
        assert sorted(found[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_epochs_differ_and_need_not_be_shuffled() -> None:
    first = consumed(30, 1, 1, 0, 60)
    assert first[:30] != first[30:] != list(range(30))
    plain = iter(GlobalOrder(3, 2, rank=1, world=2, shuffle=False))
    assert list(islice(plain, 4)) == [2, 0, 0, 1]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BadArgument, match="rank 2 of 2"):
        GlobalOrder(3, 1, rank=2, world=2)


def epochs(order: GlobalOrder, count: int) -> list[list[int]]:
    found = []
    for _ in range(count):
        promised = len(order)
        found.append(list(order))
        assert len(found[-1]) == promised
    return found


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 70), st.integers(1, 40))
def test_epochs_end_and_divide_the_endless_order(length: int, batch: int, world: int, seen: int, epoch: int) -> None:
    """Iterators one after the other give what one without end does; each ends at its epoch, on all ranks alike."""
    found = []
    for rank in range(world):
        order = GlobalOrder(length, batch, rank=rank, world=world, seen=seen, seed=5, epoch_length=epoch)
        assert order.epoch == seen // epoch
        found.append(epochs(order, 3))
    assert len({tuple(map(len, own)) for own in found}) == 1
    endless = iter(GlobalOrder(length, batch, rank=0, world=world, seen=seen, seed=5))
    assert [n for part in found[0] for n in part] == list(islice(endless, sum(map(len, found[0]))))
    steps = len(found[0][0]) // batch
    assert seen + (steps - 1) * world * batch < (seen // epoch + 1) * epoch <= seen + steps * world * batch


def test_a_loader_over_epochs_ends_and_has_a_length() -> None:
    order = GlobalOrder(10, 2, rank=0, world=2, seen=4, seed=1, epoch_length=10)
    loader = DataLoader(range(10), 2, sampler=order)
    assert [len(loader), len(list(loader))] == [2, 2]
    assert [order.epoch, len(loader), len(list(loader))] == [1, 2, 2]  # 12 samples were seen: two of the second epoch
    without = DataLoader(range(10), 2, sampler=GlobalOrder(10, 2, rank=0, world=2))
    with pytest.raises(TypeError, match="epoch_length=len\\(data\\)"):
        len(without)
    with pytest.raises(BadArgument, match="epoch_length"):
        GlobalOrder(10, 2, rank=0, world=2, epoch_length=0)


def test_set_epoch_goes_where_it_says(caplog: pytest.LogCaptureFixture) -> None:
    def made(seen: int = 0) -> GlobalOrder:
        return GlobalOrder(10, 2, rank=0, world=2, seen=seen, seed=1, epoch_length=10)

    whole = epochs(made(), 4)
    order = made()
    order.set_epoch(2)
    assert list(order) == whole[2]
    order.set_epoch(3)
    assert list(order) == whole[3]
    going_on = made(seen=24)
    going_on.set_epoch(2)  # the one under way
    assert list(going_on) == whole[2][2:]
    assert not caplog.messages
    going_on.set_epoch(0)
    assert "goes back from epoch 3 to epoch 0" in caplog.text
    assert list(going_on) == whole[0]
    begun = made()
    next(iter(begun))
    assert list(begun) == whole[0]  # an iterator that was left begins its epoch again
    endless = GlobalOrder(10, 2, rank=0, world=2)
    endless.set_epoch(7)  # frameworks call it without asking
    assert (endless.epoch, next(iter(endless))) == (0, next(iter(GlobalOrder(10, 2, rank=0, world=2))))


def test_a_state_within_an_epoch_goes_on_to_its_end() -> None:
    order = GlobalOrder(12, 2, rank=0, world=2, seed=1, epoch_length=12)
    numbers = iter(order)
    first = [next(numbers) for _ in range(3)]
    again = GlobalOrder(12, 2, rank=0, world=2, seed=1, epoch_length=12)
    again.load_state_dict(order.state_dict())
    assert [*first, *again] == list(GlobalOrder(12, 2, rank=0, world=2, seed=1, epoch_length=12))
    assert again.epoch == 1


def test_too_few_samples_and_no_end_are_said(caplog: pytest.LogCaptureFixture) -> None:
    for rank in range(2):
        order = GlobalOrder(3, 2, rank=rank, world=2)
        list(islice(order, 20))
    few, endless = caplog.messages
    assert "3 samples, fewer than the 4 that 2 ranks take at once" in few
    assert "without end; epoch_length=len(data)" in endless

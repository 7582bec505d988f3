"""No sample is seen twice or skipped, and the global order is the same, whatever the ranks and whenever they change."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

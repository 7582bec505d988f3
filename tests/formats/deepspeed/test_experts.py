"""Which rank holds which expert: every expert once for each of its holders, every row of a stack once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.formats.deepspeed.experts import Expert, Experts, counts, data_ranks, expert_of, group_places, ordered
from ucp.geometry import concat, coverage_fault

LAYER = "blocks.0.moe.deepspeed_moe.experts.deepspeed_experts"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{LAYER}.3.up.weight", Expert(LAYER, 3, "up.weight")),
        ("deepspeed_moe.experts.deepspeed_experts.11.w", Expert("deepspeed_moe.experts.deepspeed_experts", 11, "w")),
        ("blocks.0.moe.deepspeed_moe.gate.wg.weight", None),
        ("mydeepspeed_moe.experts.deepspeed_experts.1.w", None),
        (f"{LAYER}.x.w", None),
        ("blocks.0.mlp.experts.3.up.weight", None),
    ],
)
def test_names(name: str, expected: Expert | None) -> None:
    assert expert_of(name) == expected
    if expected:
        assert expected.name == name


@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_every_rank_holds_the_experts_of_one_expert_parallel_rank(ep: int, copies: int, data_first: bool) -> None:
    dp = ep * copies
    found = [list(data_ranks(rank, dp, ep, data_first)) for rank in range(ep)]
    assert sorted(r for group in found for r in group) == list(range(dp))
    assert all(len(group) == copies for group in found)
    if data_first:
        assert found[0] == list(range(copies))
    else:
        assert [group[0] for group in found] == list(range(ep))


@given(st.integers(1, 4), st.integers(1, 4))
def test_local_numbers_become_global_ones(ep: int, held: int) -> None:
    experts = Experts({LAYER: held})
    local = [f"{LAYER}.{i}.w" for i in range(held)]
    names = [experts.name(name, rank) for rank in range(ep) for name in local]
    assert names == [f"{LAYER}.{i}.w" for i in range(ep * held)]
    assert counts(names) == {LAYER: ep * held}
    assert experts.name("head.weight", ep) == "head.weight"


def test_stacks_are_put_together_by_their_placement() -> None:
    """Against plain indexing; the placement is not in order."""
    stack = ((3, 0), (1, 4), (2, 5))
    whole = np.arange(6 * 2 * 3).reshape(6, 2, 3)
    experts = Experts(stacks={"experts.w1": stack})
    places = [experts.place("experts.w1", (2, 2, 3), rank) for rank in range(3)]
    out = np.full(whole.shape, -1)
    for rank, placed in enumerate(places):
        assert (placed.name, placed.shape) == ("experts.w1", (6, 2, 3))
        shard = whole[list(stack[rank])].reshape(-1)
        for k in range(len(placed.blocks)):
            at, size = placed.blocks.offsets[k], placed.blocks.sizes[k]
            start = int(placed.blocks.starts[k])
            box = tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))
            out[box] = shard[start : start + int(np.prod(size))].reshape(size)
    np.testing.assert_array_equal(out, whole)
    assert coverage_fault((6, 2, 3), concat((p.blocks for p in places), 3)) is None


@given(st.permutations(range(4)), st.integers(1, 3))
def test_the_order_is_that_of_a_rank_with_all_experts(numbers: list[int], parameters: int) -> None:
    whole = [f"{LAYER}.{e}.p{p}" for e in range(4) for p in range(parameters)]
    met = [f"{LAYER}.{e}.p{p}" for e in numbers for p in range(parameters)]
    dense = ["a", "b"]
    assert ordered([*dense, *met]) == [*dense, *whole]
    assert ordered([*met, *dense]) == [*whole, *dense]
    assert ordered(dense) == dense


def test_stages_without_experts_lack_their_param_groups() -> None:
    every = [False, True, False, True]
    assert group_places(every, every) == [0, 1, 2, 3]
    assert group_places([False, False], every) == [0, 2]
    assert group_places([False, True], every) is None  # which of the two groups of experts is not told
    assert group_places([False], every) is None

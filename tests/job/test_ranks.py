"""What ranks tell each other."""

from __future__ import annotations

import pytest

from tests.engines.pool import RankPool
from tests.job import rank_jobs as jobs
from ucp.errors import Mismatch, Position, SpecError, noted, rebuilt
from ucp.job.ranks import pointer

LONG = "x" * 100_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        ["a", "a", "a"],
        ["a", "b", "a"],
        [LONG, LONG, LONG],
        [LONG, "a", LONG],
        ["a", LONG, "b"],
        ["b", LONG + "y", LONG],
    ],
    ids=["equal", "small", "large", "a small one", "a large one", "two large ones"],
)
def test_distinct_values(ranks: RankPool, values: list[str]) -> None:
    known = list(dict.fromkeys(values))
    for said, which in ranks.run(jobs.distinct, values, world_size=3):
        assert said == known
        assert [said[k] for k in which] == values


def test_a_long_error_is_said_by_one_rank_and_pointed_at_by_the_others() -> None:
    text = "nothing was loaded: the checkpoint is Adam's; " + ", ".join(f"'layer.{k}.weight'" for k in range(99))
    found = pointer(SpecError(text, Position("my.yaml", 3, 7), "picture"), 2)
    assert str(found).startswith("rank 2: my.yaml:3:7: nothing was loaded: the checkpoint is Adam's; 'layer.0.weight'")
    assert str(found).endswith(" … (rank 2's message has all of it)")
    assert len(str(found)) < 270
    assert isinstance(found, SpecError)
    assert (found.position, found.picture) == (Position("my.yaml", 3, 7), "picture")
    assert found.whole == f"rank 2: my.yaml:3:7: {text}"
    again = pointer(rebuilt(noted(Mismatch("short")), "rank 0: "), 0)  # type: ignore[arg-type]
    assert (type(again), str(again)) == (Mismatch, "rank 0: short")


@pytest.mark.slow
def test_what_all_ranks_refuse_one_of_them_tells(ranks: RankPool) -> None:
    found = ranks.run(jobs.refused_on_all_ranks, world_size=3)
    assert [kind for kind, _ in found] == ["Mismatch"] * 3
    (_, whole), *others = found
    assert whole.endswith("'of rank 0, 98'")
    for _, text in others:
        assert text.startswith("rank 0: nothing was loaded: ")
        assert text.endswith("(rank 0's message has all of it)")
        assert len(text) < 300

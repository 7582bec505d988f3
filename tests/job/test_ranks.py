"""What ranks tell each other."""

from __future__ import annotations

import pytest

from tests.engines.pool import RankPool
from tests.job import rank_jobs as jobs

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

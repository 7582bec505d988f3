"""Ranks that have this project's plugin imported already: once, in the process that they are forked from."""

from __future__ import annotations

import pytest

from tests.engines import rig_jobs
from tests.engines.pool import RankPool


@pytest.fixture(scope="session")
def ranks(ranks: RankPool) -> RankPool:
    ranks.run(rig_jobs.leave_a_mark, world_size=1, preload=("ucp.deepspeed",))
    return ranks

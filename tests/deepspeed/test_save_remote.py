"""Real engines save behind a URL, in the background, and resume from it in another layout."""

from __future__ import annotations

import os

import pytest

import ucp
from tests.deepspeed import save_jobs
from tests.deepspeed.agree import differences
from tests.engines.configs import Case
from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow


def test_saved_to_a_bucket_and_resumed_from_it(ranks: RankPool, bucket: str) -> None:
    url = f"{bucket}/engine"
    server = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    case = Case(stage=1, dp=2, groups=2, frozen=True)
    saved = ranks.run(save_jobs.to_a_url, case, url, server, world_size=2)
    other = Case(stage=3, dp=3, groups=2, frozen=True, seed=5)
    resumed = ranks.run(save_jobs.from_a_url, other, url, server, world_size=3)
    assert saved[0] is not None
    assert resumed[0] is not None
    assert differences(saved[0], resumed[0]) == []
    with ucp.open(url) as checkpoint:
        assert str(checkpoint.path) == f"{url}/global_step{checkpoint.training_state.global_steps}"
        assert checkpoint.verify() > 0

"""Runs that are killed and resume from memory, told shortly; ``scripts/survive`` tells them at length."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.engines.pool import RankPool
from tests.memory import survive_main

pytestmark = pytest.mark.slow


def test_ranks_killed_at_random_instants_lose_at_most_a_step(ranks: RankPool, tmp_path: Path, keepers: Path) -> None:
    told = survive_main.kills(ranks, str(tmp_path), str(keepers), 2, random.Random(5))
    assert told["not bit-equal"] == []
    assert told["steps lost at most"] <= 1
    assert told["resumes"] == told["kills"] >= 2
    assert told["from memory"] > 0
    assert survive_main.holds(told)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_killed_run_sees_every_sample_once_with_the_same_masks(
    ranks: RankPool, tmp_path: Path, keepers: Path, bf16: bool
) -> None:
    """It is started again by DeepSpeed's elasticity section, beside runs whose batches are in our own."""
    folder = str(tmp_path / "run")
    os.mkdir(folder)
    section = {"enabled": True, "max_train_batch_size": 13, "micro_batch_sizes": [1, 2, 3], "version": 0.1}
    told = survive_main.run(ranks, folder, str(keepers), 1, random.Random(5), bf16, section)
    assert told["samples each once"]
    assert told["masks equal"]
    assert told["losses apart at most"] <= (4e-3 if bf16 else 5e-5)
    assert told["from an unkilled run on the same ranks"] == 0.0
    assert survive_main.holds(told)
    assert not survive_main.holds({**told, "losses apart at most": 4.1e-3})

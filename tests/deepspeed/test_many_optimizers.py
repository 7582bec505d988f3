"""Engines with other packages' optimizers resume as if nothing had been: what a group counts comes back, too.

`tests.torchdist.test_many_optimizers` shows more of them without DeepSpeed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deepspeed import optimizer_jobs as jobs
from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow


CASES = [("AdEMAMix", 0), ("AdEMAMix", 1), ("AdEMAMix", 3), ("Lamb", 0), ("ADOPT", 1), ("Prodigy", 3)]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_losses_go_on(ranks: RankPool, tmp_path: Path, name: str, stage: int) -> None:
    found = ranks.run(jobs.resumed, name, stage, str(tmp_path), world_size=1)[0]
    wanted, _ = found.pop("")
    for way, (losses, error) in found.items():
        if (name, stage, way) == ("Lamb", 0, "theirs"):
            assert "'trust_ratio'" in error  # refused by name: tensors of one element beside those of the weight
        else:
            assert (losses, error) == (wanted, ""), way


def test_a_state_of_another_shape_is_not_saved(ranks: RankPool, tmp_path: Path) -> None:
    """As many elements as the weight has, in another shape, may belong anywhere."""
    outcome = ranks.attempt(jobs.resumed, "Prodigy", 0, str(tmp_path), world_size=1)
    (failure,) = outcome.failures
    assert "has shape [48], neither the parameters' shape nor a single value" in str(failure)
    assert not (tmp_path / "ours").exists() or not any((tmp_path / "ours").iterdir())

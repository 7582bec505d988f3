"""Engines with other packages' optimizers resume as if nothing had been: what a group counts comes back, too.

`tests.torchdist.test_many_optimizers` shows more of them without DeepSpeed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deepspeed import optimizer_jobs as jobs
from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow


CASES = [("AdEMAMix", 0), ("AdEMAMix", 1), ("AdEMAMix", 3), ("Lamb", 0), ("ADOPT", 1), ("Prodigy", 0), ("Prodigy", 3)]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_losses_go_on(ranks: RankPool, tmp_path: Path, name: str, stage: int) -> None:
    found = ranks.run(jobs.resumed, name, stage, str(tmp_path), world_size=1)[0]
    wanted, _ = found.pop("")
    for way, (losses, error) in found.items():
        assert (losses, error) == (wanted, ""), way

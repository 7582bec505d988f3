"""Another learning rate on purpose at a resume: what is set, and that the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deepspeed import override_jobs
from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow


def test_hyperparameters_that_a_config_overrides_are_told(ranks: RankPool, tmp_path: Path) -> None:
    (kept, reset, plain), refused = ranks.run(override_jobs.resume, str(tmp_path / "run"), world_size=1)[0]
    assert (kept[2], kept[3]) == (2, ())
    assert (reset[1], reset[2] < 2) == (0.3, True)
    assert reset[3] == (
        "weight_decay is 0.3 for all param groups, by the config's override",
        "the lr scheduler is the program's own, by the config",
    )
    assert (plain[0], plain[3]) == (5e-4, ("lr is 0.0005 for all param groups, by the config's override",))
    assert "changed as declared: lr is 0.0005" in plain[4]
    assert len(refused) == 2
    assert "would last until the lr scheduler's next step" in refused[0]
    assert "'colour', which the param groups here do not have" in refused[1]

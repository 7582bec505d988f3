"""Checkpoints of other DeepSpeed releases go on in engines of the installed one, at another stage and number of ranks,
under the plugin, and under stock DeepSpeed from converted files. With ``./scripts/test --deepspeed VERSION --smoke``
the engines are an older release's, and the newest release's files are among those that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deepspeed import older_jobs
from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow(seconds=30)

OTHER = {"z0": 3, "z1": 3, "z2": 3, "z3": 1}
"""The stage to resume at, by the stage that saved."""


NAMES = [folder.name for folder in older_jobs.folders()]
# The smoke tests of another release have two of the newest alone.
SMOKE = ("0.19.8-z1-bf16", "0.19.8-z3-bf16")
PARAMETERS = [pytest.param(name, marks=pytest.mark.smoke if name in SMOKE else ()) for name in NAMES]


@pytest.mark.parametrize("name", PARAMETERS)
def test_goes_on_in_this_release(ranks: RankPool, tmp_path: Path, name: str) -> None:
    saved = name.split("-")[1]
    world = 1 if saved == "z3" else 3
    for wrong in ranks.run(older_jobs.resumed, name, OTHER[saved], str(tmp_path / "native"), world_size=world):
        assert wrong == []

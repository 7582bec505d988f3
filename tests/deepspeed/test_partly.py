"""A load whose second phase fails: all ranks say the same, and the engine refuses until a load succeeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deepspeed import partly_jobs
from tests.deepspeed.agree import differences
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.sources import Sources
from tests.engines.truth import known
from ucp.loading.strategy import VERIFY_THEN_READ

pytestmark = pytest.mark.slow(seconds=20)

SOURCE = Case(stage=1, dp=2)
ONE, THREE = Case(stage=1, dp=3), Case(stage=3, dp=2, dtype="bf16")
TARGETS = [(ONE, False), (THREE, False), (THREE, True), (Case(stage=0, dp=2), False)]


@pytest.mark.parametrize(
    ("target", "windows"), TARGETS, ids=[f"{case.label}{' through windows' * w}" for case, w in TARGETS]
)
def test_a_failure_at_every_read(ranks: RankPool, sources: Sources, target: Case, windows: bool) -> None:
    run = sources.get(SOURCE)
    before = {path: path.read_bytes() for path in Path(run.folder).rglob("*") if path.is_file()}
    found = ranks.run(partly_jobs.fall, target, run.folder, run.tag, VERIFY_THEN_READ, windows, world_size=target.dp)
    assert len(found[0].texts) > 1
    assert {one.texts for one in found} == {found[0].texts}
    for text in found[0].texts:
        assert "the load failed when it had begun to change the engine: rank 1: OSError" in text
        assert text.endswith("load a checkpoint again (load_checkpoint), or make the engine anew (initialize)")
    for one in found:
        for name, text in one.refused.items():
            assert f"{name}() is refused: " in text
            assert "Input/output error" in text
        assert one.strategy == VERIFY_THEN_READ
        assert one.trained
    assert differences(known(run.truth), known(found[0].truth)) == []
    assert {path: path.read_bytes() for path in Path(run.folder).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_dies_between_reads(ranks: RankPool, sources: Sources, at: int) -> None:
    """The other rank does not wait for the group's timeout."""
    run = sources.get(SOURCE)
    before = {path: path.read_bytes() for path in Path(run.folder).rglob("*") if path.is_file()}
    outcome = ranks.attempt(
        partly_jobs.perish, THREE, run.folder, run.tag, VERIFY_THEN_READ, at, world_size=THREE.dp, grace=60.0
    )
    assert [(f.rank, f.kind) for f in outcome.failures] == [(1, "died")]
    text, seconds, refused = outcome.values[0]
    assert "the load failed when it had begun to change the engine: " in text
    assert text.endswith("load a checkpoint again (load_checkpoint), or make the engine anew (initialize)")
    assert seconds < 60
    assert refused.startswith("engine.step() is refused: ")
    assert {path: path.read_bytes() for path in Path(run.folder).rglob("*") if path.is_file()} == before

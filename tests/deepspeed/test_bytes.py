"""Every rank reads the bytes that it needs, and about no others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.build import build_engine
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.sources import Sources


def load_and_count(case: Case, folder: str, tag: str) -> tuple[int, int]:
    """On a rank: the bytes that were brought to it, and those that were read for that."""
    engine: Any = build_engine(case, initialize="ucp.deepspeed:initialize", extra={"ucp": {"enabled": True}})
    engine.load_checkpoint(folder, tag)
    report = engine.ucp.last_load
    return report.nbytes, report.bytes_read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Case(stage=1, dp=4, groups=2, frozen=True), Case(stage=3, dp=2, groups=2, frozen=True)),
        (Case(stage=3, dp=3, groups=2), Case(stage=2, dp=4, groups=2)),
    ],
    ids=["z1-to-z3", "z3-to-z2"],
)
def test_each_rank_reads_its_own_share(ranks: RankPool, sources: Sources, source: Case, target: Case) -> None:
    run = sources.get(source)
    truth = run.truth
    assert truth is not None
    trained = sum(t.nbytes for states in truth.params.values() for t in states.values())
    whole_on_every_rank = sum(b.nbytes for b in truth.buffers.values())
    frozen = sum(t.nbytes for t in truth.frozen.values())
    if target.stage < 3:
        whole_on_every_rank += frozen
    else:
        trained += frozen
    counted = ranks.run(load_and_count, target, run.folder, run.tag, world_size=target.dp)
    assert sum(nbytes for nbytes, _ in counted) == trained + target.dp * whole_on_every_rank
    assert sum(read for _, read in counted) <= 1.05 * (trained + target.dp * whole_on_every_rank)
    share = trained / target.dp + whole_on_every_rank
    assert all(read <= 1.15 * share for _, read in counted), "a rank read more than its share"

"""Pairs of model-parallel layouts, from one into the other, whichever kind of parallelism it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.deepspeed.agree import differences
from tests.deepspeed.pairs import CLOSE
from tests.engines import parallel_runs
from tests.engines.parallel_runs import ParallelRun
from tests.engines.pool import RankPool
from tests.engines.runs import CLIENT_STATE
from tests.engines.truth import Truth, compare, known

SEED = 5  # of the target's weights; sources have 0


@dataclass(frozen=True)
class Pair:
    """losses: '' where DeepSpeed itself computes otherwise in the target."""

    source: Any
    target: Any
    losses: str = "close"

    @property
    def label(self) -> str:
        return f"{self.source.label}--{self.target.label}"


def load(ranks: RankPool, target: Any, folder: str, section: dict[str, Any], trained: int) -> ParallelRun:
    """Into an engine of other weights, which may have trained before."""
    found: ParallelRun = ranks.run(
        parallel_runs.resume,
        target.but(seed=SEED),
        folder,
        section,
        trained,
        world_size=target.world_size,
        preload=parallel_runs.rig_of(target).PRELOAD,
    )[0]
    return found


def check(pair: Pair, run: ParallelRun, loaded: ParallelRun, truths: tuple[Truth, Truth]) -> None:
    """truths: the two runs' in terms that both layouts know."""
    assert differences(*truths) == []
    assert {k: loaded.client_state[k] for k in CLIENT_STATE} == CLIENT_STATE
    if pair.losses == "equal":
        assert compare(known(run.truth), known(loaded.truth)) == []
        assert loaded.further == run.further
        assert compare(known(run.truth_after), known(loaded.truth_after)) == []
    elif pair.losses:
        assert loaded.further == pytest.approx(run.further, rel=0, abs=CLOSE[pair.target.case.dtype])

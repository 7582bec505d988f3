"""ZeRO++'s hierarchical partitions (hpZ): the pieces and states are stage 3's, and every group of ranks has a second
copy of the weights besides, from which forward and backward gather. A load must not leave an old one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.deepspeed import plugin_jobs, save_jobs
from tests.deepspeed.agree import differences
from tests.deepspeed.pairs import Pair
from tests.deepspeed.test_load_pairs import check
from tests.deepspeed.test_save import check_contents
from tests.engines import load_jobs
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.runs import STEPS
from tests.engines.sources import Sources
from tests.engines.truth import compare, known

pytestmark = pytest.mark.slow(seconds=30)

GROUPS_OF_TWO = (("zero_hpz_partition_size", 2),)
HPZ = Case(stage=3, dp=4, dtype="bf16", groups=3, frozen=True, persistence=0, zero=GROUPS_OF_TWO)
STAGE1 = Case(stage=1, dp=2, dtype="bf16", groups=3, frozen=True)
PAIRS = [
    Pair(HPZ, HPZ, losses="equal", trained=2),
    Pair(STAGE1, HPZ.but(persistence=60), trained=1),
    Pair(HPZ, STAGE1),
    Pair(HPZ, Case(stage=3, dp=3, dtype="bf16", groups=3, frozen=True)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.label)
def test_loads_exactly(ranks: RankPool, sources: Sources, pair: Pair) -> None:
    """Equal losses show that the second copies are new: frozen ones DeepSpeed itself keeps for good."""
    check(ranks, sources, pair)


def test_saves_exactly(ranks: RankPool, tmp_path: Path) -> None:
    saved = ranks.run(save_jobs.save_and_resume, HPZ, str(tmp_path), world_size=4)[0]
    check_contents(str(tmp_path), known(saved.truth), HPZ)
    assert compare(known(saved.truth), known(saved.resumed)) == []
    assert saved.resumed_further == saved.further
    found = ranks.run(load_jobs.resume, STAGE1.but(seed=5), str(tmp_path), None, STEPS, world_size=2)[0]
    assert differences(known(saved.truth), known(found.truth)) == []


def test_engines_that_only_compute(ranks: RankPool, sources: Sources) -> None:
    """Under zero.Init, without which DeepSpeed cannot build one (it calls what only the optimizer has)."""
    run = sources.get(Case(stage=1, dp=2, frozen=True))
    case = Case(stage=3, dp=4, frozen=True, seed=5, zero=GROUPS_OF_TWO, zero_init=True)
    weights, loss, *_ = ranks.run(plugin_jobs.load_to_compute, case, run.folder, run.tag, 0, world_size=4)[0]
    truth = known(run.truth)
    expected = {**truth.module, **truth.buffers}
    assert [n for n, tensor in expected.items() if not torch.equal(weights[n], tensor)] == []
    (reference,) = ranks.run(plugin_jobs.reference_loss, case.but(zero=(), zero_init=False), expected, world_size=1)
    assert loss == pytest.approx(reference, abs=1e-5)

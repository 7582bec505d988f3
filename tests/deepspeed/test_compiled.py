"""Optimizers that DeepSpeed compiles, saved and loaded both ways at stages 1 to 3, to the bit.

With other releases: `python -m tests.engines.operators` builds them first, in a folder
of their own (``TORCH_EXTENSIONS_DIR``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.deepspeed import smoke_jobs
from tests.deepspeed.agree import differences
from tests.engines import load_jobs, operators, resume
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.sources import Sources, preload_for
from tests.engines.truth import compare, known

pytestmark = pytest.mark.slow(seconds=45)

RANKS = {1: 2, 2: 2, 3: 3}
KINDS = {
    "cpu_adam": Case(optimizer="cpu_adam", offload=True, groups=2),
    "fused_adam": Case(optimizer="fused_adam", groups=2),
}

UNREAD = "[amsgrad]: only in the first"
"""DeepSpeedCPULion's own loading of its state adds this option to its groups, which nothing reads."""


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [("cpu_adam", 1, 2), ("cpu_adam", 2, 3), ("cpu_adam", 3, 1), ("fused_adam", 3, 1)],
    ids=str,
)
def test_there_and_back(ranks: RankPool, sources: Sources, tmp_path: Path, kind: str, first: int, second: int) -> None:
    """Stock DeepSpeed saves; the other stage resumes and saves in our format; the first stage goes on from that under
    the plugin and, from converted files, under stock DeepSpeed, with the same numbers: what of its powers of betas a
    kernel raises anew after a load, it raises alike."""
    check_there_and_back(ranks, sources, tmp_path, KINDS[kind], first, second)


def test_lion_there_and_back(ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    """DeepSpeedCPULion makes a second state, too, which its update never reads."""
    check_there_and_back(ranks, sources, tmp_path, Case(optimizer="lion", offload=True, groups=2), 2, 3)


def check_there_and_back(
    ranks: RankPool, sources: Sources, tmp_path: Path, case: Case, first: int, second: int
) -> None:
    if not operators.are_built(case.optimizer):
        pytest.skip("DeepSpeed's operators are not built: python -m tests.engines.operators")
    here, there = (case.but(stage=stage, dp=RANKS[stage]) for stage in (first, second))
    run = sources.get(here)
    ours, native = str(tmp_path / "ours"), str(tmp_path / "native")
    preload, own = preload_for(here), here.but(seed=5)
    found = ranks.run(
        smoke_jobs.load_and_save, there.but(seed=5), run.folder, run.tag, ours, world_size=there.dp, preload=preload
    )[0]
    assert differences(known(run.truth), known(found)) == []
    back = ranks.run(load_jobs.resume, own, ours, run.tag, run.steps, world_size=here.dp, preload=preload)[0]
    assert differences(known(run.truth), known(back.truth)) == []  # FusedAdam puts a 0 into its groups, in a step

    ucp.convert(ours, native, to="deepspeed", layout=f"dp={here.dp},zero={first}")
    stock = ranks.run(resume.resume, own, native, None, run.steps, world_size=here.dp, preload=preload)[0]
    assert differences(known(run.truth), known(stock.truth)) == []
    assert stock.further == back.further
    told = [line for line in compare(known(stock.truth_after), known(back.truth_after)) if UNREAD not in line]
    assert told == []

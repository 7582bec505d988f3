"""Which samples whole runs see across changes of tp, pp, sp and dp: each once, in one order, whoever counts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import ucp
from tests.deepspeed import sample_jobs
from tests.deepspeed.sample_jobs import Drawn
from tests.engines import moe, releases
from tests.engines.configs import Case
from tests.engines.models import GLOBAL_BATCH
from tests.engines.moe import MoeCase
from tests.engines.pipe_runs import PipeCase
from tests.engines.pool import RankPool
from tests.engines.tp_runs import PRELOAD, TpCase
from ucp.catalog import TrainingState
from ucp.formats.shared import samples

LLAMA = TpCase(case=Case(stage=1, dp=1))  # two ranks of AutoTP
GPT = TpCase("megatron", case=Case(stage=1, dp=1))
ULYSSES = TpCase("megatron", tp=1, sp=2, case=Case(stage=1, dp=2))
PIPE = PipeCase(case=Case(stage=1, dp=1, accumulation=2))
EXPERTS = MoeCase(Case(stage=1, dp=4), ep=2)  # expert parallelism divides the data-parallel ranks and adds none
STEPS = 2


AnyCase = TpCase | PipeCase | MoeCase


def run(ranks: RankPool, case: AnyCase, folder: Path, load: bool, stock: bool = False) -> list[Drawn]:
    args = (case, str(folder), STEPS, load, stock)
    modules = moe.preload(case, ours=True) if isinstance(case, MoeCase) else PRELOAD
    world = case.case.dp if isinstance(case, MoeCase) else case.world_size
    found = ranks.run(sample_jobs.run, *args, world_size=world, preload=modules)
    return list({drawn.part: drawn for drawn in found}.values())


CHAINS: dict[str, list[AnyCase]] = {
    "tp": [LLAMA, LLAMA.but(tp=1, dp=2, stage=3), LLAMA.but(dp=2, stage=1), LLAMA.but(tp=4)],
    "accumulation": [LLAMA.but(accumulation=2), LLAMA.but(tp=1, dp=3)],
    "megatron": [GPT, GPT.but(tp=1, dp=2), GPT.but(dp=2, stage=2)],
    "sp": [ULYSSES, ULYSSES.but(sp=1, dp=3, stage=3), ULYSSES.but(dp=1), GPT],
    "pp": [PIPE, PIPE.but(pp=1, dp=2), PIPE.but(dp=2)],
    "ep": [EXPERTS, MoeCase(Case(stage=2, dp=4), ep=4), MoeCase(Case(stage=1, dp=2), ep=1), EXPERTS],
}


@pytest.mark.slow
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
@pytest.mark.parametrize("chain", CHAINS)
def test_every_sample_once(ranks: RankPool, tmp_path: Path, chain: str, stock: bool) -> None:
    """stock: DeepSpeed itself makes the first checkpoint, and its own count is what it is."""
    seen = 0
    for k, case in enumerate(CHAINS[chain]):
        found = run(ranks, case, tmp_path, k > 0, stock and k == 0)
        numbers = sorted(number for drawn in found for number in drawn.numbers)
        assert numbers == list(range(seen, seen + len(numbers)))
        before, seen = seen, seen + len(numbers)
        assert len(numbers) == STEPS * GLOBAL_BATCH * case.case.accumulation
        if stock and k == 0:
            times = case.tp if isinstance(case, TpCase) and case.kind == "autotp" else 1
            assert times == 1 or found[0].seen[1] == seen * times
        else:
            assert {drawn.seen for drawn in found} == {(before, seen)}
        changed = k > 0 and case.case.accumulation != CHAINS[chain][k - 1].case.accumulation
        assert any("global batch size changes" in w for drawn in found for w in drawn.warnings) == changed
        releases.skip_unreadable(str(tmp_path))
        with ucp.open(tmp_path) as checkpoint:
            state = checkpoint.training_state
            assert (state.global_samples, state.global_batch_size) == (seen, len(numbers) // STEPS)


AUTOTP = {"tensor_parallel": {"autotp_size": 2}, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}


def test_what_an_earlier_release_has_recorded() -> None:
    """It took DeepSpeed's count; what is recorded now is not divided again."""
    old = TrainingState(global_steps=5, global_samples=240, dp_world_size=2, global_batch_size=48, config=AUTOTP)
    new = replace(old, global_samples=120, global_batch_size=24)
    assert samples.counted_by_us(old) == new
    assert samples.counted_by_us(new) == new
    plain = replace(old, config={**AUTOTP, "tensor_parallel": {"autotp_size": 1}})
    assert samples.counted_by_us(plain) == plain
    for config in ({"tensor_parallel": "x"}, {"tensor_parallel": {"autotp_size": "2"}}, {}):
        assert samples.autotp_size(config) == 1
    by_batch = replace(old, config={"tensor_parallel": {"autotp_size": 2}, "train_batch_size": 48})
    assert samples.counted_by_us(by_batch).global_samples == 120
    unknown = replace(old, config={"tensor_parallel": {"autotp_size": 2}})
    assert samples.counted_by_us(unknown) == unknown

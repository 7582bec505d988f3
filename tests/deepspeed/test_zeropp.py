"""ZeRO++. Its hierarchical partitions (hpZ): the pieces and states are stage 3's, and every group of ranks has a second
copy of the weights besides, from which forward and backward gather. A load must not leave an old one. And its quantized
weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ucp
from tests.deepspeed import plugin_jobs, save_jobs, zeropp_jobs
from tests.deepspeed.agree import differences
from tests.deepspeed.pairs import Pair
from tests.deepspeed.test_load_pairs import check
from tests.deepspeed.test_save import check_contents
from tests.engines import load_jobs
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.runs import STEPS, Run
from tests.engines.sources import Sources, preload_for
from tests.engines.truth import compare, known
from ucp.errors import Unsupported

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


LLAMA = Case(stage=3, dp=2, dtype="bf16", model="llama", groups=2, frozen=True, persistence=0)
QUANTIZED = LLAMA.but(zero=(("zero_quantized_weights", True),))


@pytest.fixture(scope="module")
def quantized(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run under DeepSpeed alone that quantizes what its ranks exchange."""
    folder = str(tmp_path_factory.mktemp("quantized"))
    needs = preload_for(QUANTIZED)
    run, count = ranks.run(zeropp_jobs.train, QUANTIZED, folder, world_size=2, preload=needs)[0]
    assert count > 100_000
    return run


class TestQuantizedWeights:
    """Codes are only what the ranks exchange: the pieces and states that each keeps are stage 3's. How DeepSpeed groups
    what it quantizes, and so a loss, is otherwise in an engine's first step, before it knows its layers' order."""

    @pytest.mark.parametrize(
        "target",
        [LLAMA.but(stage=1, persistence=None), QUANTIZED.but(dp=4, zero=(*QUANTIZED.zero, *GROUPS_OF_TWO))],
        ids=lambda case: case.label,
    )
    def test_loads_exactly(self, ranks: RankPool, quantized: Run, target: Case) -> None:
        found = ranks.run(zeropp_jobs.resume, target.but(seed=5), quantized, 1, world_size=target.dp)[0]
        assert differences(known(quantized.truth), known(found.truth)) == []

    def test_goes_on_as_if_nothing_had_been(self, ranks: RankPool, quantized: Run) -> None:
        found = ranks.run(zeropp_jobs.resume, QUANTIZED.but(seed=5), quantized, 1, world_size=2)[0]
        assert compare(known(quantized.truth), known(found.truth)) == []
        assert found.further == quantized.further
        assert compare(known(quantized.truth_after), known(found.truth_after)) == []

    def test_goes_on_as_deepspeeds_own_resume_does(self, ranks: RankPool, quantized: Run) -> None:
        ours, native = (
            ranks.run(job, QUANTIZED.but(seed=5), quantized, 0, world_size=2)[0]
            for job in (zeropp_jobs.resume, zeropp_jobs.resume_natively)
        )
        assert ours.further == native.further != quantized.further
        assert compare(known(native.truth_after), known(ours.truth_after)) == []

    def test_saves_exactly(self, ranks: RankPool, tmp_path: Path) -> None:
        saved = ranks.run(zeropp_jobs.save_and_resume, QUANTIZED, str(tmp_path), world_size=2)[0]
        check_contents(str(tmp_path), known(saved.truth), QUANTIZED)
        assert compare(known(saved.truth), known(saved.resumed)) == []


def test_frozen_weights_of_which_only_codes_were_saved(ranks: RankPool, tmp_path: Path) -> None:
    """DeepSpeed keeps their scales beside the codes and saves only these. (0.19.8 cannot compute with them: it takes
    the codes for weights.)"""
    case = LLAMA.but(zero=(("zero_quantized_nontrainable_weights", True),))
    ranks.run(zeropp_jobs.save_untrained, case, str(tmp_path), world_size=2, preload=preload_for(case))
    with pytest.raises(
        Unsupported, match=r"'model\.layers\.0\.self_attn\.k_proj\.weight' as 8-bit codes without their"
    ):
        ucp.open(tmp_path)

"""Engines with DeepSpeed's own experts: into any number of expert-parallel and data-parallel ranks, exactly.

The truth is what all ranks of the source engine held when it saved, by the experts' numbers in the whole model; the
target begins with other weights. DeepSpeed's own converter fails for these models.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.deepspeed.agree import differences
from tests.engines import moe
from tests.engines.configs import Case
from tests.engines.moe import MoeCase, MoeSources
from tests.engines.runs import Run
from tests.engines.truth import compare, known

pytestmark = pytest.mark.slow(seconds=70)

# The largest difference of a step's loss in another layout. In bf16, sums taken in another order may send a token whose
# two best experts are nearly equal to the other one.
CLOSE = {"fp32": 5e-5, "bf16": 8e-3, "bf16_optimizer": 8e-3}

FOUR = Case(stage=1, dp=4)
EP2 = MoeCase(FOUR, ep=2)
BF16 = FOUR.but(dtype="bf16", groups=2)
ACCUMULATES_IN_FP32 = MoeCase(BF16.but(dtype="bf16_optimizer"), ep=2, frozen=True)


@dataclass(frozen=True)
class Pair:
    """trained: steps that the target has done when it loads; universal: the source is saved by this project."""

    source: MoeCase
    target: MoeCase
    trained: int = 0
    universal: bool = False

    @property
    def label(self) -> str:
        return f"{self.source.label}{'-universal' * self.universal}->{self.target.label}-trained{self.trained}"


PAIRS = [
    # the layouts that issue 3 names: ep2 on four ranks into ep4, ep1, two ranks, itself
    Pair(EP2, EP2, trained=2),
    Pair(EP2, MoeCase(FOUR, ep=4)),
    Pair(EP2, MoeCase(FOUR, ep=1), trained=2),
    Pair(EP2, MoeCase(FOUR.but(dp=2), ep=1)),
    Pair(EP2, MoeCase(FOUR.but(stage=2, dp=2), ep=2), trained=2),
    Pair(EP2, MoeCase(FOUR.but(stage=0, dp=1), ep=1)),
    Pair(MoeCase(FOUR, ep=4), MoeCase(FOUR.but(stage=2), ep=2), trained=2),
    Pair(MoeCase(FOUR, ep=1), MoeCase(FOUR.but(stage=0), ep=4)),
    Pair(MoeCase(FOUR.but(dp=2), ep=2), MoeCase(FOUR, ep=1)),
    # with and without expert parallelism at every stage
    Pair(MoeCase(FOUR.but(stage=2), ep=1), MoeCase(FOUR, ep=2)),
    Pair(MoeCase(FOUR.but(stage=0), ep=1), MoeCase(FOUR.but(stage=2), ep=4)),
    Pair(EP2, MoeCase(FOUR.but(stage=2), ep=1)),
    # stage 0, whose optimizers name no parameters
    Pair(MoeCase(FOUR.but(stage=0), ep=2), MoeCase(FOUR.but(stage=0), ep=2), trained=2),
    Pair(MoeCase(FOUR.but(stage=0), ep=2), MoeCase(FOUR, ep=4)),
    Pair(MoeCase(FOUR.but(stage=0), ep=4), MoeCase(FOUR.but(stage=0, dp=2), ep=1), trained=2),
    Pair(MoeCase(BF16.but(stage=0), ep=2), MoeCase(BF16.but(stage=2), ep=4)),
    # element types, param groups, frozen experts, layers over different numbers of ranks, other orders of ranks
    Pair(MoeCase(BF16.but(stage=2), ep=4), MoeCase(BF16.but(dtype="bf16_optimizer"), ep=2), trained=2),
    Pair(ACCUMULATES_IN_FP32, MoeCase(BF16.but(dtype="bf16_optimizer"), ep=4, frozen=True)),
    Pair(ACCUMULATES_IN_FP32, MoeCase(BF16.but(stage=0), ep=4, frozen=True)),
    Pair(MoeCase(BF16.but(stage=2), ep=2, frozen=True), MoeCase(BF16.but(stage=0), ep=4, frozen=True)),
    Pair(MoeCase(BF16, ep=2), MoeCase(BF16, ep=2), trained=2),
    Pair(
        MoeCase(FOUR.but(round_robin=True), ep=2, later_ep=4, data_first=True),
        MoeCase(FOUR.but(stage=2, round_robin=True), ep=4, later_ep=1),
        trained=2,
    ),
    Pair(MoeCase(FOUR, ep=2), MoeCase(FOUR.but(stage=2), ep=1, later_ep=2, data_first=True)),
    # saved by this project
    Pair(MoeCase(FOUR, ep=2, frozen=True), MoeCase(FOUR.but(stage=0), ep=4, frozen=True), universal=True),
    Pair(MoeCase(FOUR, ep=2), MoeCase(FOUR, ep=2), universal=True, trained=2),
    Pair(MoeCase(BF16.but(stage=0), ep=2), MoeCase(BF16.but(stage=2, dp=2), ep=1), universal=True),
    Pair(
        MoeCase(FOUR.but(stage=2), ep=4, later_ep=2, data_first=True), MoeCase(FOUR, ep=1, later_ep=4), universal=True
    ),
]


def load(sources: MoeSources, target: MoeCase, run: Run, trained: int, last: bool) -> Run:
    found: Run = sources.pool.run(
        moe.resume,
        target.but(seed=5),
        run.folder,
        run.tag,
        moe.INITIALIZE,
        {"ucp": {"enabled": True}},
        trained,
        last,
        world_size=target.case.dp,
        preload=moe.preload(target, ours=True),
    )[0]
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.label)
def test_loads_exactly(moe_sources: MoeSources, pair: Pair) -> None:
    run = moe_sources.get(pair.source, pair.universal)
    loaded = load(moe_sources, pair.target, run, pair.trained, pair.source == pair.target)
    assert differences(known(run.truth), known(loaded.truth)) == []
    assert len(loaded.further) >= 3
    if pair.source == pair.target:
        assert loaded.further == run.further
        assert compare(known(run.truth_after), known(loaded.truth_after)) == []
    else:
        assert loaded.further == pytest.approx(run.further, rel=0, abs=CLOSE[pair.target.case.dtype])


@pytest.mark.parametrize("case", [EP2, MoeCase(BF16.but(stage=0), ep=4)], ids=lambda case: case.label)
def test_fragments_hold_everything_once(moe_sources: MoeSources, case: MoeCase) -> None:
    """What this project saves of such an engine, read as a catalog."""
    import ucp
    from tests.formats.deepspeed.read.test_matrix import check_parameters, check_tensors

    run = moe_sources.get(case, universal=True)
    with ucp.open(run.folder) as checkpoint:
        assert checkpoint.format == "universal"
        assert checkpoint.layout.ep == case.ep
        check_tensors(checkpoint, known(run.truth))
        check_parameters(checkpoint, known(run.truth))

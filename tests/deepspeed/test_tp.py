"""Tensor-parallel engines resume and save: any number of ranks into any other, and into one plain module, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.deepspeed import parallel_pairs
from tests.deepspeed.parallel_pairs import Pair, load
from tests.engines.configs import Case
from tests.engines.models import GLOBAL_BATCH
from tests.engines.parallel_runs import ParallelRun, ParallelSources
from tests.engines.pool import RankPool
from tests.engines.runs import STEPS
from tests.engines.tp_runs import TpCase
from tests.engines.tp_truth import without_padding
from tests.engines.truth import Truth, known
from tests.formats.deepspeed.read.test_matrix import check_parameters, check_tensors

pytestmark = pytest.mark.slow


LLAMA = TpCase()
OPTIONS = TpCase(case=Case(stage=1, dp=2, groups=3, frozen=True, scheduler=True))
UNEVEN = TpCase(kv_heads=3, case=Case(stage=1, dp=2, dtype="bf16"))
IDLE = TpCase(kv_heads=3, tp=4, case=Case(stage=1, dp=1))  # one rank has no heads
TIED = TpCase(case=Case(stage=2, dp=2, tied=True))
GPT = TpCase("megatron")
ULYSSES = TpCase("megatron", tp=1, sp=2, case=Case(stage=1, dp=2))
SLICED = TpCase("megatron", sp=2, case=Case(stage=1, dp=1))
SILENT = TpCase("megatron", tp=4, info=False, case=Case(stage=2, dp=1, dtype="bf16", groups=2))


PAIRS = [
    # the same layout
    *(
        Pair(case, case, "equal")
        for case in (
            LLAMA.but(stage=3),
            OPTIONS,
            UNEVEN,
            IDLE,
            GPT,
            SILENT,
        )
    ),
    # from two tensor-parallel ranks to one, to four, and to plain data parallelism
    Pair(LLAMA, LLAMA.but(tp=1, stage=3, dp=4)),
    Pair(LLAMA, LLAMA.but(tp=4, stage=2, dp=1)),
    Pair(LLAMA, LLAMA.but(tp=1, stage=0, dp=2)),
    Pair(LLAMA.but(stage=3), LLAMA.but(tp=4, stage=1, dp=1)),
    Pair(OPTIONS, OPTIONS.but(tp=1, stage=3, dp=3)),
    Pair(OPTIONS.but(tp=1, stage=2, dp=3), OPTIONS.but(stage=3)),
    # three key heads on two ranks, and on four, of which one has none
    Pair(UNEVEN, UNEVEN.but(tp=1, stage=2, dp=3)),
    Pair(UNEVEN, UNEVEN.but(stage=3, dp=1)),
    Pair(UNEVEN.but(tp=1, stage=3, dp=2), UNEVEN),
    Pair(IDLE, IDLE.but(tp=2, stage=3, dp=2)),
    Pair(IDLE.but(tp=2, stage=2), IDLE),
    Pair(IDLE.but(tp=1, stage=0), IDLE),
    # a head that is cut together with the embedding it is tied to
    Pair(TIED, TIED.but(tp=1, stage=3)),
    Pair(TIED.but(tp=1), TIED.but(tp=4, stage=1, dp=1)),
    # Megatron's cuts: interleaved groups of heads, gate and up in one weight, a padded vocabulary
    Pair(GPT, GPT.but(tp=1, stage=3, dp=4)),
    Pair(GPT, GPT.but(tp=4, info=False, stage=2, dp=1)),
    Pair(SILENT, SILENT.but(tp=1, stage=3, dp=2)),
    Pair(SILENT, SILENT.but(tp=2, stage=1, dp=2)),
    Pair(GPT.but(tp=1, stage=3), GPT),
    # sequence parallelism (Ulysses): every rank has all parameters, and ZeRO cuts them over all ranks
    Pair(ULYSSES, ULYSSES, "equal"),
    Pair(ULYSSES.but(stage=3), ULYSSES.but(stage=3), "equal"),
    Pair(ULYSSES, ULYSSES.but(sp=1, stage=3, dp=3)),
    Pair(ULYSSES, ULYSSES.but(sp=4, stage=2, dp=1)),
    Pair(ULYSSES.but(stage=3, dp=1), ULYSSES.but(sp=1), losses=""),
    Pair(ULYSSES, GPT),
    Pair(GPT, ULYSSES),
    # both together, over four ranks
    Pair(SLICED, SLICED, "equal"),
    Pair(SLICED, GPT.but(tp=1, stage=3, dp=3)),
    Pair(ULYSSES, SLICED),
]


def section(*cases: TpCase) -> dict[str, Any]:
    """The config's section: of padding, a plain module that says nothing of itself can't be known to have any."""
    return {"spec": "megatron_gpt_plain"} if any(not c.info and c.tp == 1 for c in cases) else {}


def truths(pair: Pair, run: ParallelRun, loaded: ParallelRun) -> tuple[Truth, Truth]:
    """Padding of one width is restored; there is none of another to restore."""
    a, b = known(run.truth), known(loaded.truth)
    widths = [{n: t["param"].shape for n, t in truth.params.items()} for truth in (a, b)]
    return (a, b) if widths[0] == widths[1] else (without_padding(a), without_padding(b))


def check(pair: Pair, run: ParallelRun, loaded: ParallelRun) -> None:
    consumed = STEPS * GLOBAL_BATCH * pair.source.case.accumulation
    assert {known(truth).counters["global_samples"] for truth in (run.truth, loaded.truth)} == {consumed}
    parallel_pairs.check(pair, run, loaded, truths(pair, run, loaded))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.label)
def test_loads_exactly(ranks: RankPool, sliced: ParallelSources, pair: Pair) -> None:
    run = sliced.get(pair.source)
    more = section(pair.source, pair.target)
    check(pair, run, load(ranks, pair.target, run.folder, more, 0 if pair.losses == "equal" else 1))


SAVES = [
    Pair(OPTIONS, OPTIONS, "equal"),
    Pair(UNEVEN, UNEVEN.but(tp=1, stage=3, dp=3)),
    Pair(IDLE, IDLE.but(tp=2, stage=2, dp=2)),
    Pair(TIED.but(stage=3), TIED.but(tp=1, stage=1)),
    Pair(GPT, GPT, "equal"),
    Pair(SILENT, SILENT.but(tp=2, stage=3, dp=2)),
    Pair(GPT.but(tp=1, stage=3), GPT.but(tp=4, stage=1, dp=1)),
    Pair(ULYSSES, ULYSSES.but(sp=1, stage=3)),
    Pair(SLICED, SLICED.but(stage=2)),
]


@pytest.mark.parametrize("pair", SAVES, ids=lambda pair: pair.label)
def test_saves_all_that_the_ranks_hold(ranks: RankPool, sliced: ParallelSources, pair: Pair) -> None:
    """Fragments of every rank, each element once; they resume in any layout."""
    run = sliced.get(pair.source, {"save": {"async": False}})
    with ucp.open(run.folder) as checkpoint:
        assert checkpoint.format == "universal"
        truth = known(run.truth)
        check_tensors(checkpoint, truth)
        check_parameters(checkpoint, truth)
        held = sum(t.nbytes for t in checkpoint.catalog.tensors.values())
        written = sum(data_size(f) for f in (Path(run.folder) / run.tag).glob("*.safetensors"))
        assert held <= written < 1.02 * held
    check(pair, run, load(ranks, pair.target, run.folder, section(pair.source, pair.target), 1))


def data_size(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with path.open("rb") as stream:
        return path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")

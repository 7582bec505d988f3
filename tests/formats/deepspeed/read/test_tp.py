"""Tensor-parallel ranks' own files, read into whole tensors, against what the engines of all ranks held."""

from __future__ import annotations

import pytest

import ucp
from tests.engines import releases
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelSources
from tests.engines.tp_runs import TpCase, spec_of
from tests.engines.truth import known
from tests.formats.deepspeed.read.test_matrix import check_parameters, check_regions, check_tensors
from ucp.errors import Unsupported

pytestmark = pytest.mark.slow

CASES = [
    TpCase(),
    TpCase(case=Case(stage=3, dp=2)),
    TpCase(case=Case(stage=3, dp=2, zero_init=True, dtype="bf16")),
    TpCase(case=Case(stage=1, dp=2, groups=3, frozen=True, scheduler=True)),
    TpCase(kv_heads=3, case=Case(stage=1, dp=2, dtype="bf16")),
    TpCase(kv_heads=3, tp=4, case=Case(stage=1, dp=1)),
    TpCase(case=Case(stage=2, dp=2, tied=True)),
    TpCase("megatron"),
    TpCase("megatron", tp=4, info=False, case=Case(stage=2, dp=1, dtype="bf16", groups=2)),
    TpCase("megatron", case=Case(stage=0, dp=1)),
]


@pytest.mark.parametrize("tp", CASES, ids=lambda tp: tp.label)
def test_everything_read_is_what_the_ranks_held(sliced: ParallelSources, tp: TpCase) -> None:
    run = sliced.get(tp)
    truth = known(run.truth)
    said = spec_of(tp) if is_silent(run.folder) else {}
    with ucp.open(run.folder, **said) as checkpoint:
        layout = checkpoint.layout
        assert (layout.dp, layout.tp, layout.pp, layout.zero) == (tp.case.dp, tp.tp, 1, tp.case.stage)
        check_tensors(checkpoint, truth)
        check_regions(checkpoint, truth)
        check_parameters(checkpoint, truth)


def is_silent(folder: str) -> bool:
    """Whether these files of another release than the pinned one do not say how AutoTP has cut the model, and are
    refused for that."""
    if releases.is_pinned():
        return False
    try:
        ucp.open(folder).close()
    except Unsupported as refusal:
        return "nothing says how they cut" in str(refusal)
    return False

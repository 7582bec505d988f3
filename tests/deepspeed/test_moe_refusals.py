"""Engines with experts that cannot take a checkpoint: all ranks refuse by name, and nothing changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.deepspeed import moe_parallel_jobs
from tests.engines import moe, releases
from tests.engines.configs import Case
from tests.engines.moe import MoeCase, MoeSources
from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow

FOUR = Case(stage=1, dp=4)
EP2 = MoeCase(FOUR, ep=2)
EXPERT = r"deepspeed_moe\.experts\.deepspeed_experts"


def refusals(sources: MoeSources, target: MoeCase, source: MoeCase = EP2) -> list[str]:
    run = sources.get(source)
    found = sources.pool.run(
        moe.refuse,
        target,
        run.folder,
        run.tag,
        world_size=target.case.dp,
        preload=moe.preload(target, ours=True),
    )
    assert all(kind and not changed for kind, _, changed in found)
    return [f"{kind}: {text}" for kind, text, _ in found]


def test_more_experts_than_were_saved(moe_sources: MoeSources) -> None:
    """Every rank speaks of the same parameters, whichever experts it holds itself."""
    texts = refusals(moe_sources, replace(EP2, experts=8))
    assert len(set(texts)) == 1
    assert re.search(rf"^Mismatch: .*would stay unrestored: parameter 'first\.{EXPERT}\.4\.", texts[0])


def test_fewer_experts_than_were_saved(moe_sources: MoeSources) -> None:
    texts = refusals(moe_sources, replace(MoeCase(FOUR.but(stage=0, dp=2), ep=2), experts=2))
    assert len(set(texts)) == 1
    assert re.search(rf"^Mismatch: .*would stay unused: parameter 'first\.{EXPERT}\.2\.", texts[0])


MIXTRAL = ("transformers.models.mixtral.modeling_mixtral", "ucp.deepspeed")


@pytest.mark.skipif(not releases.is_pinned(), reason="what the pinned DeepSpeed does")
@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        (moe_parallel_jobs.ulysses, (), "AutoEP does not currently support tensor model parallelism from mpu"),
        (moe_parallel_jobs.step_of_sliced, (), "invalid tensor size"),
        (moe_parallel_jobs.planned, (), "HuggingFace tp_plan contains unsupported partition style"),
    ],
    ids=[
        "AutoEP with DeepSpeed's own mesh of sequences",
        "MoE layers with AutoTP on a CPU",
        "AutoEP with AutoTP by Mixtral's plan",
    ],
)
def test_what_deepspeed_itself_cannot_do(
    ranks: RankPool, job: Callable[..., None], arguments: tuple[str, ...], words: str
) -> None:
    """Its own mesh passes for one of tensor parallelism, and AutoEP knows no such (`test_moe_beside.py` has another
    mesh); its MoE layers gather tokens of slices into a buffer of a shape that gloo does not take."""
    outcome = ranks.attempt(job, *arguments, world_size=4, preload=MIXTRAL)
    assert any(words in failure.message for failure in outcome.failures)

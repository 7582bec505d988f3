"""Engines with experts that cannot take a checkpoint: all ranks refuse by name, and nothing changes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.engines import moe
from tests.engines.configs import Case
from tests.engines.moe import MoeCase, MoeSources

pytestmark = pytest.mark.slow

FOUR = Case(stage=1, dp=4)
EP2 = MoeCase(FOUR, ep=2)
EXPERT = r"deepspeed_moe\.experts\.deepspeed_experts"


def refusals(sources: MoeSources, target: MoeCase, source: MoeCase = EP2, **options: int) -> list[str]:
    run = sources.get(source)
    found = sources.pool.run(
        moe.refuse,
        target,
        run.folder,
        run.tag,
        **options,
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


def test_sequence_parallelism(moe_sources: MoeSources) -> None:
    for text in refusals(moe_sources, EP2, ranks_of_sequences=2):
        assert text.startswith("Unsupported: this engine uses mixture-of-experts layers together with tensor")
        assert "nothing was changed" in text

"""An engine that computes in fewer bits is proved whole after a load: what it keeps rounded, and what is no number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed import proof_jobs as jobs
from tests.engines.configs import Case
from tests.engines.pool import RankPool

pytestmark = pytest.mark.slow

SOURCE = Case(stage=1, dp=2, frozen=True)
TARGETS = [Case(stage=1, dp=2, dtype="bf16", frozen=True), Case(stage=3, dp=2, dtype="fp16", frozen=True)]
FAULTS = [jobs.frozen_weight, jobs.trained_weight]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nans") / "run"
    ranks.run(jobs.save_with_nans, SOURCE, str(folder), world_size=SOURCE.dp)
    return folder


@pytest.mark.parametrize("target", TARGETS, ids=lambda case: case.label)
def test_nothing_is_left_without_a_proof(ranks: RankPool, saved: Path, target: Case) -> None:
    for found in ranks.run(jobs.load, target, str(saved), world_size=target.dp):
        assert found.kind == "", found.text
        assert found.unproved == ()
        assert found.rounded


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("target", TARGETS, ids=lambda case: case.label)
def test_faults_of_what_is_rounded_are_found(ranks: RankPool, saved: Path, target: Case, fault: Any) -> None:
    for found in ranks.run(jobs.load, target, str(saved), fault, world_size=target.dp):
        assert found.kind == "ProofFailed", found
        assert re.search(r" 1 of \d+ tensors differ: .* \(weights\): ", found.text)

"""Experts beside slices of tensors, beside shared sequences, and in stages of slices: what is read, resumed and saved.

DeepSpeed's own layers train so on CPU ranks where they gather tokens flat (`moe_beside_jobs.gather_flat`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.deepspeed import moe_beside_jobs as jobs
from tests.deepspeed.agree import differences
from tests.deepspeed.moe_read import check_read
from tests.deepspeed.pairs import CLOSE
from tests.engines import autoep, releases
from tests.engines.autoep import AutoCase
from tests.engines.configs import Case
from tests.engines.moe import MoeCase
from tests.engines.pool import RankPool
from tests.engines.truth import known
from tests.formats.deepspeed.read.test_matrix import check_tensors
from ucp.inspection.planning import plan
from ucp.parallel.mesh import parse_layout

pytestmark = [
    pytest.mark.slow(seconds=60),
    pytest.mark.skipif(not releases.is_pinned(), reason="what the pinned DeepSpeed trains"),
]

FOUR = Case(stage=1, dp=4)
AUTO = FOUR.but(model="llama")
RANKS: Any = {"world_size": 4, "preload": autoep.PRELOAD}
Tensors = dict[str, dict[str, torch.Tensor]]
# How AutoTP cuts the model of `moe_parallel_jobs.sliced`, for a plan of other numbers of ranks than the source's.
SLICES = """\
ucp: 1
model: slices
sizes: {size: 6, inner: 12, experts: 4}
parameters:
  0.weight: "inner/tp size"
  1.weight: "size inner/tp"
  2.moe.deepspeed_moe.gate.wg.weight: experts size
"""

STAGES = """\
ucp: 1
model: stages
sizes: {size: 6, experts: 4}
parameters:
  "{n}.weight": size size
  "{n}.bias": size
  "{n}.moe.deepspeed_moe.gate.wg.weight": experts size
"""


def check(folder: Path, truth: Tensors, layout: str, spec: Path | None = None) -> None:
    with ucp.open(folder, spec=spec) as checkpoint:
        assert str(checkpoint.layout) == layout
        check_read(checkpoint, truth)


def same(found: Tensors, truth: Tensors) -> None:
    assert found.keys() == truth.keys()
    for name, states in truth.items():
        assert found[name].keys() == states.keys()
        assert [state for state, value in states.items() if not torch.equal(found[name][state], value)] == [], name


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (MoeCase(FOUR, ep=2), MoeCase(FOUR.but(stage=2), ep=4)),
        (AutoCase(AUTO, ep=2), AutoCase(AUTO.but(stage=2), ep=4)),
    ],
    ids=["MoE layers", "AutoEP"],
)
def test_shared_sequences(ranks: RankPool, tmp_path: Path, source: Any, target: Any) -> None:
    """Two ranks share each sequence: from stock DeepSpeed's files into the same, over other ranks, and without."""
    run = ranks.run(jobs.trained_beside_sequences, source, str(tmp_path / "stock"), **RANKS)[0]
    truth = known(run.truth)
    folder = "stock"
    for case, save, mesh in (
        (source.but(seed=5), "ours", False),
        (target.but(seed=6), "other", False),
        (source.but(seed=7), "alone", None),
        *([(source.but(seed=8), "mixed", True)] if isinstance(source, MoeCase) else ()),
    ):
        with ucp.open(tmp_path / folder) as checkpoint:
            assert (checkpoint.layout.dp, checkpoint.layout.tp) == (4, 1)
            check_tensors(checkpoint, truth)
        found, complete, losses, warned = ranks.run(
            jobs.loaded_beside_sequences, case, str(tmp_path / folder), str(tmp_path / save), mesh, **RANKS
        )[0]
        assert complete
        assert differences(truth, known(found)) == []
        assert any("takes ranks that share a sequence for slices" in text for text in warned) == bool(mesh)
        if folder == "stock":
            assert losses == list(run.further)
        elif losses:  # ranks of one sequence add up their gradients, which AdamW's epsilon tells from their mean
            assert losses == pytest.approx(run.further, rel=0, abs=1e-3)
        folder = save


def test_slices(ranks: RankPool, tmp_path: Path) -> None:
    """DeepSpeed's own layers under AutoTP: experts lie on ranks of several slices, and are not cut."""
    (tmp_path / "slices.yaml").write_text(SLICES)
    truth, losses = ranks.run(jobs.trained_beside_slices, str(tmp_path / "stock"), 2, 4, 1, **RANKS)[0]
    check(tmp_path / "stock", truth, "dp=2,tp=2,ep=4,zero=1")
    # (source, tp, ep, ZeRO stage)
    for source, tp, ep, stage in (("stock", 2, 4, 1), ("2-4-1", 2, 2, 2), ("2-2-2", 2, 1, 0), ("2-1-0", 1, 4, 1)):
        save = f"{tp}-{ep}-{stage}"
        every = ranks.run(
            jobs.loaded_beside_slices, str(tmp_path / source), str(tmp_path / save), tp, ep, stage, **RANKS
        )
        found, complete, further, _ = every[0]
        assert complete
        same(found, truth)
        if ep <= 4 // tp:  # a layout's ep divides its dp
            layout = parse_layout(f"dp={4 // tp},tp={tp},ep={ep},zero={stage}")
            with ucp.open(tmp_path / source) as checkpoint:
                planned = plan(checkpoint, layout, spec=tmp_path / "slices.yaml" if tp > 1 else None)
            assert [rank.bytes for rank in planned.ranks] == [nbytes for *_, nbytes in every]
        assert further == (losses if source == "stock" else pytest.approx(losses, rel=0, abs=CLOSE["fp32"]))
        with ucp.open(tmp_path / save) as checkpoint:
            for name, states in truth.items():
                assert all(torch.equal(checkpoint.read(name, s), value) for s, value in states.items()), (name, save)


def test_stages_of_slices(ranks: RankPool, tmp_path: Path) -> None:
    """DeepSpeed's own files of its own layers in two stages of two slices."""
    (tmp_path / "stages.yaml").write_text(STAGES)
    truth = ranks.run(jobs.trained_in_stages_and_slices, str(tmp_path / "stock"), **RANKS)[0]
    check(tmp_path / "stock", truth, "dp=1,tp=2,pp=2,ep=2,zero=1", tmp_path / "stages.yaml")

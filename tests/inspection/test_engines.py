"""Checkpoints that real DeepSpeed engines have just written: good ones, and those of them with planted faults."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import ucp
from tests.engines.configs import Case
from tests.inspection import jobs
from ucp.inspection.difference import diff
from ucp.inspection.report.data import timings_of
from ucp.inspection.verify import verify
from ucp.storage import metrics

if TYPE_CHECKING:
    from tests.engines.pool import RankPool
    from tests.engines.sources import Sources

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", [Case(stage=1, dp=2), Case(stage=3, dp=2)], ids=lambda case: case.label)
def test_native_and_converted_are_the_same(sources: Sources, tmp_path: Path, case: Case) -> None:
    folder = Path(sources.get(case).folder)
    assert verify(folder, finite=True).whole
    ucp.convert(folder, tmp_path / "universal")
    ucp.convert(folder, tmp_path / "other", "deepspeed", layout="dp=3,zero=2")
    with ucp.open(folder) as a:
        for other in ("universal", "other"):
            assert verify(tmp_path / other).whole
            with ucp.open(tmp_path / other) as b:
                found = diff(a, b)
            assert found.same, found
            assert found.equal == found.compared == len(a.catalog.tensors)


def test_copies_of_tensor_parallel_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Norms that two ranks keep: equal as they were saved, found where one of them has drifted, by whoever wrote it."""
    from tests.engines import parallel_runs
    from tests.engines.tp_runs import PRELOAD, TpCase

    case = TpCase(case=Case(stage=1, dp=1))
    ranks.run(parallel_runs.train, case, str(tmp_path / "run"), world_size=2, preload=PRELOAD, further=0)
    with ucp.open(tmp_path / "run") as checkpoint:
        names = {copy.name for copy in checkpoint.catalog.copies if copy.state == "exp_avg"}
    assert any("norm" in name for name in names)
    verdict = verify(tmp_path / "run", finite=True)
    assert verdict.whole, verdict
    assert verdict.checked["copies"] >= 3 * len(names)
    assert verdict.checked["compared"] > 0
    # Drifted as training would drift it: in a file that torch itself has written, CRCs and all.
    (path,) = (tmp_path / "run").glob("*/*zero_pp_rank_0_mp_rank_01_optim_states.pt")
    with ucp.open(tmp_path / "run") as checkpoint:
        copy = next(c for c in checkpoint.catalog.copies if c.state == "exp_avg" and "norm" in c.name)
        place = int(copy.bases[0] + copy.blocks.starts[0] * 4)
        assert checkpoint.catalog.files[int(copy.blocks.buffers[0])].path == str(path)
    value = torch.frombuffer(bytearray(path.read_bytes()[place : place + 4]), dtype=torch.float32)[0]
    saved = torch.load(path, weights_only=False)
    (state,) = saved["optimizer_state_dict"]["base_optimizer_state"]["state"].values()
    (hits,) = torch.nonzero(state["exp_avg"] == value, as_tuple=True)
    state["exp_avg"][hits[0]] += 1
    torch.save(saved, path)
    verdict = verify(tmp_path / "run")
    faults = [f for f in verdict.findings if f.fault]
    assert [(f.kind, f.subject) for f in faults] == [("copy", f"{copy.name}:exp_avg")]


def test_timings_are_recorded(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(jobs.save_and_load, Case(stage=2, dp=2), str(tmp_path), world_size=2)
    records = metrics.read_metrics(tmp_path)
    assert len(records) == 6  # two saves and a load, on two ranks
    assert {r["schema"] for r in records} == {metrics.SCHEMA}
    last = timings_of(records, str(tmp_path / "global_step1"))
    for rank, (saved, loaded) in enumerate(found):
        (save,) = [r for r in last if r["rank"] == rank and r["what"] == "save"]
        (load,) = [r for r in last if r["rank"] == rank and r["what"] == "load"]
        assert save["seconds"] == pytest.approx(saved["seconds"], abs=1e-5)
        assert set(save["seconds"]) == {"prepare", "copy", "digest", "write", "commit"}
        assert save["wall"] == pytest.approx(saved["wall"], abs=1e-5)
        assert save["seconds"] != pytest.approx(saved["first"], abs=1e-5)
        assert load["seconds"] == pytest.approx(loaded["seconds"], abs=1e-5)
        stages = ["plan", *["open"] * (rank == 0), "exchange", "read", "check", "apply", "prove", "wait"]
        assert [*load["seconds"]] == stages  # the share is held, and ranks verify chunks together
        assert load["overlapping"]["digest"] > 0
        assert (save["bytes"], load["bytes"]) == (saved["written"], loaded["bytes_read"])
        assert (save["world"], load["world"]) == (2, 2)
    # They are beside the checkpoints, not in one.
    assert verify(tmp_path).whole
    shutil.copytree(tmp_path / "global_step1", tmp_path / "copy")
    assert verify(tmp_path / "copy").whole

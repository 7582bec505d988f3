"""Workers of local SGD: each keeps its own, or another number of them begins as is chosen; the outer state by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.engines.pool import RankPool
from tests.torchdist import local_sgd_jobs as jobs
from ucp.errors import Mismatch, SpecError, Unsupported
from ucp.spec.changes import read

Held = dict[str, torch.Tensor]


def by_worker(found: list[Any]) -> dict[int, Held]:
    return {one[0]: one[1] for one in found}


def is_global(key: str) -> bool:
    return "outer" in key or "copy" in key


def expected(truth: dict[int, Held], choice: str, worker: int) -> Held:
    had, out = len(truth), {}
    for key, value in truth[0].items():
        rows = torch.stack([truth[k][key] for k in range(had)])
        if is_global(key):
            out[key] = value
        elif choice == "averaged":
            out[key] = rows.double().mean(0).to(value.dtype)
        elif choice == "reset":
            out[key] = truth[0][f"{key}:copy"] if ":" not in key else torch.zeros_like(value)
        else:
            out[key] = rows[worker % had]
    return out


def check(found: list[Any], truth: dict[int, Held], choice: str) -> None:
    for worker, held, *_ in found:
        wanted = expected(truth, choice, worker)
        assert isinstance(held, dict), held
        assert held.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(held[key], value), (choice, worker, key)


@pytest.mark.slow
def test_workers_keep_their_own_or_begin_as_is_chosen(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    source = ranks.run(jobs.saved, folder, 2, "sharded", world_size=4)
    truth = by_worker(source)
    assert not torch.equal(truth[0]["0.weight"], truth[1]["0.weight"])
    same = ranks.run(jobs.resumed, folder, 2, "sharded", world_size=4)
    check(same, truth, "kept")
    assert [one[2] for one in same] == [one[2] for one in source]  # four more steps, two syncs among them
    for open_choice, kept in ranks.run(jobs.refused, folder, 3, "plain", world_size=3):
        assert "2 workers saved and 3 resume" in open_choice
        assert "'kept', 'averaged', 'copied', 'reset'" in open_choice
        assert "3 workers cannot keep what 2 had" in kept
    for workers, choice in ((1, "kept"), (3, "averaged"), (3, "copied"), (1, "reset")):  # on other shards, too
        kind = "plain" if workers == 3 else "sharded"
        found = ranks.run(jobs.resumed, folder, workers, kind, choice, world_size=workers)
        check(found, truth, choice)
        assert found[0][3][0].startswith("workers: ")


@pytest.mark.slow
def test_torchft(ranks: RankPool, tmp_path: Path) -> None:
    """torchft's own DiLoCo over two fragments with an outer optimizer each."""
    pytest.importorskip("torchft")
    source = ranks.run(jobs.saved, str(tmp_path / "saved"), 2, "torchft", world_size=2)
    found = ranks.run(jobs.resumed, str(tmp_path / "saved"), 2, "torchft", world_size=2)
    check(found, by_worker(source), "kept")
    assert [one[2] for one in found] == [one[2] for one in source]
    check(
        ranks.run(jobs.resumed, str(tmp_path / "saved"), 1, "torchft", "averaged", world_size=1),
        by_worker(source),
        "averaged",
    )


def test_a_conversion_changes_the_number_of_workers(tmp_path: Path) -> None:
    rows = torch.randn(3, 4, 2)
    state = {"model": {"w": torch.ones(4, 2)}, "workers": {"model": {"w": rows}, "state": {"w": {"m": rows + 1}}}}
    ucp.save({**state, "optim": {"state": {}, "param_groups": [{"params": ["w"], "lr": 0.1}]}}, tmp_path / "saved")
    ucp.convert(tmp_path / "saved", tmp_path / "two", changes={"workers": {"kept": 2}})
    ucp.convert(tmp_path / "saved", tmp_path / "mean", changes={"workers": {"averaged": 5}})
    ucp.convert(tmp_path / "saved", tmp_path / "new", changes={"workers": {"reset": 2}})
    with ucp.open(tmp_path / "two") as two, ucp.open(tmp_path / "mean") as mean, ucp.open(tmp_path / "new") as new:
        assert torch.equal(two.read("workers.model.w"), rows[:2])
        assert torch.equal(mean.read("workers.state.w.m"), (rows + 1).double().mean(0).float().expand(5, 4, 2))
        assert torch.equal(new.read("workers.model.w"), torch.ones(2, 4, 2))
        assert not new.read("workers.state.w.m").any()
        assert torch.equal(mean.read("w"), torch.ones(4, 2))
    with pytest.raises(Mismatch, match="4 workers cannot keep what 3 had"):
        ucp.convert(tmp_path / "saved", tmp_path / "no", changes={"workers": {"kept": 4}})
    ucp.save({"model": {"w": torch.ones(2)}}, tmp_path / "plain")
    with pytest.raises(Unsupported, match="no tensors of workers"):
        ucp.convert(tmp_path / "plain", tmp_path / "no", changes={"workers": {"kept": 1}})
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("said", ["kept", {"kept": 0}, {"kept": "two"}, {"kept": 1, "reset": 1}, {"halved": 2}, []])
def test_what_is_no_number_of_workers(said: Any) -> None:
    with pytest.raises(SpecError):
        read({"workers": said})

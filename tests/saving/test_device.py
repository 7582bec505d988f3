"""Saving tensors that lie on a device; skipped where there is none."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.saving import save_jobs as jobs
from ucp import limits
from ucp.saving import commit
from ucp.saving.background import Saver
from ucp.saving.save import write_share
from ucp.saving.source import Source
from ucp.saving.staging import Pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_device(made: Source) -> Source:
    return replace(made, holdings=[replace(h, tensor=h.tensor.cuda()) for h in made.holdings])


@pytest.mark.parametrize("seed", range(3))
def test_straight_to_files(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SAVE_WINDOW_BYTES", 1 << 20)  # so that tensors pass in several pieces
    values = jobs.values(seed)
    session = commit.begin(tmp_path, "now", 2)
    for rank in range(2):
        write_share(session, rank, on_device(jobs.source(values, rank, 2, seed)))
    commit.commit(session)
    assert jobs.digest_of(tmp_path) == jobs.digest(values)


@pytest.mark.parametrize("memory", [1, 16 << 30], ids=["in turns", "whole"])
def test_in_the_background(tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SAVE_WINDOW_BYTES", 1 << 20)
    pool = Pool(memory)
    saver = Saver(pool=pool)
    for seed in range(4):
        values = jobs.values(seed)
        made = on_device(jobs.source(values, 0, 1, seed))
        torch.cuda._sleep(10_000_000)  # the tensors' own values are still under way
        for holding in made.holdings:
            holding.tensor.add_(1).sub_(1) if holding.tensor.dtype != torch.bool else None
        saver.save(made, tmp_path, "now")
        saver.hold()
        for holding in made.holdings:
            holding.tensor.zero_()
        saver.wait()
        assert jobs.digest_of(tmp_path) == jobs.digest(values)
    assert pool.bytes is not None
    assert pool.bytes.is_pinned()


def test_what_lies_on_both_is_saved(tmp_path: Path) -> None:
    """As with an optimizer that is offloaded: much in host memory, the rest on the device."""
    saver = Saver()
    values = jobs.values(3)
    made = jobs.source(values, 0, 1, 3)
    moved = [replace(h, tensor=h.tensor.cuda()) if k % 2 else h for k, h in enumerate(made.holdings)]
    saver.save(replace(made, holdings=moved), tmp_path, "now")
    saver.hold()
    for holding in moved:
        holding.tensor.zero_()
    saver.wait()
    assert jobs.digest_of(tmp_path) == jobs.digest(values)


def test_a_word_to_the_host_passes_between_the_copies(tmp_path: Path) -> None:
    """Training asks its device for a loss or a norm in every step."""
    saver = Saver()
    word = torch.zeros(1, device="cuda")
    made = on_device(jobs.source({("w", "param"): torch.zeros(1 << 29)}, 0, 1, 0))  # 2 GiB
    for _ in range(2):  # the first time memory is pinned
        torch.cuda.synchronize()
        saver.save(made, tmp_path, "now")
        began = time.perf_counter()
        word.add_(1).item()
        took = time.perf_counter() - began
        saver.hold()
        torch.cuda.synchronize()
        copied = time.perf_counter() - began
        saver.wait()
    assert took < copied / 4


def test_memory_may_be_freed_while_it_is_copied(tmp_path: Path) -> None:
    saver = Saver()
    values = jobs.values(5)
    saver.save(on_device(jobs.source(values, 0, 1, 5)), tmp_path, "now")
    rubbish = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(50)]
    saver.wait()
    assert len(rubbish) == 50
    assert jobs.digest_of(tmp_path) == jobs.digest(values)

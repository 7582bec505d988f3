"""Saving tensors that lie on a device; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training import save_jobs as jobs
from ucp.training import commit, share
from ucp.training.background import Saver
from ucp.training.save import write_share
from ucp.training.source import Source

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_device(made: Source) -> Source:
    return replace(made, holdings=[replace(h, tensor=h.tensor.cuda()) for h in made.holdings])


@pytest.mark.parametrize("seed", range(3))
def test_straight_to_files(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "WINDOW", 1 << 20)  # so that tensors pass in several pieces
    values = jobs.values(seed)
    session = commit.begin(tmp_path, "now", 2)
    for rank in range(2):
        write_share(session, rank, on_device(jobs.source(values, rank, 2, seed)))
    commit.commit(session)
    assert jobs.digest_of(tmp_path) == jobs.digest(values)


def test_in_the_background(tmp_path: Path) -> None:
    saver = Saver()
    for seed in range(3):
        values = jobs.values(seed)
        made = on_device(jobs.source(values, 0, 1, seed))
        saver.save(made, tmp_path, "now")
        for holding in made.holdings:
            holding.tensor.zero_()
        saver.wait()
        assert jobs.digest_of(tmp_path) == jobs.digest(values)

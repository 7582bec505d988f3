"""Copies taken while training goes on: what the pool holds, who waits for what, and the bytes that come of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.saving import save_jobs as jobs
from ucp import limits
from ucp.job.stopwatch import Stopwatch
from ucp.saving import share
from ucp.saving.background import Saver
from ucp.saving.share import assign, lay_out
from ucp.saving.source import Source
from ucp.saving.staging import Copying, Pool


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is copied before it is set."""
    event = threading.Event()
    arriving = Copying.arriving

    def later(*args: Any) -> Iterator[int]:
        assert event.wait(30)
        yield from arriving(*args)

    monkeypatch.setattr(Copying, "arriving", later)
    yield event
    event.set()


def state(seed: int) -> tuple[dict[tuple[str, str], torch.Tensor], Source]:
    values = jobs.values(seed, small=True)
    return values, jobs.source(values, 0, 1, seed)


def file_of(copying: Copying) -> bytes:
    out = bytearray()
    for at, window in copying.windows(Stopwatch()):
        assert at == len(out)
        out += window
    return bytes(out)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.sampled_from([1 << 20, 3 << 20]), st.integers(1, 6))
def test_the_file_is_the_same_whatever_the_pool(seed: int, world: int, window: int, windows: int) -> None:
    values = jobs.values(seed, small=seed % 2 == 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "SAVE_WINDOW_BYTES", window)
        for rank in range(world):
            plan, pieces = lay_out(assign(jobs.source(values, rank, world, seed).holdings, rank))
            pool = Pool(windows * window)
            found = file_of(Copying(pool, plan, pieces))
            assert pool.nbytes <= windows * window
            wanted = bytearray(plan.header)
            for piece in pieces:
                for part in range(1 if piece.dense is not None else len(piece.holding.blocks)):
                    elements = share.elements(piece, piece.holding.tensor, part)
                    wanted += elements.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert found == wanted
            assert len(found) == plan.size


def test_an_update_waits_for_the_copy_and_nothing_else_does(tmp_path: Path, slow: threading.Event) -> None:
    values, made = state(1)
    saver = Saver()
    saver.save(made, tmp_path, "now")  # returns although nothing is copied
    held = threading.Thread(target=saver.hold)
    held.start()
    held.join(0.2)
    assert held.is_alive()
    slow.set()
    held.join(30)
    assert not held.is_alive()
    for holding in made.holdings:
        holding.tensor.zero_()
    saver.wait()
    assert jobs.digest_of(tmp_path) == jobs.digest(values)


def test_what_may_change_before_an_update_is_set_aside(tmp_path: Path, slow: threading.Event) -> None:
    values, made = state(1)
    made = replace(made, holdings=[replace(h, volatile=h.name != "embed.weight") for h in made.holdings])
    saver = Saver()
    saver.save(made, tmp_path, "now")
    for holding in made.holdings:
        if holding.volatile:
            holding.tensor.zero_()
    slow.set()
    saver.wait()
    assert jobs.digest_of(tmp_path) == jobs.digest(values)


def test_a_program_may_drop_the_tensors(tmp_path: Path, slow: threading.Event) -> None:
    values, made = state(2)
    saver = Saver()
    saver.save(made, tmp_path, "now")
    del made
    slow.set()
    saver.wait()
    assert jobs.digest_of(tmp_path) == jobs.digest(values)


def test_a_share_larger_than_the_pool_holds_the_update_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied in turns: the last window is copied when those before it have been written."""
    monkeypatch.setattr(limits, "SAVE_WINDOW_BYTES", 1 << 20)
    values = jobs.values(3)
    made = jobs.source(values, 0, 1, 3)
    saver = Saver(memory=1)
    saver.save(made, tmp_path, "now")
    saver.hold()
    for holding in made.holdings:
        holding.tensor.zero_()
    assert saver.memory == 1 << 20
    saver.wait()
    assert jobs.digest_of(tmp_path) == jobs.digest(values)


def test_the_pool_is_reused_and_allocated_when_asked(tmp_path: Path) -> None:
    pool = Pool(64 << 20)
    saver = Saver(pool=pool)
    saver.reserve(40 << 20, pinned=False)
    assert saver.memory == 48 << 20
    memory = pool.bytes
    for seed in range(2):
        values, made = state(seed)
        saver.save(made, tmp_path, "now")
        saver.wait()
        assert jobs.digest_of(tmp_path) == jobs.digest(values)
    assert pool.bytes is memory
    saver.reserve(1 << 40, pinned=False)
    assert saver.memory == 64 << 20


def test_what_the_pool_may_take_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SAVE_WINDOW_BYTES", 1 << 20)
    saver = Saver()
    for limit, expected in ((2 << 20, 2 << 20), (16 << 20, 5 << 20), (3 << 20, 3 << 20), (1, 1 << 20)):
        values = {("w", "param"): torch.randn(1 << 20)}  # 4 MiB, and a header
        saver.limit(limit)
        saver.save(jobs.source(values, 0, 1, 0), tmp_path, "now")
        saver.wait()
        assert saver.memory == expected
        assert jobs.digest_of(tmp_path) == jobs.digest(values)


def test_a_copy_that_fails_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Iterator[int]:
        raise RuntimeError("no such memory")

    monkeypatch.setattr(Copying, "arriving", fail)
    saver = Saver()
    saver.save(state(1)[1], tmp_path, "now")
    saver.hold()
    with pytest.raises(RuntimeError, match="no such memory"):
        saver.wait()
    assert [path.name for path in tmp_path.glob("[!.]*")] == []

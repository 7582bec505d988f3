"""Fresh memory is zero, writable and of the length asked for, whatever pages the system has."""

from __future__ import annotations

import pytest
import torch

from ucp.training import memory
from ucp.training.memory import Memory


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 1 << 20, (1 << 20) + 1, (33 << 20) + 17])
@pytest.mark.parametrize("missing", ["nothing", "huge pages", "both"])
def test_memory_is_zero_and_writable(monkeypatch: pytest.MonkeyPatch, nbytes: int, missing: str) -> None:
    if missing != "nothing":
        monkeypatch.setattr(memory, "_HUGE", None)
    if missing == "both":
        monkeypatch.setattr(memory, "_POPULATE", 9999)  # what an older kernel says to it
    taken = [Memory().take(nbytes)]
    taken.append(Memory().take(nbytes))
    for one in taken:
        assert (one.dtype, tuple(one.shape)) == (torch.uint8, (nbytes,))
        assert not one.any()
        one.fill_(7)
    taken[0].zero_()
    assert not nbytes or bool(taken[1].all())


def test_the_quicker_pages_are_taken() -> None:
    pages = Memory()
    if len(pages._cost) < 2:
        pytest.skip("no huge pages here")
    pages._cost = {True: 1.0, False: 0.0}
    pages.take(64 << 20)
    assert pages._cost[True] == 1.0  # never tried again while ordinary ones are quicker
    assert 0 < pages._cost[False] < 1

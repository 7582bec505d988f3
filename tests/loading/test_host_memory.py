"""Fresh memory is zero, writable and of the length asked for, whatever pages the system has."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ucp import limits
from ucp.loading import host_memory
from ucp.loading.host_memory import Memory, MemoryToCome, joined


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 1 << 20, (1 << 20) + 1, (33 << 20) + 17])
@pytest.mark.parametrize("missing", ["nothing", "huge pages", "both"])
def test_memory_is_zero_and_writable(monkeypatch: pytest.MonkeyPatch, nbytes: int, missing: str) -> None:
    if missing != "nothing":
        monkeypatch.setattr(host_memory, "HUGE", None)
    if missing == "both":
        monkeypatch.setattr(host_memory, "POPULATE", 9999)  # what an older kernel says to it
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
    if len(pages.cost) < 2:
        pytest.skip("no huge pages here")
    assert pages.is_huge
    pages.cost = {True: 1.0, False: 0.0}
    huge = _huge_bytes(pages.take(64 << 20).fill_(1))
    assert pages.cost[True] == 1.0  # never tried again while ordinary ones are quicker
    assert 0 < pages.cost[False] < 1
    assert not pages.is_huge
    assert huge == 0
    pages.cost = {True: 2.0, False: 3.0}
    assert pages.is_huge


def test_the_kind_of_pages_holds_for_what_comes_later() -> None:
    """A take tries a piece at most. The rest comes when it is written, in pages of the same kind."""
    pages = Memory()
    if len(pages.cost) < 2 or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("no huge pages here")
    pages.cost = {True: 1e-12, False: 0.0}
    taken = pages.take(64 << 20)
    assert _resident(taken) == 0
    assert _asks_for_huge(taken)  # how many it gets then is the system's
    assert pages.cost == {True: 1e-12, False: 0.0}


def _huge_bytes(tensor: torch.Tensor) -> int:
    return _of_mapping(tensor, "AnonHugePages")


def _resident(tensor: torch.Tensor) -> int:
    return _of_mapping(tensor, "Rss")


def _asks_for_huge(tensor: torch.Tensor) -> bool:
    """Whether all of the mappings that lie within a tensor are to have huge pages."""
    flags = [line.split() for line in _lines(tensor) if line.startswith("VmFlags:")]
    return bool(flags) and all("hg" in own for own in flags)


def _of_mapping(tensor: torch.Tensor, what: str) -> int:
    """What the system says of the mappings that lie within a tensor, in bytes."""
    return sum(int(line.split()[1]) << 10 for line in _lines(tensor) if line.startswith(f"{what}:"))


def _lines(tensor: torch.Tensor) -> Iterator[str]:
    """What the system says of the mappings that lie within a tensor."""
    low, high = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if not name.endswith(":"):
            begin, end = (int(edge, 16) for edge in name.split("-"))
            inside = low <= begin and end <= high
        elif inside:
            yield line


@pytest.mark.parametrize("nbytes", [0, 5, (1 << 20) + 3, 3 << 20, 40 << 20])
def test_tensors_stay_what_they_are(nbytes: int) -> None:
    tensors = [torch.full((nbytes,), k, dtype=torch.uint8) for k in range(5)]
    Memory().ready(tensors[3:0:-1])
    assert all(bool((tensor == k).all()) for k, tensor in enumerate(tensors))


def test_neighbours_are_one_range() -> None:
    found = joined([(8192, 12288), (0, 4096), (4096, 8192), (20480, 24576), (20480, 28672)])
    assert list(found) == [(0, 12288), (20480, 28672)]


def test_several_at_once_lie_in_one_memory() -> None:
    sizes = [3, 0, 64, (2 << 20) + 1, 8]
    memory, starts = Memory().take_together(sizes)
    taken = [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    assert [len(one) for one in taken] == sizes
    assert not any(bool(one.any()) for one in taken)
    assert all(one.data_ptr() % 64 == 0 for one in taken if len(one))
    for k, one in enumerate(taken):
        one.fill_(k + 1)
    assert all(bool((one == k + 1).all()) for k, one in enumerate(taken))
    assert len(Memory().take_together([])[0]) == 0


def test_memory_to_come_is_memory_when_it_is_taken() -> None:
    sizes = {"a": 40 << 20, "b": (2 << 20) + 5, "small": 3}
    coming = MemoryToCome(sizes)
    assert coming.take("b", 7) is None  # of another size than was foreseen, so that it is let go
    assert coming.take("b", sizes["b"]) is None
    assert coming.take("small", 3) is None
    taken = coming.take("a", sizes["a"])
    assert taken is not None
    assert (taken.dtype, len(taken)) == (torch.uint8, sizes["a"])
    assert not taken.any()
    taken.fill_(7)
    assert coming.take("a", sizes["a"]) is None
    assert bool((taken == 7).all())


@pytest.mark.parametrize("taken", [False, True])
def test_memory_is_got_ahead_only_while_nobody_works_with_it(monkeypatch: pytest.MonkeyPatch, taken: bool) -> None:
    """The thread gets one more piece at most, and ends: if some is taken, or nobody waits for it any more."""
    first, go = threading.Event(), threading.Event()
    pieces: list[int] = []
    niceness: list[int] = []

    def by_pieces(_: Memory, tensor: torch.Tensor) -> Iterator[None]:
        pieces.append(len(tensor))
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        first.set()
        go.wait()
        yield

    monkeypatch.setattr(Memory, "ready_by_pieces", by_pieces)
    before = set(threading.enumerate())
    coming = MemoryToCome({"a": 4 << 20, "b": 2 << 20})
    first.wait()
    (thread,) = set(threading.enumerate()) - before
    if taken:
        assert coming.take("b", 2 << 20) is not None
    else:
        del coming
    go.set()
    thread.join()
    assert pieces == [4 << 20]
    # It makes way for those who are waited for; the others do as before.
    assert niceness == [max(limits.MEMORY_NICENESS, own := os.getpriority(os.PRIO_PROCESS, 0))]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own

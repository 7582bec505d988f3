"""In which order several threads read files that are not in the page cache, or no longer all of them.

A thread that reads a cold file step by step waits for the disk in each step, and the disk waits for the thread in
between. By itself the system reads ahead little (often 128 KiB), and only once a thread has come by, which it does late
where processors are busy. So one more thread tells the system of the next bytes of all readers. It reads nothing.

The page cache may have lost some of what was read before, the oldest first. Whoever reads again in the same order would
find nothing there, since each read from the disk pushes out what comes next. So what is there is read first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest

from ucp import limits
from ucp.storage.files import Files
from ucp.storage.page_cache import cached_bytes

FileRange = tuple[str, int, int]
"""A local file's path, and the range [first, last) of its bytes. Of no file: "", and nothing."""


@contextmanager
def reading_ahead(files: Files, shares: Sequence[Sequence[FileRange]]) -> Iterator[list[list[int]] | None]:
    """While the block runs, keep the system `limits.READ_AHEAD_BYTES` ahead of what ``files`` have read, if the page
    cache lacks much of it. The value is the order in which each thread is to read its share; None for any order.

    shares: what each thread will read, in the order that suits it. Nothing is raised: whoever reads says what is wrong.
    """
    cached, wanted = _cached_and_wanted(shares)
    if cached >= wanted * limits.WARM_PART:
        yield None
        return
    orders = None
    if cached > wanted * (1 - limits.WARM_PART):
        orders = [_cached_first(share) for share in shares]
        shares = [[share[k] for k in order] for share, order in zip(shares, orders, strict=True)]
    over = threading.Event()
    thread = threading.Thread(target=_tell, args=(files, shares, over), name="ucp-read-ahead", daemon=True)
    thread.start()
    try:
        yield orders
    finally:
        over.set()
        thread.join()


def tell_of(files: Files, path: str, starts: Sequence[int], size: int) -> None:
    """Tell the system of little parts of a file, so many bytes from each of these on, that will be read one after the
    other: each read would wait for the disk. It is told of nothing if it has most of what lies between them."""
    between = (min(starts, default=0), max(starts, default=0))
    if hasattr(os, "posix_fadvise") and cached_bytes(path, [between]) < (between[1] - between[0]) * limits.WARM_PART:
        for start in starts:
            files.will_read(path, start, start + size)


def _cached_and_wanted(shares: Sequence[Sequence[FileRange]]) -> tuple[int, int]:
    """Bytes of all shares: how many are in the page cache, and all."""
    by_file: dict[str, list[tuple[int, int]]] = {}
    for path, first, last in chain.from_iterable(shares):
        held = by_file.setdefault(path, [])
        if held and held[-1][1] == first:
            held[-1] = held[-1][0], last
        elif first < last:
            held.append((first, last))
    wanted = sum(last - first for held in by_file.values() for first, last in held)
    if not hasattr(os, "posix_fadvise") or wanted <= limits.READ_AHEAD_BYTES:
        return wanted, wanted
    return sum(cached_bytes(path, held) for path, held in by_file.items() if held), wanted


def _cached_first(share: Sequence[FileRange]) -> list[int]:
    missing = [2 * cached_bytes(path, [(first, last)]) < last - first for path, first, last in share]
    return sorted(range(len(share)), key=missing.__getitem__)


def _tell(files: Files, shares: Sequence[Sequence[FileRange]], over: threading.Event) -> None:
    before, told = files.bytes_read, 0
    for path, first, last in _in_turns(shares):
        while told - (files.bytes_read - before) > limits.READ_AHEAD_BYTES:
            if over.wait(limits.READ_AHEAD_PAUSE_SECONDS):
                return
        if over.is_set():
            return
        files.will_read(path, first, last)
        told += last - first


def _in_turns(shares: Sequence[Sequence[FileRange]]) -> Iterator[FileRange]:
    """The shares in steps, one step of each in turn, since the threads read at the same time."""
    for turn in zip_longest(*map(_steps, shares)):
        yield from (step for step in turn if step is not None)


def _steps(parts: Sequence[FileRange]) -> Iterator[FileRange]:
    size = limits.READ_AHEAD_STEP_BYTES
    for path, first, last in parts:
        for at in range(first, last, size):
            yield path, at, min(at + size, last)

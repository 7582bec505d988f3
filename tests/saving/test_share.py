"""Where a rank's bytes are left when they are written: in the page cache for a restart, or past it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from ucp import limits
from ucp.job.stopwatch import Stopwatch
from ucp.saving.share import AUTO, BYPASS, CACHES, KEEP, write_windows
from ucp.storage import page_cache
from ucp.storage.digests import digest_chunks

SIZE = limits.WRITEBACK_FILE_BYTES


def written(path: Path, cache: str) -> int:
    """How many bytes of a large file are in the page cache once it is written."""
    with mmap.mmap(-1, SIZE) as memory:
        memory[:: mmap.PAGESIZE] = b"\x07" * (SIZE // mmap.PAGESIZE)
        view = memoryview(memory)
        half = SIZE // 2
        found = write_windows(path, [(0, view[:half]), (half, view[half:])], SIZE, Stopwatch(), cache)
        assert found.table == bytes(digest_chunks(view))
        if cache == KEEP:
            assert path.read_bytes() == memory[:]
        view.release()
    return page_cache.cached_bytes(str(path), [(0, SIZE)])


def needs_both_ways(folder: Path) -> None:
    """Skip where the system does not say what it caches, or has no direct writes."""
    (folder / "plain").write_bytes(bytes(SIZE))
    if page_cache.cached_bytes(str(folder / "plain"), [(0, SIZE)]) < SIZE:
        pytest.skip("this file system does not say what is cached")
    if written(folder / "past", BYPASS) > SIZE // 2:
        pytest.skip("this file system has no direct writes")


def test_a_large_file_stays_in_the_page_cache_or_does_not(tmp_path: Path) -> None:
    needs_both_ways(tmp_path)
    assert written(tmp_path / "kept", KEEP) == SIZE
    assert page_cache.cached_bytes(str(tmp_path / "past"), [(0, SIZE)]) == 0
    assert (tmp_path / "past").read_bytes() == (tmp_path / "kept").read_bytes()


@pytest.mark.parametrize(
    ("processors", "ranks", "available", "stays"),
    [(8, 2, 1 << 40, True), (7, 2, 1 << 40, False), (8, 2, 2 * SIZE, False), (64, 1, None, False)],
    ids=["room", "few processors", "no room", "not known"],
)
def test_auto_keeps_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: int, ranks: int, available: int | None, stays: bool
) -> None:
    needs_both_ways(tmp_path)
    monkeypatch.setattr(limits, "processors", lambda: processors)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(page_cache, "available_bytes", lambda: available)
    assert (written(tmp_path / "file", AUTO) == SIZE) == stays
    assert CACHES[0] == AUTO

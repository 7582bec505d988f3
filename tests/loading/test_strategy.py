"""Which way a load takes: by what is in the page cache, what memory there is, and what was measured."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ucp import limits
from ucp.loading.strategy import (
    HOLD,
    VERIFY_READ_PROVE,
    VERIFY_THEN_READ,
    VERIFY_WHILE_BRINGING,
    ReadFacts,
    choose,
)
from ucp.storage import page_cache

GIB = 1 << 30
WARM = ReadFacts(
    held=10 * GIB, bound=GIB, wanted=10 * GIB, compared=10 * GIB, cached=10 * GIB, available=5 * GIB, local=1
)
COLD = replace(WARM, cached=0, available=64 * GIB)
SMALL = replace(WARM, held=1 << 20)
FITS = replace(WARM, held=GIB // 2)


@pytest.mark.parametrize(
    ("every", "way"),
    [
        ([WARM], VERIFY_THEN_READ),
        ([SMALL], HOLD),
        ([replace(SMALL, held=1 << 20, bound=1 << 19)], VERIFY_THEN_READ),
        ([SMALL, WARM], VERIFY_THEN_READ),
        ([FITS], VERIFY_THEN_READ),
        ([replace(FITS, hold_costs=1e-10, again_costs=2e-10)], HOLD),
        ([replace(FITS, hold_costs=2e-10, again_costs=1e-10)], VERIFY_THEN_READ),
        ([replace(FITS, cached=0)], HOLD),
        ([COLD], VERIFY_THEN_READ),
        ([replace(COLD, available=9 * GIB)], VERIFY_WHILE_BRINGING),
        ([replace(COLD, local=8)], VERIFY_WHILE_BRINGING),
        ([replace(COLD, available=0, compared=0)], VERIFY_THEN_READ),
        ([replace(COLD, available=None)], VERIFY_THEN_READ),
        ([WARM, COLD], VERIFY_THEN_READ),
        ([COLD, replace(COLD, available=GIB)], VERIFY_WHILE_BRINGING),
        ([replace(WARM, proved=True)], VERIFY_READ_PROVE),
        ([replace(COLD, proved=True)], VERIFY_READ_PROVE),
        ([replace(WARM, proved=True), WARM], VERIFY_THEN_READ),
        ([replace(SMALL, proved=True)], HOLD),
    ],
)
def test_the_choice(every: list[ReadFacts], way: str) -> None:
    assert choose(every) == way


@pytest.mark.parametrize("kernel", ["this one", "an older one"])
def test_cached_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    if kernel != "this one":
        monkeypatch.setattr(page_cache, "CACHESTAT", 9999)  # what an older kernel says to it
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert page_cache.cached_bytes(str(path), [(0, 1 << 20)]) == 1 << 20
    assert page_cache.cached_bytes(str(path), [(5, 100), (8192, 8192), (70_000, 80_000)]) == 95 + 10_000
    assert page_cache.cached_bytes(str(tmp_path / "none"), [(0, 10)]) == 0
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if page_cache.cached_bytes(str(path), [(0, 1 << 20)]):
        pytest.skip("this file system keeps its files in memory")
    with open(path, "rb", buffering=0) as stream:
        stream.read(4096)
    assert 0 < page_cache.cached_bytes(str(path), [(0, 1 << 20)]) <= 1 << 20


def test_available_memory_is_the_least_limit(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    assert page_cache.available_bytes(tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1000 kB\n")
    assert page_cache.available_bytes(tmp_path) == 1000 << 10
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (group / "memory.max").write_text("max\n")
    assert page_cache.available_bytes(tmp_path) == 1000 << 10
    for name, text in {"max": "500000", "current": "400000", "stat": "inactive_file 50000\nactive_file 1000\n"}.items():
        (group.parent / f"memory.{name}").write_text(text)
    assert page_cache.available_bytes(tmp_path) == 151_000


def test_memory_bounds_threads() -> None:
    from ucp.loading.load import within

    assert [within(mib << 20, 16) for mib in (64, 256, 512, 4096)] == [2, 9, 16, 16]
    assert within(limits.LOAD_MEMORY_BYTES, 2) == 2

"""Cold files, by several threads: the system is told of what comes, and what it has still is read first."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, SourceFile, TrainingState
from ucp.geometry import whole
from ucp.parallel.mesh import Layout
from ucp.storage.digests import digest_file
from ucp.storage.files import Files
from ucp.storage.page_cache import cached_bytes
from ucp.storage.read_ahead import reading_ahead
from ucp.transfer.checking import compare
from ucp.transfer.gather import Want, fill, plan
from ucp.transfer.reader import Reader

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_AHEAD_BYTES", 4 * MIB)
    monkeypatch.setattr(limits, "BYTES_PER_READER", MIB)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    forget(path, 0, SIZE)
    if cached_bytes(str(path), [(0, SIZE)]):
        pytest.skip("this file system keeps its files in memory")
    return path


def forget(path: Path, first: int, last: int) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), first, last - first, os.POSIX_FADV_DONTNEED)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_the_system_is_ahead_of_the_readers_and_not_by_more_than_that(cold: Path) -> None:
    shares = [[(str(cold), 0, SIZE // 2)], [(str(cold), SIZE // 2, SIZE)]]
    with Files() as files, reading_ahead(files, shares) as orders:
        assert orders is None
        end = time.monotonic() + 30
        while cached_bytes(str(cold), [(0, SIZE)]) < 4 * MIB and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        # A part of each share.
        assert [2 * MIB <= cached_bytes(str(cold), [part[1:]]) <= 3 * MIB for (part,) in shares] == [True, True]
        files.read_into(cold, 0, bytearray(MIB))
        while cached_bytes(str(cold), [(0, SIZE)]) < 5 * MIB and time.monotonic() < end:
            time.sleep(0.01)
        assert cached_bytes(str(cold), [(0, SIZE)]) >= 5 * MIB
    assert "ucp-read-ahead" not in threads()


def test_what_is_in_the_page_cache_needs_nobody(cold: Path) -> None:
    cold.read_bytes()
    with Files() as files, reading_ahead(files, [[(str(cold), 0, SIZE)]]) as orders:
        assert orders is None
        assert "ucp-read-ahead" not in threads()


def test_a_file_that_is_gone_is_left_to_its_readers(cold: Path) -> None:
    share = [(str(cold), 0, SIZE), ("", 0, 0), (str(cold.parent / "none"), 0, SIZE)]
    with Files() as files, reading_ahead(files, [share]) as orders:
        assert orders is None
        time.sleep(0.05)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The threads that read, and where reads begin, in their order. Two threads besides the main one begin together."""
    seen: list[tuple[int, int]] = []
    begun = threading.Barrier(2, timeout=60)
    real = Files.read_parts

    def read_parts(self: Files, path: Any, offset: int, parts: Any) -> None:
        own = threading.get_ident()
        is_first = all(thread != own for thread, _ in seen)
        seen.append((own, offset))
        if is_first and threading.current_thread() is not threading.main_thread():
            begun.wait()
        real(self, path, offset, parts)

    monkeypatch.setattr(Files, "read_parts", read_parts)
    return seen


@pytest.mark.parametrize("how", ["compare", "fill"])
def test_what_the_page_cache_has_is_read_first(cold: Path, read: list[tuple[int, int]], how: str) -> None:
    """Else each byte that comes from the disk would push out one that is wanted next."""
    truth = np.frombuffer(cold.read_bytes(), np.uint8).reshape(-1, MIB)
    digests = {0: digest_file(cold)}
    source = SourceFile(str(cold), SIZE, cold.stat().st_mtime_ns)
    catalog = Catalog("", "", Layout(), (source,), {}, {}, TrainingState(), digests)
    forget(cold, 0, SIZE // 4)
    read.clear()
    with Files() as files:
        reader = Reader(catalog, files)
        if how == "compare":
            compare(reader, {0: [(0, SIZE)]}, 2)
        else:
            out = np.zeros_like(truth)
            parts = [
                LogicalTensor(f"{k}", "", (MIB,), "uint8", whole((MIB,)), np.array([k * MIB])) for k in range(len(out))
            ]
            wants = [Want(tensor, whole((MIB,)), "uint8") for tensor in parts]
            fill(reader, plan(wants, list(range(len(out)))), list(out), 2)
            assert (out == truth).all()
    # The other thread, once it is done, may take some of this one's share from its end.
    first = next(thread for thread, at in read if at == SIZE // 4)
    of_the_first_thread = [at for thread, at in read if thread == first and at < SIZE // 2]
    assert sorted(of_the_first_thread, key=lambda at: at < SIZE // 4) == of_the_first_thread
    assert of_the_first_thread[0] == SIZE // 4

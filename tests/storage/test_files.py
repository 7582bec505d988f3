"""Byte ranges of real files, read by many threads."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ucp.errors import DamagedCheckpoint
from ucp.storage.files import Files


def open_files(folder: Path) -> int:
    """How many files under a folder this process has open: others come and go, as what earlier tests left is freed."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(link.startswith(f"{folder.resolve()}/") for link in links)


def make(tmp_path: Path, count: int, size: int = 1000) -> list[tuple[Path, bytes]]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        path, data = tmp_path / f"{i}.bin", rng.bytes(size)
        path.write_bytes(data)
        made.append((path, data))
    return made


def test_ranges_arrive_in_any_kind_of_buffer(tmp_path: Path) -> None:
    ((path, data),) = make(tmp_path, 1)
    with Files() as files:
        array = np.zeros((3, 5), np.int32)
        files.read_into(path, 17, array)
        assert array.tobytes() == data[17 : 17 + 60]
        raw = bytearray(10)
        files.read_into(str(path), 990, memoryview(raw))
        assert raw == data[990:]
        files.read_into(path, 5000, bytearray())
        files.read_into(path, 0, np.zeros((0, 3)))
        assert files.bytes_read == 70
        assert files.size(path) == 1000
        assert files.mtime_ns(path) == path.stat().st_mtime_ns


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short reads"])
def test_several_buffers_are_filled_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    ((path, data),) = make(tmp_path, 1)
    if short:  # as a file system may do at any time
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [v[: len(v) // 2 + 1] for v in views[:1]], at))
    with Files() as files:
        parts = [bytearray(7), np.zeros((2, 3), np.int64), bytearray(), bytearray(200)]
        files.read_parts(path, 100, parts)
        assert b"".join(bytes(part) for part in parts) == data[100 : 100 + 7 + 48 + 200]
        assert files.bytes_read == 255
        files.read_parts(path, 5, [])
        with pytest.raises(DamagedCheckpoint, match=r"0\.bin: .* has 1000"):
            files.read_parts(path, 900, [bytearray(90), bytearray(20)])
        with pytest.raises(DamagedCheckpoint, match=r"none\.bin: cannot be read: No such file"):
            files.read_parts(tmp_path / "none.bin", 0, [bytearray(1)])


def test_the_end_of_a_file_is_reported_with_the_range(tmp_path: Path) -> None:
    ((path, _),) = make(tmp_path, 1)
    with Files() as files, pytest.raises(DamagedCheckpoint, match=r"0\.bin: .*bytes 995 to 1005 .* has 1000"):
        files.read_into(path, 995, bytearray(10))


def test_missing_files_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "none.bin"
    with Files() as files:
        for call in (files.size, files.mtime_ns, lambda p: files.read_into(p, 0, bytearray(1))):
            with pytest.raises(DamagedCheckpoint, match=r"none\.bin: cannot be read: No such file"):
                call(path)
        with pytest.raises(DamagedCheckpoint, match="directory"):
            files.read_into(tmp_path, 0, bytearray(1))


def test_few_files_stay_open_and_none_after_closing(tmp_path: Path) -> None:
    made = make(tmp_path, 20)
    before = open_files(tmp_path)
    with Files(keep_open=3) as files:
        for path, data in made * 2:
            got = bytearray(100)
            files.read_into(path, 1, got)
            assert got == data[1:101]
            assert open_files(tmp_path) <= before + 3
    assert open_files(tmp_path) == before


def test_many_threads_read_what_is_there(tmp_path: Path) -> None:
    made = make(tmp_path, 12, 5000)
    before = open_files(tmp_path)
    with Files(keep_open=2) as files, ThreadPoolExecutor(8) as pool:

        def work(seed: int) -> int:
            rng = np.random.default_rng(seed)
            total = 0
            for _ in range(100):
                path, data = made[rng.integers(len(made))]
                start = int(rng.integers(5000))
                got = bytearray(int(rng.integers(1, 5001 - start)))
                files.read_into(path, start, got)
                assert got == data[start : start + len(got)]
                total += len(got)
            return total

        assert sum(pool.map(work, range(16))) == files.bytes_read
    assert open_files(tmp_path) == before


def test_closing_lets_a_read_under_way_finish(tmp_path: Path) -> None:
    ((path, data),) = make(tmp_path, 1, 1 << 24)
    files = Files()
    done: list[bytes] = []
    started = threading.Event()

    def read() -> None:
        for _ in range(20):
            got = bytearray(1 << 24)
            started.set()
            files.read_into(path, 0, got)
            done.append(bytes(got[:100]))

    thread = threading.Thread(target=read)
    before = open_files(tmp_path)
    thread.start()
    started.wait()
    while thread.is_alive():
        files.close()
    thread.join()
    files.close()
    assert done == [data[:100]] * 20
    assert open_files(tmp_path) == before

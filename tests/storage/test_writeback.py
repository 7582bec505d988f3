"""Bytes written past the page cache are the bytes that were given, whatever their alignment and the file system."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucp.storage.writeback import ALIGNMENT, write_past_cache

MEMORY = mmap.mmap(-1, 1 << 20)
MEMORY.write(os.urandom(1 << 20))


def written(folder: str, data: memoryview, offset: int) -> bytes:
    path = Path(folder, "file")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.pwrite(fd, b"x" * offset, 0)
        write_past_cache(fd, data, offset)
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    finally:
        os.close(fd)
    return path.read_bytes()


@pytest.mark.parametrize("place", [None, "/dev/shm"])
@settings(max_examples=60, deadline=None)
@given(
    start=st.one_of(st.integers(0, 5), st.integers(0, 9).map(lambda n: n * ALIGNMENT)),
    offset=st.one_of(st.integers(0, 5), st.integers(0, 3).map(lambda n: n * ALIGNMENT)),
    size=st.one_of(st.integers(0, 3 * ALIGNMENT), st.integers(0, 900_000)),
)
def test_any_alignment(place: str | None, start: int, offset: int, size: int) -> None:
    if place is not None and not os.path.isdir(place):
        pytest.skip("no such file system here")
    data = memoryview(MEMORY)[start : start + size]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        assert written(folder, data, offset) == b"x" * offset + bytes(data)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSPC])
def test_file_systems_that_refuse(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some take the flag and refuse the write; other errors than that are told."""
    pwrite = os.pwrite

    def refuse(fd: int, data: bytes, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    data = memoryview(MEMORY)[: 3 * ALIGNMENT + 7]
    if code == errno.EINVAL:
        assert written(str(tmp_path), data, 0) == bytes(data)
    else:
        with pytest.raises(OSError, match="No space left"):
            written(str(tmp_path), data, 0)


def test_a_write_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: ALIGNMENT + 100], offset))
    data = memoryview(MEMORY)[: 20 * ALIGNMENT + 7]
    assert written(str(tmp_path), data, 0) == bytes(data)

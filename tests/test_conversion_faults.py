"""What goes wrong while a conversion runs: one clear error, nothing half done, and the same command continues."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.formats import raw
from tests.slow_cases import slow_but
from ucp import limits
from ucp.errors import DamagedCheckpoint, DestinationError

SHAPES = {"w": (3000, 1000), "b": (3,), "v": (1500, 1000)}
LEAST = 12 << 20  # windows of one chunk, one thread
FORMS = [{}, {"to": "deepspeed", "layout": "dp=2,zero=3", "ds_config": {"optimizer": {"type": "Adam"}}}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files of 12 MB, to which a virtual checkpoint points."""
    made = raw.make(tmp_path / "raw", shapes=SHAPES, states=("param", "exp_avg"), dp=3)
    return raw.virtual_checkpoint(tmp_path / "source", made)


class Once:
    """A progress callback that does something when a third of the work is done."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self.done = False

    def __call__(self, done: int, total: int) -> None:
        if not self.done and done >= total / 3:
            self.done = True
            self._act()


def convert(source: Path, dest: Path, options: dict[str, Any], act: Callable[[], object]) -> None:
    once = Once(act)
    try:
        ucp.convert(source, dest, workers=1, max_memory=LEAST, progress=once, **options)
    finally:
        assert once.done
        assert not dest.exists()


def check_continues(source: Path, dest: Path, options: dict[str, Any]) -> None:
    """The same command ends with what an undisturbed one writes, and has not read everything again."""
    ucp.convert(source, dest.with_name("expected"), **options)
    report = ucp.convert(source, dest, **options)
    assert raw.tree(dest) == raw.tree(dest.with_name("expected"))
    assert report.bytes_read < 0.9 * report.bytes_written
    assert not list(dest.parent.glob(".ucp*"))


@pytest.mark.parametrize("options", FORMS, ids=["universal", "deepspeed"])
@pytest.mark.parametrize("victim", slow_but(["rank2.bin"], ["rank0.bin", "rank2.bin"]))
def test_a_source_file_goes_away(source: Path, tmp_path: Path, options: dict[str, Any], victim: str) -> None:
    """One that is open already, or one that comes later; once it is back the work goes on."""
    path = tmp_path / "raw" / victim
    with pytest.raises(DamagedCheckpoint, match=rf"{victim}: (went away during the conversion|cannot be read)"):
        convert(source, tmp_path / "dest", options, lambda: path.rename(tmp_path / "away"))
    (tmp_path / "away").rename(path)
    check_continues(source, tmp_path / "dest", options)


@pytest.mark.parametrize("how", slow_but(["overwritten"], ["truncated", "overwritten", "longer"]))
def test_a_source_file_changes(source: Path, tmp_path: Path, how: str) -> None:
    """What was written from it is worth nothing then, and does not stay."""
    path = tmp_path / "raw" / "rank2.bin"

    def change() -> None:
        if how == "truncated":
            os.truncate(path, 1000)
        else:
            with path.open("ab" if how == "longer" else "r+b") as stream:
                stream.write(b"changed")

    with pytest.raises(DamagedCheckpoint, match=r"rank2\.bin: (the file is truncated|was changed during)"):
        convert(source, tmp_path / "dest", {}, change)
    assert not list(tmp_path.glob(".ucp*"))


@pytest.mark.parametrize("options", FORMS, ids=["universal", "deepspeed"])
def test_a_read_error_in_the_middle(
    source: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a failing device, which no file system here can be made to have."""
    preadv = os.preadv

    def failing(fd: int, buffers: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("rank1.bin") and offset > 6 << 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    reason = r"rank1\.bin: cannot be read: Input/output error"
    with monkeypatch.context() as patched, pytest.raises(DamagedCheckpoint, match=reason):
        convert(source, tmp_path / "dest", options, lambda: patched.setattr(os, "preadv", failing))
    check_continues(source, tmp_path / "dest", options)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A real file system of 40 MiB."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, check=False, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.mark.parametrize("options", FORMS, ids=["universal", "deepspeed"])
def test_the_disk_fills_up_meanwhile(
    source: Path, tmp_path: Path, options: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the space that was free at the beginning. Files count as large, so writes are direct."""

    monkeypatch.setattr(limits, "WRITEBACK_FILE_BYTES", 1 << 20)
    other = small_disk / "other"

    def fill() -> None:
        with other.open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(b"x" * (64 << 10))

    with pytest.raises(DestinationError, match=r"no space left to write it .*; free some, or choose"):
        convert(source, small_disk / "dest", options, fill)
    other.unlink()
    report = ucp.convert(source, small_disk / "dest", **options)
    assert report.bytes_read < 0.9 * report.bytes_written
    ucp.convert(source, tmp_path / "expected", **options)
    assert raw.tree(small_disk / "dest") == raw.tree(tmp_path / "expected")

"""Folders and files that are there whole or not at all, with real processes that are killed on the way."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ucp.errors import DestinationError
from ucp.storage import atomic, disk
from ucp.storage.atomic import check_destination, staged, write_atomic


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "sub" / "b.txt").write_text(text * 2)


def put(dest: Path, text: str, then: Callable[[], object], replace: bool = False) -> None:
    with staged(dest, needed_bytes=0, replace=replace) as temporary:
        fill(temporary, text)
        then()


def raiser(error: type[BaseException]) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    dest = tmp_path / "new" / "parent" / "ckpt"
    with staged(dest, needed_bytes=100) as temporary:
        assert temporary.parent == dest.parent
        assert temporary.name.startswith(".ucp-tmp-ckpt-")
        fill(temporary, "x")
        assert not dest.exists()
    assert tree(tmp_path) == {"new/parent/ckpt/a.txt": "x", "new/parent/ckpt/sub/b.txt": "xx"}
    assert os.listdir(dest.parent) == ["ckpt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    dest = tmp_path / "new" / "parent" / "ckpt"
    with pytest.raises(error):
        put(dest, "x", raiser(error))
    assert os.listdir(tmp_path) == []


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    dest = tmp_path / "ckpt"
    dest.mkdir()
    fill(dest, "old")
    with pytest.raises(ZeroDivisionError):
        put(dest, "new", raiser(ZeroDivisionError), replace=True)
    assert tree(dest) == {"a.txt": "old", "sub/b.txt": "oldold"}
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replaced_folder_is_gone(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:  # as on systems without renameat2
        monkeypatch.setattr(disk, "rename_with", lambda *args: False)
    dest = tmp_path / "ckpt"
    dest.mkdir()
    fill(dest, "old")
    (dest / "extra").write_text("")
    with staged(dest, needed_bytes=0, replace=True) as temporary:
        fill(temporary, "new")
        assert tree(dest)["a.txt"] == "old"
    assert tree(dest) == {"a.txt": "new", "sub/b.txt": "newnew"}
    assert os.listdir(tmp_path) == ["ckpt"]


def test_readers_find_the_old_or_the_new_folder_at_every_moment(tmp_path: Path) -> None:
    dest = tmp_path / "ckpt"
    with staged(dest, needed_bytes=0) as temporary:
        (temporary / "a").write_text("0")
    seen: set[str] = set()
    stop = threading.Event()
    failures: list[OSError] = []

    def watch() -> None:
        while not stop.is_set():
            try:
                fd = os.open(dest, os.O_RDONLY)  # keeps the folder that it found
            except OSError as error:
                failures.append(error)
                return
            seen.add(os.fstat(fd).st_ino.__str__())
            os.close(fd)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(30):
        with staged(dest, needed_bytes=0, replace=True) as temporary:
            (temporary / "a").write_text(str(i))
    stop.set()
    watcher.join()
    assert not failures
    assert len(seen) > 1
    assert (dest / "a").read_text() == "29"


def test_a_destination_that_exists_is_refused_untouched(tmp_path: Path) -> None:
    dest = tmp_path / "ckpt"
    dest.mkdir()
    fill(dest, "old")
    with pytest.raises(DestinationError, match="ckpt: the destination exists already"), staged(dest, needed_bytes=0):
        pytest.fail("the block was entered")
    (tmp_path / "file").write_text("x")
    for name in ("file", "link"):
        if name == "link":
            (tmp_path / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(DestinationError, match="exists already"):
            check_destination(tmp_path / name, needed_bytes=0)
        with pytest.raises(DestinationError, match="not a folder"):
            check_destination(tmp_path / name, needed_bytes=0, replace=True)
    assert tree(dest) == {"a.txt": "old", "sub/b.txt": "oldold"}


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    dest = tmp_path / "ckpt"
    with pytest.raises(DestinationError, match="cannot be put in place"):
        put(dest, "mine", dest.mkdir)
    assert os.listdir(tmp_path) == ["ckpt"]
    assert os.listdir(dest) == []


def test_too_little_space_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    dest = tmp_path / "new" / "ckpt"
    with pytest.raises(DestinationError, match=rf"{free * 4} bytes are needed, and \d+ are free"):
        check_destination(dest, needed_bytes=free * 4)
    with pytest.raises(DestinationError, match="are needed"), staged(dest, needed_bytes=free * 4):
        pytest.fail("the block was entered")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_becomes_full_is_named(tmp_path: Path) -> None:
    dest = tmp_path / "ckpt"
    with pytest.raises(DestinationError, match="ckpt: the file system became full"):
        put(dest, "x", lambda: Path("/dev/full").write_bytes(b"x"))
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match="file is not a folder"):
        check_destination(tmp_path / "file" / "ckpt", needed_bytes=0)
    with pytest.raises(DestinationError, match="name a folder"):
        check_destination("/", needed_bytes=0)
    # /proc refuses new folders even to root, whom no permission bits keep out.
    with pytest.raises(DestinationError), staged("/proc/self/ckpt", needed_bytes=0):
        pytest.fail("the block was entered")
    with pytest.raises(DestinationError, match="cannot be written"):
        write_atomic("/proc/self/latest", b"x")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DestinationError, match="not writable"):
        check_destination(tmp_path / "ckpt", needed_bytes=0)


VICTIM = """
import sys, time
from ucp.storage.atomic import staged
with staged(sys.argv[1], needed_bytes=0, replace=True) as temporary:
    (temporary / "half").write_text("x")
    print(temporary, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_process_leaves_the_old_state_and_its_rest_is_swept(tmp_path: Path, existing: bool) -> None:
    dest = tmp_path / "ckpt"
    if existing:
        dest.mkdir()
        fill(dest, "old")
    with subprocess.Popen([sys.executable, "-c", VICTIM, str(dest)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rest = Path(process.stdout.readline().strip())
        # While it lives, its folder is its own.
        with staged(tmp_path / "ckpt2", needed_bytes=0):
            assert rest.exists()
        with staged(dest, needed_bytes=0, replace=True) as temporary:
            fill(temporary, "other")
        assert rest.exists()
        process.send_signal(signal.SIGKILL)
    assert tree(dest) == {"a.txt": "other", "sub/b.txt": "otherother"}
    assert rest.exists()
    (tmp_path / ".ucp-tmp-ckpt-1-notours").mkdir()
    (tmp_path / ".ucp-tmp-ckpt-1-0123456789abcdef").mkdir()  # a process of another machine
    with staged(dest, needed_bytes=0, replace=True) as temporary:
        assert not rest.exists()
        fill(temporary, "last")
    assert sorted(os.listdir(tmp_path)) == [
        ".ucp-tmp-ckpt-1-0123456789abcdef",
        ".ucp-tmp-ckpt-1-notours",
        "ckpt",
        "ckpt2",
    ]


def test_death_between_two_renames_is_repaired(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    old = tmp_path / f".ucp-old-ckpt-{dead.pid}-{atomic.machine_of_process()}01234567"
    old.mkdir()
    fill(old, "old")
    with pytest.raises(RuntimeError), staged(tmp_path / "ckpt", needed_bytes=0, replace=True):
        raise RuntimeError
    assert tree(tmp_path / "ckpt")["a.txt"] == "old"
    assert os.listdir(tmp_path) == ["ckpt"]


def test_everything_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = tmp_path / "ckpt"
    events: list[str] = []
    real_fsync, real_rename = os.fsync, disk.rename_with

    def fsync(fd: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real_fsync(fd)

    def rename(*args: Any) -> bool:
        events.append("renamed")
        return real_rename(*args)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(disk, "rename_with", rename)
    with staged(dest, needed_bytes=0) as temporary:
        fill(temporary, "x")
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    assert set(before) == {"a.txt", "b.txt", "sub", temporary.name}
    assert tmp_path.name in after


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_atomic(path, b"step1")
    write_atomic(path, b"step2")
    assert path.read_bytes() == b"step2"
    assert os.listdir(tmp_path) == ["latest"]
    with pytest.raises(DestinationError, match="latest: cannot be written: No such file"):
        write_atomic(tmp_path / "none" / "latest", b"x")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_atomic(path, b"step1")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DestinationError, match="No space left"):
        write_atomic(path, b"step2")
    assert path.read_bytes() == b"step1"
    assert os.listdir(tmp_path) == ["latest"]


def test_space_is_counted_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk_usage(place: Path) -> usage:
        asked.append(place)
        return usage(10, 5, 5)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_destination(tmp_path / "a" / "b" / "ckpt", needed_bytes=5)
    with pytest.raises(DestinationError, match="6 bytes are needed, and 5 are free"):
        check_destination(tmp_path / "a" / "b" / "ckpt", needed_bytes=6)
    assert asked == [tmp_path, tmp_path]


def test_a_folder_reserved_for_a_process_stays_while_that_lives(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    reserved = atomic.reserve(tmp_path / "new", process=process.pid)
    other = atomic.reserve(tmp_path / "other")
    assert reserved.is_dir()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and its number still taken
    third = atomic.reserve(tmp_path / "third", keep=[other.name])
    assert {path.name for path in tmp_path.iterdir()} == {other.name, third.name}
    process.communicate()

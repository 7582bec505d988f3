"""Writing planned files: every byte against numpy, whatever the window, and errors that name the file."""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.formats import raw
from tests.formats.raw import write_files
from ucp import limits
from ucp.errors import BadArgument, DamagedCheckpoint, DestinationError
from ucp.geometry import box, row_major, whole
from ucp.storage.digests import CHUNK, digest_file
from ucp.storage.files import Files
from ucp.storage.writeback import ALIGNMENT
from ucp.transfer import windows, write
from ucp.transfer.copies import Copy
from ucp.transfer.gather import Want
from ucp.transfer.reader import Reader
from ucp.transfer.targets import TargetFile
from ucp.transfer.windows import budget, check_files

LEAST = limits.SCRATCH_BYTES + 4 * CHUNK  # what one thread needs to work with windows of one chunk


def one_file(made: raw.Raw, state: str = "param", name: str = "sub/out.bin") -> tuple[TargetFile, bytes]:
    """A file with all float32 tensors of a state between literals and gaps, and the bytes that it must have."""
    parts, wants, at = [b"HEAD"], [], 4
    for (tensor, s), array in made.truth.items():
        if s != state or made.catalog.tensors[tensor, s].dtype != "float32":
            continue
        parts.append(b"\0\0\0")  # a gap, so that elements are misaligned too
        at += 3
        found = made.catalog.tensors[tensor, s]
        wants.append(Want(found, whole(found.shape), "float32", at))
        parts.append(array.tobytes())
        at += found.nbytes
    parts.append(b"TAIL")
    return TargetFile(name, at + 4, ((0, b"HEAD"), (at, b"TAIL")), tuple(wants)), b"".join(parts)


BIG = {"a": (1021, 1031), "b": (300_007,), "c": (3,), "d": (523, 3, 211)}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("max_memory", [None, LEAST], ids=["default windows", "windows of one chunk"])
def test_files_over_many_windows(tmp_path: Path, stage: int, max_memory: int | None) -> None:
    made = raw.make(tmp_path / "source", shapes=BIG, dp=4, stage=stage, states=("param", "exp_avg"))
    first, first_bytes = one_file(made, "param", "one.bin")
    second, second_bytes = one_file(made, "exp_avg", "deep/two.bin")
    seen: list[tuple[int, int]] = []
    with Files() as files:
        digests = write_files(
            Reader(made.catalog, files),
            tmp_path,
            [first, second, TargetFile("empty", 0, (), ())],
            threads=3,
            max_memory=max_memory,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert (tmp_path / "one.bin").read_bytes() == first_bytes
    assert (tmp_path / "deep/two.bin").read_bytes() == second_bytes
    assert (tmp_path / "empty").read_bytes() == b""
    for name, content in (("one.bin", first_bytes), ("deep/two.bin", second_bytes), ("empty", b"")):
        chunks = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
        assert digests[name].table == b"".join(xxhash.xxh3_64_digest(chunk) for chunk in chunks)
    total = len(first_bytes) + len(second_bytes)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_large_files_are_written_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From aligned memory, a window at a time; the bytes are right, those at the end too."""
    made = raw.make(tmp_path / "source", shapes=BIG, dp=2)
    target, expected = one_file(made, "param", "one.bin")
    monkeypatch.setattr(limits, "WRITEBACK_FILE_BYTES", 1 << 20)
    past: list[tuple[int, int]] = []
    direct = write.write_past_cache

    def noted(fd: int, data: memoryview, offset: int) -> None:
        assert np.frombuffer(data, np.uint8).ctypes.data % ALIGNMENT == 0
        past.append((offset, len(data)))
        direct(fd, data, offset)

    monkeypatch.setattr(write, "write_past_cache", noted)
    with Files() as files:
        write_files(Reader(made.catalog, files), tmp_path, [target], threads=2, max_memory=2 * LEAST)
    assert (tmp_path / "one.bin").read_bytes() == expected
    assert min(past)[0] == 0
    assert sum(size for _, size in past) == len(expected)


def test_a_chunk_that_two_windows_share_is_read_once(tmp_path: Path) -> None:
    """By the thread that fills both. Windows of a file end elsewhere than the chunks of what they are filled from."""
    made = raw.make(tmp_path / "source", shapes={"w": (5 << 20,)}, dp=1, states=("param",))
    digested = replace(made.catalog, chunk_digests={k: digest_file(f.path) for k, f in enumerate(made.catalog.files)})
    tensor = digested.tensors["w", "param"]
    target = TargetFile("w.bin", 3 + tensor.nbytes, ((0, b"odd"),), (Want(tensor, whole(tensor.shape), "float32", 3),))
    assert target.size > 2 * limits.CONVERT_WINDOW_BYTES
    with Files() as files:
        reader = Reader(digested, files)
        write_files(reader, tmp_path, [target], threads=1)
        assert reader.verified_bytes == files.bytes_read <= tensor.nbytes + 2 * CHUNK
    assert (tmp_path / "w.bin").read_bytes() == b"odd" + made.truth["w", "param"].tobytes()


def test_a_failed_write_ends_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for memory, too."""
    made = raw.make(tmp_path / "source", shapes=BIG)
    target, _ = one_file(made)

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(write, "write_at", fails)
    before = threading.active_count()
    with Files() as files, pytest.raises(DestinationError, match="Input/output error"):
        write_files(Reader(made.catalog, files), tmp_path, [target], threads=3, max_memory=3 * LEAST)
    assert threading.active_count() == before


def test_strided_targets_leave_zeros_between(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "source", shapes={"w": (700, 401)})
    tensor, array = made.catalog.tensors["w", "param"], made.truth["w", "param"]
    wide = 1000  # the target's rows are longer than the tensor's
    target = TargetFile("w.bin", 700 * wide * 4, (), (Want(tensor, box([0, 0], [700, 401], 7, [wide, 1]), "float32"),))
    with Files() as files:
        write_files(Reader(made.catalog, files), tmp_path, [target], threads=2, max_memory=2 * LEAST)
    expected = np.zeros((700, wide), np.float32)
    expected[:, 7:408] = array
    assert (tmp_path / "w.bin").read_bytes() == expected.tobytes()


def test_wider_elements_across_windows(tmp_path: Path) -> None:
    """bfloat16 widened to float32 at an odd offset: some element straddles every window."""
    made = raw.make(tmp_path / "source")
    tensor = made.catalog.tensors["frozen.weight", "param"]
    places = range(CHUNK - 61, 4 * CHUNK, CHUNK)
    wants = tuple(Want(tensor, whole(tensor.shape), "float32", at) for at in places)
    target = TargetFile("w.bin", 4 * CHUNK, (), wants[:3])
    with Files() as files:
        write_files(Reader(made.catalog, files), tmp_path, [target], threads=1, max_memory=LEAST)
    bits = made.truth["frozen.weight", "param"].astype(np.uint32) << 16
    expected = bytearray(4 * CHUNK)
    for at in list(places)[:3]:
        expected[at : at + 120] = bits.tobytes()
    assert (tmp_path / "w.bin").read_bytes() == bytes(expected)


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    """A strided copy into a buffer in which all its elements have places of their own."""
    sizes = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    room = tuple(n + draw(st.integers(0, 3)) for n in sizes)
    steps = row_major(room)
    dtype = draw(st.sampled_from(["uint8", "float16", "float32", "float64"]))
    return Copy(0, 0, 0, draw(st.integers(0, 100)), sizes, row_major(sizes), steps, dtype, dtype)


@given(copies(), st.integers(16, 64))
def test_cutting_at_windows_keeps_every_element(copy: Copy, window: int) -> None:
    size = {"uint8": 1, "float16": 2, "float32": 4, "float64": 8}[copy.target_dtype]

    def places(c: Copy) -> Iterator[tuple[int, int]]:
        for index in np.ndindex(*c.sizes):
            source = sum(i * s for i, s in zip(index, c.steps, strict=True))
            target = sum(i * s for i, s in zip(index, c.target_steps, strict=True))
            yield c.at + source * size, c.to + target * size

    wanted = Counter()
    for at, to in places(copy):
        for index in range(to // window, (to + size - 1) // window + 1):
            wanted[index, at, to] += 1
    cut = windows.cut_at_windows(copy, window)
    found = Counter((index, at, to) for index, piece in cut for at, to in places(piece))
    assert found == wanted


def test_a_budget_is_kept() -> None:
    mib = 1 << 20
    assert budget(4, None) == (4, limits.CONVERT_WINDOW_BYTES)
    for limit in (LEAST, 20 * mib, 40 * mib, 100 * mib, 1 << 34):
        workers, window = budget(8, limit)
        assert 1 <= workers <= 8
        assert window % CHUNK == 0
        assert 0 < window <= limits.CONVERT_WINDOW_BYTES
        assert workers * (window + limits.SCRATCH_BYTES + 3 * CHUNK) <= limit
    with pytest.raises(BadArgument, match="memory limit of 1000 bytes"):
        budget(None, 1000)
    with pytest.raises(BadArgument, match="0 workers"):
        budget(0, None)


def test_as_many_threads_as_processors_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "processor_quota", lambda: math.inf)  # of this machine's control groups
    for processors, threads in ((1, 1), (3, 3), (128, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, count=processors: set(range(count)))
        assert budget(None, None) == (threads, limits.CONVERT_WINDOW_BYTES)


def test_a_truncated_source_names_its_file(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "source", shapes=BIG)
    target, _ = one_file(made)
    victim = tmp_path / "source/rank1.bin"
    victim.write_bytes(victim.read_bytes()[:1000])
    with Files() as files, pytest.raises(DamagedCheckpoint, match=r"rank1\.bin: the file is truncated"):
        write_files(Reader(made.catalog, files), tmp_path, [target])


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "source")
    target, _ = one_file(made, name="taken.bin")
    (tmp_path / "taken.bin").write_bytes(b"precious")
    with Files() as files, pytest.raises(DestinationError, match=r"taken\.bin: cannot be written"):
        write_files(Reader(made.catalog, files), tmp_path, [target])
    assert (tmp_path / "taken.bin").read_bytes() == b"precious"


def test_a_limit_on_file_sizes_names_the_file(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "source", shapes=BIG)
    target, _ = one_file(made)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with Files() as files, pytest.raises(DestinationError, match=r"sub/out\.bin: cannot be written"):
            write_files(Reader(made.catalog, files), tmp_path, [target])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A real file system of 2 MiB."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        folder.rmdir()
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_a_full_disk_names_the_file(tmp_path: Path, small_disk: Path) -> None:
    made = raw.make(tmp_path / "source", shapes=BIG)
    target, _ = one_file(made)
    with Files() as files, pytest.raises(DestinationError, match=r"sub/out\.bin: no space left"):
        write_files(Reader(made.catalog, files), small_disk, [target])


def test_a_plan_beyond_its_file_is_a_fault_of_the_plan(tmp_path: Path) -> None:
    made = raw.make(tmp_path / "source")
    target, _ = one_file(made)
    check_files([target])
    short = TargetFile(target.name, target.size - 1, target.literals, target.wants)
    with pytest.raises(ValueError, match="but gives the file"):
        check_files([short])

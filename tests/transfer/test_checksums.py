"""Records put together from pieces in any order, by several readers: whole ones pass, a flipped bit never does."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.formats import raw
from ucp.errors import DigestMismatch
from ucp.storage.crc32 import StoredCrc32
from ucp.storage.files import Files
from ucp.transfer.checksums import RecordChecks

# Records with gaps between them; one of one byte, one of none is not a record.
PLACES = ((3, 700), (700, 701), (710, 9_000), (9_001, 60_000))
SIZE = 60_100


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "file"
    path.write_bytes(random.Random(5).randbytes(SIZE))
    return path


def records(path: Path) -> dict[int, tuple[StoredCrc32, ...]]:
    data = path.read_bytes()
    return {0: tuple(StoredCrc32(f"r{k}", a, b, zlib.crc32(data[a:b]), 0) for k, (a, b) in enumerate(PLACES))}


@st.composite
def reads(draw: st.DrawFn) -> list[tuple[int, int]]:
    edge = st.integers(0, SIZE)
    pairs = draw(st.lists(st.tuples(edge, edge), min_size=1, max_size=12))
    return [(min(pair), max(pair)) for pair in pairs]


def read(checks: RecordChecks, path: Path, ranges: list[tuple[int, int]]) -> None:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    for a, b in ranges:
        checks.add(0, a, data[a:b])


def touched(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The records of which a byte was read: an empty range within one reads none."""
    return [(a, b) for a, b in PLACES if any(max(x, a) < min(y, b) for x, y in ranges)]


@given(ranges=reads(), at=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=150)
def test_any_ranges_in_any_order(path: Path, ranges: list[tuple[int, int]], at: int, bit: int) -> None:
    known = records(path)
    with Files() as files:
        checks = RecordChecks(known, [str(path)], files)
        read(checks, path, ranges)
        checks.finish()
        assert checks.verified_bytes == sum(b - a for a, b in touched(ranges))
        assert checks.unverified_bytes == 0
        raw.flip(path, at, 1 << bit)
        try:
            checks = RecordChecks(known, [str(path)], files)
            if any(a <= at < b for a, b in touched(ranges)):
                with pytest.raises(DigestMismatch, match=r"record 'r\d' .* is damaged: its CRC-32 should be"):
                    finished(checks, path, ranges)
            else:
                finished(checks, path, ranges)
        finally:
            raw.flip(path, at, 1 << bit)


def finished(checks: RecordChecks, path: Path, ranges: list[tuple[int, int]]) -> None:
    read(checks, path, ranges)
    checks.finish()


def test_a_whole_record_is_compared_at_once(path: Path) -> None:
    with Files() as files:
        checks = RecordChecks(records(path), [str(path)], files)
        read(checks, path, [(9_001, 30_000), (30_000, 59_999)])
        assert (checks.verified_bytes, checks.unverified_bytes) == (0, 59_999 - 9_001)
        read(checks, path, [(59_999, 60_000)])
        assert (checks.verified_bytes, checks.unverified_bytes, files.bytes_read) == (60_000 - 9_001, 0, 0)


def test_a_load_reads_what_little_is_missing_and_no_more(path: Path) -> None:
    with Files() as files:
        checks = RecordChecks(records(path), [str(path)], files)
        read(checks, path, [(9_001, 59_000), (710, 1_000)])
        checks.settle()
        assert files.bytes_read == 1_000
        assert (checks.verified_bytes, checks.unverified_bytes) == (60_000 - 9_001, 290)
        checks.settle()
        assert files.bytes_read == 1_000


def test_what_can_not_be_compared_is_not_digested(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a record that is to be read in part nothing is digested; it is counted, and the others are compared."""
    digested: list[int] = []

    def counted(data: memoryview) -> int:
        digested.append(len(data))
        return zlib.crc32(data)

    monkeypatch.setattr("ucp.transfer.checksums.crc32", counted)
    ranges = [(3, 700), (710, 5_000), (5_500, 6_000), (9_001, 60_000)]
    with Files() as files:
        checks = RecordChecks(records(path), [str(path)], files)
        checks.expect({0: ranges})
        read(checks, path, ranges)
        read(checks, path, ranges[1:2])  # again: counted once
        checks.settle()
        assert sum(digested) == checks.verified_bytes == 697 + 50_999
        assert checks.unverified_bytes == 4_290 + 500


def test_the_crc_may_stand_in_the_file(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(1000)
    path = tmp_path / "file"
    path.write_bytes(data + zlib.crc32(data[10:500]).to_bytes(4, "little"))
    with Files() as files:
        checks = RecordChecks({0: (StoredCrc32("x", 10, 500, None, 1000),)}, [str(path)], files)
        read(checks, path, [(10, 500)])
        assert checks.verified_bytes == 490
        raw.flip(path, 1001, 1)
        with pytest.raises(DigestMismatch):
            read(RecordChecks({0: (StoredCrc32("x", 10, 500, None, 1000),)}, [str(path)], files), path, [(10, 500)])


@given(first=reads(), second=reads(), third=reads())
@example(first=[(0, 0)], second=[(4, 4)], third=[(0, 0)])
@example(first=[(0, 0)], second=[(0, 0)], third=[(4, 4)])
@settings(deadline=None, max_examples=80)
def test_several_readers_add_up(
    path: Path, first: list[tuple[int, int]], second: list[tuple[int, int]], third: list[tuple[int, int]]
) -> None:
    """Processes that share the work, whose ranges may overlap: what the leader hears is as if it had read it."""
    with Files() as files, Files() as own:
        others = [RecordChecks(records(path), [str(path)], files, keeps_pieces=True) for _ in range(2)]
        for checks, ranges in zip(others, (first, second), strict=True):
            read(checks, path, ranges)
        leader = RecordChecks(records(path), [str(path)], own, keeps_pieces=True)
        read(leader, path, third)
        for checks in others:
            leader.add_known(checks.take_pieces())
            assert checks.take_pieces() == []
        leader.finish()
        assert leader.verified_bytes == sum(b - a for a, b in touched([*first, *second, *third]))
        assert own.bytes_read <= leader.verified_bytes


def test_threads_that_read_the_same(path: Path) -> None:
    data = np.frombuffer(path.read_bytes(), np.uint8)

    def ranges(seed: int) -> Iterator[tuple[int, int]]:
        for _ in range(200):
            a = random.Random(seed).randrange(SIZE)
            yield a, min(a + 5_000, SIZE)
            seed += 1000

    with Files() as files, ThreadPoolExecutor(8) as pool:
        checks = RecordChecks(records(path), [str(path)], files)

        def work(seed: int) -> None:
            for a, b in ranges(seed):
                checks.add(0, a, data[a:b])

        list(pool.map(work, range(8)))
        checks.finish()
        assert checks.verified_bytes == sum(b - a for a, b in PLACES)


@given(
    cuts=st.lists(st.integers(0, SIZE), min_size=1, max_size=5),
    more=st.lists(reads(), min_size=3, max_size=3),
    at=st.integers(0, SIZE - 1),
    bit=st.integers(0, 7),
)
@settings(deadline=None, max_examples=100)
def test_readers_that_tell_one_another(
    path: Path, cuts: list[int], more: list[list[tuple[int, int]]], at: int, bit: int
) -> None:
    """Three share the file between them, and read some of it twice: what all have read is compared by each."""
    known = records(path)
    edges = sorted({0, *cuts, SIZE})
    shares = [list(pairwise(edges))[k::3] for k in range(3)]
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    damaged = path.with_name("damaged")
    damaged.write_bytes(data)
    for place, hit in ((path, None), (damaged, next(((a, b) for a, b in PLACES if a <= at < b), None))):
        with Files() as files:
            readers = [RecordChecks(known, [str(place)], files) for _ in shares]
            found = set()
            for reader, own, again in zip(readers, shares, more, strict=True):
                for ranges in (own, again):
                    try:
                        read(reader, place, ranges)
                    except DigestMismatch:
                        found.add("alone")
            pieces = {0: [piece[1:] for reader in readers for piece in reader.parts(1 << 20)]}
            unverified = [reader.unverified_bytes for reader in readers]
            for reader in readers:
                try:
                    reader.compare_together(pieces)
                except DigestMismatch:
                    found.add("together")
            if hit is None:
                assert not found
                assert all(
                    reader.unverified_bytes <= before for reader, before in zip(readers, unverified, strict=True)
                )
            elif "alone" not in found:
                assert found == {"together"} or any(reader.unverified_bytes for reader in readers)


def test_parts_that_touch_are_told_and_compared(path: Path) -> None:
    """Two halves; halves that overlap, whose CRC-32s say nothing of the whole; a gap of more than padding."""
    known, (low, high) = records(path), PLACES[3]
    middle = (low + high) // 2
    with Files() as files:
        for shares, verified in (
            (([(low, middle)], [(middle, high)]), True),
            (([(low, middle + 100)], [(middle, high)]), False),
            (([(low, middle - 5_000)], [(middle, high)]), False),
        ):
            readers = [RecordChecks(known, [str(path)], files) for _ in shares]
            for reader, ranges in zip(readers, shares, strict=True):
                read(reader, path, ranges)
            told = [piece for reader in readers for piece in reader.parts(8)]
            assert len(told) == 2
            for reader, ranges in zip(readers, shares, strict=True):
                reader.compare_together({0: [piece[1:] for piece in told]})
                nbytes = sum(b - a for a, b in ranges)
                assert (reader.verified_bytes, reader.unverified_bytes) == ((nbytes, 0) if verified else (0, nbytes))

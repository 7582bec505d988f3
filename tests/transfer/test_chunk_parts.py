"""Chunks that several ranks read parts of: every byte that is used is verified, and damage anywhere in it is found."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucp.catalog import Catalog, SourceFile, TrainingState
from ucp.errors import DigestMismatch
from ucp.parallel.mesh import Layout
from ucp.storage.digests import CHUNK, digest_file
from ucp.storage.files import Files
from ucp.transfer import checking
from ucp.transfer.chunk_parts import ChunkParts, parts_in, shared_out
from ucp.transfer.reader import Reader

SIZE = 3 * CHUNK + 12_345
Ranges = list[tuple[int, int]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chunks") / "data.bin"
    out.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes())
    return out


def catalog_of(path: Path, place: Path | None = None) -> Catalog:
    """A file with digests, which lies somewhere else since."""
    digests = digest_file(path)
    where = place or path
    source = SourceFile(str(where), where.stat().st_size, where.stat().st_mtime_ns)
    return Catalog("test", "", Layout(), (source,), {}, {}, TrainingState(), chunk_digests={0: digests})


@st.composite
def ranges(draw: st.DrawFn) -> Ranges:
    """In order and disjoint, with edges at chunks, near them, and anywhere."""
    near = st.builds(lambda k, off: max(0, min(SIZE, k * CHUNK + off)), st.integers(0, 3), st.integers(-3, 3))
    edges = sorted(set(draw(st.lists(near | st.integers(0, SIZE), max_size=8))))
    return list(zip(edges[::2], edges[1::2], strict=False))


@dataclass
class Rank:
    reader: Reader
    parts: ChunkParts
    ranges: Ranges

    def read(self, place: Path, times: int = 1) -> None:
        """Read every range, a part of one then and now, and compare it with the file."""
        whole = np.memmap(place, np.uint8, "r")
        for _ in range(times):
            cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
            for low, high in self.ranges:
                cut = (low + high) // 2
                into = np.zeros(high - low, np.uint8)
                self.reader.read_into(0, low, [into[: cut - low], into[cut - low :]], cache)
                assert np.array_equal(into, whole[low:high])


def job(catalog: Catalog, files: Files, held: Sequence[Ranges]) -> list[Rank]:
    sizes = {0: catalog.chunk_digests[0].size}
    tables = [parts_in({0: one}, sizes) for one in held]
    parts = [shared_out(tables, rank) for rank in range(len(held))]
    return [Rank(Reader(catalog, files, parts=own), own, one) for own, one in zip(parts, held, strict=True)]


def compare(ranks: Sequence[Rank]) -> None:
    told = [rank.parts.told() for rank in ranks]
    for rank in ranks:
        rank.reader.compare_parts(told)


@given(held=st.lists(ranges(), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_who_reads_what(held: list[Ranges]) -> None:
    """Each part lies in one chunk that its rank does not hold whole; of a chunk that several want, one reads all."""
    tables = [parts_in({0: one}, {0: SIZE}) for one in held]
    shared = [shared_out(tables, rank) for rank in range(len(held))]
    wanted: dict[int, dict[int, int]] = {}
    for rank, (own, table) in enumerate(zip(held, tables, strict=True)):
        for _, low, high in table.tolist():
            assert low // CHUNK == (high - 1) // CHUNK
            assert high - low < min(CHUNK, SIZE - low // CHUNK * CHUNK)
            assert any(a <= low and high <= b for a, b in own)
            chunk = wanted.setdefault(low // CHUNK, {})
            chunk[rank] = chunk.get(rank, 0) + high - low
    for rank, (own, table) in enumerate(zip(shared, tables, strict=True)):
        for part in map(tuple, table.tolist()):
            chunk = wanted[part[1] // CHUNK]
            owner = min(chunk, key=lambda k: (-chunk[k], k))
            assert (part in own.alone) == (len(chunk) > 1 and owner != rank)
            assert (part in shared[owner].owned.get((0, part[1] // CHUNK), ())) == (len(chunk) > 1)


@given(held=st.lists(ranges(), min_size=2, max_size=3), at=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=20)
def test_damage_in_what_is_used_is_found(path: Path, held: list[Ranges], at: int, bit: int) -> None:
    damaged = path.with_name("damaged.bin")
    damaged.write_bytes(path.read_bytes())
    np.memmap(damaged, np.uint8, "r+")[at] ^= 1 << bit
    used = any(low <= at < high for one in held for low, high in one)
    for place, hit in ((path, False), (damaged, used)):
        with Files() as files:
            ranks = job(catalog_of(path, place), files, held)
            found = False
            for rank in ranks:
                try:
                    rank.read(place, times=2)
                except DigestMismatch:
                    found = True
            try:
                compare(ranks)
            except DigestMismatch:
                found = True
            assert found or not hit
            if place is path:
                assert not found
                before = files.bytes_read
                for rank in ranks:
                    rank.read(place)
                assert not any(rank.parts.seen for rank in ranks)
                assert files.bytes_read - before >= sum(high - low for one in held for low, high in one)


def test_halves_are_read_once(path: Path) -> None:
    """Two ranks that share a file, cut in the middle of a chunk: one reads all of that chunk at first, and nobody
    after that."""
    cut = 2 * CHUNK + CHUNK // 4
    with Files() as files:
        ranks = job(catalog_of(path), files, [[(0, cut)], [(cut, SIZE)]])
        for rank in ranks:
            rank.read(path)
        assert files.bytes_read == SIZE + CHUNK // 4
        compare(ranks)
        for rank in ranks:
            rank.read(path)
        assert files.bytes_read == 2 * SIZE + CHUNK // 4
        assert ranks[0].reader.verified_bytes == 2 * cut


def test_what_is_checked_first(path: Path) -> None:
    """`checking.compare` takes parts alone, too, and what it has seen counts in the second reading."""
    cut = 2 * CHUNK + CHUNK // 4
    with Files() as files:
        ranks = job(catalog_of(path), files, [[(0, cut)], [(cut, SIZE)]])
        for rank in ranks:
            found = checking.comparable(rank.reader, {0: rank.ranges})
            checking.compare(rank.reader, found, 1)
        assert files.bytes_read == SIZE + CHUNK // 4
        compare(ranks)
        for rank in ranks:
            rank.read(path)
        assert files.bytes_read == 2 * SIZE + CHUNK // 4


@pytest.mark.parametrize("when", ["before it is compared", "after that"])
def test_a_part_that_changes_between_two_readings(path: Path, tmp_path: Path, when: str) -> None:
    place, cut = tmp_path / "changing.bin", 2 * CHUNK + CHUNK // 4
    place.write_bytes(path.read_bytes())
    with Files() as files:
        ranks = job(catalog_of(path, place), files, [[(cut - 9, cut)], [(cut, SIZE)]])
        for rank in ranks:
            rank.read(place)
        if when == "after that":
            compare(ranks)
        data = bytearray(place.read_bytes())
        data[cut - 5] ^= 1
        place.write_bytes(data)
        with pytest.raises(DigestMismatch, match=rf"changing.bin: bytes {cut - 9} to {cut} are not what was verified"):
            ranks[0].read(place)


def test_a_rank_that_reads_other_bytes(path: Path, tmp_path: Path) -> None:
    """Two machines, of which one has another file under the same name: what was read there is not taken."""
    other, cut = tmp_path / "other.bin", 2 * CHUNK + CHUNK // 4
    data = bytearray(path.read_bytes())
    data[cut - 1] ^= 1
    other.write_bytes(data)
    with Files() as files:
        first, second = job(catalog_of(path), files, [[(0, cut)], [(cut, SIZE)]])
        first = replace(first, reader=Reader(catalog_of(path, other), files, parts=first.parts))
        first.read(other)
        second.read(path)
        with pytest.raises(DigestMismatch, match=rf"other.bin: bytes {2 * CHUNK} to {cut} are not what was verified"):
            first.reader.compare_parts([first.parts.told(), second.parts.told()])


def test_parts_of_which_nobody_tells(path: Path, tmp_path: Path) -> None:
    """The rank that should have verified a chunk has not read it: it is read after all, and found damaged or not."""
    cut = 2 * CHUNK + CHUNK // 4
    for place, damage in ((path, None), (tmp_path / "damaged.bin", cut + 7)):
        if damage is not None:
            data = bytearray(path.read_bytes())
            data[damage] ^= 1
            place.write_bytes(data)
        with Files() as files:
            first, _ = job(catalog_of(path, place), files, [[(0, cut)], [(cut, SIZE)]])
            first.read(place)
            if damage is None:
                first.reader.compare_parts([])
            else:
                with pytest.raises(DigestMismatch, match=r"damaged.bin: chunk 2 "):
                    first.reader.compare_parts([])


def test_what_was_not_read_by_then_is_read_with_its_chunk(path: Path) -> None:
    cut = 2 * CHUNK + CHUNK // 4
    with Files() as files:
        first, _ = job(catalog_of(path), files, [[(0, cut)], [(cut, SIZE)]])
        assert (0, 2 * CHUNK, cut) in first.parts
        first.reader.compare_parts([])
        assert (0, 2 * CHUNK, cut) not in first.parts
        first.read(path)
        assert files.bytes_read == 3 * CHUNK


def test_chunks_of_many_parts_are_read_whole(path: Path) -> None:
    many = [(k * 100, k * 100 + 50) for k in range(20)]
    assert not len(parts_in({0: many}, {0: SIZE}))
    assert len(parts_in({0: many[:4]}, {0: SIZE})) == 4
    assert not len(parts_in({0: many[:4]}, {}))

"""Chunk digests: each flipped bit is found where it is, and nothing beyond the touched chunks is read."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from tests.property import law
from ucp.errors import BadArgument, DamagedCheckpoint, DigestMismatch
from ucp.storage import digests
from ucp.storage.digests import CHUNK, ChunkDigests, check_aligned
from ucp.storage.files import Files

SIZE = 3 * CHUNK + 1234


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    return path


def table(data: bytes) -> bytes:
    """The digests by the definition: one xxh3_64 per chunk, big-endian."""
    parts = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    return b"".join(xxhash.xxh3_64_intdigest(part).to_bytes(8, "big") for part in parts)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 17 * CHUNK + 5])
def test_a_files_digests_are_its_chunks(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(1).bytes(size)
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    found = digests.digest_file(path)
    assert found == ChunkDigests(size, table(content))
    assert ChunkDigests.from_text(size, found.text) == found
    assert digests.digest_chunks(content) == found.table


def test_tables_that_do_not_fit_are_damaged() -> None:
    with pytest.raises(DamagedCheckpoint, match="16 bytes and has 8"):
        ChunkDigests(CHUNK + 1, b"12345678")
    with pytest.raises(DamagedCheckpoint, match="base64"):
        ChunkDigests.from_text(1, "no base64!")


def test_what_is_digested_begins_and_ends_with_chunks() -> None:
    for start, stop in ((1, CHUNK), (0, 5), (3 * CHUNK, SIZE + 1)):
        with pytest.raises(BadArgument, match="not whole chunks"):
            check_aligned(SIZE, start, stop - start)
    assert check_aligned(SIZE, 2 * CHUNK, SIZE - 2 * CHUNK) == 2


@law(80)
@given(st.integers(0, SIZE), st.integers(0, SIZE))
@example(0, SIZE)
@example(CHUNK, 2 * CHUNK)
@example(CHUNK - 1, 2 * CHUNK + 1)
@example(3 * CHUNK, SIZE)
def test_verifying_reads_only_touched_chunks(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, a: int, b: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "verified.bin"
    if not path.exists():
        path.write_bytes(data)
    start, stop = min(a, b), max(a, b)
    low, high = digests.covering(start, stop, SIZE)
    if stop > start:
        assert low <= start < stop <= high
        assert low % CHUNK == 0
        assert high % CHUNK == 0 or high == SIZE
        assert high - low < stop - start + 2 * CHUNK
    with Files() as files:
        digests.verify_range(files, path, ChunkDigests(SIZE, table(data)), start, stop)
        assert files.bytes_read == high - low


@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 77, 3 * CHUNK, SIZE - 1])
def test_a_flipped_bit_is_found_by_every_read_of_its_chunk_and_no_other(path: Path, data: bytes, at: int) -> None:
    known = ChunkDigests(SIZE, table(data))
    broken = bytearray(data)
    broken[at] ^= 1
    path.write_bytes(broken)
    index = at // CHUNK
    first, last = index * CHUNK, min((index + 1) * CHUNK, SIZE)
    message = rf"a\.bin: chunk {index} \(bytes {first} to {last}\) is damaged"
    with Files() as files:
        for start, stop in ((0, SIZE), (first, first + 1), (last - 1, last), (first, last), (max(0, first - 5), last)):
            with pytest.raises(DigestMismatch, match=message):
                digests.verify_range(files, path, known, start, stop)
        for start, stop in ((0, first), (last, SIZE)):
            digests.verify_range(files, path, known, start, stop)
    with pytest.raises(DigestMismatch, match=message):
        digests.verify_chunks(path, known, index, bytes(broken[first:last]))
    digests.verify_chunks(path, known, index, data[first:last])
    cuts = sorted({first, *range(first + 1, last, 99_991), last})
    for whole, damaged in ((data, False), (broken, True)):
        parts = [whole[low:high] for low, high in itertools.pairwise(cuts)]
        with pytest.raises(DigestMismatch, match=message) if damaged else nullcontext():
            digests.verify_parts(path, known, index, parts)


def test_ranges_beyond_the_digests_and_truncated_files_are_damaged(path: Path, data: bytes) -> None:
    known = ChunkDigests(SIZE, table(data))
    with Files() as files:
        for start, stop in ((SIZE - 1, SIZE + 1), (-1, 3)):
            with pytest.raises(DamagedCheckpoint, match=f"bytes {start} to {stop}"):
                digests.verify_range(files, path, known, start, stop)
        path.write_bytes(data[:-1])
        with pytest.raises(DamagedCheckpoint, match="truncated"):
            digests.verify_range(files, path, known, SIZE - 5, SIZE - 3)

"""What has been written: pieces of files with their digests, the journal that lists them, and how files are finished.

A journal has a record for every window that was written. It says which bytes the window should have, never that they
are on the device. Whoever continues the work reads them and compares. The same records, of all processes that shared
the work, make the files' digests and the CRC-32s that zip records carry.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from ucp.errors import DamagedCheckpoint, DestinationError
from ucp.storage import disk, locations, names
from ucp.storage.crc32 import combine_all
from ucp.storage.digests import CHUNK, WIDTH, ChunkDigests, chunk_count, digest_chunks
from ucp.storage.writeback import write_at
from ucp.transfer.checksums import RecordPiece
from ucp.transfer.reader import Counts
from ucp.transfer.targets import TargetFile


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole chunks of a file that were written, in bytes.

    file: the file's index.
    start, size: where the piece lies in the file.
    digests: of its chunks, one after the other.
    crcs: (index of the file's CRC-32 entry, first byte, bytes, CRC-32) for each part of an entry that lies in it.
    logical: what it adds to logical digests, as `ucp.transfer.collecting` keeps it.
    """

    file: int
    start: int
    size: int
    digests: bytes
    crcs: tuple[tuple[int, int, int, int], ...] = ()
    logical: bytes = b""


_HEAD = struct.Struct("<IQQIII")  # file, start, size, bytes of digests, number of CRCs, bytes of logical digests' parts
_CRC = struct.Struct("<IQQI")
_FINISHED = 0xFFFFFFFF
_COUNTS = struct.Struct("<QQQ")  # of a finished process: as `Counts` has them
_RECORDS = 0xFFFFFFFE  # in a file's place: what follows are CRC-32s of the source
_SEAL = 8  # bytes of xxh3_64 after each record, so that a torn one is recognised


class Journal:
    """An append-only file of one process. Records may be added by several threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        try:
            self._fd = disk.open_to_write(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise failed(self._path, error) from error

    def add(self, piece: Piece) -> None:
        """Note that this piece was written. Raises DestinationError."""
        sizes = len(piece.digests), len(piece.crcs), len(piece.logical)
        head = _HEAD.pack(piece.file, piece.start, piece.size, *sizes)
        self._append(head + piece.digests + b"".join(_CRC.pack(*crc) for crc in piece.crcs) + piece.logical)

    def add_record_pieces(self, pieces: Sequence[RecordPiece]) -> None:
        """Note what was read of the source's records. Raises DestinationError."""
        if pieces:
            head = _HEAD.pack(_RECORDS, 0, 0, 0, len(pieces), 0)
            self._append(head + b"".join(_CRC.pack(*piece) for piece in pieces))

    def finish(self, counts: Counts) -> None:
        """Note that this process has written its share and flushed it, and what it has read. Raises
        DestinationError."""
        said = _COUNTS.pack(counts.read, counts.digested, counts.unchecked)
        self._append(_HEAD.pack(_FINISHED, 0, 0, 0, 0, len(said)) + said)
        try:
            disk.flush(self._fd)
        except OSError as error:
            raise failed(self._path, error) from error

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, record: bytes) -> None:
        try:
            disk.write_all(self._fd, record + xxhash.xxh3_64_digest(record))
        except OSError as error:
            raise failed(self._path, error) from error


def read_journal(path: str | os.PathLike[str]) -> tuple[list[Piece], bool]:
    """The pieces in a journal up to the first record that is torn, and whether its process had finished."""
    out: list[Piece] = []
    for piece in _journal_records(path):
        if piece.file == _FINISHED:
            return out, True
        if piece.file != _RECORDS:
            out.append(piece)
    return out, False


def read_record_pieces(path: str | os.PathLike[str]) -> list[RecordPiece]:
    """What a process has noted of the source's records."""
    return [crc for piece in _journal_records(path) if piece.file == _RECORDS for crc in piece.crcs]


def read_counts(path: str | os.PathLike[str]) -> Counts:
    """What a process that has finished has read; nothing for another one."""
    said = [piece.logical for piece in _journal_records(path) if piece.file == _FINISHED]
    return Counts(*_COUNTS.unpack(said[0])) if said and len(said[0]) == _COUNTS.size else Counts()


def _journal_records(path: str | os.PathLike[str]) -> Iterator[Piece]:
    """Each record up to the first that is torn, as a piece, whatever its kind."""
    raw = locations.read(path)
    at = 0
    while at + _HEAD.size + _SEAL <= len(raw):
        file, start, size, width, count, logical = _HEAD.unpack_from(raw, at)
        middle = at + _HEAD.size + width + count * _CRC.size
        end = middle + logical
        if raw[end : end + _SEAL] != xxhash.xxh3_64_digest(raw[at:end]):
            return
        digests = raw[at + _HEAD.size : at + _HEAD.size + width]
        crcs = tuple(_CRC.iter_unpack(raw[at + _HEAD.size + width : middle]))
        yield Piece(file, start, size, digests, crcs, raw[middle:end])
        at = end + _SEAL


def known_chunks(
    pieces: Iterable[Piece], share: Sequence[tuple[int, int]] | None = None
) -> dict[tuple[int, int], bytes]:
    """(file, chunk) -> the digest that it should have; if a share is given (`write_share`), only for its chunks."""
    out = {}
    for piece in pieces:
        if share is not None and not share[piece.file][0] <= piece.start < share[piece.file][1]:
            continue
        first = piece.start // CHUNK
        for k in range(len(piece.digests) // WIDTH):
            out[piece.file, first + k] = piece.digests[k * WIDTH : (k + 1) * WIDTH]
    return out


def create_files(folder: str | os.PathLike[str], files: Sequence[TargetFile], continued: bool = False) -> None:
    """Make all files, empty and of their final sizes. continued: files that are there already keep their bytes.

    Raises DestinationError.
    """
    for file in files:
        path = path_of(folder, file)
        try:
            disk.make_folders(os.path.dirname(path))
            fd = disk.open_to_write(path, os.O_RDWR | os.O_CREAT | (0 if continued else os.O_EXCL))
        except OSError as error:
            raise failed(path, error) from error
        try:
            disk.resize(fd, file.size)
        except OSError as error:
            raise failed(path, error) from error
        finally:
            os.close(fd)


def seal_files(
    folder: str | os.PathLike[str], files: Sequence[TargetFile], pieces: Iterable[Piece]
) -> dict[str, ChunkDigests]:
    """Store the CRC-32s where the files want them. Returns all files' digests by name. Every byte is written by now.

    Raises DestinationError, and DamagedCheckpoint if some bytes are in no piece.
    """
    tables = [bytearray(chunk_count(file.size) * WIDTH) for file in files]
    told = [0] * len(files)
    crcs: list[dict[int, list[tuple[int, int, int]]]] = [{} for _ in files]
    for piece in pieces:
        first = piece.start // CHUNK * WIDTH
        tables[piece.file][first : first + len(piece.digests)] = piece.digests
        told[piece.file] += piece.size
        for entry, start, size, crc in piece.crcs:
            crcs[piece.file].setdefault(entry, []).append((start, size, crc))
    for k, file in enumerate(files):
        if told[k] != file.size:
            raise DamagedCheckpoint(f"{path_of(folder, file)}: {told[k]} of {file.size} bytes were written")
        if crcs[k]:
            _store_crcs(path_of(folder, file), file, crcs[k], tables[k])
    return {file.name: ChunkDigests(file.size, bytes(table)) for file, table in zip(files, tables, strict=True)}


def _store_crcs(path: str, file: TargetFile, found: dict[int, list[tuple[int, int, int]]], table: bytearray) -> None:
    """Write each entry's CRC-32, and digest again the chunks that it lies in."""
    touched: set[int] = set()
    try:
        fd = disk.open_to_write(path, os.O_RDWR)
        try:
            for entry, parts in found.items():
                crc = combine_all((crc, size) for _, size, crc in sorted(parts))
                for position in file.crc32_entries[entry].positions:
                    write_at(fd, memoryview(crc.to_bytes(4, "little")), position)
                    touched.update((position // CHUNK, (position + 3) // CHUNK))
            for chunk in touched:
                raw = os.pread(fd, min(CHUNK, file.size - chunk * CHUNK), chunk * CHUNK)
                table[chunk * WIDTH : (chunk + 1) * WIDTH] = digest_chunks(raw)
        finally:
            os.close(fd)
    except OSError as error:
        raise failed(path, error) from error


def path_of(folder: str | os.PathLike[str], file: TargetFile) -> str:
    return names.below(folder, file.name)


def failed(path: str, error: OSError) -> DestinationError:
    """The error for a file that cannot be written."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationError(
            f"{path}: no space left to write it ({reason}); free some, or choose another destination"
        )
    return DestinationError(f"{path}: cannot be written ({reason}); check the destination's permissions and device")

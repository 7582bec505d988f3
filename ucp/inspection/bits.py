"""Bytes of files against the digests and CRCs that were stored with them: every damaged place, not just the first."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ucp import limits
from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint
from ucp.storage import locations
from ucp.storage.crc32 import crc32
from ucp.storage.digests import CHUNK, digest_chunks
from ucp.storage.files import Files
from ucp.storage.torch_pt.archive import Section

Advance = Callable[[int], None]


def damaged_chunks(catalog: Catalog, files: Files, advance: Advance) -> Generator[tuple[int, int, int], None, None]:
    """(file, first byte, last byte + 1) of every chunk that differs from its digest, neighbours apart.

    The caller closes it. advance: called with how many bytes were read. Raises DamagedCheckpoint for a file that can't
    be read.
    """
    jobs = [
        (k, at) for k, table in catalog.chunk_digests.items() for at in range(0, table.size, limits.CRC_BATCH_BYTES)
    ]

    def work(job: tuple[int, int]) -> tuple[int, list[tuple[int, int, int]]]:
        index, at = job
        table = catalog.chunk_digests[index]
        size = min(limits.CRC_BATCH_BYTES, table.size - at)
        raw = bytearray(size)
        files.read_into(catalog.files[index].path, at, memoryview(raw))
        found = np.frombuffer(digest_chunks(memoryview(raw)), np.uint64)
        first = at // CHUNK
        wanted = np.frombuffer(table.table, np.uint64)[first : first + len(found)]
        bad = [first + int(k) for k in np.flatnonzero(found != wanted)]
        return size, [(index, k * CHUNK, min((k + 1) * CHUNK, table.size)) for k in bad]

    with ThreadPoolExecutor(_threads()) as pool:
        for size, bad in pool.map(work, jobs):
            advance(size)
            yield from bad


def checked_files(folder: Path, catalog: Catalog) -> tuple[list[str], list[str]]:
    """The files without digests: zip archives whose entries have CRCs, and files with nothing to check them by.

    These are the catalog's files, and torch's files in the checkpoint's folder, which may have parts of the training
    state.
    """
    digested = {_identity(catalog.files[index].path) for index in catalog.chunk_digests}
    found = {_identity(path): path for path in (*torch_files(folder), *(file.path for file in catalog.on_disk))}
    zips: list[str] = []
    others: list[str] = []
    for identity, path in sorted(found.items()):
        if identity not in digested:
            with locations.opened(path) as stream:
                (zips if _has_crcs(stream) else others).append(path)
    return zips, others


def _has_crcs(stream: BinaryIO) -> bool:
    """Whether this is an archive whose entries have CRC-32s (or several in a row, of which the last one decides), up to
    the file's end. torch writes zeros if it was told not to compute them. True for a damaged archive, which is looked
    at later."""
    end = stream.seek(0, os.SEEK_END)
    section, _ = _last(stream, end)
    stream.seek(max(0, end - _END))
    # zipfile finds one with other data after it, too (DCP's in safetensors), which its CRC-32s say nothing of.
    if not stream.read(4).startswith(b"PK\5\6") or not zipfile.is_zipfile(section):
        return False
    try:
        with zipfile.ZipFile(section) as archive:
            return any(info.CRC for info in archive.infolist())
    except zipfile.BadZipFile:
        return True


def torch_files(folder: Path) -> list[str]:
    """torch's files in a checkpoint's folder."""
    if locations.is_file(folder):  # a checkpoint that is one file
        return [str(folder)]
    return [str(folder / name) for name in locations.names(folder) if name.endswith(".pt")]


def _identity(path: str) -> str:
    return path if locations.is_remote(path) else os.path.realpath(path)


def damaged_entries(paths: Sequence[str], files: Files, advance: Advance) -> Generator[tuple[str, str], None, None]:
    """(file, description) for every entry of these archives that differs from its CRC-32. The caller closes it.

    An archive whose entries have no CRC-32 is skipped (`checked_files` sorts those out). advance: called with how many
    bytes were read. Raises DamagedCheckpoint for a file that can't be read.
    """
    with ThreadPoolExecutor(_threads()) as pool:
        for path, bad in zip(paths, pool.map(lambda path: _archive(path, files), paths), strict=True):
            advance(files.size(path))
            yield from ((path, entry) for entry in bad)


def _archive(path: str, files: Files) -> list[str]:
    try:
        with locations.opened(path) as stream:
            archives = _archives(stream)
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise DamagedCheckpoint(f"can't be read as an archive: {reason}", file=path) from error
    out = []
    for entries in archives:
        if any(info.CRC for info in entries):
            bad = [info for info in entries if _crc(path, info, files) != info.CRC]
            out += [f"entry '{info.filename}' ({info.file_size} bytes from byte {info.header_offset})" for info in bad]
    return out


def _archives(stream: BinaryIO) -> list[list[zipfile.ZipInfo]]:
    """The entries of each archive in a file. torch.distributed.checkpoint's files are several archives in a row. Places
    are counted from the file's beginning."""
    found: list[list[zipfile.ZipInfo]] = []
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        # An archive is read from its end. It tells where it begins, and there the one before it ends.
        section, begin = _last(stream, end)
        with zipfile.ZipFile(section) as archive:
            infos = archive.infolist()
        if not infos:
            break
        for info in infos:
            info.header_offset += begin
        found.append([info for info in infos if info.file_size])
        end = min(info.header_offset for info in infos)
    return found[::-1]


def _last(stream: BinaryIO, end: int) -> tuple[Section, int]:
    """The last archive before this byte, and where it begins; all bytes before it if its end says nothing of that.

    zipfile looks for the beginning, too, but refuses large archives (zip64, as torch's all are) that have other bytes
    before them, since Python 3.13.5 and the releases of older ones from that time on.
    """
    begin, length = 0, min(end, _END + _LOCATOR + _END64)
    stream.seek(end - length)
    tail = stream.read(length)
    last, locator, large = tail[-_END:], tail[-_END - _LOCATOR : -_END], tail[: -_END - _LOCATOR]
    if last.startswith(b"PK\5\6") and last.endswith(b"\0\0"):
        at, (size, offset) = end - _END, struct.unpack("<II", last[12:20])
        if locator.startswith(b"PK\6\7") and large.startswith(b"PK\6\6"):
            at, (size, offset) = end - length, struct.unpack("<QQ", large[40:56])
        begin = max(at - size - offset, 0)
    return Section(stream, begin, end - begin), begin


_END, _LOCATOR, _END64 = 22, 20, 56
"""Bytes of the records at an archive's end: the end itself, and of large ones the end's place and the large end."""


def _crc(path: str, info: zipfile.ZipInfo, files: Files) -> int:
    """The CRC-32 of an entry's stored bytes."""
    header = bytearray(30)
    files.read_into(path, info.header_offset, header)
    name, extra = struct.unpack_from("<HH", header, 26)
    at, left, crc = info.header_offset + len(header) + name + extra, info.compress_size, 0
    buffer = memoryview(bytearray(min(left, limits.CRC_PIECE_BYTES)))
    while left:
        piece = buffer[: min(left, limits.CRC_PIECE_BYTES)]
        files.read_into(path, at, piece)
        crc = crc32(piece, crc)
        at, left = at + len(piece), left - len(piece)
    return crc


def _threads() -> int:
    return min(limits.processors(), limits.THREADS_MAX_COUNT)

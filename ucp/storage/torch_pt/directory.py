"""The directory at the end of a zip archive.

An archive as torch writes it, with nothing before or after and no entry of 4 GiB or more, is read here in two reads: a
job's thousands of files each have one. Any other, the damaged ones among them, is left to Python's ``zipfile``, which
says what is wrong.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

_ENTRY = struct.Struct("<4s4B4H3I5H2I")
_CRC_IN_ENTRY = 16
_UTF8 = 0x800
# The three records at the end: of the 64-bit form, where it lies, and of the old form.
_END64 = struct.Struct("<4sQ2H2I4Q")
_WHERE = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_END_BYTES = _END64.size + _WHERE.size + _END.size
_NEWEST = 63  # the last version of the format that zipfile knows
_TOO_LARGE = 0xFFFFFFFF  # stands for a number that is elsewhere


class ZipEntry(NamedTuple):
    """A record of an archive. raw_name: as its own header has it. at: of its header, in the archive. crc_at: where in
    the archive its CRC-32 is stored."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    stored_size: int
    size: int
    at: int
    crc_at: int


def entries(stream: Any, read: Callable[[int, int], bytes], size: int) -> tuple[list[ZipEntry], int]:
    """The entries in the directory's order, and where it begins.

    stream: the archive as a file of its own. read: gives bytes of it from a place on, fewer if it ends before. size: of
    the archive. Raises what zipfile raises.
    """
    found = as_torch_writes(read, size)
    return by_zipfile(stream, read, size) if found is None else found


def as_torch_writes(read: Callable[[int, int], bytes], size: int) -> tuple[list[ZipEntry], int] | None:
    """None for an archive of another kind."""
    end = read(size - _END_BYTES, _END_BYTES)
    if len(end) < _END_BYTES:
        return None
    end64, where, old = (
        form.unpack_from(end, at)
        for form, at in ((_END64, 0), (_WHERE, _END64.size), (_END, _END64.size + _WHERE.size))
    )
    count, length, start = end64[7:]
    alike = (
        end64[:2] == (b"PK\x06\x06", _END64.size - 12)
        and end64[4:7] == (0, 0, count)
        and where == (b"PK\x06\x07", 0, size - _END_BYTES, 1)
        and old == (b"PK\x05\x06", 0, 0, count, count, length, start, 0)
        and start + length == size - _END_BYTES
    )
    if not alike:
        return None
    raw = read(start, length)
    out, at = [], 0
    for _ in range(count):
        if at + _ENTRY.size > len(raw):
            return None
        fields = _ENTRY.unpack_from(raw, at)
        flags, method, crc, stored, full = fields[5], fields[6], *fields[9:12]
        name_bytes, others, header = fields[12], fields[13:16], fields[18]
        name = raw[at + _ENTRY.size : at + _ENTRY.size + name_bytes]
        plain = len(name) == name_bytes and name.isascii() and b"\0" not in name
        if fields[0] != b"PK\x01\x02" or fields[3] > _NEWEST or any(others) or not plain:
            return None
        if _TOO_LARGE in (stored, full, header):
            return None
        place = start + at + _CRC_IN_ENTRY
        out.append(ZipEntry(name.decode(), name, flags, method, crc, stored, full, header, place))
        at += _ENTRY.size + name_bytes
    return (out, start) if at == length else None


def by_zipfile(stream: Any, read: Callable[[int, int], bytes], size: int) -> tuple[list[ZipEntry], int]:
    with zipfile.ZipFile(stream) as archive:
        infos, start = archive.infolist(), archive.start_dir
    raw = read(start, size - start)
    out, at = [], 0
    for info in infos:  # in the directory's order; zipfile has checked the entries
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        numbers = info.flag_bits, info.compress_type, info.CRC, info.compress_size, info.file_size, info.header_offset
        out.append(ZipEntry(info.filename, name, *numbers, start + at + _CRC_IN_ENTRY))
        at += _ENTRY.size + sum(_ENTRY.unpack_from(raw, at)[12:15])
    return out, start

"""The zip archives that `torch.save` writes, read by their directory. No tensor's data is touched.

torch stores records uncompressed, each under the name that the file had when it was written
(``mp_rank_00_model_states/data.pkl``), and gives each its CRC-32. A record that is read whole here is compared with it.
For records that others read, `ZipEntries.crc` says which CRC-32 the bytes should have.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any, BinaryIO

from ucp import limits
from ucp.errors import DamagedCheckpoint, DigestMismatch, Unsupported
from ucp.storage import locations
from ucp.storage.crc32 import StoredCrc32, crc32
from ucp.storage.torch_pt.directory import ZipEntry, entries

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1
# Records of a few bytes that torch writes beside the pickle. Only 'byteorder' decides anything here.
SMALL_RECORDS = (".format_version", ".storage_alignment", "version")


def crcs_of(path: str) -> tuple[StoredCrc32, ...]:
    """The CRC-32s of all records of a torch file; () if the file is not a single archive.

    Raises DamagedCheckpoint for a file that cannot be read.
    """
    try:
        with locations.opened(path) as stream:
            start = stream.read(2)
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            archive = ZipEntries(stream, path, size) if start == b"PK" else None
            return tuple(archive.crcs()) if archive is not None and archive.is_whole_file else ()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror or error}") from error


class Section(io.RawIOBase):
    """A range of an open file as a file of its own."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream = stream
        self._start, self._length, self._at = start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the beginning")  # zipfile takes this for a damaged archive
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._stream.seek(self._start + self._at)
        found = self._stream.read(min(len(view), max(self._length - self._at, 0)))
        view[: len(found)] = found
        self._at += len(found)
        return len(found)


class ZipEntries:
    """The records of one archive. Only its directory and the headers asked for are read.

    stream: the archive as a file of its own.
    path: the file that it is, or that it lies in from byte ``base`` on.
    size: bytes of the archive.

    Raises DamagedCheckpoint for what is not a whole archive by torch.
    """

    def __init__(self, stream: Any, path: str, size: int, base: int = 0) -> None:
        self.path = path
        self.size = size
        self._base = base
        # Headers lie far apart, so reading ahead, as a buffered local file does, would be wasteful.
        self._stream = getattr(stream, "raw", stream)
        self._raw = stream.getbuffer() if isinstance(stream, io.BytesIO) else None
        try:
            found, directory = entries(stream, self._read, size)
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, struct.error) as error:
            raise DamagedCheckpoint(
                f"the file is truncated or damaged ({size} bytes, zip archive: {error})", file=path
            ) from error
        self._data_end = base + directory
        self._entries = {entry.name: entry for entry in found}
        if len(self._entries) != len(found):
            raise DamagedCheckpoint("two entries of its zip archive have the same name", file=path)
        pickles = [name for name in self._entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles:
            raise DamagedCheckpoint(f"a zip archive ({size} bytes), but not one that torch.save wrote", file=path)
        self._prefix = min(pickles, key=len).removesuffix("data.pkl")
        self.has_crcs = any(entry.crc for entry in found)
        """Whether it was written with CRC-32s: `torch.serialization.set_crc32_options(False)` leaves zeros."""

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._entries

    @property
    def root(self) -> str:
        """The folder in the archive that all records lie in."""
        return self._prefix.rstrip("/")

    def range(self, name: str) -> tuple[int, int]:
        """The bytes `[start, stop)` of the file that are the record's data."""
        entry = self._entries.get(self._prefix + name)
        if entry is None:
            raise DamagedCheckpoint(f"its zip archive has no entry {name!r}", file=self.path)
        if entry.method != zipfile.ZIP_STORED or entry.flags & _ENCRYPTED:
            raise Unsupported(
                f"entry {name!r} is compressed or encrypted, so that it has no byte ranges", file=self.path
            )
        start = self._base + entry.at + self._header_length(name, entry)
        stop = start + entry.size
        if entry.stored_size != entry.size or stop > self._data_end:
            raise DamagedCheckpoint(
                f"zip entry {name!r} should be bytes {start} to {stop}, and the archive's data end at "
                f"{self._data_end} ({self.size} bytes in the file)",
                file=self.path,
            )
        return start, stop

    def _header_length(self, name: str, entry: ZipEntry) -> int:
        """Bytes from a record's header to its data.

        No CRC covers the header, and its lengths decide where the data begins. So its name must be the directory's, and
        the fields of its extra part, which torch uses for padding, must fill that part exactly.
        """
        wanted = entry.raw_name
        raw = self._read(entry.at, LOCAL_HEADER.size + len(wanted) + limits.ZIP_EXTRA_BYTES)
        if len(raw) >= LOCAL_HEADER.size and raw[:4] == b"PK\x03\x04":
            fields = LOCAL_HEADER.unpack_from(raw)
            at = LOCAL_HEADER.size + len(wanted)
            end = at + fields[10]
            if end > len(raw):
                raw = self._read(entry.at, end)
            stored = fields[3] == zipfile.ZIP_STORED and fields[9] == len(wanted)
            if stored and len(raw) >= end and raw[at - len(wanted) : at] == wanted:
                while at + 4 <= end:
                    at += 4 + int.from_bytes(raw[at + 2 : at + 4], "little")
                if at == end:
                    return end
        raise DamagedCheckpoint(f"the header of zip entry {name!r} is damaged ({self.size} bytes)", file=self.path)

    def crc(self, name: str, start: int, stop: int) -> StoredCrc32 | None:
        """The CRC-32 of a record that lies in these bytes of the file; None if the archive was written without CRCs."""
        entry = self._entries[self._prefix + name]
        return StoredCrc32(name, start, stop, entry.crc, self._base + entry.crc_at) if self.has_crcs else None

    @property
    def is_whole_file(self) -> bool:
        """Whether the archive begins where its file does. If a file is a row of archives, only the first does."""
        return self._base == 0 and min(entry.at for entry in self._entries.values()) == 0

    def crcs(self) -> list[StoredCrc32]:
        """The CRC-32s of all records that have bytes, in the order of the file; none if it was written without CRCs."""
        names = [name.removeprefix(self._prefix) for name, entry in self._entries.items() if entry.size]
        found = [self.crc(name, *self.range(name)) for name in names if self._prefix + name in self._entries]
        return sorted((crc for crc in found if crc is not None), key=lambda crc: crc.start)

    def read(self, name: str) -> bytes:
        """A whole record. Raises DigestMismatch if it differs from its CRC-32."""
        start, stop = self.range(name)
        data = self._read(start - self._base, stop - start)
        if len(data) < stop - start:
            raise DamagedCheckpoint(f"ends inside zip entry {name!r} ({self.size} bytes)", file=self.path)
        wanted = self.crc(name, start, stop)
        if wanted is not None and wanted.crc is not None and crc32(data) != wanted.crc:
            raise DigestMismatch(wanted.differs(self.path, wanted.crc, crc32(data)))
        return data

    def _read(self, at: int, count: int) -> bytes:
        """Bytes of the archive; fewer if it ends before, none if a damaged directory points outside."""
        if not 0 <= at <= self.size:
            return b""
        if self._raw is not None:
            return bytes(self._raw[at : at + count])
        self._stream.seek(at)
        parts = []
        while count:
            part = self._stream.read(count)
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

"""Lay out a ``torch.save`` file whose tensors' data is not there yet.

A checkpoint file of many gigabytes is described before its first byte exists: the pickle and all zip records are known
bytes, and every tensor's storage is a byte range that somebody fills later. Neither torch nor the classes that the
pickle names are imported: a DeepSpeed object is pickled from its `Standin`, by its class's name.

The layout is that of torch's own writer (caffe2/serialize/inline_container.cc): stored zip records, each record's data
on a 64-byte boundary, ``data.pkl`` first, then ``byteorder``, ``data/<n>`` and ``version``. As there, a record whose
data comes later has its CRC-32 after the data, in a data descriptor. So the file can be written from its first byte to
its last, without going back. One record is left out on purpose: ``.format_version``. With it, torch would compute
storage offsets by the exact habits of its writer when it loads under fake tensors. Without it, torch asks the zip
directory.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ucp.storage.crc32 import Crc32Entry
from ucp.storage.dtypes import itemsize
from ucp.storage.torch_pt.pickler import Pickler, Placeholder

ALIGNMENT = 64
# torch's name for the archive of what it writes to a stream.
STREAM = "archive"
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_UTF8_NAME, _DESCRIPTOR_FOLLOWS = 0x0800, 0x0008  # flags of a record


@dataclass(frozen=True)
class TorchFilePlan:
    """A file to be written.

    size: bytes.
    literals: (byte offset, bytes) that are known.
    offsets: byte offset of every placeholder's first element.
    crc32_entries: the storages whose data comes later, and where their CRC-32 must then be stored, after the data.
    """

    size: int
    literals: tuple[tuple[int, bytes], ...]
    offsets: Mapping[Placeholder, int]
    crc32_entries: tuple[Crc32Entry, ...]


def scalar_tensor(value: float, dtype: str = "float32") -> Placeholder:
    """A 0-d tensor with this value, as torch's optimizers keep their ``step``."""
    return Placeholder((), dtype, data=np.asarray(value, np.dtype(dtype).newbyteorder("<")).tobytes())


def stem_of(name: str) -> str:
    """The root folder of the archive that torch would write into a file of this name.

    It is the name without its last extension. A file whose name is not ASCII is opened as a stream by torch.
    """
    stem = name.rpartition("/")[2].rpartition("\\")[2]
    stem = stem.rpartition(".")[0] if "." in stem else stem
    return stem if stem and stem.isascii() else STREAM


def plan_torch_file(obj: Any, stem: str = STREAM) -> TorchFilePlan:
    """Plan the file that ``torch.save(obj)`` would write with tensors in place of the placeholders.

    stem: the root folder of the archive, which says what name the file was written under (`stem_of` its name).
    ``obj`` is made of plain Python values, numpy arrays, placeholders, `Standin`, `Size`, `DtypeName`, `DeviceName`
    and real tensors (embedded). Raises `Unsupported` for a `TensorRef`: its bytes are elsewhere.
    """
    stream = io.BytesIO()
    pickler = Pickler(stream)
    pickler.dump(obj)
    archive = _ZipRecords(stem)
    archive.add_known("data.pkl", stream.getvalue())
    archive.add_known("byteorder", b"little")
    starts = [
        archive.add_known(f"data/{key}", storage.data)
        if storage.data is not None
        else archive.add_later(f"data/{key}", storage.size)
        for key, storage in enumerate(pickler.storages)
    ]
    archive.add_known("version", b"3\n")
    size = archive.finish()
    offsets = {p: starts[key] + p.offset * itemsize(p.dtype) for p, key in pickler.placed.items()}
    return TorchFilePlan(size, tuple(archive.literals), offsets, tuple(archive.crc32_entries))


# --- the zip archive -------------------------------------------------------------------------------------------------


@dataclass
class _ZipRecord:
    name: bytes
    header: int  # offset of the local header
    size: int
    crc: int | None  # None where the data come later
    start: int  # offset of the data

    @property
    def flags(self) -> int:
        return _UTF8_NAME | (_DESCRIPTOR_FOLLOWS if self.crc is None else 0)


@dataclass
class _ZipRecords:
    """Zip records one after the other (APPNOTE.TXT 4.3: local headers, then the central directory and its end)."""

    root: str
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    crc32_entries: list[Crc32Entry] = field(default_factory=list)
    _records: list[_ZipRecord] = field(default_factory=list)
    _at: int = 0

    def add_known(self, name: str, data: bytes) -> int:
        """Add a record of these bytes. Returns their offset in the file."""
        start = self._begin(name, len(data), zlib.crc32(data))
        if data:
            self.literals.append((start, data))
        return start

    def add_later(self, name: str, size: int) -> int:
        """Add a record whose ``size`` bytes come later. Returns their offset in the file."""
        if not size:
            return self.add_known(name, b"")
        start = self._begin(name, size, None)
        # 4.3.9: the CRC, and the sizes as wide as the local header has them.
        descriptor = struct.pack("<4sIQQ" if size >= _MAX32 else "<4sIII", b"PK\7\x08", 0, size, size)
        self.literals.append((self._at, descriptor))
        self._at += len(descriptor)
        return start

    def _begin(self, name: str, size: int, crc: int | None) -> int:
        path = f"{self.root}/{name}".encode()
        large = size >= _MAX32
        told = 0 if crc is None else size  # 4.4.4: the size is 0 here if a descriptor follows
        extra = struct.pack("<HHQQ", 1, 16, told, told) if large else b""
        # Padding is an extra field of its own, tagged as torch tags it.
        end = self._at + 30 + len(path) + len(extra) + 4
        padding = -end % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        record = _ZipRecord(path, self._at, size, crc, self._at + 30 + len(path) + len(extra))
        shown = _MAX32 if large else told
        header = struct.pack(
            "<4s5H3I2H",
            b"PK\3\4",
            45 if large else 20,
            record.flags,
            0,  # stored
            0,
            0x21,  # 1 January 1980: equal inputs give equal files
            crc or 0,
            shown,
            shown,
            len(path),
            len(extra),
        )
        self.literals.append((self._at, header + path + extra))
        self._records.append(record)
        self._at = record.start + size
        return record.start

    def finish(self) -> int:
        """Add the central directory. Returns the file's size."""
        directory = bytearray()
        for record in self._records:
            at = self._at + len(directory)
            wide = [n for n in (record.size, record.size) if n >= _MAX32]
            wide += [record.header] if record.header >= _MAX32 else []
            extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            shown = min(record.size, _MAX32)
            directory += struct.pack(
                "<4s6H3I5H2I",
                b"PK\1\2",
                45 if wide else 20,
                45 if wide else 20,
                record.flags,
                0,
                0,
                0x21,
                record.crc or 0,
                shown,
                shown,
                len(record.name),
                len(extra),
                0,
                0,
                0,
                0,
                min(record.header, _MAX32),
            )
            directory += record.name + extra
            if record.crc is None:
                descriptor = record.start + record.size
                self.crc32_entries.append(Crc32Entry(record.start, record.size, (descriptor + 4, at + 16)))
        count, start, size = len(self._records), self._at, len(directory)
        end = self._at + size
        if count >= _MAX16 or start >= _MAX32 or size >= _MAX32:
            directory += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
            directory += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        shown_count = min(count, _MAX16)
        directory += struct.pack(
            "<4s4H2IH", b"PK\5\6", 0, 0, shown_count, shown_count, min(size, _MAX32), min(start, _MAX32), 0
        )
        self.literals.append((start, bytes(directory)))
        self._at += len(directory)
        return self._at

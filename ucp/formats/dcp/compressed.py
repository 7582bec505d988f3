"""Records that torch's extension ``ZStandard`` has compressed (torch/distributed/checkpoint/_extension.py).

An element of such a record has no bytes of its own, so the record is decompressed whole when some of it is read. The
last ones are kept, since their neighbours are read next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.errors import DamagedCheckpoint, DigestMismatch
from ucp.storage import zstd
from ucp.storage.crc32 import StoredCrc32, crc32
from ucp.storage.files import Files


@dataclass
class Kept:
    """Records that were decompressed last, by file and place. Thread-safe."""

    records: OrderedDict[tuple[str, int], bytes] = field(default_factory=OrderedDict)
    lock: Lock = field(default_factory=Lock)


@dataclass(frozen=True)
class CompressedRecord:
    """A `ucp.catalog.ByteSource`: what one record decompresses to. Thread-safe.

    start, length: of the compressed bytes. most: how many bytes they may become. crc: that of the tensor's elements.
    """

    files: Files
    path: str
    start: int
    length: int
    most: int
    crc: StoredCrc32 | None
    kept: Kept

    def read_into(self, offset: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        """Fill the parts, one after the other, with the bytes from ``offset`` on. Raises DamagedCheckpoint, and
        DigestMismatch where the elements are not those of the record's CRC-32."""
        whole = self._whole()
        if offset + sum(map(len, parts)) > len(whole):
            raise DamagedCheckpoint(f"{self.path}: the record at byte {self.start} is shorter than others like it")
        for part in parts:
            np.asarray(part)[:] = np.frombuffer(whole, np.uint8, len(part), offset)
            offset += len(part)

    def _whole(self) -> bytes:
        key = self.path, self.start
        with self.kept.lock:
            found = self.kept.records.pop(key, None)
            if found is None:
                raw = bytearray(self.length)
                self.files.read_into(self.path, self.start, raw)
                found = zstd.read(self.path, bytes(raw), self.most)
                self._check(found)
            self.kept.records[key] = found
            while len(self.kept.records) > 1 and sum(map(len, self.kept.records.values())) > limits.ZSTD_KEPT_BYTES:
                self.kept.records.popitem(last=False)
        return found

    def _check(self, whole: bytes) -> None:
        if self.crc is None or self.crc.stop > len(whole):
            return
        said = int.from_bytes(whole[self.crc.at : self.crc.at + 4], "little") if self.crc.crc is None else self.crc.crc
        if crc32(memoryview(whole)[self.crc.start : self.crc.stop]) != said:
            raise DigestMismatch(
                f"{self.path}: the elements in the record at byte {self.start} are not those of its CRC-32; they were "
                "changed after they were written"
            )

"""Reading files that `torch.save` wrote, without torch and without reading any tensor's data.

`load` gives the object graph with a `TensorRef` (file, byte offset, dtype, shape, strides) in each tensor's place. Both
formats of torch/serialization.py are read:

- the zip archive: `<name>/data.pkl` is the pickle, `<name>/data/<key>` the bytes of each storage, stored uncompressed;
- the older stream: a magic number, the protocol, a description of the system, the pickle, the list of storage keys, and
  for each key the number of elements (int64) and the bytes.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import Any, BinaryIO

from ucp.errors import DamagedCheckpoint, UnsafePickle, Unsupported
from ucp.storage import dtypes, locations
from ucp.storage.torch_pt.allowlist import StorageClass, StorageRef
from ucp.storage.torch_pt.pickles import Unpickler
from ucp.storage.torch_pt.values import TensorRef

__all__ = ["Section", "TensorRef", "load", "load_section"]

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
# How the older stream begins: the magic number, pickled with protocol 2 or later.
_MAGIC_PICKLE = _MAGIC_NUMBER.to_bytes(10, "little")


def load(path: str | os.PathLike[str], *, trust: bool = False) -> Any:
    """The object graph of a `torch.save` file; every tensor is a `TensorRef` into that file.

    `trust` allows classes outside the allow-list by importing and calling them, which runs code that the file's author
    chose. Raises `DamagedCheckpoint` if the file is missing, empty, truncated or not a torch file, `UnsafePickle` for a
    class outside the allow-list, and `Unsupported` for tensors that are not plain strided ones.
    """
    name = str(path)
    try:
        with locations.opened(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            start = stream.read(32)
            stream.seek(0)
            if size == 0:
                raise DamagedCheckpoint(f"{name}: the file is empty (0 bytes)")
            if start.startswith(b"PK"):
                return _load_zip(stream, name, size, trust)
            if _MAGIC_PICKLE in start:
                return _load_legacy(stream, name, size, trust)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{name}: there is no such file") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{name}: cannot be read: {error.strerror or error}") from error
    raise DamagedCheckpoint(f"{name}: not a file that torch.save wrote ({size} bytes, it begins with {start[:8]!r})")


def load_section(
    stream: BinaryIO, path: str | os.PathLike[str], start: int, length: int, *, trust: bool = False
) -> Any:
    """As `load`, for a zip archive of `torch.save` that is the bytes `[start, start + length)` of another file.

    stream: that file, open for reading; path: its name, which the `TensorRef`s have. They count from its beginning.
    """
    name = str(path)
    size = stream.seek(0, os.SEEK_END)
    if not 0 <= start <= start + length <= size:
        raise DamagedCheckpoint(
            f"{name}: the file is truncated: bytes {start} to {start + length} are wanted, and it has {size}"
        )
    return _load_zip(Section(stream, start, length), name, length, trust, start)


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
            raise ValueError("a position before the beginning")  # what zipfile takes for a damaged archive
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._stream.seek(self._start + self._at)
        found = self._stream.read(min(len(view), max(self._length - self._at, 0)))
        view[: len(found)] = found
        self._at += len(found)
        return len(found)


class _Storages:
    """The storages that one pickle refers to, each made once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.found: dict[tuple[str, str], StorageRef] = {}  # by key and dtype

    def get(self, saved: Any, items: int) -> StorageRef:
        """The storage for a persistent id of the form ("storage", class, key, location, numel, ...)."""
        kind = saved[0] if isinstance(saved, tuple) and saved else saved
        if kind != "storage":
            raise UnsafePickle(f"{self.path}: its pickle refers to a stored {kind!r}; only tensor storages are read")
        if len(saved) != items:
            raise DamagedCheckpoint(f"{self.path}: a storage is described by {len(saved)} items instead of {items}")
        _, storage_class, key, location, numel, *view = saved
        if type(storage_class) is not StorageClass or type(key) is not str or type(location) is not str:
            raise DamagedCheckpoint(f"{self.path}: the description of storage {key!r} is damaged")
        if type(numel) is not int or not 0 <= numel < 2**60:
            raise DamagedCheckpoint(f"{self.path}: storage {key!r} has {numel!r} elements")
        if any(item is not None for item in view):
            raise Unsupported(f"{self.path}: storage {key!r} is a view of another, as torch wrote before release 0.4")
        storage = self.found.get((key, storage_class.dtype))
        if storage is None:
            start = self.start(key, storage_class, numel)
            storage = self.found[key, storage_class.dtype] = StorageRef(
                self.path, key, storage_class.dtype, numel, location, start
            )
        elif storage.numel != numel:
            raise DamagedCheckpoint(f"{self.path}: storage {key!r} has {storage.numel} elements, and {numel} elsewhere")
        return storage

    def start(self, key: str, storage_class: StorageClass, numel: int) -> int:
        """The first byte of the storage in the file."""
        raise NotImplementedError


# --- the zip archive -------------------------------------------------------------------------------------------------

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1


class _ZipEntries:
    """The entries of a torch zip archive. Only the central directory and the local headers asked for are read."""

    def __init__(self, stream: Any, path: str, size: int, base: int = 0) -> None:
        self.path = path
        self.size = size
        self._base = base  # where the archive begins in the file
        # Headers lie far apart: reading ahead, as a buffered local file does, would be waste.
        self._stream = getattr(stream, "raw", stream)
        try:
            with zipfile.ZipFile(stream) as archive:
                infos = archive.infolist()
                self._data_end = base + archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, struct.error) as error:
            raise DamagedCheckpoint(
                f"{path}: the file is truncated or damaged ({size} bytes, zip archive: {error})"
            ) from error
        self._entries = {info.filename: info for info in infos}
        if len(self._entries) != len(infos):
            raise DamagedCheckpoint(f"{path}: two entries of its zip archive have the same name")
        pickles = [name for name in self._entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles:
            raise DamagedCheckpoint(f"{path}: a zip archive ({size} bytes), but not one that torch.save wrote")
        self._prefix = min(pickles, key=len).removesuffix("data.pkl")

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._entries

    def range(self, name: str) -> tuple[int, int]:
        """The bytes `[start, stop)` of the file that are the entry's data."""
        info = self._entries.get(self._prefix + name)
        if info is None:
            raise DamagedCheckpoint(f"{self.path}: its zip archive has no entry {name!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise Unsupported(f"{self.path}: entry {name!r} is compressed or encrypted, so that it has no byte ranges")
        header = self._read(info.header_offset, _LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise DamagedCheckpoint(f"{self.path}: the header of zip entry {name!r} is damaged ({self.size} bytes)")
        fields = _LOCAL_HEADER.unpack(header)
        # The name and extra lengths of the local header differ from the central directory's: torch pads with them.
        start = self._base + info.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10]
        stop = start + info.file_size
        if fields[3] != zipfile.ZIP_STORED or info.compress_size != info.file_size or stop > self._data_end:
            raise DamagedCheckpoint(
                f"{self.path}: zip entry {name!r} should be bytes {start} to {stop}, and the archive's data end at "
                f"{self._data_end} ({self.size} bytes in the file)"
            )
        return start, stop

    def read(self, name: str) -> bytes:
        start, stop = self.range(name)
        data = self._read(start - self._base, stop - start)
        if len(data) < stop - start:
            raise DamagedCheckpoint(f"{self.path}: ends inside zip entry {name!r} ({self.size} bytes)")
        return data

    def _read(self, at: int, count: int) -> bytes:
        """Bytes of the archive; fewer where it ends before, none where a damaged directory points outside."""
        if not 0 <= at <= self.size:
            return b""
        self._stream.seek(at)
        parts = []
        while count:
            part = self._stream.read(count)
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


class _ZipStorages(_Storages):
    def __init__(self, archive: _ZipEntries) -> None:
        super().__init__(archive.path)
        self._archive = archive

    def start(self, key: str, storage_class: StorageClass, numel: int) -> int:
        start, stop = self._archive.range(f"data/{key}")
        width = dtypes.itemsize(storage_class.dtype)
        # torch counts whole elements, so that a byte storage of odd length may have a rest.
        if not 0 <= stop - start - numel * width < width:
            raise DamagedCheckpoint(
                f"{self.path}: storage {key!r} should be {numel} elements of {storage_class.dtype} "
                f"({numel * width} bytes), and its zip entry has {stop - start} bytes"
            )
        return start


def _load_zip(stream: Any, path: str, size: int, trust: bool, base: int = 0) -> Any:
    archive = _ZipEntries(stream, path, size, base)
    if "constants.pkl" in archive:
        raise Unsupported(f"{path}: a TorchScript program, not a checkpoint")
    if "byteorder" in archive and archive.read("byteorder").strip() != b"little":
        raise Unsupported(f"{path}: written on a big-endian machine, which is not supported")
    storages = _ZipStorages(archive)
    data = archive.read("data.pkl")
    return Unpickler(io.BytesIO(data), path, len(data), lambda saved: storages.get(saved, 5), trust).load()


# --- the older stream ------------------------------------------------------------------------------------------------


class _LegacyStorages(_Storages):
    """Storages whose places are known only once the pickle has been read."""

    def start(self, key: str, storage_class: StorageClass, numel: int) -> int:
        return 0

    def place(self, stream: BinaryIO, keys: Any, size: int) -> None:
        """Find each storage's bytes, which follow the stream's position in the order of `keys`."""
        if not isinstance(keys, list) or set(keys) != {key for key, _ in self.found}:
            raise DamagedCheckpoint(f"{self.path}: its list of storages does not match its pickle")
        # Of the types that one storage may be read as, the first is the one that it was written with.
        written = {key: storage for (key, _), storage in reversed(self.found.items())}
        at = stream.tell()
        for key in keys:
            storage = written[key]
            stream.seek(at)
            header = stream.read(8)
            numel = int.from_bytes(header, "little", signed=True)
            start, stop = at + 8, at + 8 + storage.nbytes
            if len(header) < 8 or stop > size:
                raise DamagedCheckpoint(
                    f"{self.path}: the file is truncated: storage {key!r} should be bytes {start} to {stop}, "
                    f"and the file has {size}"
                )
            if numel != storage.numel:
                raise DamagedCheckpoint(
                    f"{self.path}: storage {key!r} should have {storage.numel} elements of {storage.dtype}, "
                    f"and {numel} are stored"
                )
            for (other, _), reading in self.found.items():
                if other == key:
                    reading.move_to(start)
            at = stop


def _load_legacy(stream: BinaryIO, path: str, size: int, trust: bool) -> Any:
    def plain() -> Any:
        return Unpickler(stream, path, size).load()

    if plain() != _MAGIC_NUMBER or plain() != _PROTOCOL_VERSION:
        raise DamagedCheckpoint(f"{path}: not a file that torch.save wrote ({size} bytes)")
    system = plain()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Unsupported(f"{path}: written on a big-endian machine, which is not supported")
    storages = _LegacyStorages(path)
    graph = Unpickler(stream, path, size, lambda saved: storages.get(saved, 6), trust).load()
    storages.place(stream, plain(), size)
    return graph

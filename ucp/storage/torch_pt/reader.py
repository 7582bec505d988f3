"""Reading files that `torch.save` wrote, without torch and without reading any tensor's data.

`load` gives the object graph with a `TensorRef` (file, byte offset, dtype, shape, strides) in place of each tensor.
Both formats of torch/serialization.py are read:

- the zip archive: `<name>/data.pkl` is the pickle, `<name>/data/<key>` has the bytes of each storage, uncompressed;
- the older stream: a magic number, the protocol, a description of the system, the pickle, the list of storage keys, and
  for each key the number of elements (int64) and the bytes.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from ucp import limits
from ucp.errors import DamagedCheckpoint, UnsafePickle, Unsupported
from ucp.printable import short
from ucp.storage import dtypes, locations
from ucp.storage.crc32 import StoredCrc32
from ucp.storage.torch_pt.archive import SMALL_RECORDS, Section, ZipEntries
from ucp.storage.torch_pt.named import StorageClass, StorageRef
from ucp.storage.torch_pt.pickles import Unpickler
from ucp.storage.torch_pt.skipped import Skipped, without
from ucp.storage.torch_pt.twins import TWINS, Twin
from ucp.storage.torch_pt.values import TensorRef

__all__ = ["TensorRef", "TorchFile", "load", "load_bytes", "load_file", "load_section"]

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
# How the older stream begins: the magic number, pickled with protocol 2 or later.
_MAGIC_PICKLE = _MAGIC_NUMBER.to_bytes(10, "little")


@dataclass(frozen=True)
class TorchFile:
    """What a `torch.save` file says.

    graph: its object, with every tensor as a `TensorRef` into that file.
    stem: the name that the file had when it was written, without its extension; torch makes it the archive's root
    folder. "archive" if torch wrote to a stream and knew no name. None in the older format, which keeps no name.
    has_crcs: whether its records have CRC-32s to compare with. The pickle and the small records were compared already.
    passed: names that a caller has given to what it found true of the graph. Files with the same pickle share them.
    """

    graph: Any
    stem: str | None
    has_crcs: bool
    passed: set[str] = field(default_factory=set, compare=False)


def load(
    path: str | os.PathLike[str], *, trust: bool | None = False, skipped: Skipped | None = None, dtensors: bool = False
) -> Any:
    """The object graph of a `torch.save` file. Arguments and errors are those of `load_file`."""
    return load_file(path, trust=trust, skipped=skipped, dtensors=dtensors).graph


def load_file(
    path: str | os.PathLike[str],
    *,
    trust: bool | None = False,
    skipped: Skipped | None = None,
    dtensors: bool = False,
) -> TorchFile:
    """Read a `torch.save` file without its tensors' data.

    trust: allow classes outside the allow-list by importing and calling them, which runs code that the file's author
    chose. None if the caller cannot ask for that.
    skipped: if given, an object of such a class becomes a plain mapping of its attributes, and the class (module, name)
    is added to it.
    dtensors: read one rank's DTensors as `Standin`s, and ShardedTensors, too (`shared_out`). They are
    refused otherwise.

    Raises `DamagedCheckpoint` if the file is missing, empty, truncated or not a torch file, `UnsafePickle` for a class
    outside the allow-list, `Unsupported` for tensors that are not plain strided ones, and `DigestMismatch` if the
    pickle or another record that is read whole differs from the CRC-32 that is stored with it.
    """
    name = str(path)
    try:
        with locations.opened(path) as stream:
            return _load_stream(stream, name, trust, skipped, dtensors)
    except FileNotFoundError as error:
        raise DamagedCheckpoint("there is no such file", file=name) from error
    except OSError as error:
        raise DamagedCheckpoint(f"cannot be read: {error.strerror or error}", file=name) from error


def load_bytes(raw: bytes, name: str, *, skipped: Skipped | None = None) -> Any:
    """The object graph of what `torch.save` wrote to a stream in memory. name: what errors call these bytes.

    The offsets of its `TensorRef`s count from the first of them. skipped, and what is raised: as for `load_file`.
    """
    return _load_stream(io.BytesIO(raw), name, None, skipped, False).graph


def _load_stream(stream: BinaryIO, name: str, trust: bool | None, skipped: Skipped | None, dtensors: bool) -> TorchFile:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    start = stream.read(32)
    stream.seek(0)
    if size == 0:
        raise DamagedCheckpoint("the file is empty (0 bytes)", file=name)
    if start.startswith(b"PK"):
        if size <= limits.SMALL_ARCHIVE_BYTES:  # one read, where its directory and small records would take twenty
            stream = io.BytesIO(stream.read())
            size = len(stream.getbuffer())
        return _load_zip(stream, name, size, trust, skipped=skipped, dtensors=dtensors)
    if _MAGIC_PICKLE in start:
        return TorchFile(_load_legacy(stream, name, size, trust, skipped, dtensors), None, False)
    raise DamagedCheckpoint(f"not a file that torch.save wrote ({size} bytes, it begins with {start[:8]!r})", file=name)


def load_section(
    stream: BinaryIO,
    path: str | os.PathLike[str],
    start: int,
    length: int,
    *,
    trust: bool | None = False,
    skipped: Skipped | None = None,
) -> Any:
    """Like `load`, for a zip archive by `torch.save` in the bytes `[start, start + length)` of another file.

    stream: that file, open for reading.
    path: its name, which the `TensorRef`s have. Their offsets count from the file's beginning.
    """
    name = str(path)
    size = stream.seek(0, os.SEEK_END)
    if not 0 <= start <= start + length <= size:
        raise DamagedCheckpoint(
            f"the file is truncated: bytes {start} to {start + length} are wanted, and it has {size}", file=name
        )
    return _load_zip(Section(stream, start, length), name, length, trust, start, skipped=skipped).graph


class _Storages:
    """The storages that one pickle refers to, each made once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.found: dict[tuple[str, str], StorageRef] = {}  # by key and dtype

    def get(self, saved: Any, items: int) -> StorageRef:
        """The storage for a persistent id of the form ("storage", class, key, location, numel, ...)."""
        kind = saved[0] if isinstance(saved, tuple) and saved else saved
        if kind != "storage":
            raise UnsafePickle(
                f"its pickle refers to a stored {short(kind)}; only tensor storages are read", file=self.path
            )
        if len(saved) != items:
            raise DamagedCheckpoint(f"a storage is described by {len(saved)} items instead of {items}", file=self.path)
        _, storage_class, key, location, numel, *view = saved
        if type(storage_class) is not StorageClass or type(key) is not str or type(location) is not str:
            raise DamagedCheckpoint(f"the description of storage {short(key)} is damaged", file=self.path)
        if type(numel) is not int or not 0 <= numel < 2**60:
            raise DamagedCheckpoint(f"storage {key!r} has {short(numel)} elements", file=self.path)
        if any(item is not None for item in view):
            raise Unsupported(
                f"storage {key!r} is a view of another, as torch wrote before release 0.4", file=self.path
            )
        storage = self.found.get((key, storage_class.dtype))
        if storage is None:
            start, record = self.place_of(key, storage_class, numel)
            storage = self.found[key, storage_class.dtype] = StorageRef(
                self.path, key, storage_class.dtype, numel, location, start, record
            )
        elif storage.numel != numel:
            raise DamagedCheckpoint(
                f"storage {key!r} has {storage.numel} elements, and {numel} elsewhere", file=self.path
            )
        return storage

    def place_of(self, key: str, storage_class: StorageClass, numel: int) -> tuple[int, StoredCrc32 | None]:
        """The first byte of the storage in the file, and its CRC-32 if it has one."""
        raise NotImplementedError


# --- the zip archive -------------------------------------------------------------------------------------------------


class _ZipStorages(_Storages):
    def __init__(self, archive: ZipEntries) -> None:
        super().__init__(archive.path)
        self._archive = archive
        self.asked: dict[Any, None] = {}  # in the pickle's order

    def plain(self, saved: Any) -> StorageRef:
        """`get`, for an archive's description of a storage."""
        found = self.get(saved, 5)
        self.asked[saved] = None
        return found

    def place_of(self, key: str, storage_class: StorageClass, numel: int) -> tuple[int, StoredCrc32 | None]:
        start, stop = self._archive.range(f"data/{key}")
        width = dtypes.itemsize(storage_class.dtype)
        # torch counts whole elements, so a storage may have bytes beyond its last whole element.
        if not 0 <= stop - start - numel * width < width:
            raise DamagedCheckpoint(
                f"storage {key!r} should be {numel} elements of {storage_class.dtype} "
                f"({numel * width} bytes), and its zip entry has {stop - start} bytes",
                file=self.path,
            )
        return start, self._archive.crc(f"data/{key}", start, stop)


def _load_zip(
    stream: Any,
    path: str,
    size: int,
    trust: bool | None,
    base: int = 0,
    skipped: Skipped | None = None,
    dtensors: bool = False,
) -> TorchFile:
    archive = ZipEntries(stream, path, size, base)
    if "constants.pkl" in archive:
        raise Unsupported("a TorchScript program, not a checkpoint", file=path)
    if "byteorder" in archive and archive.read("byteorder").strip() != b"little":
        raise Unsupported("written on a big-endian machine, which is not supported", file=path)
    storages = _ZipStorages(archive)
    for name in SMALL_RECORDS:
        if name in archive:
            archive.read(name)
    data = archive.read("data.pkl")
    known = None if trust else TWINS.get(data, dtensors)
    if known is not None:
        return TorchFile(known.copy(storages.plain), archive.root, archive.has_crcs, known.passed)
    graph = Unpickler(io.BytesIO(data), path, len(data), storages.plain, trust, skipped, dtensors).load()
    if skipped:
        return TorchFile(without(graph, skipped), archive.root, archive.has_crcs)
    twin = None if trust else Twin.of(graph, list(storages.asked), list(storages.found.values()))
    if twin is None:
        return TorchFile(graph, archive.root, archive.has_crcs)
    TWINS.put(data, dtensors, twin)
    return TorchFile(graph, archive.root, archive.has_crcs, twin.passed)


# --- the older stream ------------------------------------------------------------------------------------------------


class _LegacyStorages(_Storages):
    """Storages whose places are known only once the pickle has been read."""

    def place_of(self, key: str, storage_class: StorageClass, numel: int) -> tuple[int, StoredCrc32 | None]:
        return 0, None

    def place(self, stream: BinaryIO, keys: Any, size: int) -> None:
        """Find each storage's bytes, which follow the stream's position in the order of `keys`."""
        if not isinstance(keys, list) or set(keys) != {key for key, _ in self.found}:
            raise DamagedCheckpoint("its list of storages does not match its pickle", file=self.path)
        # A storage may be read as several types. The first one is the type that it was written with.
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
                    f"the file is truncated: storage {key!r} should be bytes {start} to {stop}, "
                    f"and the file has {size}",
                    file=self.path,
                )
            if numel != storage.numel:
                raise DamagedCheckpoint(
                    f"storage {key!r} should have {storage.numel} elements of {storage.dtype}, and {numel} are stored",
                    file=self.path,
                )
            for (other, _), reading in self.found.items():
                if other == key:
                    reading.move_to(start)
            at = stop


def _load_legacy(
    stream: BinaryIO,
    path: str,
    size: int,
    trust: bool | None,
    skipped: Skipped | None = None,
    dtensors: bool = False,
) -> Any:
    def plain() -> Any:
        return Unpickler(stream, path, size, trust=None).load()

    if plain() != _MAGIC_NUMBER or plain() != _PROTOCOL_VERSION:
        raise DamagedCheckpoint(f"not a file that torch.save wrote ({size} bytes)", file=path)
    system = plain()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Unsupported("written on a big-endian machine, which is not supported", file=path)
    storages = _LegacyStorages(path)
    graph = Unpickler(stream, path, size, lambda saved: storages.get(saved, 6), trust, skipped, dtensors).load()
    storages.place(stream, plain(), size)
    return without(graph, skipped) if skipped else graph

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
import pickle
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ucp.errors import Unsupported
from ucp.geometry import row_major, span
from ucp.storage.crc32 import Crc32Entry
from ucp.storage.dtypes import canonical, itemsize
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, Standin, TensorRef

ALIGNMENT = 64
# torch's name for the archive of what it writes to a stream.
STREAM = "archive"
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_UTF8_NAME, _DESCRIPTOR_FOLLOWS = 0x0800, 0x0008  # flags of a record
# torch/storage.py: the classes that name an element type in a pickle; types without one are stored untyped.
_STORAGE_CLASSES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}


@dataclass(frozen=True, eq=False)
class SharedStorage:
    """A storage that several placeholders share. size: bytes. data: its bytes, if they are already known."""

    size: int
    data: bytes | None = None


@dataclass(frozen=True, eq=False)
class Placeholder:
    """A tensor whose data comes later. Every instance is its own tensor, equal to no other.

    shape, strides: in elements; strides are row-major by default.
    storage: what it lies in from element ``offset`` on; by default one of its own, just large enough.
    is_parameter: load as an ``nn.Parameter``.
    data: the storage's bytes, if they are already known.

    The same instance in two places of an object is one tensor in both when loaded.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    storage: SharedStorage | None = None
    offset: int = 0
    is_parameter: bool = False
    data: bytes | None = None

    @property
    def extent(self) -> int:
        """Bytes from the storage's beginning to the end of the tensor's last element."""
        if 0 in self.shape:
            return 0
        strides = row_major(self.shape) if self.strides is None else self.strides
        return (self.offset + span(self.shape, strides)) * itemsize(self.dtype)


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
    pickler = _Pickler(stream)
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


# --- the pickle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GlobalName:
    """A class or function, by name alone."""

    module: str
    name: str


# Python's own pickler in Python, since its methods are needed. Type stubs know the class without them.
_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):
    """Protocol 2, as torch writes it. Classes that are not here are named, not looked up."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.storages: list[SharedStorage] = []
        self.placed: dict[Placeholder, int] = {}
        self._keys: dict[SharedStorage, int] = {}
        self._names: dict[_GlobalName, _GlobalName] = {}
        self._embedded: dict[int, tuple[Placeholder, Any]] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        kind = type(obj)
        if kind is _GlobalName:
            return self._save_name(obj)
        known = self.memo.get(id(obj))
        if known is not None:
            self.write(self.get(known[0]))
            return None
        if kind is Placeholder:
            self._save_tensor(obj)
        elif kind is Standin:
            self._save_standin(obj)
        elif kind is DtypeName:
            self.save(_GlobalName("torch", obj.name))
        elif kind is DeviceName:
            name, _, index = obj.name.partition(":")
            self._call(_GlobalName("torch", "device"), (name, int(index)) if index else (name,), obj)
        elif kind is Size:
            self._call(_GlobalName("torch", "Size"), (tuple(obj),), obj)
        elif kind is TensorRef:
            raise Unsupported(
                f"{obj.file}: a tensor of shape {list(obj.shape)} lies there, and its data are needed here"
            )
        elif kind.__module__.startswith("torch") and hasattr(obj, "detach"):
            # The tensor is kept with its placeholder, so that no other object gets its identity meanwhile.
            self.save(self._embedded.setdefault(id(obj), (_embedded(obj), obj))[0])
        else:
            super().save(obj, save_persistent_id)
        return None

    def _save_name(self, name: _GlobalName) -> None:
        # One object stands for all equal ones, so that the memo, which looks up by identity, finds it again.
        name = self._names.setdefault(name, name)
        known = self.memo.get(id(name))
        if known is not None:
            self.write(self.get(known[0]))
            return
        self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())
        self.memoize(name)

    def _call(self, function: _GlobalName, args: tuple[Any, ...], obj: Any) -> None:
        self.save(function)
        self.save(args)
        self.write(pickle.REDUCE)
        self.memoize(obj)

    def _save_standin(self, obj: Standin) -> None:
        cls = _GlobalName(obj.class_module, obj.class_name)
        self.save(cls)
        self.save(obj.class_args)
        # An enum member is its class called with its value; any other object is made without its __init__.
        self.write(pickle.REDUCE if obj.class_args else pickle.NEWOBJ)
        self.memoize(obj)
        if obj.state:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def _save_tensor(self, tensor: Placeholder) -> None:
        if not tensor.is_parameter:
            self._save_plain_tensor(tensor)
            self.memoize(tensor)
            return
        self.save(_GlobalName("torch._utils", "_rebuild_parameter"))
        self._save_plain_tensor(tensor)
        self.save(True)
        self._save_no_hooks()
        self.write(pickle.TUPLE3 + pickle.REDUCE)
        self.memoize(tensor)

    def _save_plain_tensor(self, tensor: Placeholder) -> None:
        dtype = canonical(tensor.dtype)
        storage = tensor.storage or SharedStorage(tensor.extent, tensor.data)
        if storage.size < tensor.extent or (storage.data is not None and len(storage.data) != storage.size):
            raise ValueError(
                f"a storage of {storage.size} bytes does not hold a tensor that reaches to {tensor.extent}"
            )
        key = self._keys.setdefault(storage, len(self.storages))
        if key == len(self.storages):
            self.storages.append(storage)
        self.placed[tensor] = key
        typed = _STORAGE_CLASSES.get(dtype)
        self.save(_GlobalName("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self.write(pickle.MARK)
        self.write(pickle.MARK)
        self.save("storage")
        self.save(_GlobalName("torch", typed) if typed else _GlobalName("torch.storage", "UntypedStorage"))
        self.save(str(key))
        self.save("cpu")
        self.save(storage.size // (itemsize(dtype) if typed else 1))
        self.write(pickle.TUPLE + pickle.BINPERSID)
        self.save(tensor.offset)
        self.save(tuple(tensor.shape))
        self.save(row_major(tensor.shape) if tensor.strides is None else tuple(tensor.strides))
        self.save(False)
        self._save_no_hooks()
        if not typed:
            self.save(_GlobalName("torch", dtype))
        self.write(pickle.TUPLE + pickle.REDUCE)

    def _save_no_hooks(self) -> None:
        self.save(_GlobalName("collections", "OrderedDict"))
        self.write(pickle.EMPTY_TUPLE + pickle.REDUCE)


def _embedded(tensor: Any) -> Placeholder:
    import torch

    plain = tensor.detach().cpu().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return Placeholder(tuple(plain.shape), canonical(str(plain.dtype)), data=raw)


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

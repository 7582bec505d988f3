"""The records of a DCP checkpoint: each a complete ``torch.save`` archive, and where the elements in it lie."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint, UnsafePickle, Unsupported
from ucp.formats.dcp import metadata
from ucp.formats.dcp.compressed import CompressedRecord, Kept
from ucp.formats.huggingface.sharded import OFFSETS, places
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.unknown_objects import UnknownObjects, load_section
from ucp.geometry import Blocks, Shape, numel
from ucp.storage import graphs, locations, safetensors, zstd
from ucp.storage.crc32 import StoredCrc32
from ucp.storage.dtypes import itemsize
from ucp.storage.read_ahead import tell_of
from ucp.storage.torch_pt import reader
from ucp.storage.torch_pt.values import TensorRef


@dataclass(frozen=True)
class _KnownRecord:
    """A tensor's record, for recognising others that begin alike.

    before: all bytes before the elements, which are at ``at``.
    crc: of its elements, if it has one, with places counted from the record's beginning.
    """

    before: bytes
    at: int
    strides: Shape
    crc: StoredCrc32 | None


class _ElementsAt(NamedTuple):
    """Where a chunk's elements lie. file: its index. at: the first element's byte in the file. crc: of their bytes."""

    file: int
    at: int
    strides: Shape
    crc: StoredCrc32 | None


class Records:
    """The records of a checkpoint's files. A context manager that keeps one file open at a time."""

    def __init__(self, folder: Path, builder: Builder) -> None:
        self._folder = folder
        self._builder = builder
        self._open: tuple[str, str, BinaryIO] | None = None  # as the metadata names it, its path, the stream
        self._index = 0  # of the open file
        self._size = 0  # of the open file, in bytes
        self._closing = ExitStack()
        self._known: dict[tuple[Any, ...], _KnownRecord] = {}
        self._headers: dict[tuple[str, int], safetensors.Header] = {}
        self._kept = Kept()
        self.crcs = builder.records

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def expect(self, found: Iterable[metadata.Record]) -> None:
        """Have the system read the beginnings of these records, all at once, if they have to come from a disk."""
        starts: dict[str, list[int]] = {}
        for record in found:
            starts.setdefault(record.file, []).append(record.start)
        for file, own in starts.items():
            tell_of(self._builder.files, str(self._folder / file), own, limits.DCP_PREAMBLE_BYTES)

    def load(self, key: str, record: metadata.Record, unknown: UnknownObjects | None = None) -> Any:
        """What `torch.save` wrote in this record. unknown: for client state; None for tensors, which need no class."""
        stream, path = self._stream(key, record)
        try:
            start, length = record.start, record.length
            if record.zstd:
                stream, path = self._decompressed(stream, path, record)
                start, length = 0, stream.seek(0, os.SEEK_END)
            if unknown is None:
                found = reader.load_section(stream, path, start, length, trust=None)
            else:
                found = load_section(stream, path, start, length, unknown)
            graphs.check(path, found)
            return found
        except UnsafePickle as error:
            raise UnsafePickle(f"entry '{key}': {error}") from error
        except DamagedCheckpoint as error:
            if _is_safetensors(stream):
                raise Unsupported(
                    f"{path}: was written with serialization_format=SAFETENSORS, and the metadata's byte ranges are "
                    "not those of its tensors, so torch's own reader cannot read it either; save it as torch_save, or "
                    "by HuggingFaceStorageWriter"
                ) from error
            place = f"bytes {record.start} to {record.start + record.length}"
            raise DamagedCheckpoint(f"{error} (entry '{key}', {place})") from error

    def tensor(self, key: str, dtype: str, chunk: metadata.Chunk) -> _ElementsAt:
        """Where a chunk's elements lie.

        Most records differ from another of the same length, type and shape only in their elements. Then comparing what
        comes before the elements is enough. That is far quicker than reading an archive's directory and its pickle.
        """
        record = chunk.record
        kind = (record.length, dtype, chunk.sizes)
        known = self._known.get(kind)
        stream, path = self._stream(key, record)
        if record.zstd:
            return self._compressed(key, dtype, chunk)
        if record.start + record.length > self._size:
            raise DamagedCheckpoint(
                f"{path}: the file is truncated: '{key}' lies in bytes {record.start} to "
                f"{record.start + record.length}, and it has {self._size}"
            )
        if known is not None and _bytes(stream, record.start, known.at) == known.before:
            # Its own CRC-32 is at the same place as the other's, after the elements. It is read when they are.
            crc = None if known.crc is None else replace(_moved(known.crc, record.start), crc=None)
            return _ElementsAt(self._index, record.start + known.at, known.strides, crc)
        if _is_safetensors(stream, record.start):
            ref = _checked(key, dtype, chunk, self._in_safetensors(key, path, chunk))
            return _ElementsAt(self._index, ref.offset, ref.strides, None)
        ref = _checked(key, dtype, chunk, self.load(key, record))
        at = ref.offset - record.start
        if at <= limits.DCP_PREAMBLE_BYTES:
            crc = None if ref.record is None else _moved(ref.record, -record.start)
            self._known[kind] = _KnownRecord(_bytes(stream, record.start, at), at, ref.strides, crc)
        return _ElementsAt(self._index, ref.offset, ref.strides, ref.record)

    def _in_safetensors(self, key: str, path: str, chunk: metadata.Chunk) -> TensorRef | None:
        """A tensor of ``serialization_format=SAFETENSORS``: the metadata says where the file's part in that format
        begins, the same for all its tensors."""
        start = chunk.record.start
        if (path, start) not in self._headers:
            self._headers[path, start] = safetensors.read_header(path, start)
        header = self._headers[path, start]
        said = places(Path(path), header.metadata).get(key)
        if said is not None and said.get(OFFSETS) != list(chunk.offsets):
            raise DamagedCheckpoint(
                f"{path}: has the part of '{key}' at {said.get(OFFSETS)}, and the metadata one at "
                f"{list(chunk.offsets)}, too; torch's writer keeps one part of each tensor in a file of this kind"
            )
        return header.tensors.get(key)

    def _decompressed(self, stream: BinaryIO, path: str, record: metadata.Record) -> tuple[BinaryIO, str]:
        """A compressed object's record as a file, and as what the catalog knows it."""
        raw, most = _bytes(stream, record.start, record.length), limits.metadata_bytes(record.length)
        whole, label = zstd.read(path, raw, most), f"{path}#{record.start}"
        source = CompressedRecord(self._builder.files, path, record.start, record.length, most, None, self._kept)
        self._builder.computed_file(label, source, len(whole))
        return io.BytesIO(whole), label

    def _compressed(self, key: str, dtype: str, chunk: metadata.Chunk) -> _ElementsAt:
        """The same as `tensor` for a compressed record, of which as much is decompressed as tells where its elements
        lie. It becomes a "file" of its own."""
        record, (stream, path) = chunk.record, self._stream(key, chunk.record)
        if record.start + record.length > self._size:
            raise DamagedCheckpoint(f"{path}: the file is truncated: '{key}' lies beyond its {self._size} bytes")
        raw, kind = _bytes(stream, record.start, record.length), ("zstd", dtype, chunk.sizes)
        nbytes = numel(chunk.sizes) * itemsize(dtype)
        most = nbytes + limits.ZSTD_SPARE_BYTES
        known = self._known.get(kind)
        if known is None or zstd.begin(path, raw, known.at) != known.before:
            whole = zstd.read(path, raw, most)
            label = f"{path}#{record.start}"
            ref = _checked(key, dtype, chunk, reader.load_section(io.BytesIO(whole), label, 0, len(whole), trust=None))
            crc = None if ref.record is None else replace(ref.record, crc=None)
            known = _KnownRecord(whole[: ref.offset], ref.offset, ref.strides, crc)
            self._known[kind] = known
        source = CompressedRecord(self._builder.files, path, record.start, record.length, most, known.crc, self._kept)
        index = self._builder.computed_file(f"{path}#{record.start}", source, known.at + nbytes)
        return _ElementsAt(index, known.at, known.strides, None)

    def _stream(self, key: str, record: metadata.Record) -> tuple[BinaryIO, str]:
        if self._open is None or self._open[0] != record.file:
            self._closing.close()
            self._open = None
            path = str(self._folder / record.file)
            try:
                stream = self._closing.enter_context(locations.opened(path))
            except OSError as error:
                raise DamagedCheckpoint(
                    f"{path}: cannot be read ({error.strerror or error}), but '{key}' lies in it"
                ) from error
            self._open = record.file, path, stream
            self._index = self._builder.index(path)
            self._size = stream.seek(0, os.SEEK_END)
        _, path, stream = self._open
        return stream, path


def _checked(key: str, dtype: str, chunk: metadata.Chunk, ref: Any) -> TensorRef:
    """The chunk's tensor. Raises DamagedCheckpoint for anything else than the metadata say."""
    if not isinstance(ref, TensorRef) or (ref.dtype, ref.shape) != (dtype, chunk.sizes):
        found = f"{ref.dtype} {list(ref.shape)}" if isinstance(ref, TensorRef) else type(ref).__name__
        raise DamagedCheckpoint(
            f"'{key}': its chunk at {list(chunk.offsets)} should be {dtype} {list(chunk.sizes)} and is {found}; "
            "the files do not belong together"
        )
    return ref


def _is_safetensors(stream: BinaryIO, start: int = 0) -> bool:
    """Whether a file in safetensors' format begins there: the length of its header, and a JSON object."""
    begin = _bytes(stream, start, 9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < 1 << 32


def _moved(crc: StoredCrc32, by: int) -> StoredCrc32:
    return replace(crc, start=crc.start + by, stop=crc.stop + by, at=crc.at + by)


def _bytes(stream: BinaryIO, start: int, count: int) -> bytes:
    # Headers lie far apart, so reading ahead, as a buffered local file does, would be wasteful.
    stream = getattr(stream, "raw", stream)
    stream.seek(start)
    return stream.read(count)


def tensors(found: Mapping[str, metadata.Tensor], records: Records) -> dict[str, LogicalTensor]:
    """The tensors of all entries, under their flat names. Files are read from front to back."""
    chunks = [(key, tensor.dtype, chunk) for key, tensor in found.items() for chunk in tensor.chunks]
    placed: dict[str, list[tuple[metadata.Chunk, _ElementsAt]]] = {key: [] for key in found}
    chunks.sort(key=lambda item: (item[2].record.file, item[2].record.start))
    records.expect(chunk.record for _, _, chunk in chunks)
    for key, dtype, chunk in chunks:
        place = records.tensor(key, dtype, chunk)
        placed[key].append((chunk, place))
        if place.crc is not None:
            records.crcs.setdefault(place.file, {})[place.crc.start] = place.crc
    # Tensors that are cut alike share their blocks, so that what follows from these is worked out once.
    alike: dict[Any, Blocks] = {}
    out = {}
    for key, tensor in found.items():
        held = [(chunk, place) for chunk, place in placed[key] if numel(chunk.sizes)]
        cut = len(tensor.shape), tuple((c.offsets, c.sizes, place.strides, place.file) for c, place in held)
        if cut not in alike:
            alike[cut] = _blocks(*cut)
        bases = np.array([place.at for _, place in held], np.int64)
        out[key] = LogicalTensor(key, "", tensor.shape, tensor.dtype, alike[cut], bases)
    return out


def _blocks(ndim: int, held: Sequence[tuple[Shape, Shape, Shape, int]]) -> Blocks:
    """held: of each chunk its offsets and sizes, its strides in the file, and the file's index."""
    grid = len(held), ndim
    offsets, sizes, strides, files = zip(*held, strict=True) if held else ((), (), (), ())
    return Blocks(
        np.array(offsets, np.int64).reshape(grid),
        np.array(sizes, np.int64).reshape(grid),
        np.zeros(len(held), np.int64),
        np.array(strides, np.int64).reshape(grid),
        np.array(files, np.int64),
    )

"""Reading a DCP checkpoint: every record's place, and what its entry is to a training run."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup, SourceFile, TrainingState
from ucp.errors import DamagedCheckpoint, UnsafePickle
from ucp.formats.dcp import NAME, metadata
from ucp.formats.shared.roles import OUTSIDE, TRAINING_STATE, VALUES, Roles, StateEntry, assign, param_groups
from ucp.geometry import Blocks, Shape, numel
from ucp.parallel.mesh import Layout
from ucp.storage import graphs, locations
from ucp.storage.crc32 import StoredCrc32, in_order
from ucp.storage.dtypes import is_numpy_native, itemsize, numpy_dtype
from ucp.storage.files import Files
from ucp.storage.torch_pt import reader
from ucp.storage.torch_pt.values import TensorRef
from ucp.transfer.checksums import read_record
from ucp.transfer.exact import widen

_RANK = re.compile(r"__(\d+)_\d+\.distcp")


def read(path: Path, files: Files, trust_client_state: bool = False) -> Catalog:
    """The folder's catalog. trust_client_state: unpickle objects of any class, which runs their code.

    Raises DamagedCheckpoint where files are missing, truncated or contradict the metadata, UnsafePickle, Unsupported.
    """
    folder = locations.locate(path)
    found = metadata.load(folder)
    with _Records(folder) as records:
        objects = {key: records.load(key, record, trust_client_state) for key, record in found.objects.items()}
        tensors = _tensors(found.tensors, records)
    entries = {
        key: StateEntry(
            found.paths.get(key, (key,)), found.tensors[key].shape if key in tensors else None, objects.get(key)
        )
        for key in (*found.tensors, *found.objects)
    }
    catalog = _catalog(entries, tensors, records, files)
    catalog.check()
    return catalog


@dataclass(frozen=True)
class _KnownRecord:
    """A tensor's record, for others that begin alike. before: all bytes before the elements, which are at ``at``;
    crc: of its elements, where it has one, counted from the record's beginning."""

    before: bytes
    at: int
    strides: Shape
    crc: StoredCrc32 | None


class _ElementsAt(NamedTuple):
    """Where a chunk's elements lie. file: its index; at: the first one's byte in it; crc: of their bytes."""

    file: int
    at: int
    strides: Shape
    crc: StoredCrc32 | None


class _Records:
    """The records of a checkpoint's files; a context manager that keeps one file open at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[str, str, BinaryIO] | None = None  # as the metadata names it, its path, the stream
        self._index = 0  # of the open file
        self._closing = ExitStack()
        self._known: dict[tuple[Any, ...], _KnownRecord] = {}
        self.files: dict[str, int] = {}  # path -> its index
        self.crcs: dict[int, dict[int, StoredCrc32]] = {}  # by the file's index and their first byte

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def load(self, key: str, record: metadata.Record, trust: bool | None = None) -> Any:
        """What `torch.save` wrote there."""
        stream, path = self._stream(key, record)
        try:
            found = reader.load_section(stream, path, record.start, record.length, trust=trust)
            graphs.check(path, found)
            return found
        except UnsafePickle as error:
            raise UnsafePickle(f"entry '{key}': {error}") from error
        except DamagedCheckpoint as error:
            place = f"bytes {record.start} to {record.start + record.length}"
            raise DamagedCheckpoint(f"{error} (entry '{key}', {place})") from error

    def tensor(self, key: str, dtype: str, chunk: metadata.Chunk) -> _ElementsAt:
        """Where a chunk's elements lie.

        Most records are as another one of the same length, type and shape but for the elements: then comparing what
        comes before these is enough, which is quicker by far than reading an archive's directory and its pickle.
        """
        record = chunk.record
        kind = (record.length, dtype, chunk.sizes)
        known = self._known.get(kind)
        stream, _ = self._stream(key, record)
        if known is not None and _bytes(stream, record.start, known.at) == known.before:
            # Its own CRC-32 is where the other's is, behind its elements: it's read when they are.
            crc = None if known.crc is None else replace(_moved(known.crc, record.start), crc=None)
            return _ElementsAt(self._index, record.start + known.at, known.strides, crc)
        ref = self.load(key, record)
        if not isinstance(ref, TensorRef) or (ref.dtype, ref.shape) != (dtype, chunk.sizes):
            found = f"{ref.dtype} {list(ref.shape)}" if isinstance(ref, TensorRef) else type(ref).__name__
            raise DamagedCheckpoint(
                f"'{key}': its chunk at {list(chunk.offsets)} should be {dtype} {list(chunk.sizes)} and is {found}; "
                "the files do not belong together"
            )
        at = ref.offset - record.start
        if at <= limits.DCP_PREAMBLE_BYTES:
            crc = None if ref.record is None else _moved(ref.record, -record.start)
            self._known[kind] = _KnownRecord(_bytes(stream, record.start, at), at, ref.strides, crc)
        return _ElementsAt(self._index, ref.offset, ref.strides, ref.record)

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
            self._index = self.files.setdefault(path, len(self.files))
        _, path, stream = self._open
        return stream, path


def _moved(crc: StoredCrc32, by: int) -> StoredCrc32:
    return replace(crc, start=crc.start + by, stop=crc.stop + by, at=crc.at + by)


def _bytes(stream: BinaryIO, start: int, count: int) -> bytes:
    # Headers lie far apart: reading ahead, as a buffered local file does, would be waste.
    stream = getattr(stream, "raw", stream)
    stream.seek(start)
    return stream.read(count)


def _tensors(found: Mapping[str, metadata.Tensor], records: _Records) -> dict[str, LogicalTensor]:
    """The tensors of all entries, under their flat names; files are read from front to back."""
    chunks = [(key, tensor.dtype, chunk) for key, tensor in found.items() for chunk in tensor.chunks]
    placed: dict[str, list[tuple[metadata.Chunk, _ElementsAt]]] = {key: [] for key in found}
    for key, dtype, chunk in sorted(chunks, key=lambda item: (item[2].record.file, item[2].record.start)):
        place = records.tensor(key, dtype, chunk)
        placed[key].append((chunk, place))
        if place.crc is not None:
            records.crcs.setdefault(place.file, {})[place.crc.start] = place.crc
    out = {}
    for key, tensor in found.items():
        held = [(chunk, place) for chunk, place in placed[key] if numel(chunk.sizes)]
        grid = (len(held), len(tensor.shape))
        blocks = Blocks(
            np.array([chunk.offsets for chunk, _ in held], np.int64).reshape(grid),
            np.array([chunk.sizes for chunk, _ in held], np.int64).reshape(grid),
            np.zeros(len(held), np.int64),
            np.array([place.strides for _, place in held], np.int64).reshape(grid),
            np.array([place.file for _, place in held], np.int64),
        )
        bases = np.array([place.at for _, place in held], np.int64)
        out[key] = LogicalTensor(key, "", tensor.shape, tensor.dtype, blocks, bases)
    return out


def _catalog(
    entries: Mapping[str, StateEntry], found: Mapping[str, LogicalTensor], records: _Records, files: Files
) -> Catalog:
    roles = assign(entries)
    tensors: dict[tuple[str, str], LogicalTensor] = {}
    states: dict[str, dict[str, str]] = {}
    for key, (name, state) in roles.tensors.items():
        t = found[key]
        tensors[name, state] = LogicalTensor(name, state, t.shape, t.dtype, t.blocks, t.bases)
        states.setdefault(name, {})[state] = t.dtype
    paths = list(records.files)

    def value(key: str) -> Any:
        return _item(found[key], paths, records.crcs, files) if key in found else entries[key].value

    scalars: dict[str, dict[str, Any]] = {}
    for key, (name, scalar) in roles.scalars.items():
        scalars.setdefault(name, {})[scalar] = value(key)
    options: dict[str, dict[str, Any]] = {}
    for key, (group, option) in roles.options.items():
        options.setdefault(group, {})[option] = value(key)
    parameters = {
        name: ParameterInfo(
            name,
            (t := tensors.get((name, "param")) or tensors[name, next(iter(kept))]).shape,
            kept,
            roles.kind(name, "float" in t.dtype or "complex" in t.dtype),
            scalars.get(name, {}),
        )
        for name, kept in states.items()
    }
    return Catalog(
        format=NAME,
        writer="torch.distributed.checkpoint",
        layout=_layout(paths, tensors),
        files=tuple(SourceFile(p, files.size(p), files.mtime_ns(p)) for p in paths),
        parameters=parameters,
        tensors=tensors,
        training_state=_training_state(roles, entries, param_groups(roles, options, repr)),
        crc_records=in_order(records.crcs),
    )


def _training_state(roles: Roles, entries: Mapping[str, StateEntry], groups: list[ParamGroup]) -> TrainingState:
    """Values that belong to no parameter; fields of a training state where `write` made the checkpoint."""
    values = {key: entries[key].value for key in roles.values}
    known = {f"{TRAINING_STATE}.{f.name}": f.name for f in dataclasses.fields(TrainingState)}
    fields = {known[key]: values.pop(key) for key in list(values) if key in known}
    extra = {**fields.pop("extra", {}), VALUES: values, OUTSIDE: roles.outside}
    return TrainingState(**{**fields, "param_groups": tuple(groups), "extra": extra})


def _item(tensor: LogicalTensor, paths: list[str], crcs: Mapping[int, Mapping[int, StoredCrc32]], files: Files) -> Any:
    """The value of a tensor of one element. Raises DigestMismatch where its record is damaged."""
    file, at = int(tensor.blocks.buffers[0]), int(tensor.bases[0])
    record = crcs.get(file, {}).get(at)
    size = itemsize(tensor.dtype)
    if record is not None and record.stop - record.start == size:
        raw = bytearray(read_record(files, paths[file], record))
    else:
        raw = bytearray(size)
        files.read_into(paths[file], at, raw)
    number = np.frombuffer(raw, numpy_dtype(tensor.dtype))
    return (number if is_numpy_native(tensor.dtype) else widen(number, tensor.dtype, "float64")).item()


def _layout(paths: list[str], tensors: Mapping[tuple[str, str], LogicalTensor]) -> Layout:
    """As many ranks as files tell; sharded like stage 3 where a tensor is in pieces."""
    ranks = [int(match[1]) for path in paths if (match := _RANK.fullmatch(os.path.basename(path)))]
    return Layout(dp=max(ranks, default=0) + 1, zero=3 if any(len(t.blocks) > 1 for t in tensors.values()) else 0)

"""Collects files, parameters and logical tensors while a checkpoint is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import ByteSource, LogicalTensor, ParameterInfo, SourceFile
from ucp.errors import DamagedCheckpoint
from ucp.geometry import Blocks, Ints, Shape, box, compose, concat, empty, numel
from ucp.spec.places import Placed
from ucp.storage import locations
from ucp.storage.crc32 import StoredCrc32
from ucp.storage.dtypes import itemsize, numpy_dtype
from ucp.storage.files import Files
from ucp.storage.torch_pt.values import TensorRef
from ucp.transfer.checksums import read_record

Scalar = int | float | bool


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the flat buffers of some ranks lie, which the tensors of a group share. refs: they themselves, kept, since
    this is found by them. files, bases: by rank, of those that are ``known``. dtypes: of all."""

    refs: Mapping[int, TensorRef]
    dtypes: frozenset[str]
    files: Ints
    bases: Ints
    known: NDArray[np.bool_]

    @classmethod
    def of(cls, refs: Mapping[int, TensorRef]) -> _Places:
        count = max(refs) + 1
        columns = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, bool)
        return cls(refs, frozenset(ref.dtype for ref in refs.values()), *columns)


@dataclass(frozen=True)
class Rows:
    """A tensor whose rows, along its first axis, lie apart, all of one shape and element type."""

    refs: tuple[TensorRef, ...]

    @property
    def shape(self) -> Shape:
        return (len(self.refs), *self.refs[0].shape)

    @property
    def dtype(self) -> str:
        return self.refs[0].dtype

    @property
    def numel(self) -> int:
        return numel(self.shape)


@dataclass
class Builder:
    """The files, parameters and tensors found so far. paths, sources and records (those of `Catalog.crc_records`, by
    their first bytes) are shared by the parts of one checkpoint. computed, copies: as `Catalog` has them."""

    files: Files
    paths: dict[str, int] = field(default_factory=dict)
    sources: list[SourceFile] = field(default_factory=list)
    records: dict[int, dict[int, StoredCrc32]] = field(default_factory=dict)
    computed: dict[int, ByteSource] = field(default_factory=dict)
    parameters: dict[str, ParameterInfo] = field(default_factory=dict)
    tensors: dict[tuple[str, str], LogicalTensor] = field(default_factory=dict)
    _places: dict[int, _Places] = field(default_factory=dict)
    copies: list[LogicalTensor] = field(default_factory=list)

    def file(self, ref: TensorRef) -> int:
        """The index of a tensor's file, entered at first use with what the file tells of the tensor's bytes."""
        index = self.index(ref.file)
        if ref.record is not None:
            self.records.setdefault(index, {})[ref.record.start] = ref.record
        return index

    def index(self, path: str) -> int:
        """A file's index, entered at first use."""
        if path not in self.paths:
            stat = locations.stat(path)
            self.paths[path] = len(self.sources)
            self.sources.append(SourceFile(path, stat.size, stat.mtime_ns))
        return self.paths[path]

    def computed_file(self, label: str, source: ByteSource, size: int) -> int:
        """The index of a new "file" whose bytes come from elsewhere."""
        self.sources.append(SourceFile(label, size, 0))
        self.computed[len(self.sources) - 1] = source
        return len(self.sources) - 1

    def read_into(self, index: int, at: int, buffer: bytearray) -> None:
        """Fill a buffer with a file's bytes from ``at`` on, wherever they come from."""
        if index in self.computed:
            self.computed[index].read_into(at, [np.frombuffer(buffer, np.uint8)])
        else:
            self.files.read_into(self.sources[index].path, at, buffer)

    def whole(self, name: str, state: str, ref: TensorRef | Rows) -> LogicalTensor:
        """A tensor that lies in one piece in one file, or row by row."""
        if isinstance(ref, Rows):
            return self._stacked(name, state, ref)
        if numel(ref.shape):
            blocks = box([0] * len(ref.shape), ref.shape, 0, ref.strides, self.file(ref))
        else:
            blocks = empty(len(ref.shape))
        return LogicalTensor(name, state, ref.shape, ref.dtype, blocks, np.full(len(blocks), ref.offset, np.int64))

    def _stacked(self, name: str, state: str, rows: Rows) -> LogicalTensor:
        rank = len(rows.shape)
        held = rows.refs if rows.numel else ()
        blocks = [
            box([e, *[0] * (rank - 1)], (1, *ref.shape), 0, (0, *ref.strides), self.file(ref))
            for e, ref in enumerate(held)
        ]
        bases = np.array([ref.offset for ref in held], np.int64)
        return LogicalTensor(name, state, rows.shape, rows.dtype, concat(blocks, rank), bases)

    def pieces(
        self, name: str, state: str, shape: Shape, blocks: Blocks, refs: Mapping[int, TensorRef]
    ) -> LogicalTensor:
        """A tensor cut over ranks: ``blocks.buffers`` are ranks, and ``refs[rank]`` is that rank's flat buffer."""
        places = self._places.get(id(refs))
        if places is None:
            places = self._places[id(refs)] = _Places.of(refs)
        if len(places.dtypes) > 1:
            raise DamagedCheckpoint(
                f"{refs[min(refs)].file}: '{name}' ({state}) has element types {sorted(places.dtypes)} on different "
                "ranks; files of two runs are mixed"
            )
        for r in sorted(set(blocks.buffers[~places.known[blocks.buffers]].tolist())):
            places.files[r], places.bases[r], places.known[r] = self.file(refs[r]), refs[r].offset, True
        held = Blocks(blocks.offsets, blocks.sizes, blocks.starts, blocks.strides, places.files[blocks.buffers])
        return LogicalTensor(name, state, shape, next(iter(places.dtypes)), held, places.bases[blocks.buffers])

    def add(
        self,
        name: str,
        kind: str,
        tensors: Sequence[LogicalTensor],
        scalars: Mapping[str, Scalar] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Enter a parameter or buffer with its states."""
        states = {t.state: t.dtype for t in tensors}
        shape = tensors[0].shape
        self.parameters[name] = ParameterInfo(name, shape, states, kind, dict(scalars or {}), tuple(aliases))
        for t in tensors:
            self.tensors[name, t.state] = t

    def add_placed(
        self,
        placed: Placed,
        kind: str,
        tensors: Sequence[LogicalTensor],
        scalars: Mapping[str, Scalar],
        aliases: Sequence[str] = (),
        first: NDArray[np.bool_] | None = None,
    ) -> None:
        """Enter a rank's tensors as their part of the whole model's. first: which of the placed boxes are not only
        copies of what was entered before; None for all. Raises DamagedCheckpoint where parts differ."""
        lifted = []
        for tensor in tensors:
            found = _lifted(tensor, placed, placed.blocks if first is None else placed.blocks.take(first))
            if first is not None:
                self.copies.append(_lifted(tensor, placed, placed.blocks.take(~first)))
            blocks = found.blocks
            known = self.tensors.get((placed.name, tensor.state))
            if known is not None:
                if known.dtype != tensor.dtype or self.parameters[placed.name].scalars != scalars:
                    raise DamagedCheckpoint(
                        f"'{placed.name}' ({tensor.state}) has another element type or step on different ranks; files "
                        "of two runs are mixed"
                    )
                blocks, bases = concat((known.blocks, blocks), len(placed.shape)), [known.bases, found.bases]
                found = replace(found, blocks=blocks, bases=np.concatenate(bases))
            lifted.append(found)
        self.add(placed.name, kind, lifted, scalars, aliases)

    def bits(self, path: str, at: int, count: int, dtype: str) -> NDArray[Any]:
        """``count`` elements from byte ``at`` of a file, as unsigned integers."""
        size = itemsize(dtype)
        raw = np.empty(count * size, np.uint8)
        self.files.read_into(path, at, raw)
        return raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size])

    def scalar(self, ref: TensorRef) -> Scalar:
        """The value of a 0-d tensor. Raises DigestMismatch where the record that it lies in is damaged."""
        size = itemsize(ref.dtype)
        if ref.record is not None and ref.record.stop - ref.record.start <= limits.SMALL_RECORD_BYTES:
            at = ref.offset - ref.record.start
            raw = np.frombuffer(read_record(self.files, ref.file, ref.record), np.uint8)[at : at + size]
        else:
            raw = np.empty(size, np.uint8)
            self.files.read_into(ref.file, ref.offset, raw)
        if ref.dtype == "bfloat16":
            return float((raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[0])
        return raw.view(numpy_dtype(ref.dtype))[0].item()


def _lifted(tensor: LogicalTensor, placed: Placed, outer: Blocks) -> LogicalTensor:
    """A rank's tensor as the part of the whole model's that these boxes are."""
    blocks, index = compose(tensor.blocks, outer, tensor.shape, placed.shape)
    return LogicalTensor(placed.name, tensor.state, placed.shape, tensor.dtype, blocks, tensor.bases[index])

"""Writing checkpoints that stock ``torch.distributed.checkpoint.load`` reads: ``ucp-convert --to dcp``.

The entries are those of ``{"model": ..., "optim": ...}`` as ``get_model_state_dict`` and ``get_optimizer_state_dict``
make them, nested: ``model.<parameter>``, ``optim.state.<parameter>.<state>``, ``optim.param_groups.<i>.<option>``. What
was beside a model in a state dict keeps its name, and the rest of the training state is ``training_state.<field>``.
Tensors are cut along their first dimension into chunks, since stock DCP reads whole chunks. Records lie one after the
other in a few files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, TrainingState
from ucp.errors import Unsupported
from ucp.formats.dcp import METADATA, written_metadata
from ucp.formats.dcp.written_metadata import WrittenRecord, WrittenTensor
from ucp.formats.shared.roles import MODEL, OUTSIDE, PARAM, TRAINING_STATE, VALUES
from ucp.formats.shared.torch_files import FileBuilder, PlaceholderPiece
from ucp.geometry import Shape, box, numel
from ucp.storage.crc32 import Crc32Entry
from ucp.storage.dtypes import itemsize
from ucp.storage.torch_pt.writer import ALIGNMENT, scalar_tensor
from ucp.transfer.targets import TargetFile


def plan(catalog: Catalog) -> list[TargetFile]:
    """The files, the metadata last. ``catalog`` has the files of its training state's tensors among its own.

    Raises Unsupported for a training state that is not plain data.
    """
    writer = RecordWriter(catalog)
    written: dict[tuple[str, str], list[WrittenRecord]] = {}
    for path, value in entries(catalog):
        if isinstance(value, LogicalTensor):
            # Tied parameters are several entries of the same bytes.
            key = (value.name, value.state)
            written[key] = writer.add_tensor(path, value, written.get(key))
        elif isinstance(value, Single):
            writer.add_scalar(path, value)
        else:
            writer.add_object(path, value)
    return writer.finish()


@dataclass(frozen=True)
class Single:
    """A number that torch's optimizers keep as a float32 tensor without dimensions: a step count."""

    value: float


def entries(catalog: Catalog) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The entries of a catalog's state dict in DCP: (path, value), a LogicalTensor, a Single or any other value."""
    outside = set(catalog.training_state.extra.get(OUTSIDE, ()))
    for info in catalog.parameters.values():
        for state in info.states:
            tensor = catalog.tensors[info.name, state]
            if state != PARAM:
                yield ("optim", "state", info.name, state), tensor
                continue
            for name in (info.name, *info.aliases):
                yield (name,) if info.name in outside else (MODEL, name), tensor
        for name, value in info.scalars.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            exact = number and (value != value or float(np.float32(value)) == value)
            yield ("optim", "state", info.name, name), Single(float(value)) if exact else value
    for index, group in enumerate(catalog.training_state.param_groups):
        yield ("optim", "param_groups", index, "params"), list(group.names)
        for option, value in (group.options or {}).items():
            yield ("optim", "param_groups", index, option), value
    for key, value in catalog.training_state.extra.get(VALUES, {}).items():
        yield (key,), value
    for name, value in _rest(catalog.training_state).items():
        yield (TRAINING_STATE, name), value


def _rest(state: TrainingState) -> dict[str, Any]:
    """The fields of a training state that become entries of their own, if they have a value."""
    found = {f.name: getattr(state, f.name) for f in fields(TrainingState) if f.name != "param_groups"}
    found["extra"] = {k: v for k, v in state.extra.items() if k not in (VALUES, OUTSIDE)}
    return {name: value for name, value in found.items() if value is not None and value != {}}


# --- records ---------------------------------------------------------------------------------------------------------


@dataclass
class _Data:
    """A data file under construction."""

    name: str
    size: int = 0
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    wants: list[Any] = field(default_factory=list)
    crc32_entries: list[Crc32Entry] = field(default_factory=list)

    def append(self, record: TargetFile) -> int:
        """Add a record's bytes. Returns where they begin."""
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.literals += [(start + at, raw) for at, raw in record.literals]
        self.wants += [want._replace(base=start + want.base) for want in record.wants]
        self.crc32_entries += [
            Crc32Entry(start + e.offset, e.size, tuple(start + at for at in e.positions)) for e in record.crc32_entries
        ]
        self.size = start + record.size
        return start


class RecordWriter:
    """Records in DCP's files under construction. paths: whether the keys that lead to each entry are recorded."""

    def __init__(self, catalog: Catalog, paths: bool = True) -> None:
        self._catalog = catalog
        self._files: list[_Data] = [_Data("__0_0.distcp")]
        self._recorded = paths
        self._paths: dict[str, tuple[Any, ...]] = {}
        self._tensors: dict[str, WrittenTensor] = {}
        self._objects: dict[str, WrittenRecord] = {}

    def add_tensor(
        self, path: tuple[Any, ...], tensor: LogicalTensor, placed: list[WrittenRecord] | None
    ) -> list[WrittenRecord]:
        """Add a tensor. Returns its records. placed: its records if it has been written under another name."""
        if placed is None:
            placed = self.records(tensor, tensor.dtype)
        self.add_written(path, tensor.dtype, tensor.shape, placed)
        return placed

    def records(
        self,
        tensor: LogicalTensor,
        dtype: str,
        at: Shape = (),
        rounded: bool = False,
        rows: tuple[int, int] | None = None,
    ) -> list[WrittenRecord]:
        """Add the records of a tensor, or of one that is at ``at`` along the first axes of a larger tensor. rows: the
        first, and how many of them, if it is not all of the tensor."""
        placed, ones = [], (1,) * len(at)
        first, count = rows or (0, 0)
        shape = (count, *tensor.shape[1:]) if rows else tensor.shape
        for offsets, sizes in _chunks(shape, itemsize(dtype)):
            builder = FileBuilder("", self._catalog)
            wanted = (offsets[0] + first, *offsets[1:]) if rows else offsets
            pieces = [PlaceholderPiece(tensor, box(wanted, sizes), rounded)] if numel(sizes) else []
            record = builder.finish(builder.tensor((*ones, *sizes), dtype, pieces))
            placed.append(self._append(record, ((*at, *offsets), (*ones, *sizes))))
        return placed

    def add_written(self, path: tuple[Any, ...], dtype: str, shape: Shape, placed: list[WrittenRecord]) -> None:
        """Add an entry whose records are already there."""
        self._tensors[self._key(path)] = WrittenTensor(dtype, shape, placed)

    def add_scalar(self, path: tuple[Any, ...], single: Single) -> None:
        record = FileBuilder("", self._catalog).finish(scalar_tensor(single.value))
        self._tensors[self._key(path)] = WrittenTensor("float32", (), [self._append(record, ((), ()))])

    def add_object(self, path: tuple[Any, ...], value: Any) -> None:
        """Add any other value, pickled as `torch.save` does it."""
        self._objects[self._key(path)] = self._append(FileBuilder("", self._catalog).finish(value), None)

    def _key(self, path: tuple[Any, ...]) -> str:
        key = ".".join(map(str, path))
        if key in self._paths:
            raise Unsupported(f"two entries of the checkpoint would be called '{key}' in a DCP checkpoint")
        self._paths[key] = path
        return key

    def _append(self, record: TargetFile, chunk: tuple[Shape, Shape] | None) -> WrittenRecord:
        if self._files[-1].size >= limits.DCP_FILE_BYTES:
            self._files.append(_Data(f"__0_{len(self._files)}.distcp"))
        data = self._files[-1]
        return WrittenRecord(data.name, data.append(record), record.size, chunk)

    def finish(self, **others: Any) -> list[TargetFile]:
        """The files, the metadata last. others: further attributes of it."""
        raw = written_metadata.pickled(self._tensors, self._objects, self._paths if self._recorded else None, others)
        files = [
            TargetFile(data.name, data.size, tuple(data.literals), tuple(data.wants), tuple(data.crc32_entries))
            for data in self._files
        ]
        return [*files, TargetFile(METADATA, len(raw), ((0, raw),), ())]


def _chunks(shape: Shape, width: int) -> Iterator[tuple[Shape, Shape]]:
    """Offsets and sizes of a tensor's chunks: as many whole rows as `limits.DCP_CHUNK_BYTES` hold."""
    if not shape or not numel(shape):
        yield (0,) * len(shape), shape
        return
    rows = max(limits.DCP_CHUNK_BYTES // (numel(shape[1:]) * width), 1)
    for first in range(0, shape[0], rows):
        yield (first, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - first), *shape[1:])

"""Parameters whose copies are averaged: the paper's pattern for copies that ranks update independently of each other.

An average is the only thing in a checkpoint that is in no file. It is computed in float64 while the checkpoint is
opened, rounded once, and kept in the catalog itself; such parameters are few and small. It is not exact, and the user
is told so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ucp.catalog import Catalog, InMemory, LogicalTensor, SourceFile, TrainingState
from ucp.errors import Unsupported
from ucp.formats.deepspeed.read.mp_rank import LocalModel
from ucp.geometry import numel, whole
from ucp.parallel.mesh import Coordinate, Layout
from ucp.printable import logger
from ucp.spec.places import Placements
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files
from ucp.storage.numbers import FLOATS, as_bytes, as_numbers
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader

log = logger(__name__)


def take_averages(
    catalog: Catalog, parts: Mapping[Coordinate, LocalModel], placements: Placements, files: Files
) -> Catalog:
    """The catalog with the averages of all parameters that are placed as such.

    Raises Unsupported for element types that have no average, and for averages of parts.
    """
    copies: dict[str, list[tuple[LocalModel, str]]] = {}
    for (at, local), places in placements.items():
        for placed in places:
            if placed.average:
                if parts[at].parameters[local].shape != placed.shape:
                    raise Unsupported(f"'{placed.name}' is an average of parts, not of whole copies; not supported")
                copies.setdefault(placed.name, []).append((parts[at], local))
    if not copies:
        return catalog
    reader = Reader(_bare(catalog), files)
    tensors = dict(catalog.tensors)
    raw = bytearray()
    index = len(catalog.files)
    for name, held in copies.items():
        for state in catalog.parameters[name].states:
            tensor = tensors[name, state]
            blocks = whole(tensor.shape, 0, index)
            tensors[name, state] = LogicalTensor(
                name, state, tensor.shape, tensor.dtype, blocks, np.full(len(blocks), len(raw), np.int64)
            )
            raw += _mean([_read(reader, part.tensors[local, state]) for part, local in held], name, tensor.dtype)
            raw += bytes(-len(raw) % 8)
    log.warning(
        "%d parameters ('%s', ...) are the averages of copies that differ: they are not what any rank had",
        len(copies),
        next(iter(copies)),
    )
    return replace(
        catalog,
        files=(*catalog.files, SourceFile("(averages)", len(raw), 0)),
        tensors=tensors,
        copies=tuple(copy for copy in catalog.copies if copy.name not in copies),
        computed={**catalog.computed, index: InMemory(bytes(raw))},
    )


def _bare(catalog: Catalog) -> Catalog:
    files, records = catalog.files, catalog.crc_records
    return Catalog(catalog.format, catalog.writer, Layout(), files, {}, {}, TrainingState(), crc_records=records)


def _read(reader: Reader, tensor: LogicalTensor) -> NDArray[np.uint8]:
    out = np.empty(numel(tensor.shape) * itemsize(tensor.dtype), np.uint8)
    gather(reader, [Want(tensor, whole(tensor.shape), tensor.dtype)], [out])
    return out


def _mean(copies: list[NDArray[np.uint8]], name: str, dtype: str) -> bytes:
    if dtype not in FLOATS:
        raise Unsupported(f"'{name}' is {dtype}, and copies of such elements have no average")
    return as_bytes(np.mean(np.stack([as_numbers(copy, dtype) for copy in copies]), axis=0), dtype).tobytes()

"""The manifest's ``blocks``: where every block of every tensor lies (see `ucp.formats.universal.schema`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.formats.universal.fields import Fields
from ucp.geometry import Blocks, Ints, Shape, dense_strides, empty
from ucp.storage.dtypes import itemsize


class _Encoded(NamedTuple):
    """Blocks as the manifest has them. odd: those that do not lie densely, and their strides."""

    odd: list[int]
    strides: list[int]
    file: list[int]
    starts: list[int]
    box: list[int]


def encode(tensors: Sequence[LogicalTensor]) -> dict[str, Any]:
    """The manifest's columns."""
    file: list[int] = []
    byte: list[int] = []
    boxes: list[int] = []
    strided: list[int] = []
    strides: list[int] = []
    # By the blocks themselves, which tensors that are cut alike may share.
    known: dict[int, _Encoded] = {}
    for tensor in tensors:
        b = tensor.blocks
        own = known.get(id(b))
        if own is None:
            odd = np.flatnonzero(np.any((b.strides != dense_strides(b.sizes)) & (b.sizes > 1), axis=1))
            box = np.concatenate([b.offsets, b.sizes], axis=1).ravel().tolist()
            own = _Encoded(odd.tolist(), b.strides[odd].ravel().tolist(), b.buffers.tolist(), b.starts.tolist(), box)
            known[id(b)] = own
        width = itemsize(tensor.dtype)
        if own.odd:
            strided += [k + len(file) for k in own.odd]
            strides += own.strides
        file += own.file
        byte += [base + start * width for base, start in zip(tensor.bases.tolist(), own.starts, strict=True)]
        boxes += own.box
    return {"file": file, "byte": byte, "box": boxes, "strides": {"block": strided, "values": strides}}


def decode(fields: Fields, shapes: Sequence[Shape], counts: Ints, files: int) -> tuple[list[Blocks], list[Ints]]:
    """Each tensor's blocks, and their byte offsets. Tensors of as many dimensions are looked at together."""
    total = sum(counts.tolist())
    file = fields.integers("blocks", "file", total, below=files)
    byte = fields.integers("blocks", "byte", total)
    boxes = fields.integers("blocks", "box")
    dims = np.fromiter(map(len, shapes), np.int64, len(shapes))
    if len(boxes) != int(np.sum(counts * dims * 2)):
        raise fields.damaged(f"'blocks.box' has {len(boxes)} numbers, which do not fit the tensors' shapes")
    owners = np.repeat(np.arange(len(shapes)), counts)
    wide = dims[owners]
    ends = np.cumsum(2 * wide)
    which, values, begins = _decode_strides(fields, wide)
    held, bases = [empty(0)] * len(shapes), [np.zeros(0, np.int64)] * len(shapes)
    for d in np.unique(dims).tolist():
        alike = np.flatnonzero(dims == d)
        own = np.flatnonzero(wide == d)
        pairs = boxes[(ends[own] - 2 * d)[:, None] + np.arange(2 * d)].reshape(len(own), 2, d)
        offsets, sizes = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
        strides = dense_strides(sizes)
        odd = np.flatnonzero(wide[which] == d)
        strides[np.searchsorted(own, which[odd])] = values[begins[odd][:, None] + np.arange(d)]
        members = alike.tolist()
        numbers = chain.from_iterable(map(shapes.__getitem__, members))
        limit = np.fromiter(numbers, np.int64, len(members) * d).reshape(len(members), d)
        _check_boxes(fields, offsets, sizes, strides, np.repeat(limit, counts[alike], axis=0))
        shared = _Shared(offsets, sizes, strides, file[own])
        ranges = list(pairwise([0, *np.cumsum(counts[alike]).tolist()]))
        at = byte[own]
        for k, found, (first, last) in zip(members, shared.of(ranges), ranges, strict=True):
            held[k], bases[k] = found, at[first:last]
    return held, bases


class _Shared:
    """Blocks of many tensors of as many dimensions, by the rows that they have in these columns. Tensors that are cut
    alike, in the same files, get the same object: what is worked out for one is then known of all."""

    def __init__(self, offsets: Ints, sizes: Ints, strides: Ints, file: Ints) -> None:
        self._columns = offsets, sizes, np.zeros(len(file), np.int64), strides, file
        for column in self._columns:
            column.flags.writeable = False
        rows = np.concatenate([offsets, sizes, strides, file[:, None]], axis=1)
        self._raw, self._width = rows.tobytes(), rows.shape[1] * rows.itemsize

    def of(self, ranges: Sequence[tuple[int, int]]) -> list[Blocks]:
        """The blocks of each of these ranges of rows."""
        raw, width = self._raw, self._width
        keys = [raw[first * width : last * width] for first, last in ranges]
        known = {
            key: Blocks(*(column[first:last] for column in self._columns))
            for key, (first, last) in dict(zip(keys, ranges, strict=True)).items()
        }
        return list(map(known.__getitem__, keys))


def _decode_strides(fields: Fields, wide: Ints) -> tuple[Ints, Ints, Ints]:
    """The blocks that do not lie densely, all their strides, and where each one's begin. wide: each block's number of
    dimensions."""
    table = fields.mapping("blocks").get("strides")
    strided = Fields(fields.path, {"strides": table if isinstance(table, dict) else {}})
    which = strided.integers("strides", "block", below=len(wide))
    values = strided.integers("strides", "values")
    if np.any(np.diff(which) <= 0):
        raise fields.damaged("'blocks.strides.block' is not in ascending order")
    ends = np.cumsum(wide[which])
    needed = int(ends[-1]) if len(ends) else 0
    if len(values) != needed:
        raise fields.damaged(f"'blocks.strides.values' is too {'short' if len(values) < needed else 'long'}")
    return which, values, ends - wide[which]


def _check_boxes(fields: Fields, offsets: Ints, sizes: Ints, strides: Ints, limit: Ints) -> None:
    """Raise DamagedCheckpoint for a block that is not within its tensor, or that no file could hold. limit: (n, d) the
    shapes of the blocks' tensors."""
    outside = np.flatnonzero(np.any((sizes < 1) | (sizes > limit) | (offsets > limit - sizes), axis=1))
    if len(outside):
        raise fields.damaged(f"a block lies outside its tensor of shape {limit[outside[0]].tolist()}")
    # In floating point first: a product of hostile numbers must not wrap around to a harmless one.
    if np.any(np.sum((sizes - 1.0) * strides, axis=1) >= float(1 << 57)):
        raise fields.damaged("a block's strides lead beyond any file")

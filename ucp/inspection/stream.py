"""Tensors of a checkpoint in pieces of bounded size, row-major, many small ones together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.checkpoint import Checkpoint
from ucp.geometry import flat_ranges, numel
from ucp.storage.dtypes import itemsize
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Stretch:
    """The elements ``[first, last)`` of a tensor's row-major order. index: of the tensor among those asked for."""

    index: int
    first: int
    last: int


def batches(tensors: Sequence[LogicalTensor], limit: int | None = None) -> Iterator[list[Stretch]]:
    """All elements of all tensors in order, as batches of at most ``limit`` bytes (and at least one element).

    limit: `limits.STREAM_BATCH_BYTES` unless it is given.
    """
    limit = limits.STREAM_BATCH_BYTES if limit is None else limit
    batch: list[Stretch] = []
    held = 0
    for index, tensor in enumerate(tensors):
        width = itemsize(tensor.dtype)
        at, n = 0, numel(tensor.shape)
        while at < n:
            if batch and held + width > limit:
                yield batch
                batch, held = [], 0
            count = min(n - at, max((limit - held) // width, 1))
            batch.append(Stretch(index, at, at + count))
            held += count * width
            at += count
    if batch:
        yield batch


def read(reader: Reader, tensors: Sequence[LogicalTensor], batch: Iterable[Stretch]) -> list[Bytes]:
    """The bytes of these pieces, in the tensors' own element types. Raises what reading raises."""
    wants: list[Want] = []
    out: list[Bytes] = []
    for k, piece in enumerate(batch):
        tensor = tensors[piece.index]
        count = piece.last - piece.first
        out.append(np.zeros(count * itemsize(tensor.dtype), np.uint8))
        wants.append(Want(tensor, flat_ranges(tensor.shape, [piece.first], [piece.last], [0], [k]), tensor.dtype))
    gather(reader, wants, out)
    return out


def total(tensors: Iterable[LogicalTensor]) -> int:
    """Bytes of these tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def each(checkpoint: Checkpoint, tensors: Sequence[LogicalTensor]) -> Iterator[tuple[Stretch, Bytes]]:
    """Every piece of these tensors with its bytes."""
    for batch in batches(tensors):
        yield from zip(batch, read(checkpoint.reader, tensors, batch), strict=True)

"""Fill buffers in memory with the elements that they want, straight from a catalog's files.

This is the project's only reading path. A region that a user asks for, a training rank's partition and a window of a
file that a conversion writes are all buffers with blocks. Contiguous elements are read in place. Strided ones go
through a small scratch buffer by one vectorised assignment. Each needed byte is read once. If the checkpoint has
digests, every chunk is verified as it passes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.columns import firsts
from ucp.errors import DamagedCheckpoint
from ucp.geometry import Blocks, Ints, collapse, concat, intersect_grouped
from ucp.storage.dtypes import itemsize, numpy_dtype
from ucp.storage.rounding import ROUNDED, round_to
from ucp.transfer.copies import Copy, CopyTable
from ucp.transfer.exact import check_exact, widen
from ucp.transfer.reader import Bytes, Cache, Reader

Buffers = Sequence[Bytes] | Mapping[int, Bytes]
"""What is filled, by number."""


class Want(NamedTuple):
    """Elements of one logical tensor that a target wants.

    blocks: which elements and where they go: ``blocks.buffers`` is an index into the buffers being filled and
    ``blocks.starts`` counts elements of ``dtype`` from byte ``base`` of that buffer. dtype: the target's element
    type, the tensor's own or one that holds all its values exactly. round: the target is a rounded copy by its nature
    (a mixed-precision engine's weights), so ``dtype`` may be narrower.
    """

    tensor: LogicalTensor
    blocks: Blocks
    dtype: str
    base: int = 0
    round: bool = False


def plan(wants: Sequence[Want], buffers: Sequence[int] | None = None) -> CopyTable:
    """The copies that serve all wants, ordered by file and offset for sequential reading.

    buffers: for each want the one buffer that it goes into, whatever its blocks say.

    Raises Mismatch if a conversion of element types would lose bits, DamagedCheckpoint if the source does not hold an
    element that is wanted.
    """
    kinds: dict[tuple[int, int, str, str, bool], int] = {}
    of = [
        kinds.setdefault(
            (id(want.tensor.blocks), id(want.blocks), want.tensor.dtype, want.dtype, want.round), len(kinds)
        )
        for want in wants
    ]
    which = np.array(of, np.int64)
    first = firsts(which)
    by_ndim: dict[int, list[int]] = {}
    for kind, want in enumerate(wants[k] for k in first):
        if want.tensor.dtype != want.dtype and not (want.round and (want.tensor.dtype, want.dtype) in ROUNDED):
            check_exact(want.tensor, want.dtype)
        by_ndim.setdefault(want.blocks.ndim, []).append(kind)
    into = None if buffers is None else np.array(buffers, np.int64)
    tables = []
    for ndim, alike in by_ndim.items():
        number = np.full(len(kinds), -1)
        number[alike] = np.arange(len(alike))
        own = np.flatnonzero(number[which] >= 0) if len(by_ndim) > 1 else np.arange(len(wants))
        some = wants if len(by_ndim) == 1 else [wants[k] for k in own.tolist()]
        tables.append(
            _copies(
                [wants[first[k]] for k in alike], ndim, some, number[which[own]], into if into is None else into[own]
            )
        )
    return CopyTable.joined(tables).in_order()


def _copies(kinds: Sequence[Want], ndim: int, wants: Sequence[Want], which: Ints, buffers: Ints | None) -> CopyTable:
    """The copies that serve wants of tensors with ``ndim`` dimensions, in no particular order.

    kinds: one want of each kind: those whose tensors are cut alike, and which want the same of them. which: (n,) the
    kind of each want. What copies there are is worked out once for each kind.
    """
    numbers = np.arange(len(kinds))
    source, target = (concat(blocks, ndim) for blocks in ((w.tensor.blocks for w in kinds), (w.blocks for w in kinds)))
    held = np.array([len(w.tensor.blocks) for w in kinds], np.int64)
    source_of, target_of = np.repeat(numbers, held), np.repeat(numbers, [len(w.blocks) for w in kinds])
    copies = collapse(intersect_grouped(source, source_of, target, target_of))
    of = source_of[copies.source]
    _check_all_found(of, copies.counts, target_of, target.counts, wants, which)
    # Row by row of a want's kind: which want, and which copy of its kind.
    order, count = np.argsort(of, kind="stable"), np.bincount(of, minlength=len(kinds))
    each = count[which]
    want = np.repeat(np.arange(len(wants)), each)
    first = np.cumsum(count) - count
    row = order[np.arange(len(want)) + (first[which] - (np.cumsum(each) - each))[want]]
    source_sizes = np.array([itemsize(w.tensor.dtype) for w in kinds], np.int64)
    target_sizes = np.array([itemsize(w.dtype) for w in kinds], np.int64)
    bases = np.concatenate([w.tensor.bases for w in wants])
    begins = np.cumsum(held[which]) - held[which] - (np.cumsum(held) - held)[which]
    from_block, to_block = copies.source[row], copies.target[row]
    base = np.array([w.base for w in wants], np.int64)
    return CopyTable(
        tuple(
            Copy(0, 0, 0, 0, sizes, steps, target_steps, kinds[k].tensor.dtype, kinds[k].dtype)
            for k, sizes, steps, target_steps in zip(
                of.tolist(),
                map(tuple, copies.sizes.tolist()),
                map(tuple, copies.source_strides.tolist()),
                map(tuple, copies.target_strides.tolist()),
                strict=True,
            )
        ),
        row,
        source.buffers[from_block],
        bases[begins[want] + from_block] + (copies.source_starts * source_sizes[of])[row],
        target.buffers[to_block] if buffers is None else buffers[want],
        base[want] + (copies.target_starts * target_sizes[of])[row],
    )


def _check_all_found(
    of: Ints, counts: Ints, target_of: Ints, wanted_counts: Ints, wants: Sequence[Want], which: Ints
) -> None:
    """Raise DamagedCheckpoint for the first want of a kind whose copies bring fewer elements than are wanted."""
    kinds = int(which.max(initial=-1)) + 1
    found, wanted = np.zeros(kinds, np.int64), np.zeros(kinds, np.int64)
    np.add.at(found, of, counts)
    np.add.at(wanted, target_of, wanted_counts)
    for k in np.flatnonzero((found != wanted)[which])[:1].tolist():
        tensor, kind = wants[k].tensor, which[k]
        raise DamagedCheckpoint(
            f"'{tensor.name}' ({tensor.state}): {wanted[kind]} elements are wanted, but the checkpoint's fragments "
            f"hold {found[kind]} of them"
        )


def gather(
    reader: Reader,
    wants: Sequence[Want],
    buffers: Sequence[Bytes],
    threads: int | None = None,
    cache: Cache | None = None,
) -> int:
    """Fill the buffers with what is wanted and return the number of payload bytes moved.

    All digests are checked. Records of torch files are compared with their CRC-32s if they have been read whole by now.
    Elements of a buffer that no want covers are left as they are. ``threads`` defaults to the processors that this
    process may use, at most `limits.THREADS_MAX_COUNT`. Small jobs run in the calling thread. cache: that thread's
    chunks of an earlier call.
    """
    return fill(reader, plan(wants), buffers, threads, cache)


def fill(
    reader: Reader,
    copies: Sequence[Copy],
    buffers: Sequence[Bytes],
    threads: int | None = None,
    cache: Cache | None = None,
) -> int:
    """`gather`, for copies that are planned already."""
    table = CopyTable.of(copies)
    total = int(table.nbytes.sum())
    workers = min(threads or min(limits.processors(), limits.THREADS_MAX_COUNT), 1 + total // limits.BYTES_PER_READER)
    if workers <= 1:
        execute(reader, table, buffers, cache)
    else:
        parts = list(_split(table, total, workers))
        much = total > limits.READ_AHEAD_BYTES
        with reader.reading_ahead(map(_dense, parts) if much else ()) as orders, ThreadPoolExecutor(workers) as pool:
            if orders is not None:
                parts = [part[np.array(order, np.int64)] for part, order in zip(parts, orders, strict=True)]
            for done in [pool.submit(execute, reader, part, buffers) for part in parts]:
                done.result()
    reader.records.settle()
    return total


def _dense(part: CopyTable) -> list[tuple[int, int, int]]:
    """Of each copy the file, its first byte there and the bytes. Nothing of those with long gaps."""
    nbytes = np.where(part.spans - part.nbytes < limits.LONG_GAP_BYTES, part.spans, 0)
    return list(zip(part.file.tolist(), part.at.tolist(), nbytes.tolist(), strict=True))


class Run(NamedTuple):
    """Bytes that follow one another in a file and are read together. parts: where they go, one after the other: the
    buffer, the first byte there and how many. odd: a copy that is no plain bytes; then there are no parts."""

    file: int
    at: int
    parts: Sequence[tuple[int, int, int]]
    odd: Copy | None = None


def runs(table: CopyTable, apart: bool = False) -> tuple[list[Run], Ints]:
    """The reads that do these copies in their order, and the number of each one's first copy. apart: what goes into
    several buffers is read apart."""
    nbytes, is_plain = table.nbytes, table.is_plain
    # Plain bytes that follow one another in a file are read together, and as one part where they go to one place.
    follows = np.zeros(len(table) + 1, bool)
    follows[1:-1] = is_plain[1:] & is_plain[:-1] & (table.file[1:] == table.file[:-1])
    follows[1:-1] &= table.at[1:] == (table.at + nbytes)[:-1]
    one_buffer = table.buffer[1:] == table.buffer[:-1]
    if apart:
        follows[1:-1] &= one_buffer
    joins = follows.copy()
    joins[1:-1] &= one_buffer & (table.to[1:] == (table.to + nbytes)[:-1])
    begins, parts = np.flatnonzero(~follows), np.flatnonzero(~joins)
    ends = np.cumsum(nbytes)
    lengths = np.diff(np.concatenate([np.zeros(1, np.int64), ends])[parts])
    starts = np.searchsorted(parts, begins).tolist()
    found = list(zip(table.buffer[parts[:-1]].tolist(), table.to[parts[:-1]].tolist(), lengths.tolist(), strict=True))
    begins = begins[:-1]
    places = zip(table.file[begins].tolist(), table.at[begins].tolist(), is_plain[begins].tolist(), strict=True)
    out = [
        Run(file, at, found[low:high]) if plain else Run(file, at, (), table[first])
        for first, (file, at, plain), low, high in zip(begins.tolist(), places, starts, starts[1:], strict=False)
    ]
    return out, begins


def execute(reader: Reader, copies: Sequence[Copy], buffers: Sequence[Bytes], cache: Cache | None = None) -> None:
    """Do these copies in this order, in the calling thread. In addition to the buffers they take about
    `limits.SCRATCH_BYTES` of memory. cache: chunks of the last copies before these."""
    serve(reader, runs(CopyTable.of(copies))[0], buffers, OrderedDict() if cache is None else cache)


def serve(reader: Reader, reads: Sequence[Run], buffers: Buffers, cache: Cache) -> None:
    """`execute`, for reads that `runs` found: here nothing is worked out that could have been before."""
    for file, at, parts, odd in reads:
        if odd is None:
            reader.read_into(file, at, [buffers[buffer][to : to + length] for buffer, to, length in parts], cache)
        else:
            _serve(reader, odd, buffers, cache)


def _split(table: CopyTable, total: int, parts: int) -> Iterator[CopyTable]:
    """Groups of consecutive copies with about equal bytes. A huge contiguous copy is cut, so all threads have work."""
    limit = max(total // parts, 1)
    if (huge := np.flatnonzero(table.nbytes > limit)).size:
        cuts = sorted({0, len(table), *huge.tolist(), *(huge + 1).tolist()})
        large = set(huge.tolist())
        pieces = (CopyTable.of(_cut(table[k], limit)) if k in large else table[k:end] for k, end in pairwise(cuts))
        table = CopyTable.joined(pieces)
    ends = np.cumsum(table.nbytes)
    first = 0
    while first < len(table):
        before = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, before + limit + limit // 8, "right")), first + 1)
        yield table[first:last]
        first = last


def _cut(copy: Copy, limit: int) -> Iterator[Copy]:
    """The copy in pieces of at most about ``limit`` bytes, along its outermost dimension that is longer than 1."""
    axis = _outermost(copy)
    if copy.nbytes <= limit or axis is None:
        yield copy
        return
    n = copy.sizes[axis]
    count = max(n * limit // copy.nbytes, 1)
    for first in range(0, n, count):
        piece = copy.narrow(axis, first, min(count, n - first))
        if count == 1:
            yield from _cut(piece, limit)
        else:
            yield piece


def _outermost(copy: Copy) -> int | None:
    """The first dimension that is longer than 1; None for a single element."""
    return next((k for k, n in enumerate(copy.sizes) if n > 1), None)


def _serve(reader: Reader, copy: Copy, buffers: Buffers, cache: Cache) -> None:
    if copy.is_plain:
        reader.read_into(copy.file, copy.at, [buffers[copy.buffer][copy.to : copy.to + copy.nbytes]], cache)
        return
    axis = _outermost(copy)
    if axis is None or axis == len(copy.sizes) - 1:  # one contiguous run of another type
        _through_scratch(reader, copy, buffers, cache)
        return
    size = itemsize(copy.source_dtype)
    gap = copy.steps[axis] * size - copy.narrow(axis, 0, 1).span
    if gap >= limits.LONG_GAP_BYTES or copy.sizes[-1] * size >= limits.SHORT_RUN_BYTES:
        for index in range(copy.sizes[axis]):
            _serve(reader, copy.narrow(axis, index, 1), buffers, cache)
    else:
        _through_scratch(reader, copy, buffers, cache)


def _through_scratch(reader: Reader, copy: Copy, buffers: Buffers, cache: Cache) -> None:
    """Read the copy with its gaps, as much at a time as fits into the scratch, and place it by array assignment."""
    # A conversion makes up to seven arrays of the size of the bytes read, in addition to these (two when widening to
    # double).
    share = limits.SCRATCH_BYTES if copy.source_dtype == copy.target_dtype else limits.SCRATCH_BYTES // 8
    for piece in _cut(copy, max(share * copy.nbytes // copy.span, 1)):
        _place(reader, piece, buffers, cache)


def _place(reader: Reader, piece: Copy, buffers: Buffers, cache: Cache) -> None:
    scratch = np.empty(piece.span, np.uint8)
    reader.read_into(piece.file, piece.at, [scratch], cache)
    source = _strided(scratch, 0, piece.sizes, piece.steps, piece.source_dtype)
    target = _strided(buffers[piece.buffer], piece.to, piece.sizes, piece.target_steps, piece.target_dtype)
    target[...] = _converted(source, piece.source_dtype, piece.target_dtype)


def _converted(values: NDArray[np.generic], source: str, target: str) -> NDArray[Any]:
    if (source, target) in ROUNDED:
        return round_to(widen(values, source, "float32").view(np.float32), target)
    return widen(values, source, target)


def _strided(buffer: Bytes, at: int, sizes: tuple[int, ...], steps: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    size = itemsize(dtype)
    return np.ndarray(sizes, numpy_dtype(dtype), buffer.data, at, tuple(s * size for s in steps))

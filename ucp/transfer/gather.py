"""Fill buffers in memory with the elements that they want, straight from a catalog's files.

This is the project's only reading path. A region that a user asks for, a training rank's partition and a window of a
file that a conversion writes are all buffers with blocks. Contiguous elements are read in place. Strided ones go
through a small scratch buffer by one vectorised assignment. Each needed byte is read once. If the checkpoint has
digests, every chunk is verified as it passes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.geometry import Blocks, collapse, concat, intersect_grouped, span
from ucp.storage.dtypes import itemsize, numpy_dtype
from ucp.storage.rounding import ROUNDED, round_to
from ucp.transfer.exact import check_exact, widen
from ucp.transfer.reader import Bytes, Cache, Reader


@dataclass(frozen=True, slots=True)
class Want:
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


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy, in elements of the source's dtype on the source side and of the target's on the other.

    The last dimension is contiguous on both sides; the others follow the file, widest step first.
    """

    file: int
    at: int  # byte offset of the first element in the file
    buffer: int
    to: int  # byte offset of the first element in the buffer
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    target_steps: tuple[int, ...]
    source_dtype: str
    target_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes read from the file, without the gaps."""
        return prod(self.sizes) * itemsize(self.source_dtype)

    @property
    def span(self) -> int:
        """Bytes of the file from the first element to the end of the last, gaps included."""
        return span(self.sizes, self.steps) * itemsize(self.source_dtype)

    def narrow(self, axis: int, first: int, count: int) -> Copy:
        """The part with ``count`` indices of one dimension, from ``first`` on."""
        return Copy(
            self.file,
            self.at + first * self.steps[axis] * itemsize(self.source_dtype),
            self.buffer,
            self.to + first * self.target_steps[axis] * itemsize(self.target_dtype),
            (*self.sizes[:axis], count, *self.sizes[axis + 1 :]),
            self.steps,
            self.target_steps,
            self.source_dtype,
            self.target_dtype,
        )


def plan(wants: Sequence[Want], buffers: Sequence[int] | None = None) -> list[Copy]:
    """The copies that serve all wants, ordered by file and offset for sequential reading.

    buffers: for each want the one buffer that it goes into, whatever its blocks say.

    Raises Mismatch if a conversion of element types would lose bits, DamagedCheckpoint if the source does not hold an
    element that is wanted.
    """
    by_ndim: dict[int, list[int]] = {}
    for k, want in enumerate(wants):
        if want.tensor.dtype != want.dtype and not (want.round and (want.tensor.dtype, want.dtype) in ROUNDED):
            check_exact(want.tensor, want.dtype)
        by_ndim.setdefault(want.blocks.ndim, []).append(k)
    out: list[Copy] = []
    for ndim, alike in by_ndim.items():
        out += _copies([wants[k] for k in alike], ndim, None if buffers is None else [buffers[k] for k in alike])
    out.sort(key=attrgetter("file", "at"))
    return out


def _copies(wants: Sequence[Want], ndim: int, buffers: Sequence[int] | None) -> list[Copy]:
    """The copies that serve wants of tensors with ``ndim`` dimensions, in no particular order."""
    numbers = np.arange(len(wants))
    source, target = (concat(blocks, ndim) for blocks in ((w.tensor.blocks for w in wants), (w.blocks for w in wants)))
    source_of = np.repeat(numbers, [len(w.tensor.blocks) for w in wants])
    target_of = np.repeat(numbers, [len(w.blocks) for w in wants])
    copies = collapse(intersect_grouped(source, source_of, target, target_of))
    which = source_of[copies.source]
    found, wanted = np.zeros(len(wants), np.int64), np.zeros(len(wants), np.int64)
    np.add.at(found, which, copies.counts)
    np.add.at(wanted, target_of, target.counts)
    for k in np.flatnonzero(found != wanted)[:1].tolist():
        tensor = wants[k].tensor
        raise DamagedCheckpoint(
            f"'{tensor.name}' ({tensor.state}): {wanted[k]} elements are wanted, but the checkpoint's fragments hold "
            f"{found[k]} of them"
        )
    source_sizes = np.array([itemsize(w.tensor.dtype) for w in wants], np.int64)[which]
    target_sizes = np.array([itemsize(w.dtype) for w in wants], np.int64)[which]
    bases = np.concatenate([w.tensor.bases for w in wants])[copies.source]
    columns = zip(
        which.tolist(),
        source.buffers[copies.source].tolist(),
        (bases + copies.source_starts * source_sizes).tolist(),
        (target.buffers[copies.target] if buffers is None else np.array(buffers, np.int64)[which]).tolist(),
        (np.array([w.base for w in wants], np.int64)[which] + copies.target_starts * target_sizes).tolist(),
        map(tuple, copies.sizes.tolist()),
        map(tuple, copies.source_strides.tolist()),
        map(tuple, copies.target_strides.tolist()),
        strict=True,
    )
    return [
        Copy(file, at, buffer, to, sizes, steps, target_steps, wants[k].tensor.dtype, wants[k].dtype)
        for k, file, at, buffer, to, sizes, steps, target_steps in columns
    ]


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
    total = sum(c.nbytes for c in copies)
    workers = min(threads or min(limits.processors(), limits.THREADS_MAX_COUNT), 1 + total // limits.BYTES_PER_READER)
    if workers <= 1:
        execute(reader, copies, buffers, cache)
    else:
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(execute, reader, part, buffers) for part in _split(copies, total, workers)]:
                done.result()
    reader.records.settle()
    return total


def execute(reader: Reader, copies: Sequence[Copy], buffers: Sequence[Bytes], cache: Cache | None = None) -> None:
    """Do these copies in this order, in the calling thread. In addition to the buffers they take about
    `limits.SCRATCH_BYTES` of memory. cache: chunks of the last copies before these."""
    cache = OrderedDict() if cache is None else cache
    for together in _neighbours(copies):
        if len(together) > 1:
            _read(reader, together, buffers, cache)
        else:
            _serve(reader, together[0], buffers, cache)


def _neighbours(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    """The copies in order. Those that are plain bytes and follow one another in a file are put together."""
    current: list[Copy] = []
    file = stop = -1  # where a copy has to begin to follow the last one, which is plain bytes
    for copy in copies:
        is_plain = _is_plain(copy)
        if current and not (is_plain and copy.file == file and copy.at == stop):
            yield current
            current = []
        current.append(copy)
        file, stop = (copy.file, copy.at + copy.nbytes) if is_plain else (-1, -1)
    if current:
        yield current


def _split(copies: Sequence[Copy], total: int, parts: int) -> Iterator[list[Copy]]:
    """Groups of consecutive copies with about equal bytes. A huge contiguous copy is cut, so all threads have work."""
    limit = max(total // parts, 1)
    current: list[Copy] = []
    held = 0
    for copy in copies:
        for piece in _cut(copy, limit):
            if held and held + piece.nbytes > limit + limit // 8:
                yield current
                current, held = [], 0
            current.append(piece)
            held += piece.nbytes
    if current:
        yield current


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


def _is_plain(copy: Copy) -> bool:
    """Whether its bytes are one run on both sides."""
    return copy.source_dtype == copy.target_dtype and prod(copy.sizes) == copy.sizes[-1]


def _read(reader: Reader, copies: Sequence[Copy], buffers: Sequence[Bytes], cache: Cache) -> None:
    """Do plain copies that follow one another in a file."""
    parts = [buffers[copy.buffer][copy.to : copy.to + copy.nbytes] for copy in copies]
    reader.read_into(copies[0].file, copies[0].at, parts, cache)


def _serve(reader: Reader, copy: Copy, buffers: Sequence[Bytes], cache: Cache) -> None:
    if _is_plain(copy):
        _read(reader, [copy], buffers, cache)
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


def _through_scratch(reader: Reader, copy: Copy, buffers: Sequence[Bytes], cache: Cache) -> None:
    """Read the copy with its gaps, as much at a time as fits into the scratch, and place it by array assignment."""
    # A conversion makes up to seven arrays of the size of the bytes read, in addition to these (two when widening to
    # double).
    share = limits.SCRATCH_BYTES if copy.source_dtype == copy.target_dtype else limits.SCRATCH_BYTES // 8
    for piece in _cut(copy, max(share * copy.nbytes // copy.span, 1)):
        _place(reader, piece, buffers, cache)


def _place(reader: Reader, piece: Copy, buffers: Sequence[Bytes], cache: Cache) -> None:
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

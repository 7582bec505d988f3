"""Fill buffers in memory with the elements that they want, straight from a catalog's files.

The one reading path of the project: a region that a user asks for, a training rank's partition, a window of a file
that a conversion writes are all buffers with blocks. Contiguous elements are read in place, strided ones through a
small scratch buffer by one vectorised assignment; each needed byte is read once, and where the checkpoint carries
digests every chunk is verified as it passes.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import DamagedCheckpoint, Mismatch
from ucp.geometry import Blocks, collapse, intersect
from ucp.storage.digests import CHUNK, ChunkDigests, verify_chunks
from ucp.storage.dtypes import itemsize, numpy_dtype
from ucp.storage.files import Files

Bytes = NDArray[np.uint8]

# Runs shorter than this are fetched together, with the gaps between them, when that costs less than separate reads.
SHORT_RUN = 32 << 10
# Gaps longer than this are never read for the sake of the short runs between them.
LONG_GAP = 16 << 10
# Scratch for strided or converted copies, per thread, in bytes.
SCRATCH = 8 << 20
# Verified chunks kept by each reader thread, for neighbours that share a chunk.
CHUNKS_KEPT = 2


@dataclass(frozen=True)
class Want:
    """Elements of one logical tensor that a target wants.

    blocks: which elements and where they go: ``blocks.buffers`` is an index into the buffers being filled and
    ``blocks.starts`` counts elements of ``dtype`` from byte ``base`` of that buffer. dtype: the target's element
    type, the tensor's own or one that holds all its values exactly.
    """

    tensor: LogicalTensor
    blocks: Blocks
    dtype: str
    base: int = 0


@dataclass(frozen=True)
class Copy:
    """One strided copy, in elements of the source's dtype on the source side and of the target's on the other.

    sizes, steps, target_steps: elements, one per dimension, the innermost last.
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
        """Bytes of payload, in the source's dtype."""
        return math.prod(self.sizes) * itemsize(self.source_dtype)

    def narrow(self, axis: int, first: int, count: int) -> Copy:
        """The part of the copy at indices ``[first, first + count)`` of dimension ``axis``."""
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


class Reader:
    """Byte ranges of a catalog's files, verified against its digests where it has them. Thread-safe."""

    def __init__(self, catalog: Catalog, files: Files, verify: bool = True) -> None:
        self._paths = [f.path for f in catalog.files]
        self._files = files
        self._digests: dict[int, ChunkDigests] = dict(catalog.chunk_digests) if verify else {}

    def read_into(self, file: int, offset: int, out: Bytes, cache: OrderedDict[tuple[int, int], bytes]) -> None:
        """Read ``len(out)`` bytes at ``offset``; ``cache`` is the calling thread's own store of verified chunks."""
        path, digests = self._paths[file], self._digests.get(file)
        if digests is None:
            self._files.read_into(path, offset, memoryview(out))
            return
        at, stop = offset, offset + len(out)
        if stop > digests.size:
            raise DamagedCheckpoint(
                f"{path}: bytes up to {stop} are wanted, but digests cover {digests.size}; the manifest and the file "
                "do not belong together"
            )
        while at < stop:
            index, within = divmod(at, CHUNK)
            whole = (stop - at) // CHUNK if within == 0 else 0
            if within == 0 and stop == digests.size and (stop - at) % CHUNK:
                whole += 1  # the file's last, shorter chunk is wanted whole
            if whole:
                end = min(at + whole * CHUNK, stop)
                part = out[at - offset : end - offset]
                self._files.read_into(path, at, memoryview(part))
                verify_chunks(path, digests, index, memoryview(part))
                at = end
                continue
            end = min((index + 1) * CHUNK, stop)
            chunk = self._chunk(file, path, digests, index, cache)
            out[at - offset : end - offset] = np.frombuffer(chunk, np.uint8)[within : within + end - at]
            at = end

    def _chunk(
        self, file: int, path: str, digests: ChunkDigests, index: int, cache: OrderedDict[tuple[int, int], bytes]
    ) -> bytes:
        key = (file, index)
        if key in cache:
            cache.move_to_end(key)
            return cache[key]
        size = min(CHUNK, digests.size - index * CHUNK)
        raw = bytearray(size)
        self._files.read_into(path, index * CHUNK, memoryview(raw))
        verify_chunks(path, digests, index, memoryview(raw))
        cache[key] = bytes(raw)
        while len(cache) > CHUNKS_KEPT:
            cache.popitem(last=False)
        return cache[key]


def plan(wants: Sequence[Want]) -> list[Copy]:
    """The copies that serve all wants, ordered by file and offset for sequential reading.

    Raises Mismatch where a conversion of element types would lose bits, DamagedCheckpoint where the source does not
    hold an element that is wanted.
    """
    out: list[Copy] = []
    for want in wants:
        tensor = want.tensor
        check_exact(tensor, want.dtype)
        source_size, target_size = itemsize(tensor.dtype), itemsize(want.dtype)
        copies = collapse(intersect(tensor.blocks, want.blocks))
        found, wanted = int(copies.counts.sum()), int(want.blocks.counts.sum())
        if found != wanted:
            raise DamagedCheckpoint(
                f"'{tensor.name}' ({tensor.state}): {wanted} elements are wanted, but the checkpoint's fragments hold "
                f"{found} of them"
            )
        files = tensor.blocks.buffers[copies.source]
        at = tensor.bases[copies.source] + copies.source_starts * source_size
        buffers = want.blocks.buffers[copies.target]
        to = want.base + copies.target_starts * target_size
        out.extend(
            Copy(*row, source_dtype=tensor.dtype, target_dtype=want.dtype)
            for row in zip(
                files.tolist(),
                at.tolist(),
                buffers.tolist(),
                to.tolist(),
                map(tuple, copies.sizes.tolist()),
                map(tuple, copies.source_strides.tolist()),
                map(tuple, copies.target_strides.tolist()),
                strict=True,
            )
        )
    out.sort(key=lambda c: (c.file, c.at))
    return out


def gather(reader: Reader, wants: Sequence[Want], buffers: Sequence[Bytes], threads: int | None = None) -> int:
    """Fill the buffers with what is wanted and return the number of payload bytes moved.

    Elements of a buffer that no want covers are left as they are. ``threads`` defaults to the number of processors,
    at most 8; small jobs run in the calling thread.
    """
    copies = plan(wants)
    total = sum(c.nbytes for c in copies)
    workers = min(threads or min(os.cpu_count() or 1, 8), 1 + total // (4 << 20))
    if workers <= 1:
        execute(reader, copies, buffers)
        return total
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(execute, reader, part, buffers) for part in _split(copies, total, workers)]:
            done.result()
    return total


def _split(copies: list[Copy], total: int, parts: int) -> Iterator[list[Copy]]:
    """Consecutive copies of about equal bytes; one huge contiguous copy is cut, so that all threads have work."""
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
    if copy.nbytes <= limit:
        yield copy
        return
    axis = next((k for k, n in enumerate(copy.sizes) if n > 1), None)
    if axis is None:
        yield copy
        return
    n = copy.sizes[axis]
    rows = max(n * limit // copy.nbytes, 1)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        piece = copy.narrow(axis, first, count)
        if count == 1 and piece.nbytes > limit:
            yield from _cut(piece, limit)
        else:
            yield piece


def execute(reader: Reader, copies: Sequence[Copy], buffers: Sequence[Bytes]) -> None:
    """Run planned copies in the calling thread, in their order."""
    cache: OrderedDict[tuple[int, int], bytes] = OrderedDict()
    for copy in copies:
        size = itemsize(copy.source_dtype)
        dense = copy.steps[-1] == 1 and copy.target_steps[-1] == 1
        single = dense and all(n == 1 for n in copy.sizes[:-1])
        same = copy.source_dtype == copy.target_dtype
        if same and single:
            reader.read_into(copy.file, copy.at, buffers[copy.buffer][copy.to : copy.to + copy.nbytes], cache)
        elif same and dense and (copy.sizes[-1] * size >= SHORT_RUN or _gap(copy) >= LONG_GAP):
            for at, to, n in _expand(copy):
                reader.read_into(copy.file, at, buffers[copy.buffer][to : to + n], cache)
        else:
            for piece in _cut(copy, SCRATCH if single else _payload_for_scratch(copy)):
                _through_scratch(reader, piece, buffers, cache)


def _span(copy: Copy) -> int:
    """Bytes from the copy's first element to the end of its last, gaps included."""
    last = sum((n - 1) * s for n, s in zip(copy.sizes, copy.steps, strict=True))
    return (last + 1) * itemsize(copy.source_dtype)


def _gap(copy: Copy) -> float:
    """Mean bytes between the copy's contiguous runs, in the file."""
    count = max(int(np.prod(copy.sizes[:-1], dtype=np.int64)), 1)
    return (_span(copy) - copy.nbytes) / count


def _payload_for_scratch(copy: Copy) -> int:
    """How much payload to take at a time so that the span around it fits the scratch buffer."""
    return max(int(SCRATCH * copy.nbytes / max(_span(copy), 1)), 1)


def _expand(copy: Copy) -> Iterator[tuple[int, int, int]]:
    """The contiguous runs of a strided copy: (file offset, buffer offset, bytes)."""
    size, outer = itemsize(copy.source_dtype), copy.sizes[:-1]
    for index in np.ndindex(*outer):
        at = sum(i * s for i, s in zip(index, copy.steps, strict=False))
        to = sum(i * s for i, s in zip(index, copy.target_steps, strict=False))
        yield copy.at + at * size, copy.to + to * size, copy.sizes[-1] * size


def _through_scratch(
    reader: Reader, copy: Copy, buffers: Sequence[Bytes], cache: OrderedDict[tuple[int, int], bytes]
) -> None:
    span = _span(copy)
    scratch = np.empty(span, np.uint8)
    reader.read_into(copy.file, copy.at, scratch, cache)
    source = _strided(scratch, 0, copy.sizes, copy.steps, copy.source_dtype)
    target = _strided(buffers[copy.buffer], copy.to, copy.sizes, copy.target_steps, copy.target_dtype)
    target[...] = widen(source, copy.source_dtype, copy.target_dtype)


def _strided(
    buffer: Bytes, at: int, sizes: tuple[int, ...], steps: tuple[int, ...], dtype: str
) -> NDArray[np.generic]:
    size = itemsize(dtype)
    return np.ndarray(sizes, numpy_dtype(dtype), buffer.data, at, tuple(s * size for s in steps))


_EXACT = {
    ("bfloat16", "float32"),
    ("bfloat16", "float64"),
    ("float16", "float32"),
    ("float16", "float64"),
    ("float32", "float64"),
}


def check_exact(tensor: LogicalTensor, dtype: str) -> None:
    """Raise Mismatch unless elements of this dtype hold all of the tensor's values exactly."""
    if tensor.dtype != dtype and (tensor.dtype, dtype) not in _EXACT:
        raise Mismatch(
            f"'{tensor.name}' ({tensor.state}) is {tensor.dtype} in the checkpoint and {dtype} in the target; that "
            "would lose bits, so it is not done: use the checkpoint's element type in the target"
        )


def widen(values: NDArray[np.generic], source: str, target: str) -> NDArray[np.generic]:
    """The same values in a wider element type; bits unchanged where the types are equal."""
    if source == target:
        return values
    if source == "bfloat16":
        wide = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide if target == "float32" else wide.astype(np.float64)
    return values.astype(numpy_dtype(target))

"""Who writes what, and how a rank writes its share: one safetensors file, digested while its bytes pass.

Tensors that the same ranks hold are put one after the other, and cut into as many equal ranges of bytes as there are
holders. Each holder writes one range. Every rank computes the same result, so nothing is exchanged.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ucp import limits
from ucp.errors import BadArgument, DestinationError
from ucp.geometry import Blocks, extents, packed, take_elements
from ucp.job.stopwatch import Stopwatch
from ucp.saving.source import Holding
from ucp.storage import disk, locations, safetensors
from ucp.storage.digests import CHUNK, ChunkDigests, digest_chunks
from ucp.storage.dtypes import itemsize
from ucp.storage.kept.files import Lease, of_run
from ucp.storage.page_cache import has_room
from ucp.storage.writeback import write_at, write_cached, write_past_cache

if TYPE_CHECKING:
    import torch

AUTO, KEEP, BYPASS = "auto", "keep", "bypass"
CACHES = (AUTO, KEEP, BYPASS)
"""Whether large files stay in the page cache: where there is room and processors to spare, always, or never."""


@dataclass(frozen=True, eq=False)
class WrittenElements:
    """Elements that this rank writes, as they lie in its file.

    start: byte in the file. blocks: as in a LogicalTensor of the file, in elements from ``start``. dense: first element
    and count, if one range of the buffer is written as it is; None if the blocks are gathered one by one.
    """

    holding: Holding
    key: str
    start: int
    blocks: Blocks
    dense: tuple[int, int] | None


def assign(holdings: Sequence[Holding], rank: int) -> list[Holding]:
    """The holdings, cut down to what this rank writes. The results of all holders together have each holding once."""
    together: dict[tuple[int, ...], list[int]] = {}
    for index, holding in enumerate(holdings):
        if len(holding.blocks) and len(holding.holders) > 1:
            together.setdefault(holding.holders, []).append(index)
    out = list(holdings)
    for holders, members in together.items():
        if rank not in holders:
            name = holdings[members[0]].name
            raise BadArgument(f"rank {rank} holds '{name}', but is not among its holders {holders}")
        ends = np.cumsum([0, *(nbytes_of(holdings[i]) for i in members)])
        place, total = holders.index(rank), int(ends[-1])
        low, high = total * place // len(holders), total * (place + 1) // len(holders)
        for index, start in zip(members, ends.tolist(), strict=False):
            width, count = itemsize(holdings[index].dtype), int(holdings[index].blocks.counts.sum())
            # An element across a cut belongs to the side on which it begins.
            first, last = (min(max(-(-(at - start) // width), 0), count) for at in (low, high))
            if (first, last) != (0, count):
                out[index] = replace(holdings[index], blocks=take_elements(holdings[index].blocks, first, last))
    return out


def nbytes_of(holding: Holding) -> int:
    """How many bytes the elements of a holding have, replicas counted."""
    return int(holding.blocks.counts.sum()) * itemsize(holding.dtype)


def lay_out(holdings: Sequence[Holding]) -> tuple[safetensors.FilePlan, list[WrittenElements]]:
    """The file for these holdings: one flat tensor for each, without the gaps that they have in the buffer.

    All weights come first, then all tensors of each state. A load verifies whole chunks, and one that wants the
    weights alone, or new states apart from live weights, would else read much of what lies between.

    Raises Unsupported for element types that safetensors lacks.
    """
    pieces: list[WrittenElements] = []
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    seen: set[str] = set()
    arranged: dict[int, tuple[int, Blocks, tuple[int, int] | None]] = {}  # many tensors have the same blocks
    for holding in sorted(holdings, key=lambda holding: (holding.state != "param", holding.state)):
        if id(holding.blocks) not in arranged:
            arranged[id(holding.blocks)] = _arranged(holding.blocks)
        count, blocks, dense = arranged[id(holding.blocks)]
        if not count:
            continue
        key = f"{holding.name}:{holding.state}"
        while key in seen:
            key += "'"
        seen.add(key)
        entries.append((key, holding.dtype, (count,)))
        pieces.append(WrittenElements(holding, key, 0, blocks, dense))
    plan = safetensors.plan_file(entries)
    placed = [replace(piece, start=plan.offsets[piece.key]) for piece in pieces]
    return plan, sorted(placed, key=lambda piece: piece.start)


def _arranged(blocks: Blocks) -> tuple[int, Blocks, tuple[int, int] | None]:
    """How many elements there are, where they lie in the file, counted from the tensor's start there, and their dense
    range in the buffer, if they are one."""
    count = int(blocks.counts.sum())
    if not count:
        return 0, blocks, None
    first, ends = extents(blocks)
    lowest, highest = int(first.min()), int(ends.max())
    if highest - lowest == count:
        return count, blocks.in_buffer(0, -lowest), (lowest, count)
    return count, packed(blocks), None


def elements(piece: WrittenElements, tensor: torch.Tensor, part: int) -> torch.Tensor:
    """One part of the piece's elements, where they lie. It is row-major, and not always dense. A dense piece has one
    part; any other piece has one for each block. tensor: the holding's, or a copy of it."""
    flat = tensor.reshape(-1)
    if piece.dense is not None:
        first, count = piece.dense
        return flat[first : first + count]
    blocks = piece.holding.blocks
    sizes, strides, start = (array[part].tolist() for array in (blocks.sizes, blocks.strides, blocks.starts))
    return flat.as_strided(sizes, strides, flat.storage_offset() + start)


def write_file(path: Path, parts: Iterable[memoryview | bytes], size: int, watch: Stopwatch) -> ChunkDigests:
    """Create the file, write these bytes one after the other, and flush them to disk. Returns the file's digests.

    watch: gets the seconds of 'digest' and of 'write', with the flush. Raises DestinationError if it fails; then the
    file is removed.
    """
    return write_windows(path, _windows(parts), size, watch)


def write_windows(
    path: Path, windows: Iterable[tuple[int, memoryview]], size: int, watch: Stopwatch, cache: str = AUTO
) -> ChunkDigests:
    """As `write_file`, but from (offset, bytes) pairs: ascending, without gaps, each at a multiple of the digests'
    chunk.

    cache: one of `CACHES`. Large files are written past the page cache, if their memory is aligned, where training
    needs it more; else they stay there for who is likeliest to read them, a restart.
    """
    if locations.is_remote(path):
        return _upload(path, windows, size, watch)
    table = bytearray()
    put = _way(cache, size)
    try:
        fd = disk.open_to_write(path)
        try:
            for at, window in windows:
                with watch.of("digest"):
                    table += digest_chunks(window)
                with watch.of("write"):
                    put(fd, window, at)
            written = os.fstat(fd).st_size
            if written != size:
                raise BadArgument(f"{path}: {written} bytes were written where {size} are planned")
            with watch.of("write"):
                disk.flush(fd)
        except BaseException:
            disk.remove_file(path, missing_ok=True)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DestinationError(f"{path}: the file system became full while {size} bytes were written") from error
        raise DestinationError(f"{path}: cannot be written: {error.strerror or error}") from error
    return ChunkDigests(size, bytes(table))


def _way(cache: str, size: int) -> Callable[[int, memoryview, int], None]:
    """How a file of so many bytes is written."""
    if size < limits.WRITEBACK_FILE_BYTES:
        return write_at
    spare = limits.processors() >= limits.CACHED_SAVE_PROCESSORS_COUNT * limits.ranks_here()
    keep = cache == KEEP or (cache == AUTO and spare and has_room(size))
    return write_cached if keep else write_past_cache


def place(path: Path, lease: Lease, watch: Stopwatch) -> None:
    """Let a keeper's memory become the file as it is. watch: gets the seconds of 'write'. Raises DestinationError."""
    try:
        with watch.of("write"):
            of_run(lease.run).place(lease, str(path))
    except OSError as error:
        raise DestinationError(f"{path}: cannot be kept: {error.strerror or error}") from error


def _upload(path: Path, windows: Iterable[tuple[int, memoryview]], size: int, watch: Stopwatch) -> ChunkDigests:
    """As `write_windows`, but behind a URL. The file appears once its last byte is written."""
    table = bytearray()
    written = 0
    try:
        with locations.created(path, limits.SAVE_WINDOW_BYTES) as stream:
            for _, window in windows:
                with watch.of("digest"):
                    table += digest_chunks(window)
                with watch.of("write"):
                    stream.write(window)
                written += len(window)
            if written != size:
                raise BadArgument(f"{path}: {written} bytes were written where {size} are planned")
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror or error}") from error
    return ChunkDigests(size, bytes(table))


def _windows(parts: Iterable[memoryview | bytes]) -> Iterator[tuple[int, memoryview]]:
    """The same bytes in pieces that begin at multiples of the digests' chunk. Long parts are not copied."""
    buffer = memoryview(bytearray(limits.SAVE_WINDOW_BYTES))
    filled = at = 0
    for part in parts:
        view = memoryview(part)
        while len(view):
            if filled == 0 and len(view) >= CHUNK:
                count = min(len(view) // CHUNK * CHUNK, limits.SAVE_WINDOW_BYTES)
                yield at, view[:count]
                at += count
            else:
                # Only up to the beginning of the next chunk, so that the rest need not be copied.
                count = min(-filled % CHUNK or CHUNK, len(view))
                buffer[filled : filled + count] = view[:count]
                filled += count
                if filled == limits.SAVE_WINDOW_BYTES or (filled % CHUNK == 0 and len(view) - count >= CHUNK):
                    yield at, buffer[:filled]
                    at, filled = at + filled, 0
            view = view[count:]
    if filled:
        yield at, buffer[:filled]

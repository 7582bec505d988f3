"""Which windows are filled together, so that a chunk of the source that many of them want a piece of is read once.

If a source has digests, a chunk is read whole for any byte of it. A target of 64 ZeRO-3 ranks has a 64th of every
parameter in each file. Written file after file, every chunk would be read and hashed 64 times. So if pieces are short,
small windows of several files are planned together and served in the order of the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ucp import limits
from ucp.geometry import numel
from ucp.storage.digests import CHUNK
from ucp.storage.dtypes import itemsize
from ucp.transfer.copies import Copy
from ucp.transfer.targets import TargetFile
from ucp.transfer.windows import Work, windows


@dataclass(frozen=True, slots=True)
class Window:
    """A window: its file's index, its first byte, its size in bytes, and what fills it."""

    file: int
    start: int
    size: int
    work: Work


def batches(
    files: Sequence[TargetFile], share: Sequence[tuple[int, int]], window: int, batch_bytes: int, verified: bool
) -> Iterator[list[Window]]:
    """The windows of the files' bytes [first, last) of ``share``, in batches for one thread each.

    window: bytes of one window. batch_bytes: bytes of all windows of a batch. verified: chunks of the source are read
    whole.
    """
    for group in _groups(files, share, verified):
        small = CHUNK if len(group) > 1 or (verified and _is_short(files[group[0]])) else window
        found = (
            Window(k, start, min(small, share[k][1] - start), work)
            for k in group
            for start, work in windows(files[k], small, *share[k])
        )
        if small == window:
            yield from ([part] for part in found)
            continue
        parts = sorted(found, key=_place)
        count = max(batch_bytes // small, 1)
        yield from (parts[at : at + count] for at in range(0, len(parts), count))


def copies(batch: Sequence[Window]) -> list[Copy]:
    """The copies that fill a batch, sorted by the source. The windows' buffers are numbered in their order."""
    found = [replace(copy, buffer=k) for k, part in enumerate(batch) for copy in part.work.copies]
    return sorted(found, key=lambda copy: (copy.file, copy.at))


def _groups(files: Sequence[TargetFile], share: Sequence[tuple[int, int]], verified: bool) -> Iterator[list[int]]:
    """Indices of files that are planned together: consecutive files of short pieces, and each other file alone."""
    group: list[int] = []
    held = 0
    for k, (first, last) in enumerate(share):
        if first >= last:
            continue
        blocks = _blocks(files[k])
        short = verified and _is_short(files[k])
        if group and (
            not short or len(group) == limits.PLANNED_FILES_COUNT or held + blocks > limits.PLANNED_BLOCKS_COUNT
        ):
            yield group
            group, held = [], 0
        if short:
            group.append(k)
            held += blocks
        else:
            yield [k]
    if group:
        yield group


def _is_short(file: TargetFile) -> bool:
    nbytes = sum(int(want.blocks.counts.sum()) * itemsize(want.dtype) for want in file.wants)
    return 0 < nbytes < limits.SHORT_PIECE_BYTES * _blocks(file)


def _blocks(file: TargetFile) -> int:
    """About as many pieces as the file is filled from."""
    out = 0
    for want in file.wants:
        share = int(want.blocks.counts.sum()) / max(numel(want.tensor.shape), 1)
        out += max(len(want.blocks), round(len(want.tensor.blocks) * share), 1)
    return out


def _place(part: Window) -> tuple[int, int, int, int]:
    first = part.work.copies[0] if part.work.copies else None
    return (-1, 0, part.file, part.start) if first is None else (first.file, first.at, part.file, part.start)

"""The second phase of a load: read again, straight to where the values live.

Live memory of the host is read into in place. What lies on a device passes through a few windows of pinned memory
(`ucp.loading.windows`). What has no place of its own (states that an engine keeps on a disk, tensors whose elements lie
apart) is read when the target asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from ucp import limits
from ucp.geometry import extents
from ucp.job.stopwatch import Stopwatch
from ucp.loading.host_memory import Memory
from ucp.loading.nouns import Entry
from ucp.loading.read import RankReads, watched
from ucp.loading.spread import copy_all
from ucp.loading.target import LoadedTensors
from ucp.loading.windows import Place, through_windows
from ucp.storage.dtypes import from_torch, itemsize, to_torch
from ucp.storage.files import Files
from ucp.storage.rounding import ROUNDED
from ucp.transfer.copies import Copy, CopyTable
from ucp.transfer.gather import fill
from ucp.transfer.reader import Bytes, Reader


@dataclass(frozen=True, eq=False)
class Brought(LoadedTensors):
    """What was read, in place or into host memory, and what is read when it is asked for.

    there: by entry. later: what to read, in its own buffer. reader, share: for that.
    """

    there: Mapping[Entry, torch.Tensor]
    later: Mapping[Entry, Sequence[Copy]] = field(default_factory=dict)
    reader: Reader | None = None
    share: RankReads | None = None
    entries: dict[tuple[int, str], Entry] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for mapping in (self.there, self.later):
            self.entries.update({(key, state): (key, state, dtype) for key, state, dtype in mapping})

    @property
    def as_read(self) -> Mapping[Entry, torch.Tensor]:
        """What is at hand in the element type in which it was read."""
        types = {dtype: to_torch(dtype) for dtype in {dtype for _, _, dtype in self.there}}
        return {entry: flat for entry, flat in self.there.items() if flat.dtype == types[entry[2]]}

    def __getitem__(self, key: tuple[int, str]) -> torch.Tensor:
        entry = self.entries[key]
        if entry in self.there or self.share is None:
            return self.there[entry]
        current = self.share.target.current(*key) if self.share.is_partial(entry) else None
        if current is None:  # memory that goes back to the system when it is let go, which torch's may not
            current = Memory().take(self.share.size(entry)).view(to_torch(entry[2]))
        out = current.to(to_torch(entry[2]))
        self._read(entry, out)
        return out

    def own(self, key: int, state: str) -> torch.Tensor:
        found = self[key, state]
        if self.entries[key, state] not in self.there:
            return found
        return Memory().take(found.nbytes).view(found.dtype).copy_(found)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def fill(self, key: int, state: str, live: torch.Tensor) -> None:
        self.fill_all({(key, state): live})

    def fill_all(self, lives: Mapping[tuple[int, str], torch.Tensor]) -> None:
        into: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for key, live in lives.items():
            found = self.there.get(self.entries[key])
            if found is live:
                continue
            if found is None:
                self._read_later(key, live)
            elif found.data_ptr() != live.data_ptr() or found.device != live.device:
                into.append(live)
                values.append(found)
        if into:
            copy_all(into, values, [is_on_host(live) for live in into])

    def _read_later(self, key: tuple[int, str], live: torch.Tensor) -> None:
        """Give live memory what was not read yet: straight into it, if it has the same elements in a row."""
        entry = self.entries[key]
        straight = live.device.type == "cpu" and live.is_contiguous() and from_torch(live.dtype) == entry[2]
        if straight and self.share is not None and live.numel() == self.share.length(entry):
            flat = live.detach().view(-1)
            clear(self.share, entry, flat)
            self._read(entry, flat)
        else:
            live.detach().copy_(self[key].view(live.shape))

    def _read(self, entry: Entry, flat: torch.Tensor) -> None:
        if self.reader is not None:
            fill(self.reader, self.later[entry], [_bytes(flat)])


@torch.no_grad()  # once for all tensors, not for each
def bring(share: RankReads, reader: Reader, files: Files, threads: int, memory: int, watch: Stopwatch) -> Brought:
    """Read everything to where it lives: into the share's rooms, or where the target says.

    threads: that read. memory: bytes of host memory that may be taken beyond what is live.
    """
    of = _ByBuffer(share.copies, len(share.wants))
    with watch.part("memory"):
        home, rooms = share.target.home, share.rooms
        homes = {
            entry: rooms[entry] if entry in rooms else home(*entry, length)
            for entry, length in zip(share.wants, share.lengths, strict=True)
        }
        Memory().ready([room for room in share.rooms.values() if is_on_host(room)])
    types = {dtype: to_torch(dtype) for dtype in {dtype for _, _, dtype in share.wants}}
    other = {
        entry: from_torch(flat.dtype)
        for entry, flat in homes.items()
        if flat is not None and flat.dtype != types[entry[2]]
    }
    rounding = _Rounding(share, other, memory)
    there: dict[Entry, torch.Tensor] = {}
    later: dict[Entry, list[Copy]] = {}
    buffers: list[Bytes] = [np.empty(0, np.uint8)] * len(share.wants)
    direct: list[int] = []
    partial = set(share.partial)
    places: list[Place] = []
    changed: dict[int, list[Copy]] = {}
    for k, ((entry, flat), elements, length) in enumerate(zip(homes.items(), of.elements, share.lengths, strict=True)):
        if entry in other:
            if rounding.is_done_in_place(entry, other[entry]):
                changed[k] = [_rounded(copy, other[entry]) for copy in of[k]]
            else:
                flat = None if entry not in rounding.held else _fresh(share, entry)
        if flat is None and entry in share.shared:
            flat = _fresh(share, entry)
        if flat is None:
            later[entry] = [replace(copy, buffer=0) for copy in of[k]]
            continue
        there[entry] = flat
        if is_on_host(flat):
            if elements < length or entry in share.shared:
                clear(share, entry, flat)
            buffers[k] = _bytes(flat)
            if k not in changed:
                direct.append(k)
        else:
            places.append(Place(k, flat.view(torch.uint8), k in partial, changed.get(k) or of[k]))
    rounded = [copy for k, own in changed.items() if len(buffers[k]) for copy in own]
    copies = CopyTable.joined([share.copies[np.isin(share.copies.buffer, direct)], CopyTable.of(rounded)])
    with watched(files, share):
        fill(reader, copies, buffers, threads)
        through_windows(reader, places, threads, memory, watch)
    return Brought(there, later, reader, share)


class _ByBuffer:
    """Copies by the buffers that they fill, of which there are so many. elements: how many each buffer gets."""

    def __init__(self, copies: CopyTable, count: int) -> None:
        self._copies = copies
        self.elements = np.bincount(copies.buffer, copies.elements, count).astype(np.int64).tolist()

    @cached_property
    def _ordered(self) -> tuple[CopyTable, list[int]]:
        order = np.argsort(self._copies.buffer, kind="stable")
        ends = np.searchsorted(self._copies.buffer[order], np.arange(len(self.elements) + 1))
        return self._copies[order], ends.tolist()

    def __getitem__(self, buffer: int) -> CopyTable:
        """In the order of the files."""
        copies, ends = self._ordered
        return copies[ends[buffer] : ends[buffer + 1]]


def is_on_host(flat: torch.Tensor) -> bool:
    """Whether files can be read straight into this memory."""
    return flat.is_cpu


_UINT8 = np.dtype(np.uint8)
# Element types that numpy has, too. Viewing an array's bytes takes a quarter of the time that viewing a tensor's does.
_IN_NUMPY = frozenset((torch.float32, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8))


def _bytes(flat: torch.Tensor) -> Bytes:
    if flat.dtype in _IN_NUMPY and not flat.requires_grad:
        return flat.numpy().view(_UINT8)
    out: Bytes = flat.view(torch.uint8).numpy()
    return out


def _fresh(share: RankReads, entry: Entry) -> torch.Tensor:
    """Host memory for an entry, with what a partial one holds now."""
    current = share.target.current(*entry[:2]) if share.is_partial(entry) and entry not in share.shared else None
    dtype = to_torch(entry[2])
    return torch.zeros(share.length(entry), dtype=dtype) if current is None else current.to(dtype)


class _Rounding:
    """Weights and buffers that are kept in fewer bits. The proof compares them with what was read, so that
    this is held if it is little. Otherwise they are rounded in place, and the proof says that it has not seen them."""

    def __init__(self, share: RankReads, other: Mapping[Entry, str], memory: int) -> None:
        """other: the entries that live in another element type than they are read in, and that type."""
        odd = [entry for entry, own in other.items() if (entry[2], own) in ROUNDED]
        fits = sum(map(share.size, odd)) <= memory * limits.LOAD_ROUNDED_PART
        self.held = frozenset(odd) if fits else frozenset()

    def is_done_in_place(self, entry: Entry, own: str) -> bool:
        return entry not in self.held and (entry[2], own) in ROUNDED


def _rounded(copy: Copy, dtype: str) -> Copy:
    """The copy into a buffer of narrower elements."""
    to = copy.to // itemsize(copy.target_dtype) * itemsize(dtype)
    return replace(copy, to=to, target_dtype=dtype)


def clear(share: RankReads, entry: Entry, flat: torch.Tensor) -> None:
    """Set to zero what nothing is read into: padding, and of shared entries all that other ranks read. What a partial
    entry leaves stays."""
    if entry in share.shared:
        flat.zero_()
    elif not share.is_partial(entry):
        for low, high in uncovered(share, entry, flat.numel()):
            flat[low:high].zero_()


def uncovered(share: RankReads, entry: Entry, length: int) -> Iterator[tuple[int, int]]:
    """The elements of an entry's buffer that no want covers, as ranges. All of it, if wants cover some of it with gaps
    between their rows."""
    blocks = [want.blocks for want in share.wants[entry] if len(want.blocks)]
    if sum(one.elements for one in blocks) == length:
        return
    ends = [extents(one) for one in blocks]
    first = np.concatenate([low for low, _ in ends]) if ends else np.zeros(0)
    last = np.concatenate([high for _, high in ends]) if ends else np.zeros(0)
    dense = all(bool((high - low == one.counts).all()) for one, (low, high) in zip(blocks, ends, strict=True))
    if not dense:
        yield 0, length
        return
    order = np.argsort(first)
    at = 0
    for low, high in zip(first[order].astype(np.int64).tolist(), last[order].astype(np.int64).tolist(), strict=True):
        if low > at:
            yield at, low
        at = max(at, high)
    if at < length:
        yield at, length

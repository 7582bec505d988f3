"""What this rank reads of a checkpoint, and the reading of all of it into host memory that nobody has seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from ucp import limits
from ucp.geometry import Ints
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch
from ucp.loading import exchange
from ucp.loading.host_memory import Memory
from ucp.loading.nouns import Entry, LoadPlan
from ucp.loading.target import Slot, Target
from ucp.progress import watching
from ucp.storage.dtypes import itemsize, to_torch
from ucp.storage.files import Files
from ucp.transfer.copies import CopyTable
from ucp.transfer.gather import Want, fill, gather, plan
from ucp.transfer.reader import Bytes, Reader


@dataclass(frozen=True)
class RankReads:
    """What this rank reads. Each entry of a plan is one buffer, and buffers are numbered in the plan's order.

    wants: by entry, as the plan has them. shared: entries of which this rank reads only a part, together with others.
    copies: what is read, into the entries' buffers. nbytes: all that is wanted for them, in bytes. to_read: what this
    rank reads of it. kept_in: entries whose parameters are only read in part. rooms: where entries live that nobody has
    seen yet.
    """

    target: Target
    wants: Mapping[Entry, Sequence[Want]]
    shared: frozenset[Entry]
    copies: CopyTable
    nbytes: int
    to_read: int
    kept_in: Collection[Entry] = ()
    rooms: Mapping[Entry, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target, what: LoadPlan, sharing: exchange.Sharing | None) -> RankReads:
        """What ranks share is read in equal parts. Raises what `ucp.transfer.gather.plan` raises."""
        parts = exchange.shared_parts(what, sharing) if sharing is not None else {}
        return cls._of(target, what, what.wants, parts, {})

    @classmethod
    def in_two(
        cls, target: Target, what: LoadPlan, sharing: exchange.Sharing | None, watch: Stopwatch
    ) -> tuple[RankReads, RankReads]:
        """What is read to where nobody has seen anything yet, and the rest: as `of`."""
        parts = exchange.shared_parts(what, sharing) if sharing is not None else {}
        slots = {slot.key: slot for slot in target.slots}
        rooms = {}
        with watch.part("memory"):
            for entry in what.wants:
                key, state, dtype = entry
                slot = slots[key]
                length = slot.length_of(state) if slot.placed else slot.length
                if entry not in parts and (room := target.room(key, state, dtype, length)) is not None:
                    rooms[entry] = room
        new = {entry: what.wants[entry] for entry in what.wants if entry in rooms} if rooms else {}
        rest = {entry: what.wants[entry] for entry in what.wants if entry not in rooms} if rooms else what.wants
        return cls._of(target, what, new, {}, rooms), cls._of(target, what, rest, parts, {})

    @classmethod
    def _of(
        cls,
        target: Target,
        what: LoadPlan,
        entries: Mapping[Entry, Sequence[Want]],
        parts: Mapping[Entry, Sequence[Want]],
        rooms: Mapping[Entry, torch.Tensor],
    ) -> RankReads:
        read = {entry: parts.get(entry, found) for entry, found in entries.items()} if parts else entries
        wants = [want for found in read.values() for want in found]
        copies = plan(wants, [k for k, found in enumerate(read.values()) for _ in found])
        to_read = int(copies.nbytes.sum())
        total = exchange.nbytes(what, frozenset(entries)) if parts else to_read
        return cls(target, entries, frozenset(parts), copies, total, to_read, what.kept_in, rooms)

    def size(self, entry: Entry) -> int:
        """Bytes of an entry's buffer."""
        return self.length(entry) * itemsize(entry[2])

    def length(self, entry: Entry) -> int:
        """Elements of an entry's buffer."""
        return self.slots[entry[0]].length_of(entry[1])

    @cached_property
    def sizes(self) -> Sequence[int]:
        """Bytes of the buffers."""
        widths = {dtype: itemsize(dtype) for dtype in {dtype for _, _, dtype in self.wants}}
        return [length * widths[dtype] for length, (_, _, dtype) in zip(self.lengths, self.wants, strict=True)]

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Elements of the buffers."""
        slots = self.slots
        found = [(slots[key], state) for key, state, _ in self.wants]
        return [slot.length_of(state) if slot.placed else slot.length for slot, state in found]

    @cached_property
    def partial(self) -> Sequence[int]:
        """The numbers of the entries of which some is not read."""
        slots, kept_in = self.slots, self.kept_in
        return [
            k
            for k, (entry, wants) in enumerate(self.wants.items())
            if len(wants) < len(slots[entry[0]].members) or entry in kept_in
        ]

    @cached_property
    def slots(self) -> Mapping[int, Slot]:
        return {slot.key: slot for slot in self.target.slots}

    def is_partial(self, entry: Entry) -> bool:
        """Whether some of the slot is not read, so that what it holds there now stays."""
        return entry in self.kept_in or len(self.wants[entry]) < len(self.slots[entry[0]].members)

    @property
    def held(self) -> int:
        """Bytes of fresh host memory that `hold` takes."""
        return sum(self.sizes)


def hold(share: RankReads, reader: Reader, files: Files, threads: int) -> dict[Entry, torch.Tensor]:
    """Read everything into host memory: the slots, flat. Elements for which nothing is read keep their current values.
    If ranks share the reading, this rank's part is filled in, and the rest is zero."""
    held = _memory(share)
    copies = share.copies
    with watched(files, share):
        into = copies.into(held.number[copies.buffer], copies.to + held.start[copies.buffer])
        fill(reader, into, held.buffers, threads)
    return held.tensors


def watched(files: Files, share: RankReads) -> AbstractContextManager[None]:
    """Show the progress of reading a share, on the first rank."""
    before = files.bytes_read
    return watching("loading", lambda: files.bytes_read - before, share.to_read, ranks.rank() == 0)


@dataclass(frozen=True, eq=False)
class _HeldMemory:
    """Memory for a share. tensors: flat, by entry, in the plan's order. buffers: what is read into. number, start: of
    each entry the buffer that it lies in, and its first byte there."""

    tensors: dict[Entry, torch.Tensor]
    buffers: list[Bytes]
    number: Ints
    start: Ints


def _memory(share: RankReads) -> _HeldMemory:
    memory = Memory()
    entries = list(share.wants)
    kept = {k: held for k in share.partial if (held := _present(share, entries[k])) is not None}
    for k in kept:
        if entries[k] in share.shared:
            kept[k].zero_()
    number, start = np.zeros(len(entries), np.int64), np.zeros(len(entries), np.int64)
    fresh = _as_read(share.copies, [k for k in range(len(entries)) if k not in kept] if kept else range(len(entries)))
    sizes = [share.sizes[k] for k in fresh]
    alone = list(kept.items())
    if share.target.keeps_memory:
        alone += [(k, raw.view(to_torch(entries[k][2]))) for k, raw in zip(fresh, map(memory.take, sizes), strict=True)]
        tensors, buffers = {}, []
    else:
        together, starts = memory.take_together(sizes)
        start[fresh] = starts
        tensors = dict(zip(fresh, _typed(together, starts, sizes, [entries[k][2] for k in fresh]), strict=True))
        buffers = [together.numpy()]
    for k, tensor in alone:
        tensors[k], number[k] = tensor, len(buffers)
        buffers.append(tensor.view(torch.uint8).numpy())
    return _HeldMemory({entry: tensors[k] for k, entry in enumerate(entries)}, buffers, number, start)


def _as_read(copies: CopyTable, buffers: Sequence[int]) -> list[int]:
    """The buffers in the order in which they are read. So those that follow one another in a file do so in memory."""
    first = np.full(max(buffers, default=-1) + 1, len(copies), np.int64)
    inside = np.flatnonzero(copies.buffer < len(first))
    np.minimum.at(first, copies.buffer[inside], inside)
    return [buffers[k] for k in np.argsort(first[buffers], kind="stable").tolist()] if buffers else []


def _typed(
    memory: torch.Tensor, starts: Sequence[int], sizes: Sequence[int], dtypes: Sequence[str]
) -> list[torch.Tensor]:
    """The tensors of these element types that lie at these bytes. Those of one type without gaps are cut at once."""
    out: list[torch.Tensor] = []
    begins, nbytes = np.array(starts, np.int64), np.array(sizes, np.int64)
    follows = (begins[1:] == (begins + nbytes)[:-1]) & (np.array(dtypes[1:]) == np.array(dtypes[:-1]))
    cuts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(sizes)] if sizes else []
    for first, last in pairwise(cuts):
        width = itemsize(dtypes[first])
        typed = memory[starts[first] : starts[last - 1] + sizes[last - 1]].view(to_torch(dtypes[first]))
        out += typed.split_with_sizes((nbytes[first:last] // width).tolist())
    return out


def _present(share: RankReads, entry: Entry) -> torch.Tensor | None:
    """What a slot of which some is not read holds now. None if it holds nothing."""
    current = share.target.current(*entry[:2])
    return None if current is None else current.to(to_torch(entry[2]))


def sample(reader: Reader, wants: list[Want], buffer: Bytes, threads: int) -> int:
    """Read some of what is wanted, to see how fast that is. Returns how many bytes were read."""
    return gather(reader, wants, [buffer], threads)


def reading_threads() -> int:
    """How many threads this process reads with: the processors that it may use, divided by the ranks on the machine. At
    most `limits.LOAD_THREADS_MAX_COUNT`, and at least 2, so that one goes on while another waits for a disk."""
    return max(2, min(limits.LOAD_THREADS_MAX_COUNT, limits.processors() // limits.ranks_here()))

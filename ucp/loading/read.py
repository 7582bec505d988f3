"""What this rank reads of a checkpoint, and the reading of all of it into host memory that nobody has seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ucp import limits
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
            for entry in what.wants.keys() - parts.keys():
                room = target.room(*entry, slots[entry[0]].length_of(entry[1]))
                if room is not None:
                    rooms[entry] = room
        new = {entry: wants for entry, wants in what.wants.items() if entry in rooms}
        rest = {entry: wants for entry, wants in what.wants.items() if entry not in rooms}
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
        read = {entry: parts.get(entry, found) for entry, found in entries.items()}
        wants = [want for found in read.values() for want in found]
        copies = plan(wants, [k for k, found in enumerate(read.values()) for _ in found])
        to_read = sum(map(exchange.nbytes_of, wants))
        total = exchange.nbytes(what, frozenset(entries)) if parts else to_read
        return cls(target, entries, frozenset(parts), copies, total, to_read, what.kept_in, rooms)

    def size(self, entry: Entry) -> int:
        """Bytes of an entry's buffer."""
        return self.length(entry) * itemsize(entry[2])

    def length(self, entry: Entry) -> int:
        """Elements of an entry's buffer."""
        return self.slots[entry[0]].length_of(entry[1])

    @cached_property
    def slots(self) -> Mapping[int, Slot]:
        return {slot.key: slot for slot in self.target.slots}

    def is_partial(self, entry: Entry) -> bool:
        """Whether some of the slot is not read, so that what it holds there now stays."""
        return entry in self.kept_in or len(self.wants[entry]) < len(self.slots[entry[0]].members)

    @property
    def held(self) -> int:
        """Bytes of fresh host memory that `hold` takes."""
        return sum(map(self.size, self.wants))


def hold(share: RankReads, reader: Reader, files: Files, threads: int) -> dict[Entry, torch.Tensor]:
    """Read everything into host memory: the slots, flat. Elements for which nothing is read keep their current values.
    If ranks share the reading, this rank's part is filled in, and the rest is zero."""
    tensors = _memory(share)
    buffers: list[Bytes] = [tensors[entry].view(torch.uint8).numpy() for entry in share.wants]
    with watched(files, share):
        fill(reader, share.copies, buffers, threads)
    return tensors


def watched(files: Files, share: RankReads) -> AbstractContextManager[None]:
    """Show the progress of reading a share, on the first rank."""
    before = files.bytes_read
    return watching("loading", lambda: files.bytes_read - before, share.to_read, ranks.rank() == 0)


def _memory(share: RankReads) -> dict[Entry, torch.Tensor]:
    """A flat tensor for each entry, in the plan's order."""
    memory = Memory()
    tensors: dict[Entry, torch.Tensor] = {}
    fresh: dict[Entry, int] = {}
    for entry in share.wants:
        if (kept := _present(share, entry)) is not None:
            tensors[entry] = kept
        else:
            fresh[entry] = share.size(entry)
    for entry in tensors.keys() & share.shared:
        tensors[entry].zero_()
    made = map(memory.take, fresh.values()) if share.target.keeps_memory else memory.take_all(list(fresh.values()))
    for entry, raw in zip(fresh, made, strict=True):
        tensors[entry] = raw.view(to_torch(entry[2]))
    return tensors


def _present(share: RankReads, entry: Entry) -> torch.Tensor | None:
    """What the slot holds now, if some of its members are not read. None if all are, or if it holds nothing."""
    if not share.is_partial(entry):
        return None
    current = share.target.current(*entry[:2])
    return None if current is None else current.to(to_torch(entry[2]))


def sample(reader: Reader, wants: list[Want], buffer: Bytes, threads: int) -> int:
    """Read some of what is wanted, to see how fast that is. Returns how many bytes were read."""
    return gather(reader, wants, [buffer], threads)


def reading_threads() -> int:
    """How many threads this process reads with: the processors that it may use, divided by the ranks on the machine. At
    most `limits.LOAD_THREADS_MAX_COUNT`, and at least 2, so that one goes on while another waits for a disk."""
    return max(2, min(limits.LOAD_THREADS_MAX_COUNT, limits.processors() // limits.ranks_here()))

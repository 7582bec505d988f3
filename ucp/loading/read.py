"""Read this rank's part of what a plan wants from a checkpoint's files into host memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ucp import limits
from ucp.job import ranks
from ucp.loading import exchange
from ucp.loading.host_memory import Memory
from ucp.loading.match import Entry, LoadPlan
from ucp.loading.target import Slot, Target
from ucp.progress import watching
from ucp.storage.dtypes import itemsize, to_torch
from ucp.storage.files import Files
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Bytes, Reader


@dataclass(frozen=True)
class Reading:
    """This rank's reading of what a plan wants."""

    reader: Reader
    files: Files
    target: Target
    what: LoadPlan
    threads: int

    def run(self, sharing: exchange.Sharing | None, nbytes: int) -> dict[Entry, torch.Tensor]:
        """The slots, flat, in host memory. Elements for which nothing is read keep their current values. If ranks share
        the reading, this rank's part is filled in, and the rest is zero. nbytes: the bytes of all that the plan
        wants."""
        parts = exchange.shared_parts(self.what, sharing) if sharing is not None else {}
        tensors = self._memory(parts)
        buffers: list[Bytes] = []
        wants: list[Want] = []
        for entry, found in self.what.wants.items():
            wants += [Want(w.tensor, w.blocks.in_buffer(len(buffers)), w.dtype) for w in parts.get(entry, found)]
            buffers.append(tensors[entry].view(torch.uint8).numpy())
        before = self.files.bytes_read
        total = nbytes if sharing is None else sum(map(exchange.nbytes_of, wants))
        with watching("loading", lambda: self.files.bytes_read - before, total, ranks.rank() == 0):
            gather(self.reader, wants, buffers, self.threads)
        return tensors

    def _memory(self, parts: Mapping[Entry, object]) -> dict[Entry, torch.Tensor]:
        """A flat tensor for each entry, in the plan's order. It is the slot's own memory if that may be read into."""
        slots = {slot.key: slot for slot in self.target.slots}
        memory = Memory()
        tensors: dict[Entry, torch.Tensor] = {}
        fresh: dict[Entry, int] = {}
        straight: list[torch.Tensor] = []
        for entry, wants in self.what.wants.items():
            key, state, dtype = entry
            room = self.target.room(key, state)
            if room is not None:
                straight.append(room)
                tensors[entry] = room
            elif (kept := self._present(slots[key], entry, len(wants))) is not None:
                tensors[entry] = kept
            else:
                fresh[entry] = slots[key].placement(state).length * itemsize(dtype)
        memory.ready(straight)
        for entry in tensors.keys() & parts.keys():
            tensors[entry].zero_()
        made = map(memory.take, fresh.values()) if self.target.keeps_memory else memory.take_all(list(fresh.values()))
        for entry, raw in zip(fresh, made, strict=True):
            tensors[entry] = raw.view(to_torch(entry[2]))
        return tensors

    def _present(self, slot: Slot, entry: Entry, count: int) -> torch.Tensor | None:
        """What the slot holds now, if some of it is not read. None if all is, or if it holds nothing."""
        if count == len(slot.members) and entry not in self.what.kept_in:
            return None
        current = self.target.current(slot.key, entry[1])
        return None if current is None else current.to(to_torch(entry[2]))

    def sample(self, wants: list[Want], buffer: Bytes) -> int:
        """Read some of it, to see how fast that is. Returns how many bytes were read."""
        return gather(self.reader, wants, [buffer], self.threads)


def reading_threads() -> int:
    """How many threads this process reads with: the processors that it may use, divided by the ranks on the machine. At
    most `limits.THREADS_MAX_COUNT`, and at least 2, so that one goes on while another waits for a disk."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(2, min(limits.THREADS_MAX_COUNT, limits.processors() // max(local, 1)))

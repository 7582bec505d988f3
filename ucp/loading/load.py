"""Put a checkpoint of any layout into a live training process, all of it or nothing.

Three steps, each agreed on by all ranks before the next: compare and plan (nothing is touched), read this rank's byte
ranges into host memory (nothing is touched), apply. A rank that finds something wrong in the first two makes all ranks
refuse. Bytes that several ranks want may be read by one of them only (`ucp.loading.exchange`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ucp.catalog import Catalog
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch, stages_text
from ucp.loading import exchange, tied
from ucp.loading.host_memory import Memory
from ucp.loading.match import Plan, Wish, plan
from ucp.loading.target import Loaded, Slot, Target
from ucp.progress import watching
from ucp.storage.dtypes import itemsize, to_torch
from ucp.storage.files import Files
from ucp.transfer.gather import Bytes, Reader, Want, gather


@dataclass(frozen=True)
class LoadReport:
    """What a load did, for people and logs.

    nbytes: of the tensors brought to this rank; bytes_read: what was read of the files for them, gaps between short
    runs and whole digest chunks included. seconds: by stage, on this rank: open (the first
    rank), plan, read, exchange (of what is read once,
    and measuring whether that is worth it), apply, and wait, for the other ranks. overlapping: seconds within those:
    'digest', checking what was read, of all reading threads together. read_once: whether ranks that want the same bytes
    read them once among them.
    """

    tensors: int
    nbytes: int
    bytes_read: int
    source: str
    target: str
    seconds: Mapping[str, float]
    plan: Plan
    read_once: bool = False
    overlapping: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = (
            f"restored {self.tensors} tensors ({_size(self.nbytes)} on this rank) from {self.source} to {self.target} "
            f"in {stages_text(self.seconds)}"
        )
        if self.plan.left:
            text += f"; left as they were: {len(self.plan.left)} ({', '.join(self.plan.left[:4])}, …)"
        if self.plan.unused:
            text += f"; not used: {len(self.plan.unused)} ({', '.join(self.plan.unused[:4])}, …)"
        return text


def load(
    catalog: Catalog,
    target: Target,
    wish: Wish,
    *,
    verify: bool = True,
    threads: int | None = None,
    read_once: bool | str = False,
    watch: Stopwatch | None = None,
) -> LoadReport:
    """Restore the target from the catalog. Collective: all ranks call it with the same catalog and wish.

    verify: check the chunks read against the checkpoint's digests, where it has them. read_once: have each byte that
    several ranks want read by one of them and exchanged; 'adaptive': where that is measured to be faster. watch: of a
    load that began earlier, with opening.

    Raises Mismatch (nothing was changed) when anything would stay unrestored or unused against the wish,
    DamagedCheckpoint when files do.
    """
    watch = watch or Stopwatch()
    state = None if wish.weights_only else catalog.training_state
    what = ranks.all_or_none(lambda: watch.timed("plan", lambda: _checked_plan(catalog, target, wish)))
    with Files() as files:
        reading = _Reading(Reader(catalog, files, verify), files, target, what, threads or reading_threads())
        tied.check(reading.reader, what.tied, watch)
        sharing = watch.timed("exchange", lambda: _sharing(reading, read_once))
        tensors = ranks.all_or_none(lambda: watch.timed("read", lambda: reading.run(sharing)))
        bytes_read = files.bytes_read
    if sharing is not None:
        watch.timed("exchange", lambda: exchange.exchange(sharing, tensors))
    brought = {(key, state): tensor for (key, state, _), tensor in tensors.items()}
    loaded = Loaded(brought, what.scalars, what.options, what.sources, state)
    watch.timed("apply", lambda: target.apply(loaded))
    nbytes = exchange.nbytes(what, frozenset(what.wants))
    count = len({(w.tensor.name, w.tensor.state) for wants in what.wants.values() for w in wants})
    return LoadReport(
        count,
        nbytes,
        bytes_read,
        f"{catalog.format} {catalog.layout}",
        str(target.layout),
        watch.with_wait(),
        what,
        sharing is not None,
        {"digest": reading.reader.digest_seconds},
    )


def _checked_plan(catalog: Catalog, target: Target, wish: Wish) -> Plan:
    what = plan(catalog, target, wish)
    if not wish.weights_only:
        target.check(catalog.training_state, what.sources)
    return what


def _sharing(reading: _Reading, read_once: bool | str) -> exchange.Sharing | None:
    """What is read once; None where every rank reads for itself. Collective."""
    if not read_once or ranks.world_size() == 1:
        return None
    sharing = exchange.find(reading.target, reading.what)
    if not sharing.all_groups:
        return None
    if read_once == exchange.ADAPTIVE:
        parts = exchange.shared_parts(reading.what, sharing)
        if not exchange.is_worthwhile(reading.what, sharing, parts, reading.sample):
            return None
    return sharing


@dataclass(frozen=True)
class _Reading:
    """This rank's reading."""

    reader: Reader
    files: Files
    target: Target
    what: Plan
    threads: int

    def run(self, sharing: exchange.Sharing | None) -> dict[exchange.Entry, torch.Tensor]:
        """The slots, flat, in host memory; elements that nothing is brought for keep their present values. Of what is
        shared this rank's part is filled in, and the rest is zero."""
        slots = {s.key: s for s in self.target.slots}
        parts = exchange.shared_parts(self.what, sharing) if sharing is not None else {}
        tensors: dict[exchange.Entry, torch.Tensor] = {}
        memory = Memory()
        buffers: list[Bytes] = []
        wants: list[Want] = []
        for entry, found in self.what.wants.items():
            key, state, dtype = entry
            complete = len(found) == len(slots[key].members)
            tensor = _blank(self.target, slots[key], state, dtype, complete, memory)
            wants += [Want(w.tensor, w.blocks.in_buffer(len(buffers)), w.dtype) for w in parts.get(entry, found)]
            buffers.append(tensor.view(torch.uint8).numpy())
            tensors[entry] = tensor
        before = self.files.bytes_read
        total = sum(exchange.nbytes_of(want) for want in wants)
        with watching("loading", lambda: self.files.bytes_read - before, total, ranks.rank() == 0):
            gather(self.reader, wants, buffers, self.threads)
        return tensors

    def sample(self, wants: list[Want], buffer: Bytes) -> int:
        """Read some, to see how fast that is; returns the bytes."""
        return gather(self.reader, wants, [buffer], self.threads)


def _blank(target: Target, slot: Slot, state: str, dtype: str, complete: bool, memory: Memory) -> torch.Tensor:
    if not complete:
        current = target.current(slot.key, state)
        if current is not None:
            return current.to(to_torch(dtype))
    return memory.take(slot.placement(state).length * itemsize(dtype)).view(to_torch(dtype))


def reading_threads() -> int:
    """Reading threads for this process: the machine's processors over the ranks on it, at most 8, and at least 2, so
    that one reads on while another waits for a disk."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(2, min(8, (os.cpu_count() or 1) // max(local, 1)))


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"

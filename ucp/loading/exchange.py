"""Read once what several ranks want alike, and exchange it: through shared memory where ranks share a machine.

Ranks that hold the same slot with the same values want the same bytes: all of a stage-0 model, frozen weights and
buffers at stages 1 and 2, what tensor-parallel ranks have in common. If storage is slower than the network, each of
them reads an equal part, by bytes. Then collectives give all of it to every rank, through a buffer of fixed size.

Until then a rank has zeros in place of the others' parts, so the sum of the ranks' bytes is their union.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from ucp import limits
from ucp.errors import BadArgument, Unsupported
from ucp.geometry import Blocks, extents, take_elements
from ucp.job import local_sums, ranks
from ucp.loading.nouns import Entry, LoadPlan
from ucp.loading.target import Slot, Target
from ucp.storage.dtypes import itemsize
from ucp.transfer.gather import Want
from ucp.transfer.reader import Bytes

ADAPTIVE = "adaptive"


def check_choice(read_once: bool | str) -> None:
    """Raise BadArgument for an unknown value of read_once."""
    if not isinstance(read_once, bool) and read_once != ADAPTIVE:
        raise BadArgument(f"read_once is True, False or '{ADAPTIVE}'; found {read_once!r}")


@dataclass(frozen=True)
class Sharing:
    """What this rank reads together with others.

    groups: the ranks of a group, ascending -> the entries that they all want. all_groups: the groups of all ranks, in
    the same order on every rank.
    """

    groups: Mapping[tuple[int, ...], tuple[Entry, ...]]
    all_groups: tuple[tuple[int, ...], ...]

    @property
    def entries(self) -> frozenset[Entry]:
        return frozenset(entry for entries in self.groups.values() for entry in entries)


def find(target: Target, what: LoadPlan) -> Sharing:
    """Find what all ranks of a group want, entry by entry. Collective."""
    slots = {slot.key: slot for slot in target.slots}
    mine: dict[tuple[int, ...], list[Entry]] = {}
    for entry, wants in what.wants.items():
        group = None if entry in what.kept_in else _group(slots[entry[0]], entry[1], wants)
        if group is not None:
            mine.setdefault(group, []).append(entry)
    told = {group: [_description(what.wants[entry]) for entry in entries] for group, entries in mine.items()}
    said, which = ranks.distinct(told)
    agreed = []
    for group in sorted({group for one in said for group in one}):
        views = [said[which[rank]].get(group) for rank in group]
        if views[0] is not None and all(view == views[0] for view in views):
            agreed.append(group)
    return Sharing({group: tuple(mine[group]) for group in agreed if group in mine}, tuple(agreed))


def _group(slot: Slot, state: str, wants: Sequence[Want]) -> tuple[int, ...] | None:
    """The ranks that want the same from a slot; None if there are none. A slot that is filled only in part is not
    shared, since the values that it keeps are no zeros."""
    holders = set(slot.placement(state).holders)
    if len(holders) != 1 or len(wants) != len(slot.members):
        return None
    (group,) = holders
    return tuple(sorted(group)) if len(group) > 1 and ranks.rank() in group else None


def _description(wants: Sequence[Want]) -> tuple[object, ...]:
    return tuple(
        (want.tensor.name, want.tensor.state, want.dtype, want.blocks.starts.tobytes(), want.blocks.sizes.tobytes())
        for want in wants
    )


def nbytes(what: LoadPlan, entries: frozenset[Entry]) -> int:
    """How many bytes of the checkpoint these entries want."""
    return sum(nbytes_of(want) for entry in entries for want in what.wants[entry])


def shared_parts(what: LoadPlan, sharing: Sharing) -> dict[Entry, list[Want]]:
    """What this rank reads of every shared entry: its equal part of the group's bytes, in the entries' order."""
    out: dict[Entry, list[Want]] = {}
    for group, entries in sharing.groups.items():
        total = sum(nbytes_of(want) for entry in entries for want in what.wants[entry])
        place = group.index(ranks.rank())
        low, high = total * place // len(group), total * (place + 1) // len(group)
        at = 0
        for entry in entries:
            out[entry] = []
            for want in what.wants[entry]:
                size = itemsize(want.tensor.dtype)
                blocks = part(want.blocks, size, low - at, high - at)
                at += nbytes_of(want)
                if len(blocks):
                    out[entry].append(want._replace(blocks=blocks))
    return out


def part(blocks: Blocks, size: int, low: int, high: int) -> Blocks:
    """The bytes [low, high) of these blocks' elements of ``size`` bytes, block after block, each in row-major order.

    An element belongs to the part with its last byte. So parts with adjoining bounds have every element exactly once.
    """
    return take_elements(blocks, low // size, high // size)


def is_worthwhile(
    what: LoadPlan, sharing: Sharing, parts: Mapping[Entry, Sequence[Want]], read: Callable[[list[Want], Bytes], int]
) -> bool:
    """Measure whether reading once and exchanging is faster than reading everywhere. Collective.

    read: gathers wants whose blocks lie in one buffer, and returns the bytes read.
    """
    most = max(_everyones(nbytes(what, sharing.entries)))
    if most < limits.EXCHANGE_WORTHWHILE_BYTES:
        return False
    sample, room = _sample(parts)
    began = time.perf_counter()
    # Ranks read different bytes at the same time here. This gives the speed of the storage for all of them together.
    count = ranks.all_or_none(lambda: read(sample, np.empty(room, np.uint8)))
    reading = (time.perf_counter() - began) / max(count, 1)
    # As the groups will do it, if all ranks share a machine; otherwise over the network.
    trial = torch.zeros(limits.EXCHANGE_TRIAL_BYTES, dtype=torch.uint8)
    sums = _sums(tuple(range(ranks.world_size())), None, len(trial))
    for _ in range(2):  # the first time makes the connections, and gets the memory
        began = time.perf_counter()
        _sum([trial], sums)
        if sums.staging.is_cuda:
            torch.cuda.synchronize()
        exchanging = (time.perf_counter() - began) / limits.EXCHANGE_TRIAL_BYTES
    slowest = max(_everyones(reading)), max(_everyones(exchanging))
    return slowest[0] / min(map(len, sharing.all_groups)) + slowest[1] < slowest[0]


def _sample(parts: Mapping[Entry, Sequence[Want]]) -> tuple[list[Want], int]:
    """Some of what this rank would read, arranged in one buffer, and how many bytes the buffer needs."""
    out: list[Want] = []
    room = held = 0
    for entry, wants in parts.items():
        for want in wants:
            if held < limits.READ_SAMPLE_BYTES:
                blocks = part(want.blocks, itemsize(want.tensor.dtype), 0, limits.READ_SAMPLE_BYTES - held)
                if not len(blocks):
                    continue
                width = itemsize(entry[2])
                first, ends = extents(blocks)
                low = int(first.min())
                out.append(want._replace(blocks=blocks.in_buffer(0, -low), base=room))
                room += (int(ends.max()) - low) * width
                held += int(blocks.counts.sum()) * itemsize(want.tensor.dtype)
    return out, room


def exchange(sharing: Sharing, tensors: Mapping[Entry, torch.Tensor]) -> None:
    """Give every rank of each group what the others have read, in turns of at most `limits.EXCHANGE_BUFFER_BYTES`.
    Collective.

    tensors: flat, on the host.
    """
    world = tuple(range(ranks.world_size()))
    for group in sharing.all_groups:
        handle = None if group == world else dist.new_group(list(group))
        if group in sharing.groups:
            flat = [tensors[entry].view(torch.uint8) for entry in sharing.groups[group]]
            _sum(flat, _sums(group, handle, sum(map(len, flat))))
        if handle is not None:
            dist.destroy_process_group(handle)


class _Sums(Protocol):
    """Adds up bytes of all ranks of a group. staging: this rank's, to be filled before each sum."""

    staging: torch.Tensor

    def sum(self, nbytes: int) -> torch.Tensor:
        """The sum of everyone's first bytes. Collective."""
        ...


class _GroupSums:
    """The sums of ranks that may be anywhere, by their process group."""

    def __init__(self, handle: dist.ProcessGroup | None, size: int) -> None:
        self._members = handle
        self.staging = torch.empty(size, dtype=torch.uint8, device=_device(handle))

    def sum(self, nbytes: int) -> torch.Tensor:
        dist.all_reduce(self.staging[:nbytes], group=self._members)
        return self.staging[:nbytes]


def _sums(group: tuple[int, ...], handle: dist.ProcessGroup | None, nbytes: int) -> _Sums:
    """How these ranks add up so many bytes: through shared memory if they share a machine. Collective for the group."""
    size = min(limits.EXCHANGE_BUFFER_BYTES, nbytes)
    if len(group) > 1 and size:
        local = local_sums.shared(group, handle, min(size, local_sums.buffer_bytes(len(group))), _device(handle))
        if local is not None:
            return local
    return _GroupSums(handle, size)


def _sum(buffers: Sequence[torch.Tensor], sums: _Sums) -> None:
    for pieces in _filled(buffers, len(sums.staging)):
        at = 0
        for piece in pieces:
            sums.staging[at : at + len(piece)].copy_(piece)
            at += len(piece)
        found = sums.sum(at)
        at = 0
        for piece in pieces:
            piece.copy_(found[at : at + len(piece)])
            at += len(piece)


def _filled(buffers: Sequence[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    """Views of the buffers, in order, in lists of ``limit`` bytes. The last list may be shorter."""
    pieces: list[torch.Tensor] = []
    held = 0
    for buffer in buffers:
        at = 0
        while at < len(buffer):
            piece = buffer[at : at + limit - held]
            pieces.append(piece)
            at, held = at + len(piece), held + len(piece)
            if held == limit:
                yield pieces
                pieces, held = [], 0
    if pieces:
        yield pieces


def is_possible(read_once: bool | str) -> bool:
    """Whether the process group exchanges tensors of the host or of CUDA. Raises Unsupported if it does not, and
    reading once was asked for."""
    backends = _backends(None)
    possible = "cpu" in backends or "cuda" in backends
    if not possible and read_once is True:
        raise Unsupported(
            f"read_once needs a process group that exchanges tensors of the host or of CUDA, and this one has "
            f"{', '.join(backends)} only; use read_once=False"
        )
    return possible


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backends exchange tensors: in host memory, if one of them can."""
    if "cpu" in _backends(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _backends(group: dist.ProcessGroup | None) -> list[str]:
    """The kinds of devices whose tensors the group exchanges."""
    config = str(dist.get_backend_config(group))  # such as "cpu:gloo,cuda:nccl"
    return [pair.partition(":")[0] for pair in config.split(",")]


def _everyones(value: float) -> list[float]:
    found: list[float] = [0.0] * ranks.world_size()
    dist.all_gather_object(found, value)
    return found


def nbytes_of(want: Want) -> int:
    """How many bytes of the checkpoint this wants."""
    return want.blocks.elements * itemsize(want.tensor.dtype)

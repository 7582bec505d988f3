"""What a load has brought to this rank, where it lies now: what the proof looks at."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

from ucp.catalog import LogicalTensor
from ucp.columns import firsts, numbered, tuples_of
from ucp.geometry import Blocks, Shape
from ucp.job.live_digest import LiveElements
from ucp.job.live_sums import Key
from ucp.loading.nouns import Entry, LoadPlan
from ucp.loading.target import Target
from ucp.storage.dtypes import from_torch
from ucp.transfer.exact import EXACT

if TYPE_CHECKING:
    import torch

ROUNDED = ", rounded"
"""The end of why a tensor is not proved that is kept in fewer bits, and of which nothing is held as it was read."""


@dataclass(frozen=True, eq=False)
class HeldTensors:
    """Tensors of the checkpoint in this rank's memory, as columns: the tensor, where it is live, and its number, if one
    tensor of the checkpoint fills several. rounded: by their place in the columns, those of which the program keeps
    fewer bits than what was read, and what it keeps. What was read is in ``lives`` then."""

    tensors: list[LogicalTensor] = field(default_factory=list)
    lives: list[LiveElements] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    rounded: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def keys(self) -> list[Key]:
        names = {turn: str(turn) for turn in set(self.turns)}
        return [(t.name, t.state, names[turn]) for t, turn in zip(self.tensors, self.turns, strict=True)]


def find_held(
    held: HeldTensors,
    target: Target,
    what: LoadPlan,
    always: bool,
    brought: Mapping[Entry, torch.Tensor],
    unproved: dict[str, str],
) -> None:
    """What was brought to this rank, where it lies now."""
    memory_of = target.memory
    lies = [
        (memory, entry, want[0], want[1])
        for entry, wants in what.wants.items()
        if wants
        for memory in (memory_of(entry[0], entry[1]),)
        for want in wants
    ]
    if not lies:
        return
    memories, entries, tensors, cuts = zip(*lies, strict=True)
    # Of tensors that are kept alike it is asked once how they are proved.
    kept = [None if memory is None else memory.dtype for memory in memories]
    recorded = map(operator.is_not, map(operator.attrgetter("digest"), tensors), repeat(None))
    looks = map(operator.attrgetter("dtype"), tensors), map(operator.itemgetter(2), entries), recorded
    which = numbered(zip(kept, *looks, strict=True))
    ways = [_way(memories[k], tensors[k], entries[k][2], always) for k in firsts(which)]
    turns, of = _turns(tensors), which.tolist()
    if not any(way.unproved for way in ways):
        held.tensors.extend(tensors)
        held.turns.extend(turns)
        shapes, dtypes = map(operator.attrgetter("shape"), tensors), [ways[k].dtype for k in of]
        held.lives.extend(tuples_of(LiveElements, memories, shapes, cuts, dtypes, *repeat(repeat(False), 3)))
        return
    lives: list[tuple[torch.Tensor, Shape, Blocks, str | None]] = []
    for memory, entry, tensor, blocks, k, turn in zip(memories, entries, tensors, cuts, of, turns, strict=True):
        way = ways[k]
        live = brought.get(entry) if way.is_rounded else memory
        if live is None or (way.unproved and not way.is_rounded):
            unproved[f"{tensor.name}:{tensor.state}"] = way.unproved
            continue
        if way.is_rounded and memory is not None:
            held.rounded[len(lives)] = memory
        lives.append((live, tensor.shape, blocks, way.dtype))
        held.tensors.append(tensor)
        held.turns.append(turn)
    if lives:
        held.lives.extend(tuples_of(LiveElements, *zip(*lives, strict=True), *repeat(repeat(False), 3)))


@dataclass(frozen=True, slots=True)
class _Way:
    """How a tensor is proved. dtype: into which its elements are converted first. is_rounded: what was read for it is
    proved, if it is at hand. unproved: why it is not proved otherwise; empty if it is."""

    dtype: str | None = None
    is_rounded: bool = False
    unproved: str = ""


def _way(memory: torch.Tensor | None, tensor: LogicalTensor, read_as: str, always: bool) -> _Way:
    if memory is None:
        return _Way(unproved="its memory is not at hand")
    if tensor.digest is None and not always:
        return _Way(unproved="the checkpoint has no digest of it")
    own = from_torch(memory.dtype)
    if own == tensor.dtype:
        return _Way()
    if (tensor.dtype, own) in EXACT:
        return _Way(tensor.dtype)
    why = f"it is {tensor.dtype} in the checkpoint and kept as {own}{ROUNDED}"
    return _Way(is_rounded=read_as == tensor.dtype, unproved=why)


def _turns(tensors: Sequence[LogicalTensor]) -> list[int]:
    """For each how many before it are the same tensor of the checkpoint, which may fill several here."""
    names = list(map(operator.attrgetter("name", "state"), tensors))
    if len(set(names)) == len(names):
        return [0] * len(names)
    seen = Counter[tuple[str, str]]()
    turns = []
    for name in names:
        turns.append(seen[name])
        seen[name] += 1
    return turns

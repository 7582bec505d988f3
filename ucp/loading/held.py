"""What a load has brought to this rank, where it lies now: what the proof looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ucp.catalog import LogicalTensor
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
    turns: dict[tuple[str, str], int] = {}
    tensors, lives = held.tensors, held.lives
    for (key, state, dtype), wants in what.wants.items():
        memory = target.memory(key, state) if wants else None
        own = "" if memory is None else from_torch(memory.dtype)
        for want in wants:
            tensor = want.tensor
            named = tensor.name, tensor.state
            turn = turns[named] = turns.get(named, -1) + 1
            if memory is None:
                unproved[":".join(named)] = "its memory is not at hand"
                continue
            if tensor.digest is None and not always:
                unproved[":".join(named)] = "the checkpoint has no digest of it"
                continue
            if own == tensor.dtype:
                live = LiveElements(memory, tensor.shape, want.blocks)
            elif (tensor.dtype, own) in EXACT:
                live = LiveElements(memory, tensor.shape, want.blocks, tensor.dtype)
            elif (read := brought.get((key, state, dtype))) is not None and dtype == tensor.dtype:
                live = LiveElements(read, tensor.shape, want.blocks)
                held.rounded[len(lives)] = memory
            else:
                unproved[":".join(named)] = f"it is {tensor.dtype} in the checkpoint and kept as {own}{ROUNDED}"
                continue
            tensors.append(tensor)
            lives.append(live)
            held.turns.append(turn)

"""Which experts an expert-parallel rank holds, what they are called in the whole model, and where a rank's tensors lie.

Expert parallelism groups the data-parallel ranks. The ranks of one expert-parallel rank hold the same experts, and ZeRO
cuts these only among them. Everything else is cut over all data-parallel ranks
(``utils/groups.py: _create_expert_and_data_parallel``).

DeepSpeed's own layers (``moe/experts.py``) keep a list of experts, each under its number on the rank, so names are the
same on all ranks. In the whole model an expert has its number among all experts, which is also in its file's name:
rank * (experts of a rank) + the number on the rank (``runtime/engine.py: _save_moe_checkpoint``).

AutoEP (``module_inject/auto_ep_layer.py``) stacks a rank's experts. Their tensors ``w1``, ``w2``, ``w3`` are parts of
the whole model's tensors along the first axis: those of the experts that the layer's placement gives to the rank. It
may give ranks different numbers of experts, in any order, and one expert to several of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ucp.geometry import Shape, box, concat, numel, whole
from ucp.spec.places import Placed

_EXPERT = re.compile(r"^((?:.*\.)?deepspeed_moe\.experts\.deepspeed_experts)\.(\d+)\.(.+)$")

# The number of an expert in the name of its tensor, and what a spec calls it.
CAPTURES = ((r"(?<=\.deepspeed_experts\.)[0-9]+", "{experts/ep}"),)


class Expert(NamedTuple):
    """The parts of the name of a tensor of one of DeepSpeed's own experts. layer: the name of the list of experts."""

    layer: str
    number: int
    rest: str

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.number}.{self.rest}"


def expert_of(name: str) -> Expert | None:
    """The expert that a tensor of this name belongs to, if it is one of DeepSpeed's own layers'."""
    found = _EXPERT.match(name)
    return Expert(found[1], int(found[2]), found[3]) if found else None


def counts(names: Iterable[str]) -> dict[str, int]:
    """How many experts each layer has among these names."""
    out: dict[str, int] = {}
    for name in names:
        expert = expert_of(name)
        if expert:
            out[expert.layer] = max(out.get(expert.layer, 0), expert.number + 1)
    return out


def data_ranks(rank: int, dp: int, ep: int, data_first: bool) -> range:
    """The data-parallel ranks that hold the experts of an expert-parallel rank, in the order in which ZeRO cuts them.

    data_first: ``use_data_before_expert_parallelism``: if set, neighbours hold the same experts, else each ep-th one.
    """
    return range(rank * (dp // ep), (rank + 1) * (dp // ep)) if data_first else range(rank, dp, ep)


@dataclass(frozen=True)
class Experts:
    """The experts of a model, and how expert-parallel ranks share them.

    held: layer -> how many of its experts each rank holds.
    stacks: tensor -> for each rank, the experts that its rows belong to.
    """

    held: Mapping[str, int] = field(default_factory=dict)
    stacks: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether ranks hold different tensors under this local name."""
        return name in self.stacks or expert_of(name) is not None

    def shape(self, name: str, shape: Shape, rank: int) -> Shape:
        """The shape of a rank's tensor of this local name, given that of some rank."""
        return (len(self.stacks[name][rank]), *shape[1:]) if name in self.stacks else shape

    def is_first(self, name: str, rank: int) -> NDArray[np.bool_] | None:
        """Which rows of a rank's tensor no earlier rank has; None for all."""
        stack = self.stacks.get(name, ())
        earlier = {expert for held in stack[:rank] for expert in held}
        if not earlier.intersection(stack[rank] if stack else ()):
            return None
        return np.array([expert not in earlier for expert in stack[rank]], bool)

    def name(self, name: str, rank: int) -> str:
        """What a rank's tensor of this local name is called in the whole model."""
        expert = expert_of(name)
        if expert is None:
            return name
        return expert._replace(number=expert.number + rank * self.held.get(expert.layer, 0)).name

    def place(self, name: str, shape: Shape, rank: int) -> Placed:
        """Where a rank's tensor of this local name and shape lies in the whole model's tensor."""
        if name in self.stacks:
            return _stacked(name, shape, self.stacks[name], rank)
        return Placed(self.name(name, rank), shape, whole(shape))


def _stacked(name: str, shape: Shape, stack: Sequence[Sequence[int]], rank: int) -> Placed:
    count = 1 + max(number for numbers in stack for number in numbers)
    row = shape[1:]
    rows = (box([e, *[0] * len(row)], (1, *row), i * numel(row)) for i, e in enumerate(stack[rank]) if numel(row))
    return Placed(name, (count, *row), concat(rows, len(shape)))


def group_places(own: Sequence[bool], every: Sequence[bool]) -> list[int] | None:
    """Which of all param groups a pipeline stage's are; None if they don't fit. A stage without experts has no groups
    of them. own, every: for each group, whether it is of experts."""
    if len(own) == len(every):
        return list(range(len(every)))
    others = [g for g, of_experts in enumerate(every) if not of_experts]
    return others if len(own) == len(others) and not any(own) else None


def ordered(names: Collection[str]) -> list[str]:
    """These names in the order of a rank that holds every expert: a layer's experts follow each other by number.

    Names of other tensors, and names within an expert, keep their order.
    """
    layers: dict[str, int] = {}
    rests: dict[tuple[str, str], int] = {}
    keyed = []
    for index, name in enumerate(names):
        expert = expert_of(name)
        if expert is None:
            keyed.append(((index, 0, 0), name))
            continue
        first = layers.setdefault(expert.layer, index)
        rest = rests.setdefault((expert.layer, expert.rest), len(rests))
        keyed.append(((first, expert.number, rest), name))
    return [name for _, name in sorted(keyed)]

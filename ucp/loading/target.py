"""What a live training process offers to be filled: the nouns between a framework's engine and the loader.

A framework's adapter describes the memory of one rank as slots, each a flat buffer with the same blocks that describe
a file's fragments, and takes the loaded values back. The loader knows nothing of the framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ucp.catalog import TrainingState
from ucp.geometry import Blocks, Shape
from ucp.parallel.mesh import Layout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter (or buffer) of the model, and what of it this rank's slot holds.

    name: the live module's own. shape: the whole parameter's. blocks: places in the slot's flat buffer, in elements;
    none where this rank holds nothing of it. padding: whether it is what a parameter's shards hold beyond its own end,
    which is restored from a checkpoint with the same padding and else left as it is.
    """

    name: str
    shape: Shape
    blocks: Blocks
    padding: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a state lies that an optimizer lays out otherwise than the weights.

    length: of the flat buffer, in elements. blocks: of each member, in the members' order. holders: for each member the
    global ranks that hold the same elements of it, () for this rank alone.
    """

    length: int
    blocks: tuple[Blocks, ...]
    holders: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Slot:
    """One flat buffer of this rank that an optimizer treats as one tensor, or one tensor outside the optimizer.

    key: unique, in the adapter's order. kind: 'parameter' (an optimizer updates it), 'frozen' or 'buffer'.
    length: elements, padding included. dtype: of the most precise weights held here. members: all parameters that lie
    in this slot on any rank, so that all ranks judge alike. group: index of the param group. states: the optimizer
    states that exist now -> dtype (a fresh optimizer has none yet). placed: states that lie otherwise than the weights.
    holders: the global ranks that hold the same slot with the same values; () for this rank alone.
    """

    key: int
    kind: str
    length: int
    dtype: str
    members: tuple[Member, ...]
    group: int | None = None
    states: Mapping[str, str] = field(default_factory=dict)
    placed: Mapping[str, Placement] = field(default_factory=dict)
    holders: tuple[int, ...] = ()

    def placement(self, state: str) -> Placement:
        """Where a state of this slot lies; ``placed`` where it says so, else as the weights do."""
        return self.placed.get(state) or Placement(
            self.length, tuple(m.blocks for m in self.members), (self.holders,) * len(self.members)
        )


@dataclass(frozen=True)
class Group:
    """A live param group. expects: the names of the optimizer states that its optimizer keeps for a parameter, tensors
    of its shape; values: those of single values, such as 'step'. None where that is unknown."""

    names: tuple[str, ...]
    options: Mapping[str, Any]
    expects: frozenset[str] | None
    values: frozenset[str] | None = None


@dataclass(frozen=True)
class Loaded:
    """What the loader brings: host tensors by (slot key, state), values by slot key, and the rest of the state.

    tensors: flat 1-d tensors of the placement's length, padding zero. scalars: slot key -> {'step': ...}; a slot that
    is named here gets exactly the states brought for it. options: param group index -> hyperparameters to set.
    sources: param group index -> the checkpoint's group with the same parameters.
    training_state: None where only weights were asked for.
    """

    tensors: Mapping[tuple[int, str], torch.Tensor]
    scalars: Mapping[int, Mapping[str, Any]]
    options: Mapping[int, Mapping[str, Any]]
    sources: Mapping[int, int]
    training_state: TrainingState | None


class Target(Protocol):
    """A live training process, seen from one rank."""

    @property
    def layout(self) -> Layout: ...

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def groups(self) -> Sequence[Group]: ...

    @property
    def elsewhere(self) -> Mapping[str, str]:
        """Parameters and buffers of which only other ranks have slots (of another pipeline stage, say): name -> kind,
        as of slots."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """Other names of tied parameters -> the one that they have in slots."""
        ...

    def current(self, key: int, state: str) -> torch.Tensor | None:
        """A host copy of what the slot holds now, flat; None if it has no such state yet."""
        ...

    def check(self, training_state: TrainingState, sources: Mapping[int, int]) -> None:
        """Raise Mismatch if the training state does not fit; ``sources`` as in Loaded. Changes nothing."""
        ...

    def apply(self, loaded: Loaded) -> None:
        """Put the values in place. Called on all ranks or on none; may communicate."""
        ...

"""What a live training process offers to be filled: the nouns between a framework's engine and the loader.

A framework's adapter describes the memory of one rank as slots, each a flat buffer with the same blocks that describe
a file's fragments, and takes the loaded values back. The loader knows nothing of the framework: a DeepSpeed engine, a
state dict of torch.distributed and a model with its optimizers are all targets, and what differs between them is said
here, by properties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ucp.catalog import TrainingState
from ucp.geometry import Blocks, Shape
from ucp.loading.refusals import Words
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
    global ranks that hold the same elements of it, () for this rank alone. shape: of the whole state, where it is
    another than its parameter's.
    """

    length: int
    blocks: tuple[Blocks, ...]
    holders: tuple[tuple[int, ...], ...]
    shape: Shape | None = None


@dataclass(frozen=True)
class Asked:
    """What a slot asks for, where it says so itself instead of leaving it to its optimizer.

    states: 'param' (the weights) and optimizer states, as tensors. values: single values, such as 'step' -> the element
    type of the tensor that keeps it, None where any value can be kept. blank: states whose elements mean nothing yet,
    so that none may be left as it is.
    """

    states: frozenset[str]
    values: Mapping[str, str | None] = field(default_factory=dict)
    blank: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Slot:
    """One flat buffer of this rank that an optimizer treats as one tensor, or one tensor outside the optimizer.

    key: unique, in the adapter's order. kind: 'parameter' (an optimizer updates it), 'frozen' or 'buffer'.
    length: elements, padding included. dtype: of the most precise weights held here. members: all parameters that lie
    in this slot on any rank, so that all ranks judge alike. group: index of the param group. states: the optimizer
    states that exist now -> dtype (a fresh optimizer has none yet). placed: states that lie otherwise than the weights.
    holders: the global ranks that hold the same slot with the same values; () for this rank alone. asked: what is to be
    brought; None for the weights and whatever the optimizer of its group keeps.
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
    asked: Asked | None = None

    def placement(self, state: str) -> Placement:
        """Where a state of this slot lies; ``placed`` where it says so, else as the weights do."""
        return self.placed.get(state) or Placement(
            self.length, tuple(m.blocks for m in self.members), (self.holders,) * len(self.members)
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights that a model computes with, beside the masters that they are a rounded copy of.

    name: the module's own. group: the global ranks whose masters make them up. master: what this rank has of the
    masters; live: of the weights. Both in the coordinates of one tensor of this shape.
    """

    name: str
    group: tuple[int, ...]
    shape: Shape
    master: torch.Tensor
    master_blocks: Blocks
    live: torch.Tensor
    live_blocks: Blocks


@dataclass(frozen=True)
class Group:
    """A live param group. options: its hyperparameters now. expects: the names of the optimizer states that its
    optimizer keeps for a parameter, tensors of its shape; values: those of single values, such as 'step'; None where
    that is unknown. takes: hyperparameters that it is given though it does not have them yet; None for all that the
    checkpoint has."""

    names: tuple[str, ...]
    options: Mapping[str, Any]
    expects: frozenset[str] | None
    values: frozenset[str] | None = None
    takes: frozenset[str] | None = frozenset(("initial_lr",))


@dataclass(frozen=True)
class Loaded:
    """What the loader brings: host tensors by (slot key, state), values by slot key, and the rest of the state.

    tensors: flat 1-d tensors of the placement's length, padding zero. scalars: slot key -> {'step': ...}; a slot that
    is named here and asks for nothing itself gets exactly the states brought for it. options: param group index ->
    hyperparameters to set. sources: param group index -> the checkpoint's group with the same parameters.
    training_state: None where only weights were asked for. named: of the target's ``named``, what the checkpoint has.
    """

    tensors: Mapping[tuple[int, str], torch.Tensor]
    scalars: Mapping[int, Mapping[str, Any]]
    options: Mapping[int, Mapping[str, Any]]
    sources: Mapping[int, int]
    training_state: TrainingState | None
    named: Mapping[str, Any] = field(default_factory=dict)


class Target(Protocol):
    """A live training process, seen from one rank."""

    @property
    def words(self) -> Words:
        """How refusals and reports call the target and what it holds."""
        ...

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

    @property
    def copies(self) -> bool:
        """Whether one tensor of the checkpoint may fill several of the target's (a state dict that names a tied
        parameter twice), or that is a misfit (a model that has untied it)."""
        ...

    @property
    def named(self) -> Mapping[str, Any] | None:
        """Plain values, and tensors of this rank alone, that are asked for by name -> what is there now. None: the
        target keeps none, and those of a checkpoint are no concern of it."""
        ...

    @property
    def keeps_memory(self) -> bool:
        """Whether `apply` may put the loaded tensors themselves in place, so that each needs memory of its own."""
        ...

    def room(self, key: int, state: str) -> torch.Tensor | None:
        """The slot's own dense host memory, flat, where nobody has seen yet what is in it: it is read into straight
        away. None where reading has to leave the slot alone until all is well."""
        ...

    def memory(self, key: int, state: str) -> torch.Tensor | None:
        """What the slot holds now, where it is, no copy; it is read as one flat row-major buffer. After `apply` that is
        what the program trains on. None where it has no such state, or none that can be looked at."""
        ...

    def weights(self) -> Iterable[Weights]:
        """The weights that are rounded copies of what the slots hold."""
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

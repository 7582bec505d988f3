"""What a live training process offers to be filled: the nouns between a framework's engine and the loader.

A framework's adapter describes the memory of one rank as slots, and takes the loaded values back. A slot is a flat
buffer, described by the same blocks as a file's fragments. The loader knows nothing of the framework. A DeepSpeed
engine, a state dict of torch.distributed and a model with its optimizers are all targets. Properties say here how they
differ.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ucp.catalog import TrainingState
from ucp.geometry import Blocks, Shape
from ucp.loading.refusals import Words
from ucp.parallel.mesh import Layout

if TYPE_CHECKING:
    import torch


class Member(NamedTuple):
    """A parameter (or buffer) of the model, and which part of it this rank's slot holds.

    name: the live module's own. shape: the whole parameter's. blocks: places in the slot's flat buffer, in elements;
    none if this rank holds nothing of it. padding: whether it is what a parameter's shards hold beyond the parameter's
    end. Padding is restored from a checkpoint with the same padding, and otherwise left as it is.
    """

    name: str
    shape: Shape
    blocks: Blocks
    padding: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a state lies that an optimizer arranges in another way than the weights.

    length: the flat buffer's, in elements. blocks: those of each member, in the members' order. holders: for each
    member, the global ranks that hold the same elements of it; () for this rank alone. shape: the whole state's, if it
    is not its parameter's.
    """

    length: int
    blocks: tuple[Blocks, ...]
    holders: tuple[tuple[int, ...], ...]
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a slot asks for, if it says so itself instead of leaving it to its optimizer.

    states: 'param' (the weights) and optimizer states, as tensors. values: single values, such as 'step' -> the element
    type of the tensor that keeps it, or None if any value can be kept. blank: states whose elements mean nothing yet,
    so that none may be left as it is.
    """

    states: frozenset[str]
    values: Mapping[str, str | None] = field(default_factory=dict)
    blank: frozenset[str] = frozenset()


class Slot(NamedTuple):
    """One flat buffer of this rank that an optimizer treats as one tensor, or one tensor outside the optimizer.

    key: unique, in the adapter's order. kind: 'parameter' (an optimizer updates it), 'frozen' or 'buffer'. length: in
    elements, with padding. dtype: that of the most precise weights held here. members: all parameters that lie in this
    slot on any rank, so that all ranks come to the same decisions. group: index of the param group. states: the
    optimizer states that exist now -> dtype (a fresh optimizer has none yet). placed: where states lie that are
    arranged in another way than the weights. holders: the global ranks that hold the same slot with the same values; ()
    for this rank alone. asked: what is to be loaded; None for the weights and what the optimizer of its group keeps.
    keeps: names of the tensors of its shape and of the single values that the optimizer keeps for this slot, if not the
    same as for all of its group.
    """

    key: int
    kind: str
    length: int
    dtype: str
    members: tuple[Member, ...]
    group: int | None = None
    states: Mapping[str, str] = MappingProxyType({})
    placed: Mapping[str, Placement] = MappingProxyType({})
    holders: tuple[int, ...] = ()
    asked: Asked | None = None
    keeps: tuple[frozenset[str], frozenset[str]] | None = None

    def length_of(self, state: str) -> int:
        """How many elements a state has here."""
        placed = self.placed.get(state) if self.placed else None
        return self.length if placed is None else placed.length

    def placement(self, state: str) -> Placement:
        """Where a state of this slot lies: as ``placed`` says, or else as the weights do."""
        return self.placed.get(state) or Placement(
            self.length, tuple(m.blocks for m in self.members), (self.holders,) * len(self.members)
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights that a model computes with, together with the masters of which they are a rounded copy.

    name: the module's own. group: the global ranks whose masters make up the weights. master: this rank's part of the
    masters. live: this rank's part of the weights. Blocks of both are in the coordinates of one tensor of this shape.
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
    """A live param group. options: its hyperparameters now. expects: the names of the states that its optimizer keeps
    for a parameter as tensors of its shape. values: the names of those that are single values, such as 'step'. Both are
    None if unknown. takes: hyperparameters that the group gets although it does not have them yet; None for all that
    the checkpoint has."""

    names: tuple[str, ...]
    options: Mapping[str, Any]
    expects: frozenset[str] | None
    values: frozenset[str] | None = None
    takes: frozenset[str] | None = frozenset(("initial_lr",))


def kept_for(slot: Slot, groups: Sequence[Group]) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    """The names of the tensors and of the single values that the optimizer keeps for a slot. None if unknown."""
    if slot.keeps is not None:
        return slot.keeps
    return (None, None) if slot.group is None else (groups[slot.group].expects, groups[slot.group].values)


class LoadedTensors(Mapping[tuple[int, str], "torch.Tensor"]):
    """The tensors that a load brings. Only taking one can read files, and going through the keys never does."""

    @abstractmethod
    def fill(self, key: int, state: str, live: torch.Tensor) -> None:
        """Give live memory of any shape the values that were loaded for it, unless it has them already."""

    @abstractmethod
    def fill_all(self, lives: Mapping[tuple[int, str], torch.Tensor]) -> None:
        """`fill`, for much live memory at once."""

    @abstractmethod
    def own(self, key: int, state: str) -> torch.Tensor:
        """The values in host memory of their own, which the caller keeps. As an item, it is a flat tensor."""

    def states(self, key: int) -> list[str]:
        """The optimizer states that are brought for a slot."""
        return [state for (slot, state) in self if slot == key and state != "param"]


@dataclass(frozen=True)
class Loaded:
    """What the loader brings: tensors by (slot key, state), values by slot key, and the rest of the state.

    tensors: flat 1-d tensors of the placement's length, with zeros as padding. Those that were read straight to where
    they live are the live memory itself; others are in host memory, or are read when they are asked for. scalars: slot
    key -> {'step': ...}. A slot that is in it and has no ``asked`` gets exactly the states loaded for it. options:
    param group index -> hyperparameters to set. sources: param group index -> the checkpoint's group with the same
    parameters.
    training_state: None if only weights were asked for. named: what the checkpoint has of the target's ``named``.
    """

    tensors: LoadedTensors
    scalars: Mapping[int, Mapping[str, Any]]
    options: Mapping[int, Mapping[str, Any]]
    sources: Mapping[int, int]
    training_state: TrainingState | None
    named: Mapping[str, Any] = field(default_factory=dict)


class Target(Protocol):
    """A live training process, seen from one rank."""

    @property
    def words(self) -> Words:
        """What refusals and reports call the target and what it holds."""
        ...

    @property
    def layout(self) -> Layout: ...

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def groups(self) -> Sequence[Group]: ...

    @property
    def elsewhere(self) -> Mapping[str, str]:
        """Parameters and buffers for which only other ranks have slots (such as another pipeline stage): name -> kind,
        as in slots."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """Other names of tied parameters -> the one that they have in slots."""
        ...

    @property
    def copies(self) -> bool:
        """Whether one tensor of the checkpoint may fill several of the target (for a state dict that names a tied
        parameter twice). Otherwise that does not fit (for a model that has untied it)."""
        ...

    @property
    def named(self) -> Mapping[str, Any] | None:
        """Plain values, and tensors of this rank alone, that are asked for by name -> what is there now. None if the
        target keeps none, and does not care about those of a checkpoint."""
        ...

    @property
    def keeps_memory(self) -> bool:
        """Whether `put` may put the loaded tensors themselves in place, so that each needs memory of its own."""
        ...

    def room(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        """Where the values will live, as `home`, if nobody has seen what is there, or there is no such state yet. So it
        is filled before `begin`, and if the ranks do not agree nothing has changed. None if the slot may not be changed
        before they have."""
        ...

    def home(self, key: int, state: str, dtype: str, length: int) -> torch.Tensor | None:
        """Where the values will live, flat: dense memory on the host or a device, to be read into directly. It is asked
        for after `begin`. None if there is none, or if the values have to pass through `Loaded`.

        dtype, length: of what is read. Where the slot has no such state yet, the memory is new, and zero. A frozen
        parameter or a buffer may be kept in another element type.
        """
        ...

    def memory(self, key: int, state: str) -> torch.Tensor | None:
        """What the slot holds now, where it lies, and no copy of it. It is read as one flat row-major buffer. After
        `apply` the program trains on it. None if there is no such state, or none that can be looked at."""
        ...

    def weights(self) -> Iterable[Weights]:
        """The weights that are rounded copies of what the slots hold."""
        ...

    def current(self, key: int, state: str) -> torch.Tensor | None:
        """A host copy of what the slot holds now, flat. None if it has no such state yet."""
        ...

    def check(self, training_state: TrainingState, sources: Mapping[int, int]) -> None:
        """Raise Mismatch if the training state does not fit. ``sources``: as in `Loaded`. Changes nothing."""
        ...

    def begin(self) -> None:
        """What is live is about to be changed, on all ranks. Must not communicate."""
        ...

    def put(self, loaded: Loaded) -> None:
        """Put what was loaded in place, as far as that needs no other rank. It may raise, and must not communicate."""
        ...

    def apply(self, loaded: Loaded) -> None:
        """Do the rest, once all ranks have put their part in place. It may communicate."""
        ...
